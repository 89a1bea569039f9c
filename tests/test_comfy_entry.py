"""A clone inside ComfyUI's `custom_nodes`: loaded by path under any name, and harmless where there is no ComfyUI."""

import ast
import asyncio
import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import comfy_nodes

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

STAND_IN = '''
"""As much of ComfyUI as a pack needs that only says that it is not installed."""

from dataclasses import dataclass


class ComfyExtension:
    pass


class io:
    class ComfyNode:
        pass

    @dataclass(kw_only=True)
    class Schema:
        node_id: str
        display_name: str
        category: str
        description: str
        inputs: list
        outputs: list
        is_output_node: bool
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `comfy_api`, on the path."""
    write_stand_in(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("comfy_api", "comfy_api.latest"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def write_stand_in(folder: Path) -> None:
    (folder / "comfy_api" / "latest").mkdir(parents=True)
    (folder / "comfy_api" / "__init__.py").write_text("")
    (folder / "comfy_api" / "latest" / "__init__.py").write_text(STAND_IN)


def listed() -> list[Any]:
    async def ask() -> list[Any]:
        return await (await comfy_nodes.comfy_entrypoint()).get_node_list()

    return asyncio.run(ask())


def test_the_clone_is_found_by_path_and_asks_for_comfyui_only_when_called(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AS_COMFYUI_DOES.format(root=str(ROOT))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("stand_in")
def test_what_is_missing_is_said_in_one_line_and_by_a_node_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {"alignprop_pipe": "", "no_such_module_1": "1.0", "no_such_module_2": "", "peft": "1000.0"}
    monkeypatch.setattr(comfy_nodes, "NEEDED", wanted)
    (node,) = listed()
    assert [(one.name, one.levelname) for one in caplog.records] == [("alignprop", "WARNING")]
    line = caplog.records[0].getMessage()
    assert "\n" not in line
    assert "no_such_module_1, no_such_module_2, peft 1000.0 or newer (here: " in line
    assert "alignprop_pipe not" not in line
    schema = node.define_schema()
    assert schema.category == "AlignProp"
    assert "no_such_module_1" in schema.display_name
    assert schema.description in line
    assert schema.is_output_node, "it can be run alone, and says then what to do"
    with pytest.raises(RuntimeError, match=re.escape(sys.executable)):
        node.execute()


def test_the_way_out_names_this_python_and_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = comfy_nodes.way_out(["peft"])
    command = re.search(r'"(?P<python>[^"]+)" -m pip install -r "(?P<file>[^"]+)"', words)
    assert command is not None
    assert command["python"] == sys.executable
    assert Path(command["file"]).samefile(ROOT / "requirements.txt")
    monkeypatch.setattr(comfy_nodes, "__file__", str(tmp_path / "alignprop_comfy" / "__init__.py"))
    assert "-m pip install alignprop-pipe" in comfy_nodes.way_out(["peft"]), "installed, there is no such file"


@pytest.mark.usefixtures("stand_in")
def test_with_all_of_it_here_there_is_no_word_and_the_nodes_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(comfy_nodes, "nodes", lambda: ["the nodes"])
    assert listed() == ["the nodes"]
    assert caplog.records == []


def test_what_is_looked_for_is_what_requirements_txt_brings() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    brought = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    oldest = {one.name: str(one.specifier).removeprefix(">=") for one in brought}
    assert {"alignprop_pipe": "", **oldest}.items() >= comfy_nodes.NEEDED.items()


def test_the_web_folder_is_there_under_both_names() -> None:
    import __init__ as clone  # pyright: ignore[reportMissingImports]  # the file at the root, which ComfyUI loads

    web = ROOT / "comfy_nodes" / "web"
    assert Path(comfy_nodes.WEB_DIRECTORY).samefile(web)
    assert (ROOT / clone.WEB_DIRECTORY).samefile(web)
    scripts = [path.name for path in web.rglob("*.js")]
    assert scripts == ["alignprop.js"], "the browser loads every script in it"


@pytest.mark.parametrize("path", sorted((ROOT / "comfy_nodes").glob("*.py")), ids=lambda path: path.stem)
def test_what_the_nodes_import_from_the_package_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignprop_pipe"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name
