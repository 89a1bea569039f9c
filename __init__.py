"""Lets ComfyUI load a clone of this repository inside its `custom_nodes` folder. Not part of the installed package.

Nothing of ComfyUI is imported here at the top: pytest imports this file too, and there is no ComfyUI then.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./comfy_nodes/web"

if find_spec("alignprop_pipe") is None:  # an installed copy wins
    sys.path.append(str(Path(__file__).parent))


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .comfy_nodes import comfy_entrypoint as entrypoint

    return await entrypoint()
