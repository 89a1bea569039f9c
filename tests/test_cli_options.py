"""Flags made from the dataclass, what lies over what, and which word on the command line is the model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import run
from huggingface_hub import constants
from typer.testing import CliRunner

from alignprop_pipe.cli.console import Output
from alignprop_pipe.cli.opening import find_device, is_model
from alignprop_pipe.cli.options import TrainRequest, options_from
from alignprop_pipe.cli.planning import planned
from alignprop_pipe.config.settings import FIELD_PATHS, AlignConfig
from alignprop_pipe.config.truncation import LastK, RandomLastK
from alignprop_pipe.errors import ConfigError


def parsed(*arguments: str) -> tuple[TrainRequest, dict[str, Any]]:
    """What a command with the flags of `train` is called with."""
    seen: list[Any] = []
    probe = typer.Typer()

    @probe.command()
    @options_from(TrainRequest, AlignConfig)
    def command(request: TrainRequest, settings: dict[str, Any]) -> None:
        seen.extend((request, settings))

    result = CliRunner().invoke(probe, arguments)
    assert result.exit_code == 0, result.output
    return seen[0], seen[1]


def planned_config(arguments: list[str]) -> AlignConfig:
    """What `train` makes of the preset, the file and the flags."""
    return planned(*parsed(*arguments), Output(quiet=True)).config


def test_no_flag_changes_nothing() -> None:
    assert parsed()[1] == {}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--num-inference-steps", "7"], {"num_inference_steps": 7}),
        (["--truncation", "last:3"], {"truncation": LastK(3)}),
        (["--betas", "0.8", "0.99"], {"betas": (0.8, 0.99)}),
        (["--judges", "jpeg", "--judges", "colour"], {"judges": ("jpeg", "colour")}),
        (["--judges", "none"], {"judges": ()}),
        (["--target-modules", "to_q"], {"target_modules": ("to_q",)}),
        (["--no-keep-best"], {"keep_best": False}),
        (["--keep-best", "yes"], {"keep_best": True}),
        (["--keep-best", "no"], {"keep_best": False}),
        (["--keep-best", "reward"], {"keep_best": "reward"}),
        (["--keep-best", "judge", "--judges", "clip"], {"keep_best": "judge", "judges": ("clip",)}),
        (["--alpha", "8"], {"alpha": 8.0}),
        (["--init-lora-weights", "gaussian"], {"init_lora_weights": "gaussian"}),
    ],
)
def test_a_flag_becomes_the_field(arguments: list[str], settings: dict[str, Any]) -> None:
    assert parsed(*arguments)[1] == settings
    AlignConfig().replace(**settings)


def test_every_field_has_a_flag_with_its_help() -> None:
    text = re.sub(r"[\s│]+", " ", run("train", "--help", env={"COLUMNS": "200"}).output)
    for name, (_, spec) in FIELD_PATHS.items():
        assert f"--{name.replace('_', '-')} " in text
        assert re.sub(r"\s+", " ", spec.metadata["help"])[:40] in text
    for panel in ("Run", "LoRA", "Optimizer", "Sampling", "Evaluation"):
        assert f"─ {panel} ─" in text


def test_preset_under_file_under_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # else a model that is not in the cache is told of
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\ntruncation = "last:2"\n[sampling]\nnum_inference_steps = 9\n')
    config = planned_config(["--config", str(file), "--num-inference-steps", "11"])
    assert (config.steps, config.truncation, config.sampling.num_inference_steps) == (7, LastK(2), 11)
    assert config.lora == AlignConfig.preset("emoji").lora
    other = ["other/model", "--reward", "jpeg", "--prompt", "a dog"]
    assert planned_config([*other, "--preset", "fast"]).truncation == RandomLastK(1, 8)
    with pytest.raises(ConfigError, match="paper"):
        planned_config(["--preset", "papper"])


def test_the_config_of_a_run_folder_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = AlignConfig.preset("fast").replace(steps=3, seed=5, judges=("likeness",))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": "a/b", "config": config.to_dict()}))
    words = ["a/b", "--reward", "jpeg", "--prompt", "a dog"]
    assert planned_config([*words, "--config", str(file)]) == config
    assert planned_config([*words, "--config", str(tmp_path)]) == config
    file.write_text(config.to_json())
    assert planned_config([*words, "--config", str(file)]) == config


@pytest.mark.parametrize(
    "word", ["emoji", "org/name", "a.safetensors", "./model", "/models/a b.ckpt", "~/model", "../x/y"]
)
def test_words_that_are_models(word: str) -> None:
    assert is_model(word)


@pytest.mark.parametrize(
    "word", ["a dog", "dog", "two dogs on a blue background", "cat / dog", "emoji dog", "a dog/cat", ""]
)
def test_words_that_are_prompts(word: str) -> None:
    assert not is_model(word)


def test_a_diffusers_folder_is_a_model_and_another_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dog").mkdir()
    assert not is_model("dog")
    Path("dog/model_index.json").write_text("{}")
    assert is_model("dog")
    assert not is_model("x" * 5000)


def test_devices() -> None:
    assert find_device("auto").type in ("cuda", "mps", "cpu")
    assert find_device("cpu").type == "cpu"
    for text in ("gpu", "cuda:99", "", "meta"):
        with pytest.raises(typer.BadParameter, match="cpu"):
            find_device(text)
