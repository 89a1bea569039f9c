"""`alignprop doctor`: versions, devices, the cache, ComfyUI, and what is missing with the way to get it."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import run

import alignprop_pipe
from alignprop_pipe.cli import doctor

TOKEN = "hf_" + "a1B2" * 8


def findings() -> tuple[dict[str, dict[str, str]], Any]:
    done = run("doctor", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines if line["type"] == "finding"}, done


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "secretname"))
    (tmp_path / "secretname").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "secretname" / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "secretname"


def test_it_says_the_versions_and_ends_well() -> None:
    found, done = findings()
    assert done.exit_code == 0, done.output
    assert found["alignprop-pipe"]["found"] == alignprop_pipe.__version__
    for name in ("torch", "diffusers", "peft"):
        assert found[name]["found"] == version(name)
    assert "GB free" in found["cpu"]["found"]
    assert "emoji-judge" in found["bundled models"]["found"]
    assert run("doctor").output.rstrip().endswith("all is well")


def test_nothing_private_is_shown(home: Path) -> None:
    (home / "cache" / "models--me--secretmodel").mkdir(parents=True)
    found, done = findings()
    assert found["token for the Hub"]["found"] == "there"
    assert found["cache of the Hub"]["found"].startswith("~/cache: 1 model,")
    for text in (done.output, run("doctor").output):
        assert TOKEN not in text
        assert "secretname" not in text
        assert "secretmodel" not in text


def test_what_is_missing_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2", "diffusers>=99", "nosuchpackage>=1", "other; extra == 'y'"]
    monkeypatch.setattr(doctor, "requires", lambda _: asked)
    found, done = findings()
    assert done.exit_code == 1
    missing = found["nosuchpackage"]
    assert (missing["found"], missing["advice"]) == ("missing", "pip install 'nosuchpackage>=1'")
    assert found["diffusers"]["found"] == f"{version('diffusers')}, and >=99 is needed"
    assert "other" not in found
    assert "nosuchpackage: pip install 'nosuchpackage>=1'" in run("doctor").output


def test_a_full_disk_and_an_incomplete_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    monkeypatch.setattr(doctor, "MODELS", [SimpleNamespace(name="emoji", missing="unet")])
    found, done = findings()
    assert "HF_HOME" in found["cache of the Hub"]["advice"]
    assert "install the package again" in found["bundled models"]["advice"]
    assert done.exit_code == 1


@pytest.mark.parametrize("has_nodes", [True, False])
def test_a_comfyui_in_the_home_folder(has_nodes: bool, home: Path) -> None:
    pack = home / "ComfyUI" / "custom_nodes" / "alignprop"
    (pack if has_nodes else pack.parent).mkdir(parents=True)
    (home / "ComfyUI" / "main.py").touch()
    found, done = findings()
    nodes = "with the nodes (alignprop)" if has_nodes else "without the nodes"
    assert found["ComfyUI"]["found"] == f"~/ComfyUI, {nodes}"
    assert found["ComfyUI"]["advice"] == ("" if has_nodes else "alignprop comfy install ~/ComfyUI")
    assert done.exit_code == 0
