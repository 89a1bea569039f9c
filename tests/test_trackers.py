"""Records to trackers: a real TensorBoard log is written and read back."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignprop_pipe import AlignConfig, Trackers
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.records import Evidence, StepRecord
from alignprop_pipe.runs.trackers import numbers_of

LOOK = Evidence(
    step=1, prompts=("a", "b"), reward=0.5, parts={"clip": 0.25}, judges={"emoji_judge": 1.0}, diversity=0.125,
    per_prompt={},
)  # fmt: skip


def record(step: int, **changes: object) -> StepRecord:
    given = {
        "loss": -0.5, "reward": float(step), "parts": {"clip": 0.75}, "grad_norm": 2.0, "distance": None,
        "graded": (8, 9), "seconds": 1.0, "memory_mb": 10.0,
    }  # fmt: skip
    return StepRecord(step=step, **{**given, **changes})  # type: ignore[arg-type]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_tensorboard_holds_every_step(tmp_path: Path) -> None:
    with Trackers(["tensorboard", "tensorboard"], AlignConfig(), tmp_path) as trackers:
        assert not list(tmp_path.iterdir())  # a run folder must be empty when the run starts
        trackers.on_step(record(0, loss=math.nan, reward=math.nan, evidence=LOOK))
        trackers.on_step(record(1))
        trackers.on_step(record(2, distance=0.5))
    found = scalars(tmp_path / "alignprop")
    assert found["reward"] == [(1, 1.0), (2, 2.0)]
    assert found["held-out/emoji_judge"] == [(0, 1.0)]
    assert found["held-out/clip"] == [(0, 0.25)]
    assert found["part/clip"] == [(step, 0.75) for step in range(3)]
    assert found["distance"] == [(2, 0.5)]


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    with Trackers([], AlignConfig(), tmp_path) as trackers:
        trackers.on_step(record(1))
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_left_out() -> None:
    assert set(numbers_of(record(1, loss=math.inf, parts={"clip": math.nan}))) == {
        "reward", "grad_norm", "graded_steps", "seconds", "memory_mb",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "way_out"), [("tensorbord", "tensorboard"), ("comet_ml", "pip install comet-ml")])
def test_a_tracker_that_cannot_be_had_is_refused_at_once(name: str, way_out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=way_out):
        Trackers([name], AlignConfig(), tmp_path)
