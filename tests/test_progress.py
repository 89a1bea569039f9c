import logging
import math
import re
import sys
from typing import Any

import aligning
import pytest
from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tqdm import auto
from transformers.utils import logging as of_transformers

from alignprop_pipe.records import Evidence, StepRecord
from alignprop_pipe.training.progress import fitted, size


@pytest.fixture(autouse=True)
def bars_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py switches them off, in two ways, for the other tests."""

    class Drawn(auto.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, disable=False, **kwargs)

    monkeypatch.setattr(auto, "tqdm", Drawn)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(of_transformers, "_tqdm_active", True)
    enable_progress_bars()


def record(step: int = 120, reward: float = -12.3456, memory: float = 81234.0, **changed: Any) -> StepRecord:
    numbers = {"loss": 1.0, "parts": {}, "grad_norm": 1.0, "distance": None, "graded": (0,), "seconds": 1.0}
    return StepRecord(**{**numbers, "step": step, "reward": reward, "memory_mb": memory, **changed})


def look(reward: float = -12.3456, judges: dict[str, float] | None = None, held_out: bool = True) -> Evidence:
    names = tuple(judges or {})
    return Evidence(0, ("a",), reward, {}, judges or {}, math.nan, {}, judge_names=names, held_out=held_out)


def run(capsys: pytest.CaptureFixture[str], **changed: Any) -> str:
    pipe = aligning.aligned()
    pipe.set_progress_bar_config(disable=False)
    aligning.align(pipe, steps=2, eval_prompts=2, eval_batch_size=1, **changed)
    said = capsys.readouterr()
    return said.out + said.err


def test_a_run_in_python_shows_where_it_is(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    said = run(capsys, judges=("auto",))
    assert "baseline 0/2" in said
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"step 2/2 .*ETA 00:00  reward 0\.\d+  fresh noise 0\.\d+  likeness 0\.\d+  \d+ MB", last), last
    assert "the judge likeness watches, since none was named; judges=() goes without" in said


@pytest.mark.parametrize("how", ["progress", "pipe", "hub", "diffusers", "transformers"])
def test_silence_is_to_be_had(capsys, how: str) -> None:
    switches = {"diffusers": of_diffusers, "transformers": of_transformers}
    pipe = aligning.aligned()
    pipe.set_progress_bar_config(disable=how == "pipe")
    try:
        if how == "hub":
            disable_progress_bars()
        if how in switches:
            switches[how].disable_progress_bar()
        aligning.align(pipe, steps=1, eval_prompts=2, progress=how != "progress")
    finally:
        enable_progress_bars()
        of_diffusers.enable_progress_bar()
        of_transformers.enable_progress_bar()
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_a_display_of_ones_own_is_told_of_pictures_and_steps() -> None:
    told: list[Any] = []

    class Mine:
        def on_pictures(self, done: int, total: int) -> None:
            told.append((done, total))

        def on_step(self, record: StepRecord) -> None:
            told.append(record.step)

    aligning.align(aligning.aligned(), steps=2, eval_prompts=2, eval_batch_size=1, judges=(), progress=Mine())
    look_at_both = [(0, 2), (1, 2), (2, 2)]
    assert told == [*look_at_both, 0, 1, *look_at_both, 2]


@pytest.mark.parametrize("width", [59, 79, 119])
@pytest.mark.parametrize("held_out", [True, False])
def test_nothing_that_counts_is_cut_away(width: int, held_out: bool) -> None:
    shown = look(judges={"emoji_judge": 0.5, "a_judge_with_a_very_long_name_indeed": 0.25}, held_out=held_out)
    for what in ("step", "look 100/100, step"):
        named, words = fitted(what, "120/1000", record(), shown, width)
        line = f"{named}120/1000 - ETA 1:23:45{words}"
        assert len(line) <= width
        assert line.count("-12.3") == 2
        assert "79.3 GB" in line
        assert ("emoji_judge 0.5" in line) == (width == 119)


def test_a_judges_name_is_no_format_and_steers_no_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named, words = fitted("step", "1/2", record(1), look(judges={"{n}\x1b[2J": 1.0}), 199)
    assert named == "step "
    assert "\x1b" not in words
    from alignprop_pipe.training.progress import Bar

    bar = Bar(2)
    bar.on_step(record(1, evidence=look(judges={"{n}": 1.0})))
    bar.close()
    assert "{n} 1" in capsys.readouterr().err


def test_what_is_logged_meanwhile_stands_in_lines_of_its_own(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    logger, handler = logging.getLogger("alignprop_pipe"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        said = run(capsys, on_step=lambda record: logger.warning("heard %d", record.step))
    finally:
        logger.removeHandler(handler)
    lines = [line.rsplit("\r", 1)[-1] for line in said.splitlines() if "heard" in line]
    assert lines == ["heard 0", "heard 1", "heard 2"]


def test_previews_are_for_notebooks_and_said_so_elsewhere(caplog) -> None:
    aligning.align(aligning.aligned(), steps=1, progress="previews")
    assert "record.images" in caplog.text


def test_memory_is_short() -> None:
    assert [size(812.4), size(81234.0)] == ["812 MB", "79.3 GB"]
