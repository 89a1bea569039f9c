"""What `align` gives back: readable, and of the adapter that was kept."""

import dataclasses
import html.parser
import math
from pathlib import Path

import pytest

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.records import Evidence, StepRecord
from alignprop_pipe.training.result import AlignResult, changes_between, kept_evidence


def look(step: int, *rewards: float) -> Evidence:
    mean = sum(rewards) / len(rewards)
    return Evidence(
        step=step,
        prompts=tuple(f"prompt {number}" for number in range(len(rewards))),
        reward=mean,
        parts={"clip": mean},
        judges={},
        diversity=0.25,
        per_prompt={"reward": rewards, "clip": rewards},
    )


def record(step: int, evidence: Evidence | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        loss=-0.5,
        reward=0.5,
        parts={"clip": 0.5},
        grad_norm=1.0,
        distance=None,
        graded=(1,),
        seconds=0.1,
        memory_mb=1.0,
        evidence=evidence,
    )


def result(**changed: object) -> AlignResult:
    before, after = look(0, 1.0, 2.0), look(2, 2.0, 5.0)
    whole = AlignResult(
        reward="clip < 1 & tv",
        config=AlignConfig(),
        adapter=Adapter({}),
        history=(record(0, before), record(1), record(2, after)),
        before=before,
        after=after,
        seconds=12.4,
        changes=changes_between(before, after),
    )
    return dataclasses.replace(whole, **changed)  # type: ignore[arg-type]


def test_repr_says_what_changed() -> None:
    assert repr(result()).splitlines() == [
        "AlignResult",
        "  reward: clip < 1 & tv",
        "  steps: 2 in 12 s",
        "  held-out reward: 1.500 -> 3.500 (+2.000 +- 1.000)",
        "  held-out clip: 1.500 -> 3.500 (+2.000 +- 1.000)",
        "  held-out diversity: 0.250 -> 0.250",
        "  warning: The evidence is of 2 pictures: what changed may be chance.",
    ]


def test_repr_of_a_run_that_ended_early_and_of_one_that_looked_at_nothing() -> None:
    text = repr(result(stopped="interrupted after 2 of 9 steps", run_folder=Path("runs/a")))
    assert "stopped: interrupted after 2 of 9 steps" in text
    assert f"run folder: {Path('runs/a')}" in text
    bare = result(before=None, after=None, changes={}, history=())
    first, second, third, warning = repr(bare).splitlines()
    assert (first, second, third) == ("AlignResult", "  reward: clip < 1 & tv", "  steps: 0 in 12 s")
    assert warning.startswith("  warning: Nothing was measured on held-out prompts")
    assert bare.steps == 0


def test_html_is_a_table_whose_text_is_escaped() -> None:
    found: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader().feed(result()._repr_html_())
    assert found[:4] == ["reward", "clip < 1 & tv", "steps", "2 in 12 s"]
    assert "clip &lt; 1 &amp; tv" in result()._repr_html_()


def test_kept_evidence() -> None:
    history = [record(0, look(0, 9.0)), record(1, look(1, 1.0)), record(2, look(2, 3.0)), record(3, look(3, 3.0))]
    best, last = AlignConfig(), AlignConfig().replace(keep_best=False)
    assert kept_evidence(history, best) is history[2].evidence  # the first of two that are as good
    assert kept_evidence(history, last) is history[3].evidence
    assert kept_evidence(history[:1], best) is None
    assert kept_evidence([], best) is None


def test_a_look_that_is_not_a_number_is_never_the_best() -> None:
    history = [record(0), record(1, look(1, math.nan)), record(2, look(2, -1.0)), record(3, look(3, math.nan))]
    assert kept_evidence(history, AlignConfig()) is history[2].evidence


def test_changes_need_both_sides() -> None:
    assert changes_between(None, look(1, 1.0)) == {}
    assert changes_between(look(0, 1.0), None) == {}
    change = changes_between(look(0, 1.0, 2.0), look(1, 2.0, 5.0))["clip"]
    assert (change.before, change.after, change.difference) == (1.5, 3.5, 2.0)
    assert change.standard_error == pytest.approx(1.0)
