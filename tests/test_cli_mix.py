"""`alignprop mix` and `alignprop sample --window` as a user meets them."""

import re
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from command_line import json_lines, run
from PIL import Image
from random_adapters import random_adapter
from safetensors.numpy import load_file

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter
from alignprop_pipe.adapters.mix import mix
from alignprop_pipe.diffusion.lora import attention_linears
from alignprop_pipe.diffusion.sample import sample_pictures
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.rewards.registry import parse_reward
from alignprop_pipe.training.sweep import rewards_of, sweep, weights_from_text

PIPE = miniatures.sd15()


def few(part: Any) -> list[str]:
    return attention_linears(part)[-4:]


ONE = random_adapter(PIPE, rank=2, alpha=3.0, seed=1, paths=few, size=1.0, reward="brightness")
TWO = random_adapter(PIPE, rank=3, alpha=3.0, seed=2, paths=few, size=1.0, reward="colour")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    PIPE.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an adapter file and a run folder."""
    monkeypatch.chdir(tmp_path)
    ONE.save("one=1.safetensors", format="diffusers")
    TWO.save("runs/two/adapter.safetensors", format="diffusers")
    return tmp_path


def change(file: str | Path, path: str) -> np.ndarray:
    tensors = load_file(file)
    return tensors[f"unet.{path}.lora_B.weight"].astype(float) @ tensors[f"unet.{path}.lora_A.weight"]


# --- a file ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_mix_is_written_for_both_programs() -> None:
    result = run("mix", "one=1.safetensors=0.6", "runs/two=-0.4", "--out", "new/both.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert sorted(path.name for path in Path("new").iterdir()) == ["both-comfyui.safetensors", "both.safetensors"]
    assert len(re.findall(r"^[0-9a-f]{64}  new/both", result.stdout, re.MULTILINE)) == 2
    assert "unet: 4 layers of rank 5" in result.stdout
    for path in few(PIPE.unet):
        wanted = 0.6 * change("one=1.safetensors", path) - 0.4 * change("runs/two/adapter.safetensors", path)
        np.testing.assert_allclose(change("new/both.safetensors", path), wanted, atol=1e-6, rtol=0)
    again = run("mix", "one=1.safetensors=0.6", "--out", "new/both.safetensors")
    assert again.exit_code == 2
    assert "not overwritten" in re.sub(r"[\s│]+", " ", again.stderr)


@pytest.mark.usefixtures("place")
def test_rank_says_the_energy_kept() -> None:
    words = ["mix", "one=1.safetensors=1", "runs/two=1", "--rank", "3", "--format", "diffusers", "--dtype", "float16"]
    result = run(*words, "--out", "small.safetensors", "--json")
    assert result.exit_code == 0, result.output
    energy, file = json_lines(result.stdout)
    assert (energy["type"], file["type"]) == ("energy", "file")
    assert file["ranks"] == {"unet": 3}
    assert len(energy["layers"]) == 4
    for path in few(PIPE.unet):
        values = np.linalg.svd(
            change("one=1.safetensors", path) + change("runs/two/adapter.safetensors", path), compute_uv=False
        )
        share = np.square(values[:3]).sum() / np.square(values).sum()
        assert energy["layers"][f"unet.{path}"] == pytest.approx(share, abs=1e-6)
    assert all(tensor.dtype == np.float16 for tensor in load_file("small.safetensors").values())
    told = run(*words, "--out", "again.safetensors")
    assert f"energy kept: {energy['total']:.2%}" in told.stdout
    assert not Path("small-comfyui.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["runs/two", "--out", "a.safetensors"], 2, "runs/two=0.6"),
        (["runs/two=much", "--out", "a.safetensors"], 2, "=0.6"),
        (["=0.5", "--out", "a.safetensors"], 2, "=0.6"),
        (["runs/two=0.5"], 2, "--out"),
        (["runs/two=0.5", "--out", "a.bin"], 2, ".safetensors"),
        (["runs/two=nan", "--out", "a.safetensors"], 1, "such as 0.6"),
        (["nowhere=0.5", "--out", "a.safetensors"], 1, "nowhere"),
        (["runs/two=0.5", "--out", "a.safetensors", "--rank", "0"], 2, "rank"),
        (["runs/two=0.5", "--out", "a.safetensors", "--prompt", "a dog"], 2, "--sweep"),
        (["runs/two=0.5", "--out", "a.safetensors", "--num-inference-steps", "3"], 2, "--sweep"),
        (["runs/two=0.5", "other.safetensors=0.5", "--out", "a.safetensors"], 1, "me/other"),
        (["runs/two", "--out", "a.png", "--sweep", "0:1"], 2, "0:1:0.25"),
        (["runs/two", "--out", "a.safetensors", "--sweep", "0:1:0.5"], 2, ".png"),
        (["runs/two", "runs/two", "runs/two", "emoji", "--out", "a.png", "--sweep", "0:1:0.5"], 2, "one or two"),
        (["runs/two", "--out", "a.png", "--sweep", "0:1:0.5", "--rank", "2"], 2, "--rank"),
        (["runs/two", "org/name", "--out", "a.png", "--sweep", "0:1:0.5"], 2, "--prompt"),
        (["runs/two", "emoji", "--out", "a.png", "--sweep", "0:1:0.5", "--reward", "clipp"], 2, "did you mean"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_use_is_one_sentence(words: list[str], code: int, said: str) -> None:
    named = Adapter(TWO.layers, type(TWO.base)(base_model="me/model"))
    named.save("runs/two/adapter.safetensors", format="diffusers")
    Adapter(ONE.layers, type(ONE.base)(base_model="me/other")).save("other.safetensors", format="diffusers")
    result = run("mix", *words)
    text = re.sub(r"[\s│]+", " ", result.stderr)
    assert result.exit_code == code, result.output
    assert said in text
    assert "Traceback" not in result.output
    assert not [path for path in Path().iterdir() if path.name.startswith("a.")]


def test_help_has_examples() -> None:
    text = re.sub(r"\s+", " ", run("mix", "--help", env={"COLUMNS": "200"}).output)
    assert "alignprop mix runs/foxes=0.6 runs/colour=0.4 --out both.safetensors" in text
    assert "--sweep 0:1:0.25" in text
    assert "--num-inference-steps" in text


# --- a row of pictures -----------------------------------------------------------------------------------------------

SMALL = ["--num-inference-steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]


@pytest.mark.usefixtures("place")
def test_a_sweep_draws_the_mixes_from_the_same_noise_and_scores_them(model: Path) -> None:
    prompts = ["--prompt", "a dog", "--prompt", "a cat"]
    words = ["mix", "one=1.safetensors", "runs/two", model, "--sweep", "0:1:0.5", *prompts, *SMALL, "--seed", "3"]
    result = run(*words, "--out", "row.png", "--json")
    assert result.exit_code == 0, result.output
    *pictures, last = json_lines(result.stdout)
    assert [(line["weight"], line["prompt"]) for line in pictures] == [
        (weight, prompt) for weight in (0.0, 0.5, 1.0) for prompt in ("a dog", "a cat")
    ]
    pipe = miniatures.sd15()
    drawn = {}
    for weight in (0.0, 0.5, 1.0):
        load_adapter(pipe, mix([(ONE, 1 - weight), (TWO, weight)]))
        drawn[weight] = [
            one.image
            for one in sample_pictures(
                pipe, ["a dog", "a cat"], options(num_inference_steps=2, height=16, width=16), seed=3
            )
        ]
    for place, line in enumerate(pictures):
        image = np.asarray(drawn[line["weight"]][place % 2]).transpose(2, 0, 1)[None] / 255
        assert line["scores"].keys() == {"brightness", "colour"}
        for name, score in line["scores"].items():
            wanted = parse_reward(name)(torch.tensor(image, dtype=torch.float32), ["a dog"]).total.item()
            assert score == pytest.approx(wanted, abs=0.01)  # a level of 8 bits may round otherwise
    assert len({line["scores"]["brightness"] for line in pictures}) == 6
    assert [means["weight"] for means in last["means"]] == [0.0, 0.5, 1.0]
    colour = np.mean([one["scores"]["colour"] for one in pictures[2:4]])
    assert last["means"][1]["scores"]["colour"] == pytest.approx(colour)
    sheet = Image.open("row.png")
    about = sheet.text  # type: ignore[attr-defined]
    assert (about["adapters"], about["weights"], about["seed"]) == ("one=1, two", "0 0.5 1", "3")
    assert (about["sheet"], about["model"]) == ("sweep", "tiny")
    assert str(Path.cwd()) not in str(about)
    assert shown_at(sheet, 0, 0).tobytes() == enlarged(drawn[0.0][0]).tobytes()
    assert shown_at(sheet, 2, 1).tobytes() == enlarged(drawn[1.0][1]).tobytes()


def options(**values: Any) -> Any:
    from alignprop_pipe.cli.options import config_for

    return config_for("tiny/model", values).sampling


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((192, 192), Image.Resampling.NEAREST)


def shown_at(sheet: Image.Image, column: int, row: int) -> Image.Image:
    """A picture on the sheet, whose rows hold a title, the picture and two lines of scores."""
    left, top = 24 + column * (192 + 8), 24 + 24 + row * (24 + 192 + 3 + 2 * 20 + 8) + 24
    return sheet.crop((left, top, left + 192, top + 192))


@pytest.mark.usefixtures("place")
def test_a_sweep_of_one_adapter_starts_from_the_base(model: Path) -> None:
    words = ["mix", "runs/two", model, "--sweep", "0:1:1", "--prompt", "a dog", *SMALL, "--reward", "jpeg - colour"]
    result = run(*words, "--out", "row.png")
    assert result.exit_code == 0, result.output
    assert "the mean score of 1 prompt from the same noise" in result.stdout
    assert "jpeg - colour" in result.stdout
    assert "2 pictures on row.png" in result.stdout
    (base,) = sample_pictures(PIPE, ["a dog"], options(num_inference_steps=2, height=16, width=16))
    sheet = Image.open("row.png")
    assert shown_at(sheet, 0, 0).tobytes() == enlarged(base.image).tobytes()
    assert shown_at(sheet, 1, 0).tobytes() != enlarged(base.image).tobytes()
    again = run(*words, "--out", "row.png")
    assert again.exit_code == 2
    assert "not overwritten" in re.sub(r"[\s│]+", " ", again.stderr)


def test_a_sweep_leaves_the_pipeline_without_adapter() -> None:
    from alignprop_pipe.records import PromptBatch

    pipe = miniatures.sd15()
    before = set(pipe.unet.state_dict())
    columns = sweep(
        pipe, [ONE], [0.5, 1.0], PromptBatch(["a dog"]), options(num_inference_steps=1, height=16, width=16)
    )
    assert next(columns).weight == 0.5
    columns.close()
    assert set(pipe.unet.state_dict()) == before


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("0:1:0.3", (0, 0.3, 0.6, 0.9)),
        ("1:-1:-1", (1, 0, -1)),
        ("0:0:1", (0,)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
    ],
)
def test_weights(text: str, weights: tuple[float, ...]) -> None:
    assert weights_from_text(text) == weights


@pytest.mark.parametrize(
    "text",
    ["", "0:1", "0:1:0", "1:0:0.1", "0:1:nan", "nan:1:1", "0:inf:1", "0:1:0.001", "a:b:c", "0:1:1:1", "1e300:1e301:1"],
)
def test_what_are_no_weights(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0:1:0\.25"):
        weights_from_text(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("clip - 0.1*jpeg(quality=80)", ["clip - 0.1*jpeg(quality=80)"]),
        ("min(brightness, colour)", ["min(brightness, colour)"]),
        ("", []),
        ("pickscore", []),
        ("evil.py:score", []),
        ("python('evil.py:score')", []),
        ("clip + python('evil:score')", []),
        ("clip(model='me/clip')", []),
        ("unknown", []),
        ("brightness(nothing=3)", []),
        ("1 +", []),
        ("3", []),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_reward_in_a_header_runs_no_file_and_downloads_nothing(text: str, found: list[str]) -> None:
    Path("evil.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\ndef score(images): return images.mean()\n"
    )
    adapter = Adapter(ONE.layers, ONE.base, {"alignprop.reward": text})
    assert [str(reward) for reward in rewards_of([adapter, adapter])] == found
    assert not Path("ran").exists()


# --- sample --window -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_sample_in_a_window(model: Path) -> None:
    words = ["sample", model, "a dog", "--adapter", "runs/two", "--num-inference-steps", "2", "--device", "cpu"]
    words += ["--height", "16", "--width", "16"]
    pictures = {}
    for window in ("", "0-1", "0.0-0.5", "0.5-0.5"):
        flags = ["--window", window] if window else []
        result = run(*words, *flags, "--out", f"p{window}")
        assert result.exit_code == 0, result.output
        image = Image.open(f"p{window}/001-a-dog.png")
        assert image.text.get("window", "") == window  # type: ignore[attr-defined]
        pictures[window] = image.tobytes()
    (base,) = sample_pictures(PIPE, ["a dog"], options(num_inference_steps=2, height=16, width=16))
    assert pictures["0-1"] == pictures[""]
    assert pictures["0.5-0.5"] == base.image.tobytes()
    assert len({*pictures.values()}) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a dog", "--window", "0-0.5"], "--adapter"),
        (["a dog", "--adapter", "runs/two", "--window", "0.5"], "0.0-0.6"),
        (["a dog", "--adapter", "runs/two", "--window", "0.9-0.5"], "0.0-0.6"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_windows(words: list[str], said: str) -> None:
    result = run("sample", *words)
    assert result.exit_code == 2
    assert said in result.stderr
