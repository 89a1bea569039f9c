"""The nodes inside a ComfyUI: a small folder in its `custom_nodes` that hands over to the installed package."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from alignprop_pipe.errors import AlignError
from alignprop_pipe.files import write_whole
from alignprop_pipe.sources import expanded

PACK = "alignprop"
MARK = '"""The AlignProp nodes. Written by `alignprop comfy install`; `alignprop comfy uninstall` takes it away.'
SHIM = (
    MARK
    + '''

The nodes are in the package alignprop-pipe, which must be installed for the Python that runs ComfyUI.
"""

import logging
import sys

try:
    from alignprop_comfy import WEB_DIRECTORY, comfy_entrypoint
except ImportError as error:
    WAY_OUT = f'AlignProp: {error}. Run "{sys.executable}" -m pip install alignprop-pipe and start ComfyUI again'
    logging.getLogger("alignprop").warning(WAY_OUT)

    async def comfy_entrypoint():
        from comfy_api.latest import ComfyExtension, io

        class NotInstalled(io.ComfyNode):
            @classmethod
            def define_schema(cls):
                return io.Schema(
                    node_id="AlignPropNotInstalled",
                    display_name="AlignProp is not installed for this Python",
                    category="AlignProp",
                    description=WAY_OUT,
                    inputs=[],
                    outputs=[],
                    is_output_node=True,
                )

            @classmethod
            def execute(cls):
                raise RuntimeError(WAY_OUT)

        class Extension(ComfyExtension):
            async def get_node_list(self):
                return [NotInstalled]

        return Extension()
'''
)


def install(comfyui: str | Path) -> list[Path]:
    """Write the pack's folder into a ComfyUI and return the files that are new or changed; none where all is there.

    Args:
        comfyui: the folder of ComfyUI, the portable build's folder around it, or the desktop app's base folder.

    Raises:
        AlignError: it is no ComfyUI, or something else stands in the place.
    """
    pack = _pack_in(comfyui)
    if (pack.exists() or pack.is_symlink()) and not _is_ours(pack):
        raise AlignError(f"{str(pack)!r} is there already and was not written by this command; move it away first")
    wanted = {pack / "__init__.py": SHIM.encode()}
    wanted |= {pack / "example_workflows" / file.name: file.read_bytes() for file in _workflows()}
    changed = [path for path, content in wanted.items() if not path.is_file() or path.read_bytes() != content]
    for path in changed:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlignError(f"{str(path.parent)!r} cannot be made: {error.strerror or error}") from error
        write_whole(path, wanted[path])
    return changed


def uninstall(comfyui: str | Path) -> Path | None:
    """Take the pack's folder away and return it; None where there is none. Raises AlignError if it is not ours."""
    pack = _pack_in(comfyui)
    if not (pack.exists() or pack.is_symlink()):
        return None
    if not _is_ours(pack):
        raise AlignError(f"{str(pack)!r} was not written by 'alignprop comfy install' and is left as it is")
    try:
        shutil.rmtree(pack)
    except OSError as error:
        raise AlignError(f"{str(pack)!r} cannot be removed: {error.strerror or error}") from error
    return pack


def _pack_in(comfyui: str | Path) -> Path:
    given = expanded(comfyui)
    for folder in (given, given / "ComfyUI"):
        is_checkout = (folder / "main.py").is_file() and (folder / "comfy").is_dir()
        is_base = (folder / "models").is_dir() and (folder / "user").is_dir()
        if (is_checkout or is_base) and (folder / "custom_nodes").is_dir():
            return folder / "custom_nodes" / PACK
    raise AlignError(
        f"{str(comfyui)!r} is no ComfyUI: its folder holds main.py, comfy and custom_nodes (the desktop app's holds "
        "models, user and custom_nodes)"
    )


def _is_ours(pack: Path) -> bool:
    shim = pack / "__init__.py"
    return (
        not pack.is_symlink() and shim.is_file() and shim.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    )


def _workflows() -> list[Path]:
    """The example workflows: in the installed package, or in the clone that this runs from."""
    spec = find_spec("alignprop_comfy")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    folders = [place / "example_workflows" for place in places] + [Path(__file__).parents[1] / "example_workflows"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jpg"))
