"""`alignprop comfy install`: a folder in somebody's ComfyUI, and nothing else of theirs; and what a wheel holds."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
from comfy_server import copy_as_cloned
from packaging.requirements import Requirement
from test_comfy_entry import write_stand_in

from alignprop_pipe import comfy_install
from alignprop_pipe.comfy_install import MARK, PACK, install, uninstall
from alignprop_pipe.errors import AlignError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "checkout": ("ComfyUI/main.py", "ComfyUI/comfy/sd.py", "ComfyUI/custom_nodes/other.py", "ComfyUI/models/loras/a"),
    "portable": (
        "python_embeded/python.exe",
        "ComfyUI/main.py",
        "ComfyUI/comfy/sd.py",
        "ComfyUI/custom_nodes/other.py",
    ),
    "desktop": ("models/loras/a", "user/default/b", "custom_nodes/other.py", "output/c"),
}


def made(folder: Path, layout: str) -> Path:
    """A ComfyUI in one of its layouts; the folder that a user would name."""
    for name in LAYOUTS[layout]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")
    return folder / "ComfyUI" if layout == "checkout" else folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=LAYOUTS)
def comfy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return made(tmp_path, request.param)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_install_writes_one_folder_once_and_uninstall_leaves_all_else(comfy: Path) -> None:
    before = files(comfy)
    written = install(comfy)
    (pack,) = {path.parents[0] for path in written if path.name == "__init__.py"}
    assert pack.name == PACK
    assert pack.parent.name == "custom_nodes"
    assert (pack.parent / "other.py").is_file()
    assert all(path.is_file() and path.is_relative_to(pack) for path in written)
    new = files(comfy)
    assert set(new) - set(before) == {str(path.relative_to(comfy)) for path in written}
    assert {name: new[name] for name in before} == before
    assert install(comfy) == []
    assert files(comfy) == new
    (pack / "__pycache__").mkdir()  # ComfyUI has run
    assert uninstall(comfy) == pack
    assert not pack.exists()
    assert files(comfy) == before
    assert uninstall(comfy) is None


def test_the_example_workflows_come_along(comfy: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in (ROOT / "example_workflows").glob("*") if path.suffix != ".py"}
    (pack,) = {path.parent for path in install(comfy) if path.name == "__init__.py"}
    assert files(pack / "example_workflows") == wanted != {}


def test_a_changed_or_missing_file_is_mended(comfy: Path) -> None:
    written = install(comfy)
    shim = next(path for path in written if path.name == "__init__.py")
    shim.write_text(MARK + " An older version.")
    written[-1].unlink()
    assert set(install(comfy)) == {shim, written[-1]}
    assert install(comfy) == []


@pytest.mark.parametrize("act", [install, uninstall])
@pytest.mark.parametrize("gone", ["main.py", "comfy", "custom_nodes"])
def test_a_folder_that_is_no_comfyui_is_refused(tmp_path: Path, act: Callable, gone: str) -> None:
    folder = made(tmp_path, "checkout")
    (folder / gone).rename(tmp_path / "elsewhere")
    before = files(tmp_path)
    with pytest.raises(AlignError, match="no ComfyUI: its folder holds main.py"):
        act(folder)
    with pytest.raises(AlignError, match="nowhere"):
        act(tmp_path / "nowhere")
    assert files(tmp_path) == before


@pytest.mark.parametrize("theirs", ["folder", "folder with a file", "file", "link", "broken link"])
def test_what_somebody_else_put_there_stays(tmp_path: Path, theirs: str) -> None:
    comfy = made(tmp_path, "checkout")
    pack = comfy / "custom_nodes" / PACK
    if theirs.startswith("folder"):
        pack.mkdir()
        (pack / ("__init__.py" if theirs != "folder" else "notes.txt")).write_text('"""Mine."""')
    elif theirs == "file":
        pack.write_text("mine")
    else:
        (tmp_path / "clone").mkdir()
        (tmp_path / "clone" / "__init__.py").write_text(MARK)  # even where the link leads to a shim of ours
        pack.symlink_to(tmp_path / ("clone" if theirs == "link" else "gone"), target_is_directory=True)
    before = files(tmp_path)
    with pytest.raises(AlignError, match="was not written by"):
        install(comfy)
    with pytest.raises(AlignError, match="left as it is"):
        uninstall(comfy)
    assert files(tmp_path) == before
    assert pack.is_symlink() == theirs.endswith("link")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    comfy = made(tmp_path, "checkout")
    (comfy / "custom_nodes").chmod(0o500)
    with pytest.raises(AlignError, match="cannot be made"):
        install(comfy)
    (comfy / "custom_nodes").chmod(0o700)


def test_a_file_where_a_folder_must_be_is_told(tmp_path: Path) -> None:
    comfy = made(tmp_path, "checkout")
    install(comfy)
    folder = comfy / "custom_nodes" / PACK / "example_workflows"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(AlignError, match="cannot be made"):
        install(comfy)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_took_away(comfy: Path) -> None:
    first, again = command_line.run("comfy", "install", str(comfy)), command_line.run("comfy", "install", str(comfy))
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert "__init__.py" in first.output
    assert "start ComfyUI again" in first.output
    assert again.output == "all of it is there already\n"
    gone, none = command_line.run("comfy", "uninstall", str(comfy)), command_line.run("comfy", "uninstall", str(comfy))
    assert (gone.exit_code, none.exit_code) == (0, 0)
    assert re.fullmatch(r"removed .*custom_nodes.alignprop\n", gone.output)
    assert none.output == "there is nothing to take away\n"


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_the_command_fails_as_the_others_do(tmp_path: Path, command: str) -> None:
    refused = command_line.run("comfy", command, str(tmp_path))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert command_line.run("comfy", command).exit_code == 2


# --- the packages ----------------------------------------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_those_of_the_package_without_torch_and_with_lower_bounds_only() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    needed = [one for one in map(Requirement, project()["project"]["dependencies"]) if one.name != "torch"]
    assert list(map(str, wanted)) == list(map(str, needed))
    assert {part.operator for one in wanted for part in one.specifier} == {">="}, "others would replace what is there"
    assert not [one for one in wanted if one.url or one.extras or one.name.startswith("torch")]


def test_what_the_registry_of_comfyui_reads_is_there() -> None:
    about = project()
    assert set(about["tool"]["comfy"]) >= {"PublisherId", "DisplayName", "requires-comfyui"}
    assert "web" not in about["tool"]["comfy"], "next to WEB_DIRECTORY, it serves every script twice"
    assert "comfyui" not in about["project"]["name"]


def test_every_folder_with_code_is_a_package() -> None:
    tools = project()["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "alignprop_pipe").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(tools["packages"])
    assert {name for name in tools["packages"] if not name.startswith("alignprop_comfy")} <= {
        ".".join(folder.parts) for folder in folders
    }
    for name, folder in tools["package-dir"].items():
        assert name in tools["packages"]
        assert (ROOT / folder).is_dir()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, as pip would put them into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = copy_as_cloned(folder / "clone")
    script = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("alignprop_pipe-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_alone_trains(unpacked: Path, tmp_path: Path) -> None:
    few = ["--steps", "1", "--batch-size", "2", "--eval-prompts", "2"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alignprop_pipe", "train", *few, "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").is_file()
    where = subprocess.run(
        [sys.executable, "-c", "import alignprop_pipe; print(alignprop_pipe.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(unpacked)


def test_the_wheel_holds_the_package_and_the_nodes_whole(unpacked: Path) -> None:
    clone = unpacked.parent / "clone"
    held = files(unpacked)
    expected = {
        **{f"alignprop_pipe/{name}": content for name, content in files(clone / "alignprop_pipe").items()},
        **{f"alignprop_comfy/{name}": content for name, content in files(clone / "comfy_nodes").items()},
        **{
            f"alignprop_comfy/example_workflows/{name}": content
            for name, content in files(clone / "example_workflows").items()
        },
    }
    assert len([name for name in expected if name.startswith("alignprop_pipe/models/")]) > 10
    assert {name: len(content) for name, content in held.items() if ".dist-info/" not in name} == {
        name: len(content) for name, content in expected.items()
    }
    assert all(held[name] == content for name, content in expected.items())


def loaded(shim: Path, code: str, *path: Path) -> "subprocess.CompletedProcess[str]":
    """The shim, loaded by its path in a Python that has only `path` next to the standard library; then `code`."""
    script = (
        "import asyncio, importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('shim', {str(shim)!r})\n"
        f"shim = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(shim)\n{code}"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=shim.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_shim_hands_over_to_the_installed_package(unpacked: Path, tmp_path: Path) -> None:
    install(made(tmp_path, "desktop"))
    code = (
        "import pathlib, alignprop_comfy\n"
        "assert shim.comfy_entrypoint is alignprop_comfy.comfy_entrypoint\n"
        "assert (pathlib.Path(shim.WEB_DIRECTORY) / 'alignprop.js').is_file()\n"
        "assert not [name for name in sys.modules if name.startswith(('torch', 'comfy'))]\n"
    )
    done = loaded(tmp_path / "custom_nodes" / PACK / "__init__.py", code, unpacked)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_package_the_shim_says_one_line_and_shows_one_node(tmp_path: Path) -> None:
    install(made(tmp_path, "desktop"))
    (tmp_path / "stand_in").mkdir()
    write_stand_in(tmp_path / "stand_in")
    code = (
        "extension = asyncio.run(shim.comfy_entrypoint())\n"
        "(node,) = asyncio.run(extension.get_node_list())\n"
        "print(node.define_schema().description)\n"
        "try:\n    node.execute()\nexcept RuntimeError as error:\n    print(error)\n"
    )
    done = loaded(tmp_path / "custom_nodes" / PACK / "__init__.py", code, tmp_path / "stand_in")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert f'"{sys.executable}" -m pip install alignprop-pipe' in line
    assert done.stdout.splitlines() == [line, line]


def test_an_installed_package_finds_its_own_workflows(unpacked: Path, tmp_path: Path) -> None:
    made(tmp_path, "desktop")
    found = f"[path.name for path in install({str(tmp_path)!r})]"
    code = f"from alignprop_pipe.comfy_install import install\nprint(*{found})"
    script = tmp_path / "script.py"
    script.write_text("")
    done = loaded(script, code, unpacked)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (unpacked.parent / "clone" / "example_workflows").iterdir()}
    assert set(done.stdout.split()) == {"__init__.py", *names}


def test_the_shim_is_marked_as_ours_and_compiles() -> None:
    assert comfy_install.SHIM.startswith(MARK)
    compile(comfy_install.SHIM, "__init__.py", "exec")
    assert "NODE_CLASS_MAPPINGS" not in comfy_install.SHIM
