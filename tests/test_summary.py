"""What is warned of: what is more than chance and matters, by the loss, once, and nothing in a good run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.config.choices import Hinge, Maximize, Target
from alignprop_pipe.records import Change, Evidence, StepRecord
from alignprop_pipe.runs.summary import RunWarning, Watch, diversity_change, paired_change, warnings_of
from alignprop_pipe.training.evidence import diversity, measures_of

EVEN = tuple(0.5 + 0.02 * number for number in range(16))


def shifted(values: Sequence[float], by: float, noise: float = 0.01) -> tuple[float, ...]:
    """Every value moved by `by` in the mean, with paired differences that vary by `noise`."""
    return tuple(value + by + noise * (-1) ** place for place, value in enumerate(values))


def look(
    step: int, reward: Sequence[float] = EVEN, images: torch.Tensor | None = None, **judges: Sequence[float]
) -> Evidence:
    table = {"reward": tuple(reward), **{name.replace("__", "."): tuple(values) for name, values in judges.items()}}
    means = {name: sum(values) / len(values) for name, values in table.items()}
    return Evidence(
        step=step,
        prompts=tuple(f"prompt {number}" for number in range(len(reward))),
        reward=means["reward"],
        parts={},
        judges={name: mean for name, mean in means.items() if name != "reward"},
        diversity=0.3 if images is None else diversity(images),
        per_prompt=table,
        measures={} if images is None else measures_of(images),
    )


def found(before: Evidence, after: Evidence, **more: Any) -> dict[str, RunWarning]:
    return {one.kind: one for one in warnings_of(before, after, paired_change(before, after), **more)}


def pictures(seed: int = 0, count: int = 16) -> torch.Tensor:
    """Pictures of any content: patches of colour."""
    patches = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(patches, size=(32, 32), mode="bicubic").clamp(0, 1)


# --- the reward, by the loss -----------------------------------------------------------------------------------------


def test_a_good_run_warns_of_nothing() -> None:
    before, after = look(0, judge=EVEN), look(9, shifted(EVEN, 0.2), judge=shifted(EVEN, 0.1))
    assert found(before, after) == {}


def test_a_reward_that_fell_is_an_adapter_that_is_worse_than_the_base() -> None:
    text = found(look(0), look(9, shifted(EVEN, -0.1)))["worse-than-base"].text
    assert "worse than the base model by the run's own evidence" in text
    assert "from 0.65 to 0.55 (-0.1 ± 0.0026)" in text


def test_what_was_looked_at_is_called_what_it_is() -> None:
    before, after = (dataclasses.replace(one, held_out=False) for one in (look(0), look(9, shifted(EVEN, -0.1))))
    text = found(before, after)["worse-than-base"].text
    assert "fell on training prompts, with fresh noise" in text
    assert "held-out" not in text


@pytest.mark.parametrize(("by", "noise"), [(-0.1, 0.5), (-0.002, 0.0001), (0.1, 0.01)])
def test_chance_and_trifles_are_no_fall(by: float, noise: float) -> None:
    assert found(look(0), look(9, shifted(EVEN, by, noise))) == {}


@pytest.mark.parametrize(
    ("loss", "before", "after", "is_worse"),
    [
        (Maximize(), 0.9, 0.5, True),
        (Target(0.2), 0.9, 0.5, False),  # it falls to where it shall be
        (Target(0.2), 0.5, 0.9, True),
        (Target(0.7), 0.5, 0.6, False),
        (Target(0.7), 0.8, 0.2, True),
        (Hinge(0.4), 0.9, 0.5, False),  # past the margin nothing pulls
        (Hinge(0.8), 0.7, 0.5, True),
        (Hinge(2.0), 0.5, 0.9, False),
    ],
)
def test_worse_is_what_the_loss_calls_worse(loss: Any, before: float, after: float, is_worse: bool) -> None:
    noise = [0.002 * number for number in range(12)]
    looks = look(0, [before + n for n in noise]), look(9, shifted([after + n for n in noise], 0.0, 0.001))
    assert ("worse-than-base" in found(*looks, loss=loss)) is is_worse
    means = {"reward": Change(before, after, after - before, 0.01)}  # as of a header, without its prompts
    assert ("worse-than-base" in {one.kind for one in warnings_of(None, None, means, loss=loss)}) is is_worse


def test_a_target_is_named_with_its_distance() -> None:
    text = found(look(0, shifted(EVEN, 0.0)), look(9, shifted(EVEN, 0.3)), loss=Target(0.2))["worse-than-base"].text
    assert "away from its target 0.2: the distance went from 0.45 to 0.75" in text


# --- judges ----------------------------------------------------------------------------------------------------------


def test_a_judge_that_fell_while_the_reward_rose() -> None:
    before, after = look(0, judge=EVEN), look(9, shifted(EVEN, 0.2), judge=shifted(EVEN, -0.2))
    ((kind, warning),) = found(before, after).items()
    assert kind == "reward-gamed"
    assert warning.score == "judge"
    assert "The judge judge, which was never trained on, fell, from 0.65 to 0.45" in warning.text
    assert "worse than the base model" in warning.text


def test_a_judge_that_fell_with_the_reward() -> None:
    before, after = look(0, judge=EVEN), look(9, shifted(EVEN, -0.2), judge=shifted(EVEN, -0.2))
    assert list(found(before, after)) == ["worse-than-base", "judge-fell"]


@pytest.mark.parametrize(
    ("scores", "by", "noise", "is_said"),
    [
        (EVEN, -0.04, 0.01, True),
        (EVEN, -0.005, 0.001, False),  # certain, and 0.8 %
        (EVEN, -0.04, 0.2, False),  # 6 %, and chance
        (tuple(21 + 3 * value for value in EVEN), -0.4, 0.1, True),  # PickScore: 1.7 %, half its spread
        (tuple(21 + 3 * value for value in EVEN), -0.05, 0.01, False),
        (tuple(value - 0.65 for value in EVEN), -0.01, 0.001, False),  # a share of a mean near 0 says nothing
        (tuple(value - 0.65 for value in EVEN), -0.04, 0.001, True),
        ((1.0,) * 16, -0.001, 0.0, False),
        ((1.0,) * 16, -0.1, 0.01, True),
    ],
)
def test_a_fall_matters_by_its_error_and_by_its_size(
    scores: tuple[float, ...], by: float, noise: float, is_said: bool
) -> None:
    before, after = look(0, judge=scores), look(9, shifted(EVEN, 0.2), judge=shifted(scores, by, noise))
    assert ("reward-gamed" in found(before, after)) is is_said


def test_attributes_of_a_judge_are_said_where_the_judge_itself_is_not() -> None:
    fell, same = shifted(EVEN, -0.2), shifted(EVEN, 0.0)
    before = look(0, judge=EVEN, judge__count=EVEN)
    one = warnings_of(before, after := look(9, judge=same, judge__count=fell), paired_change(before, after))
    assert [warning.score for warning in one] == ["judge.count"]
    both = warnings_of(before, after := look(9, judge=fell, judge__count=fell), paired_change(before, after))
    assert [warning.score for warning in both] == ["judge"]


def test_what_a_judge_logs_besides_may_fall_for_the_better() -> None:
    """`jpeg_kb` is the size of the file, which `jpeg` wants small."""
    rose, fell = shifted(EVEN, 0.2), shifted(EVEN, -0.2)
    before = look(0, **{"hpsv2.1": EVEN, "jpeg": EVEN, "jpeg_kb": EVEN})
    after = look(9, rose, **{"hpsv2.1": rose, "jpeg": rose, "jpeg_kb": fell})
    named = [dataclasses.replace(one, judge_names=("hpsv2.1", "jpeg")) for one in (before, after)]
    assert found(*named) == {}
    assert named[1].main_judges == ["hpsv2.1", "jpeg"]
    worse = dataclasses.replace(
        look(9, rose, **{"hpsv2.1": fell, "jpeg": rose, "jpeg_kb": fell}), judge_names=("hpsv2.1", "jpeg")
    )
    assert found(named[0], worse)["reward-gamed"].score == "hpsv2.1"


@pytest.mark.parametrize(
    ("count", "after", "is_said"), [(1, 0.1, True), (1, 0.4, False), (2, 0.1, True), (2, 0.4, False)]
)
def test_of_few_pictures_only_a_large_fall_is_said(count: int, after: float, is_said: bool) -> None:
    looks = look(0, [0.5] * count, judge=[0.5] * count), look(9, [0.9] * count, judge=[after] * count)
    assert list(found(*looks)) == ["reward-gamed"] * is_said + ["few-pictures"]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.2), (0.5, 0.5, 0.5)])
def test_pictures_that_lose_their_content_are_seen_without_a_judge(colour: tuple[float, float, float]) -> None:
    before, flat = pictures(), torch.tensor(colour)[:, None, None].expand(3, 32, 32)
    after = 0.2 * before + 0.8 * flat
    kinds = found(look(0, images=before), look(9, shifted(EVEN, 0.2), images=after))
    assert list(kinds) == ["pictures-collapsed", "diversity-fell"]
    assert "lost 80% of their contrast" in kinds["pictures-collapsed"].text


def test_pictures_that_go_to_black_and_white_are_seen() -> None:
    before = pictures() * 0.5 + 0.25
    after = (before > before.mean(dim=(2, 3), keepdim=True)).float()
    assert (
        "have 100% of their values at black or white"
        in found(look(0, images=before), look(9, images=after))["pictures-collapsed"].text
    )


def test_other_pictures_are_no_collapse() -> None:
    before = pictures()
    for after in (pictures(1), 0.7 * before + 0.15, (1.3 * before - 0.15).clamp(0, 1), before.flip(-1)):
        assert "pictures-collapsed" not in found(look(0, images=before), look(9, images=after))


@pytest.mark.parametrize(
    ("lost", "error", "is_said"),
    [
        (0.007, 0.0001, False),
        (0.05, 0.001, False),
        (0.12, 0.01, True),
        (0.12, 0.1, False),
        (0.2, 0.05, True),
        (0.2, math.nan, True),
        (0.12, math.nan, False),
        (0.3, 0.4, False),
        (-0.3, 0.01, False),
        (math.nan, 0.1, False),
    ],
)
def test_diversity_by_its_error_and_by_its_size(lost: float, error: float, is_said: bool) -> None:
    change = Change(0.3, 0.3 * (1 - lost), -0.3 * lost, 0.3 * error)
    found = warnings_of(None, None, {"reward": Change(1, 2, 1, 0.1)}, diversity=change)
    assert bool(found) is is_said


@pytest.mark.parametrize("count", [3, 4, 16])
def test_the_jackknife_by_hand(count: int) -> None:
    """The standard error from leaving one picture out and measuring the diversity anew."""
    before, after = pictures(3, count), pictures(4, count)
    got = diversity_change(look(0, EVEN[:count], before), look(1, EVEN[:count], after))
    assert got is not None
    kept = [[i for i in range(count) if i != out] for out in range(count)]
    left = [diversity(after[some]) - diversity(before[some]) for some in kept]
    mean = sum(left) / count
    assert got.difference == pytest.approx(diversity(after) - diversity(before))
    by_hand = math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in left))
    assert got.standard_error == pytest.approx(by_hand, rel=1e-3)


def test_two_pictures_have_no_error_of_their_diversity() -> None:
    got = diversity_change(look(0, EVEN[:2], pictures(0, 2)), look(1, EVEN[:2], pictures(1, 2)))
    assert got is not None
    assert math.isnan(got.standard_error)


# --- runs that went wrong --------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_a_run_that_diverged() -> None:
    after = look(9, (*EVEN[:13], math.nan, math.inf, -math.inf))
    assert "3 of 16 pictures get a score from the reward" in found(look(0), after)["not-finite"].text
    judged = look(9, judge=(*EVEN[:15], math.nan))
    assert found(look(0, judge=EVEN), judged)["not-finite"].score == "judge"


@pytest.mark.parametrize(
    ("status", "is_said"),
    [
        ("", False),
        ("completed", False),
        ("no better held-out score for 3 evaluations: ended after 9 steps", False),
        ("interrupted after 12 of 60 steps", True),
        ("failed: out of memory", True),
    ],
)
def test_a_run_that_did_not_end_is_said(status: str, is_said: bool) -> None:
    assert ("not-finished" in found(look(0), look(9), status=status)) is is_said


def test_no_evidence_is_said() -> None:
    for before, after in ((None, None), (look(0), None), (None, look(9))):
        (one,) = warnings_of(before, after, {})
        assert one.kind == "no-evidence"


@given(
    st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=6), st.sampled_from([Maximize(), Target(1.0)])
)
def test_any_numbers_are_taken(pairs: list[tuple[float, float]], loss: Any) -> None:
    first, last = zip(*pairs, strict=True)
    before, after = look(0, first, judge=first), look(9, last, judge=last)
    for one in warnings_of(before, after, paired_change(before, after), loss=loss):
        assert " nan" not in one.text.replace("(NaN", "")


# --- when ------------------------------------------------------------------------------------------------------------


def record(step: int, evidence: Evidence | None) -> StepRecord:
    return StepRecord(step, 0.0, 0.0, {}, 1.0, None, (1,), 0.1, 1.0, evidence=evidence)


def test_each_warning_is_told_once_where_it_first_holds() -> None:
    watch = Watch(Maximize())
    rose, fell = shifted(EVEN, 0.2), shifted(EVEN, -0.2)
    course = [
        (0, look(0, judge=EVEN, other=EVEN), []),
        (1, None, []),
        (2, look(2, rose, judge=EVEN, other=EVEN), []),
        (4, look(4, rose, judge=fell, other=EVEN), ["judge"]),
        (6, look(6, rose, judge=fell, other=fell), ["other"]),
        (8, look(8, rose, judge=fell, other=fell), []),
    ]
    for step, evidence, fresh in course:
        assert [one.score for one in watch.first_at(record(step, evidence))] == fresh
    assert [one.score for one in watch.holding] == ["judge", "other"]


def test_a_run_without_a_look_before_tells_nothing() -> None:
    assert Watch(Maximize()).first_at(record(3, look(3))) == []


def test_warnings_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunWarning("not-finite", "x").text = "y"  # pyright: ignore[reportAttributeAccessIssue]
