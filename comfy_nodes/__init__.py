"""The entry for ComfyUI. `comfy_api` exists only inside ComfyUI, so it is imported when ComfyUI asks, not before."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """The extension, with its list of nodes; it is empty so far."""
    from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports]  # comes with ComfyUI

    class AlignPropExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return []

    return AlignPropExtension()
