"""`alignprop export` and `alignprop inspect` as a user meets them: files, sums, tables, JSON, exit codes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import assert_same_changes, made
from command_line import json_lines, run
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.header import base_of
from alignprop_pipe.cli import exporting
from alignprop_pipe.diffusion.lora import attention_linears


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The SDXL miniature's adapter in `runs/mine/adapter.safetensors`; the working folder is new."""
    monkeypatch.chdir(tmp_path)
    adapter = made("sdxl", ranks=(2, 3), text=True)
    adapter.save("runs/mine/adapter.safetensors", format="diffusers", reward="clip")
    return adapter


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_to_every_format_with_the_sum_of_the_file(form: str, adapter: Adapter) -> None:
    result = run("export", "runs/mine", "--to", form, "--out", "new/out.safetensors")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("new").iterdir()] == ["out.safetensors"]
    digest = hashlib.sha256(Path("new/out.safetensors").read_bytes()).hexdigest()
    assert f"{digest}  new/out.safetensors" in result.stdout
    # Its two ranks have become two alphas, since diffusers' form folds alpha in.
    verdict = (
        "loads it" if form == "diffusers" else "does not load it: load_lora_weights applies it at another strength"
    )
    assert f"diffusers: {verdict}" in result.stdout
    got = Adapter.load("new/out.safetensors")
    assert_same_changes(got, adapter)
    assert got.metadata["alignprop.reward"] == "clip"


@pytest.mark.usefixtures("adapter")
def test_json_and_number_format() -> None:
    result = run(
        "export", "runs/mine/adapter.safetensors", "--to", "kohya", "--out", "a.safetensors", "--dtype", "float16",
        "--json",
    )  # fmt: skip
    (record,) = json_lines((result).stdout)
    assert record["sha256"] == hashlib.sha256(Path("a.safetensors").read_bytes()).hexdigest()
    assert record["size"] == Path("a.safetensors").stat().st_size
    assert {tensor.dtype for tensor in load_file("a.safetensors").values()} == {torch.float16}


@pytest.mark.usefixtures("adapter")
def test_quiet_leaves_the_sum() -> None:
    result = run("export", "runs/mine", "--to", "comfyui", "--out", "a.safetensors", "--quiet")
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.split()[1] == "a.safetensors"


@pytest.mark.parametrize("form", ["diffusers", "merged"])
@pytest.mark.usefixtures("adapter")
def test_nothing_is_overwritten(form: str) -> None:
    Path("mine.safetensors").write_text("mine")
    result = run("export", "runs/mine", "--to", form, "--out", "mine.safetensors")
    assert result.exit_code == 2
    assert "not overwritten" in result.stderr
    assert Path("mine.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.safetensors", "--to", "kohya", "--out", "a.safetensors"], 1, "no adapter file"),
        (["runs/mine", "--to", "kohya", "--out", "a.bin"], 1, "has to end in '.safetensors'"),
        (["runs/mine", "--to", "webui", "--out", "a.safetensors"], 2, "--to"),
        (["runs/mine", "--out", "a.safetensors"], 2, "--to"),
        (["runs/mine", "--to", "kohya"], 2, "--out"),
        (["runs/mine", "--to", "kohya", "--out", "a.safetensors", "--model", "emoji"], 2, "--to merged"),
        (["runs/mine", "--to", "merged", "--out", "a"], 2, "give --model"),
        (["runs/mine", "--to", "merged", "--out", "a", "--model", "./gone"], 1, "there is no file or folder"),
        (["runs/mine", "--to", "merged", "--out", "a", "--model", "emoji"], 1, "do not fit"),
        (["theirs.bin", "--to", "kohya", "--out", "a.safetensors"], 1, "--allow-pickle"),
        (["damaged.safetensors", "--to", "kohya", "--out", "a.safetensors"], 1, "it is a text file"),
    ],
)
@pytest.mark.usefixtures("adapter")
def test_what_is_asked_wrongly_is_said_and_leaves_nothing(arguments: list[str], code: int, words: str) -> None:
    torch.save({"unet.conv_in.lora_A.weight": torch.ones(1, 1)}, "theirs.bin")
    Path("damaged.safetensors").write_bytes(b"damaged")
    before = sorted(Path().rglob("*"))
    result = run("export", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("adapter")
def test_a_pickle_that_is_allowed(adapter: Adapter) -> None:
    torch.save(dict(adapter), "theirs.bin")
    result = run("export", "theirs.bin", "--to", "kohya", "--out", "a.safetensors", "--allow-pickle")
    assert result.exit_code == 0, result.output
    assert_same_changes(Adapter.load("a.safetensors"), adapter)


def for_the_bundled_model() -> Adapter:
    pipe = AlignPropPipeline.from_pretrained("emoji")
    layers = {}
    for path in attention_linears(pipe.unet)[:4]:
        linear = pipe.unet.get_submodule(path)
        pair = torch.full((1, linear.in_features), 0.1), torch.full((linear.out_features, 1), 0.1)
        layers[path] = Factors(*pair, alpha=1.0)
    return Adapter({"unet": layers}, base_of(pipe))


def test_merged_into_the_model_that_the_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = for_the_bundled_model()
    adapter.save("adapter.safetensors", format="kohya")
    result = run("export", "adapter.safetensors", "--to", "merged", "--out", "merged", "--dtype", "float16", "--json")
    assert result.exit_code == 0, result.output
    files = {record["file"]: record["sha256"] for record in json_lines((result).stdout)}
    assert set(files) == {str(path) for path in Path("merged").rglob("*") if path.is_file()}
    assert all(hashlib.sha256(Path(name).read_bytes()).hexdigest() == digest for name, digest in files.items())
    merged = DiffusionPipeline.from_pretrained("merged", dtype=torch.float16)
    base = AlignPropPipeline.from_pretrained("emoji").unet.state_dict()
    for path, factors in adapter.layers["unet"].items():
        wanted = base[f"{path}.weight"] + factors.up @ factors.down
        torch.testing.assert_close(merged.unet.state_dict()[f"{path}.weight"].float(), wanted, atol=1e-3, rtol=1e-3)


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("adapter")
def test_inspect_shows_what_is_in_a_file() -> None:
    run("export", "runs/mine", "--to", "kohya", "--out", "a.safetensors")
    result = run("inspect", "a.safetensors")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    digest = hashlib.sha256(Path("a.safetensors").read_bytes()).hexdigest()
    for text in (
        digest, "StableDiffusionXLPipeline (xl)", "64 in unet", "6 in text_encoder_2", "to_q (16 times)", "float32",
        "alignprop.reward clip", "unet.down_blocks.1 16", "text_encoder.layers.0", "ComfyUI: loads it",
        "ok: a.safetensors, nothing wrong found",
    ):  # fmt: skip
        assert text in words, text
    bars = {line.split()[0]: line.count("█") + line.count("#") for line in result.stdout.splitlines() if "█" in line}
    assert max(bars.values()) == exporting.BAR
    assert bars["unet.up_blocks.0"] == exporting.BAR
    assert 0 < bars["unet.mid_block"] < exporting.BAR


def test_inspect_says_what_is_wrong(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.zeros(4, 2)},
        tmp_path / "a.safetensors",
    )
    result = run("inspect", tmp_path / "a.safetensors", "--quiet")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("wrong: it changes nothing")
    assert "no alpha" in lines[1]


@pytest.mark.usefixtures("adapter")
def test_inspect_as_json() -> None:
    (record,) = json_lines((run("inspect", "runs/mine", "--json")).stdout)
    assert record["type"] == "adapter"
    assert record["layers"] == {"unet": 64, "text_encoder": 6, "text_encoder_2": 6}
    assert sorted(one["rank"] for one in record["ranks"]) == [2, 3]
    assert sum(one["layers"] for one in record["ranks"]) == 76
    assert all(isinstance(one["alpha"], float) for one in record["alphas"])
    assert record["metadata"]["alignprop.reward"] == "clip"
    assert {verdict["program"]: verdict["loads"] for verdict in record["programs"]}["diffusers"] is True
    assert record["change"] > 0


def test_signs_of_a_key_do_not_reach_the_terminal(tmp_path: Path) -> None:
    layer = "unet.mid_block.\x1b[2J"
    pair = {f"{layer}.lora_A.weight": torch.ones(1, 2), f"{layer}.lora_B.weight": torch.zeros(2, 1)}
    for tensors in (pair, {**pair, "\x1b[31m": torch.ones(1)}, {**pair, f"{layer}x.lora_A.weight": torch.ones(1, 2)}):
        save_file(tensors, tmp_path / "a.safetensors")
        result = run("inspect", tmp_path / "a.safetensors")
        assert "wrong:" in result.stdout
        exported = run("export", tmp_path / "a.safetensors", "--to", "kohya", "--out", tmp_path / "b.safetensors")
        (tmp_path / "b.safetensors").unlink(missing_ok=True)
        assert "\x1b" not in result.output + exported.output


def test_signs_of_a_header_do_not_reach_the_terminal(tmp_path: Path) -> None:
    pair = {"unet.mid_block.x.lora_A.weight": torch.ones(1, 2), "unet.mid_block.x.lora_B.weight": torch.ones(2, 1)}
    save_file(pair, tmp_path / "a.safetensors", {"note": "\x1b[2J[bold]hello\n" + "x" * 5000, "\x1b[31m": "red"})
    result = run("inspect", tmp_path / "a.safetensors")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "[2J[bold]hello" in result.stdout
    assert "(5016 characters)" in " ".join(result.stdout.split())


@pytest.mark.parametrize(("name", "words"), [("gone.safetensors", "no adapter file"), ("a.bin", "is a pickle")])
def test_inspect_of_what_is_no_adapter(name: str, words: str, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.bin")
    result = run("inspect", tmp_path / name)
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_help_is_quick_and_has_examples(command: str) -> None:
    code = "import sys; from alignprop_pipe.cli.app import app; sys.argv = ['alignprop', sys.argv[1], '--help']; app()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0
    assert "Examples" in done.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
