"""A clone inside ComfyUI's `custom_nodes`: loaded by path under any name, and harmless where there is no ComfyUI."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

LOAD_AS_COMFYUI_DOES = """
import importlib.util, inspect, sys
name = "/custom_x_/alignprop-pipe.clone".replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {root!r} + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert inspect.iscoroutinefunction(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS"), "ComfyUI would then never call comfy_entrypoint"
assert not [one for one in sys.modules if one.startswith(("comfy", "torch"))]
try:
    module.comfy_entrypoint().send(None)
except ModuleNotFoundError as error:
    assert error.name == "comfy_api", error
    assert name + ".comfy_nodes" in sys.modules
else:
    raise AssertionError("there is a comfy_api here")
"""


def test_the_clone_is_found_by_path_and_asks_for_comfyui_only_when_called(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AS_COMFYUI_DOES.format(root=str(ROOT))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
