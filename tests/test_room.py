"""What cannot fit into memory is refused before it starts, in words; what fits is not, and is not measured."""

import time
from pathlib import Path
from typing import Any

import aligning
import miniatures
import pytest
import torch
from aligning import align, aligned, state
from command_line import run

from alignprop_pipe.config.settings import AlignConfig, SamplingOptions
from alignprop_pipe.diffusion import memory
from alignprop_pipe.diffusion.sample import sample_pictures
from alignprop_pipe.errors import ConfigError

HUGE = {"height": 100000, "width": 100000}


@pytest.mark.parametrize(
    "changed",
    [
        HUGE,
        {"height": 8, "width": 10**9},
        {"batch_size": 10**9},
        {**HUGE, "checkpointing": "none"},
        {"eval_batch_size": 10**9, "eval_prompts": 3, "height": 60000, "width": 60000},
    ],
    ids=str,
)
def test_a_run_that_cannot_fit_is_refused_before_it_starts(changed: dict[str, Any], tmp_path: Path) -> None:
    pipe = aligned()
    before = state(pipe)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"GB of memory are needed, and .* GB are there\. What would fit: "):
        align(pipe, out=tmp_path / "run", **changed)
    assert time.monotonic() - began < 20
    assert state(pipe) == before
    assert not (tmp_path / "run").exists()


def test_what_would_fit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that the message names are let through, and the next ones are not."""
    monkeypatch.setattr(memory, "available", lambda _: 2e9)
    config, pipe = aligning.settings(height=4096, width=4096, batch_size=4, checkpointing="none"), aligned()
    with pytest.raises(ConfigError) as caught:
        memory.check_training(pipe, config, {}, 0)
    side = int(str(caught.value).split("What would fit: ")[1].split("x")[0])
    assert 64 < side < 4096
    memory.check_training(pipe, config.replace(height=side, width=side), {}, 0)
    with pytest.raises(ConfigError):
        memory.check_training(pipe, config.replace(height=side + 64, width=side + 64), {}, 0)
    memory.check_training(pipe, config.replace(height=side + 64, width=side + 64, checkpointing="all"), {}, 0)


def test_ordinary_runs_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_line", lambda *_: pytest.fail("a picture was drawn"))
    memory.check_training(aligned(), AlignConfig.preset("emoji").replace(height=64, width=64), {}, 100)
    memory.check_drawing(aligned(), SamplingOptions(height=512, width=512), {}, 1)


def test_a_video_of_too_many_frames_is_refused() -> None:
    sampling = SamplingOptions(height=1024, width=1024, num_inference_steps=2)
    with pytest.raises(ConfigError, match="GB of memory"):
        memory.check_drawing(aligned(miniatures.wan()), sampling, {"num_frames": 80001}, 4)


def test_pictures_that_cannot_fit_are_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GB of memory"):
        next(sample_pictures(aligned(), ["a dog"], SamplingOptions(**HUGE, num_inference_steps=2)))
    miniatures.sd15().save_pretrained(tmp_path / "tiny")
    words = [str(tmp_path / "tiny"), "a dog", "--height", "100000", "--width", "100000", "--out", str(tmp_path / "out")]
    done = run("sample", *words)
    assert done.exit_code == 2, done.output
    assert "What would fit" in done.stderr
    words = [words[0], "--prompt", "a dog", "--reward", "jpeg", "--height", "90000", "--width", "9000", "--dry-run"]
    assert "What would fit" in run("train", *words).stderr


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("2000\n")
    monkeypatch.setattr(memory, "LIMITS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.available(torch.device("cpu")) == 3000
    (tmp_path / "max").write_text("max\n")
    assert memory.available(torch.device("cpu")) > 10**8
