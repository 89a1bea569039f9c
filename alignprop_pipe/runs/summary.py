"""What a run's evidence warns of. The terminal, the result, `--json`, the report, the card and the node repeat it.

AlignProp's weakness is over-optimisation: the reward rises and the pictures get worse. What was never trained on says
so: judges, and what the pictures are like. A change counts where it is more than chance, by the standard error of the
paired differences, *and* large enough to matter. Plain numbers; no torch.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from alignprop_pipe.config.choices import Hinge, Loss, Maximize, Target
from alignprop_pipe.errors import AlignError
from alignprop_pipe.records import Change, Cut, Evidence, StepRecord, part_of

Kind = Literal[
    "not-finite",
    "worse-than-base",
    "reward-gamed",
    "judge-fell",
    "pictures-collapsed",
    "diversity-fell",
    "prompts-cut",
    "not-finished",
    "no-evidence",
    "few-pictures",
]

ERRORS = 2.0
"""Standard errors from which a change is more than chance: one in forty falls that far without a cause."""
ERRORS_OF_A_PART = 2.5
"""For the single attributes of a judge ("judge.count"): they are several, so chance has several tries."""

OF_A_JUDGE = (0.2, 0.05)
"""The least fall that matters: of the spread that the score has over the prompts (Cohen's small effect), or of its
value. The first fits scores of any range, such as PickScore's, all of which lie between 18 and 24."""
OF_THE_GOAL = (0.05, 0.01)
"""Of what was trained for, which was to rise, a smaller fall is worth a word."""
LARGE = (1.0, 0.3)
"""A fall so large that it is said where nothing, or too little, tells how much of it is chance."""
LEAST_SHARE = 0.01
"""Of the value: a smaller fall never matters, whatever the spread."""

LOST_DIVERSITY, MUCH_DIVERSITY = 0.1, 0.2
"""Shares of the diversity whose loss is said: at two standard errors, and at one."""
LOST_CONTRAST = 0.5
"""Share of the pictures' contrast whose loss means that they lost their content: an honest run keeps 0.8 and more,
while `brightness` loses 0.8 of it in 12 steps on the way to white pictures."""
MORE_CLIPPED = 0.3
"""Share of all pixel values that became 0 or 1 beyond those that were."""

FEW = 3
"""Pictures that are needed to tell a change from chance at all."""

WAY_OUT = "try fewer steps, a lower learning rate or a distance_weight"


@dataclass(frozen=True, slots=True)
class RunWarning:
    """`kind` is for programs and stays as it is; `text` is one or more sentences, plain; `score` the score's name."""

    kind: Kind
    text: str
    score: str = ""


def warnings_of(
    before: Evidence | None,
    after: Evidence | None,
    changes: Mapping[str, Change],
    *,
    loss: Loss = Maximize(),  # noqa: B008 - frozen
    status: str = "",
    judges: Collection[str] | None = None,
    diversity: Change | None = None,
    cuts: Sequence[Cut] = (),
) -> tuple[RunWarning, ...]:
    """Everything that whoever uses the adapter should be warned of, the worst first; nothing for a good run.

    Args:
        before: the evaluation of the base model; None where it is not known, such as for a file without its run.
        after: the evaluation of the adapter that was kept.
        changes: `paired_change` of the two, or what is known of it.
        loss: what the run made of the reward: with `target:0.2`, a reward that falls to 0.2 is no fall.
        status: how the run ended, where that is not said next to the warnings.
        judges: names in `changes` that were never trained on; default: those of `after`. Where `after` names its
            judges, only these and their attributes count: what a judge logs besides may fall for the better.
        diversity: default: that of the two evaluations.
        cuts: prompts that a reward or a judge could not read to their end.
    """
    names = tuple(after.judges if judges is None and after is not None else judges or ())
    if after is not None and after.judge_names:
        names = tuple(name for name in names if name in after.judge_names or part_of(name, after.judge_names))
    look = _Looks(before, after, changes, loss, names)
    return (
        *_not_finite(look),
        *_goal(look),
        *_judges(look),
        *_pictures(look),
        *_diversity(diversity or diversity_change(before, after)),
        *cut_warnings(cuts),
        *_status(status),
        *_evidence(look),
    )


class Watch:
    """Follows a run's records; `first_at` gives each warning once, at the evaluation where it first holds."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.holding: tuple[RunWarning, ...] = ()
        """What holds at the newest evaluation."""
        self._before: Evidence | None = None
        self._told: set[tuple[str, str]] = set()

    def first_at(self, record: StepRecord) -> list[RunWarning]:
        """The warnings that hold at this record's evaluation and at none before it; none where it has no evaluation."""
        look = record.evidence
        if record.step == 0 or look is None or self._before is None:
            self._before = look if record.step == 0 else self._before
            return []
        self.holding = warnings_of(self._before, look, paired_change(self._before, look), loss=self.loss)
        fresh = [one for one in self.holding if (one.kind, one.score) not in self._told]
        self._told |= {(one.kind, one.score) for one in fresh}
        return fresh


def cut_warnings(cuts: Sequence[Cut]) -> Iterator[RunWarning]:
    """A warning for each reward that could not read all of its prompts."""
    for cut in cuts:
        number = f"{cut.count} {cut.what}s are" if cut.count > 1 else f"a {cut.what} is"
        shown = cut.first if len(cut.first) <= 60 else f"{cut.first[:59]}…"
        yield RunWarning(
            "prompts-cut",
            f"{number} longer than the {cut.read} tokens that {cut.reward} reads; what stands behind them "
            f"changes no score. {'The first' if cut.count > 1 else 'It'} has {cut.tokens} tokens: {shown!r}.",
            cut.reward,
        )


# --- changes ---------------------------------------------------------------------------------------------------------


def paired_change(before: Evidence, after: Evidence) -> Mapping[str, Change]:
    """How "reward", its parts and the judges changed, by name, over the same prompts and noise.

    The standard error of the mean difference is NaN where there is one picture only. Raises AlignError if the
    prompts are not the same.
    """
    if before.prompts != after.prompts:
        raise AlignError("the two evidences are of different prompts; only the same prompts and noise can be compared")
    shared = [name for name in before.per_prompt if name in after.per_prompt]
    return {name: _change(before.per_prompt[name], after.per_prompt[name]) for name in shared}


def diversity_change(before: Evidence | None, after: Evidence | None) -> Change | None:
    """How the diversity changed; its standard error by the jackknife over the pictures, NaN where they are too few.

    Each picture is left out in turn (Efron and Stein, 1981): the pairs of a mean over all pairs are not independent.
    """
    if before is None or after is None:
        return None
    error = math.nan
    first, last = (look.measures.get("distance", ()) for look in (before, after))
    count = len(first)
    if count == len(last) and count > 2:
        # Without picture i the mean of the remaining pairs is off by twice its own deviation, over count - 2.
        off = [2 * d / (count - 2) for d in _deviations([b - a for a, b in zip(first, last, strict=True)])]
        error = math.sqrt((count - 1) / count * sum(d * d for d in off))
    return Change(before.diversity, after.diversity, after.diversity - before.diversity, error)


def numbers_of(change: Change) -> str:
    """`from 0.5 to 0.4 (-0.1 ± 0.02)`."""
    spread = f" ± {change.standard_error:.2g}" if math.isfinite(change.standard_error) else ""
    return f"from {change.before:.4g} to {change.after:.4g} ({change.difference:+.3g}{spread})"


def _change(before: Sequence[float], after: Sequence[float]) -> Change:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean, count = _mean(differences), len(differences)
    error = math.nan
    if count > 1:
        error = math.sqrt(sum((d - mean) * (d - mean) for d in differences) / (count - 1) / count)
    return Change(_mean(before), _mean(after), mean, error)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviations(values: Sequence[float]) -> list[float]:
    mean = _mean(values)
    return [value - mean for value in values]


# --- inside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Looks:
    before: Evidence | None
    after: Evidence | None
    changes: Mapping[str, Change]
    loss: Loss
    judges: Sequence[str]
    pictures: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", math.inf if self.after is None else len(self.after.prompts))

    def spread(self, name: str) -> float:
        """The standard deviation of a score over the prompts, before; NaN where it is not known."""
        values = () if self.before is None else self.before.per_prompt.get(name, ())
        finite = [value for value in values if math.isfinite(value)]
        return statistics.stdev(finite) if len(finite) > 1 else math.nan

    def fell(self, change: Change, spread: float, errors: float, sizes: tuple[float, float]) -> bool:
        """Whether it fell by more than chance, and by one of `sizes`: of its spread over the prompts, of its value."""
        fall, value, error = -change.difference, abs(change.before), change.standard_error
        if not math.isfinite(fall) or fall <= 0 or fall < LEAST_SHARE * value:
            return False
        effect, share = sizes if self.pictures >= FEW and math.isfinite(error) else LARGE
        # Of a score whose values lie on both sides of 0, a share of the mean says nothing.
        matters = 0 < effect * spread <= fall or (fall >= share * value and not value < spread)
        # Of a score that is 0 or 1, one picture of any number is a change of exactly one error, but for rounding.
        return matters and not fall < errors * error * (1 - 1e-6)

    @property
    def goal(self) -> Change | None:
        """The reward as the loss wants it: more is better."""
        if isinstance(self.loss, Maximize):
            return self.changes.get("reward")
        wanted = _wanted(self.loss)
        if self.before is not None and self.after is not None:
            first, last = (look.per_prompt.get("reward", ()) for look in (self.before, self.after))
            if first and len(first) == len(last):
                return _change([wanted(value) for value in first], [wanted(value) for value in last])
        known = self.changes.get("reward")
        if known is None:
            return None
        before, after = wanted(known.before), wanted(known.after)
        return Change(before, after, after - before, known.standard_error)


def _wanted(loss: Loss) -> Callable[[float], float]:
    if isinstance(loss, Target):
        return lambda reward: -abs(reward - loss.value)
    if isinstance(loss, Hinge):
        return lambda reward: min(reward, loss.margin)
    return lambda reward: reward


def _not_finite(look: _Looks) -> Iterator[RunWarning]:
    if look.after is None:
        return
    table = look.after.per_prompt or {"reward": (look.after.reward,)}
    for name, values in table.items():
        if name not in ("reward", *look.judges) or all(map(math.isfinite, values)):
            continue
        count = sum(not math.isfinite(value) for value in values)
        what = "the reward" if name == "reward" else f"the judge {name}"
        yield RunWarning(
            "not-finite",
            f"{count} of {len(values)} pictures get a score from {what} that is not a finite number: the run "
            "has diverged, and the adapter is of no use. Try a lower learning rate or max_grad_norm.",
            name,
        )


def _goal(look: _Looks) -> Iterator[RunWarning]:
    goal = look.goal
    if goal is None or not look.fell(goal, look.spread("reward"), ERRORS, OF_THE_GOAL):
        return
    of = (
        "training prompts, with fresh noise"
        if look.after is not None and not look.after.held_out
        else "held-out prompts"
    )
    words = f"the trained reward itself fell on {of}, {numbers_of(goal)}"
    if isinstance(look.loss, Target):
        away = Change(-goal.before, -goal.after, -goal.difference, goal.standard_error)
        words = f"the reward moved away from its target {look.loss.value:g}: the distance went {numbers_of(away)}"
    elif isinstance(look.loss, Hinge):
        words = f"the trained reward, counted up to the margin {look.loss.margin:g}, fell, {numbers_of(goal)}"
    yield RunWarning(
        "worse-than-base",
        f"The adapter is worse than the base model by the run's own evidence: {words}. Do not use it; {WAY_OUT}.",
        "reward",
    )


def _judges(look: _Looks) -> Iterator[RunWarning]:
    goal, told = look.goal, set[str]()
    rose = goal is not None and goal.difference > 0
    wholes = {name: part_of(name, look.judges) for name in look.judges}
    for name in sorted(look.judges, key=lambda name: bool(wholes[name])):  # a judge before its attributes
        change = look.changes.get(name)
        errors = ERRORS_OF_A_PART if wholes[name] else ERRORS
        if change is None or wholes[name] in told or not look.fell(change, look.spread(name), errors, OF_A_JUDGE):
            continue
        told.add(name)
        words = f"The judge {name}, which was never trained on, fell, {numbers_of(change)}"
        if rose:
            yield RunWarning(
                "reward-gamed",
                f"{words}, while the reward rose: by this judge the adapter is worse than the base model. It may "
                f"please the reward without making better pictures. Look at the pictures; {WAY_OUT}.",
                name,
            )
        else:
            yield RunWarning("judge-fell", f"{words}: by this judge the adapter is worse than the base model.", name)


def _pictures(look: _Looks) -> Iterator[RunWarning]:
    """A sign that needs no judge: pictures that turn white, black or into one colour."""
    if look.before is None or look.after is None:
        return
    found = []
    for name in ("contrast", "clipped"):
        first, last = (one.measures.get(name, ()) for one in (look.before, look.after))
        if not first or len(first) != len(last):
            continue
        change = _change(first, last)
        beyond = abs(change.difference) >= ERRORS * _or_zero(change.standard_error)
        if name == "contrast" and beyond and change.after <= (1 - LOST_CONTRAST) * change.before:
            found.append(f"lost {-change.difference / change.before:.0%} of their contrast, {_from_to(change)}")
        if name == "clipped" and beyond and change.difference >= MORE_CLIPPED:
            found.append(f"have {change.after:.0%} of their values at black or white, before {change.before:.0%}")
    if found:
        yield RunWarning(
            "pictures-collapsed",
            f"The pictures {' and '.join(found)}: they are losing their content. Look at them; {WAY_OUT}.",
        )


def _diversity(change: Change | None) -> Iterator[RunWarning]:
    if change is None or not change.before > 0 or not math.isfinite(change.difference):
        return
    lost, error = -change.difference / change.before, _or_zero(change.standard_error) / change.before
    known = math.isfinite(change.standard_error)
    much = lost >= MUCH_DIVERSITY * (1 - 1e-9) and lost >= error
    if much or (known and lost >= LOST_DIVERSITY and lost >= ERRORS * error):
        yield RunWarning(
            "diversity-fell",
            f"Diversity fell by {lost:.0%}, {numbers_of(change)}: pictures of different prompts have become more "
            "alike. Try fewer steps, truncation 'random' or a distance_weight.",
            "diversity",
        )


def _status(status: str) -> Iterator[RunWarning]:
    if status and status != "completed" and not status.startswith(PATIENCE):
        yield RunWarning("not-finished", f"The run did not go to its end: {status}.")


PATIENCE = "no better"
"""How the status of a run begins that `patience` ended, which is an end like any other."""


def _evidence(look: _Looks) -> Iterator[RunWarning]:
    if not look.changes and (look.before is None or look.after is None):
        yield RunWarning(
            "no-evidence",
            "Nothing was measured on held-out prompts: there is no evidence that this adapter improves pictures.",
        )
    elif look.pictures < FEW:
        count = f"{look.pictures:.0f} picture{'s' * (look.pictures != 1)}"
        yield RunWarning("few-pictures", f"The evidence is of {count}: what changed may be chance.")


def _from_to(change: Change) -> str:
    return f"from {change.before:.3g} to {change.after:.3g}"


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def best_of(looks: Sequence[Evidence], keep_best: bool | str) -> Evidence | None:
    """The evaluation of the adapter that is kept: the first of the best by `merit`, or without `keep_best` the newest.

    An evaluation with a reward or merit that is not finite is never it. Evaluations that an earlier version wrote know
    no merit and are compared by their reward, as they were then.
    """
    known = [look for look in looks if all(map(math.isfinite, (look.reward, *look.merit)))]
    if not keep_best:
        return known[-1] if known and known[-1] is looks[-1] else None
    return max(known, key=lambda look: look.merit or (look.reward,), default=None)
