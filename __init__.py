"""Lets ComfyUI load a clone of this repository inside its `custom_nodes` folder. Not part of the installed package.

Nothing is imported here at the top: pytest imports this file too, and there is no ComfyUI then.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .comfy_nodes import comfy_entrypoint as entrypoint

    return await entrypoint()
