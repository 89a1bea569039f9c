"""Settings that change nothing are named before the run, and settings that do something, or are usual, are not."""

import json
import logging
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from aligning import align, aligned, settings
from command_line import run

from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion.effects import settings_without_effect

DDIM = miniatures.make_scheduler("DDIMScheduler")
EULER = miniatures.make_scheduler("EulerDiscreteScheduler")
EVIDENCE = {"eval_prompts": 4, "steps": 6}


def told(pipe: Any = None, call: dict[str, Any] | None = None, **changed: Any) -> dict[str, str]:
    usual = settings(num_inference_steps=8, guidance_scale=3.0)
    return settings_without_effect(aligned(pipe or miniatures.sd15(DDIM)), usual.replace(**changed), usual, call or {})


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt"),
        ({"negative_prompt": "fog", "guidance_scale": 0.5}, "negative_prompt"),
        ({"warmup_steps": 1}, "warmup_steps"),
        ({"warmup_steps": 1, "steps": 1}, "warmup_steps"),
        ({"warmup_steps": 3}, "warmup_steps"),
        ({"warmup_steps": 200}, "warmup_steps"),
        ({"max_skipped": 7}, "max_skipped"),
        ({"truncation": "last:9"}, "truncation"),
        ({"truncation": "random:1-10"}, "truncation"),
        ({"truncation": "random:9-10"}, "truncation"),
        ({"truncation": "last:2", "checkpointing": "2"}, "checkpointing"),
        ({"eval_every": 7}, "eval_every"),
        ({"judges": ("jpeg",)}, "judges"),
        ({**EVIDENCE, "eval_every": 7}, "eval_every"),
        ({**EVIDENCE, "eval_every": 2, "patience": 3}, "patience"),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_named(changed: dict[str, Any], name: str) -> None:
    found = told(**changed)
    assert list(found) == [name]
    assert found[name]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"negative_prompt": "fog"},
        {"negative_prompt": "fog", "guidance_scale": 1.5},
        {"eta": 0.5},
        {"height": 32, "width": 24},
        {"warmup_steps": 2},  # the last step has the whole rate
        {"truncation": "last:8"},
        {"truncation": "random:1-8"},
        {"truncation": "random:3-"},
        {"truncation": "full"},
        {"truncation": "last:3", "checkpointing": "2"},
        {"checkpointing": "none"},
        {**EVIDENCE, "eval_every": 2, "patience": 2, "judges": ("jpeg",)},
        {**EVIDENCE, "eval_every": 6},
        {"mixed_precision": "bf16"},
        {"steps": 1, "eval_every": 10},  # usual, though it is past the end
    ],
    ids=str,
)
def test_a_setting_with_an_effect_is_not(changed: dict[str, Any]) -> None:
    assert told(**changed) == {}


def test_what_the_pipeline_itself_decides() -> None:
    assert "DDIMScheduler" in told(miniatures.sd15(EULER), eta=0.5)["eta"]
    assert told(miniatures.flux(), eta=0.5) == {"eta": "FluxPipeline takes no eta"}
    assert "true_cfg_scale=1" in told(miniatures.flux(), negative_prompt="fog")["negative_prompt"]
    assert told(miniatures.flux(), {"true_cfg_scale": 2.0}, negative_prompt="fog") == {}
    assert told(miniatures.sd15_img2img(DDIM), height=32, width=32).keys() == {"height", "width"}
    half = miniatures.sd15(DDIM).to(torch.bfloat16)
    assert told(half, mixed_precision="bf16").keys() == {"mixed_precision"}
    assert told(half, mixed_precision="fp16") == {}


def test_no_preset_nags() -> None:
    for name in ("paper", "fast", "emoji"):
        preset = AlignConfig.preset(name)
        assert settings_without_effect(aligned(miniatures.sd15(DDIM)), preset, preset, {}) == {}


def test_align_tells_once_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        align(aligned(), negative_prompt="fog", warmup_steps=50)
    lines = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(lines) == 2
    assert "negative_prompt='fog'" in lines[0]
    assert "warmup_steps=50 has no effect past the end of 2 steps: the rate never gets to lr" in lines[1]


def test_the_commands_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    miniatures.sd15().save_pretrained("tiny")
    small = ["--num-inference-steps", "2", "--steps", "1", "--batch-size", "1", "--eval-prompts", "0"]
    words = ["train", "./tiny", "--reward", "jpeg", "--prompt", "a dog", *small, "--gradient-accumulation-steps", "1"]
    more = ["--guidance-scale", "1", "--negative-prompt", "fog"]
    done = run(*words, *more, "--json")
    assert done.exit_code == 0, done.output
    notes = [line for line in map(json.loads, done.stdout.splitlines()) if line["type"] == "note"]
    assert [note["setting"] for note in notes] == ["negative_prompt"]
    assert done.stderr.count("has no effect") == 1
    done = run("sample", "./tiny", "a dog", *more, "--num-inference-steps", "2")
    assert done.exit_code == 0, done.output
    assert "negative_prompt='fog' has no effect" in done.stderr
