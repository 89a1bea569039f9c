"""Rewards of rewards: brought to one scale, all at once, good enough, only watched. Scores of the children in, one out.

`zscore` and `scaled` need statistics of the base model's pictures. `align` measures them once before the first step,
`calibrate` on pictures at hand; afterwards they are arguments like any other, so the reward's text repeats the run.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Scores, Targets
from alignprop_pipe.rewards.base import Combination, Reward
from alignprop_pipe.rewards.entries import RewardEntry

SCORED_AT_ONCE = 8


def calibrate(reward: Reward, images: Images, prompts: list[str], targets: Targets | None = None) -> Reward:
    """The reward with the statistics that it lacks measured on these pictures; the reward itself where it lacks none.

    Nothing is trained and nothing changed in place; `str()` of the result holds the numbers. Networks run where the
    images are, a few pictures at a time. Raises RewardError where a reward has no spread on these pictures.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import calibrate, parse_reward
        >>> pictures = torch.tensor([0.25, 0.75]).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        >>> str(calibrate(parse_reward("zscore(brightness)"), pictures, ["", ""], {}))
        'zscore(brightness, mean=0.5, std=0.3536)'
    """
    if len(prompts) != len(images):
        raise RewardError(f"{len(images)} images but {len(prompts)} prompts: one each is needed")
    return reward.calibrated(images.detach(), list(prompts), targets or {})


class OfOne(Combination):
    """Base of the rewards that change the score of one other. The total is logged as `zscore_clip`."""

    reward: Reward

    @property
    def label(self) -> str:
        return f"{self.name}_{self.reward.name}"


# --- one scale -------------------------------------------------------------------------------------------------------


class Measured(OfOne):
    """Base of `zscore` and `scaled`. `statistics` are the two numbers by the names of their arguments, or nothing."""

    statistics: dict[str, float]

    def measure(self, scores: Tensor) -> dict[str, float]:
        """The statistics of these scores, [pictures] in float64."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        return bool(self.statistics) and super().is_calibrated

    def calibrated(self, images: Images, prompts: list[str], targets: Targets) -> Reward:
        if self.is_calibrated:
            return self
        inner = self.reward.calibrated(images, prompts, targets)
        known = self.statistics or self.measure(self._scores(inner, images, prompts, targets))
        return type(self)(inner, **known)  # pyright: ignore[reportCallIssue]: subclasses take just these

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score the images. Raises RewardError as long as the statistics are not known."""
        if not self.statistics:
            raise RewardError(
                f"{self} cannot score yet: its statistics are those of the base model's pictures. align() measures "
                "them at its start; elsewhere call alignprop_pipe.rewards.calibrate(reward, images, prompts), or "
                f"write numbers into the expression, such as {self._example()}"
            )
        return super().__call__(images, prompts, targets)

    def _example(self) -> str:
        raise NotImplementedError

    def _scores(self, inner: Reward, images: Images, prompts: list[str], targets: Targets) -> Tensor:
        """The scores of all pictures, a few at a time; refuses fewer than two, and what is not finite."""
        if len(images) < 2:
            raise RewardError(
                f"{self} needs two pictures or more to measure a spread, and got {len(images)}; give more, or write "
                f"numbers into the expression, such as {self._example()}"
            )
        scores = []
        for first in range(0, len(images), SCORED_AT_ONCE):
            part = slice(first, first + SCORED_AT_ONCE)
            columns = {name: list(values)[part] for name, values in targets.items()}
            scores.append(inner(images[part], prompts[part], columns).total.detach().cpu().double())
        joined = torch.cat(scores)
        if not joined.isfinite().all():
            raise RewardError(f"{self}: {inner} gives scores that are not finite on the base model's pictures")
        return joined

    def _refuse_no_spread(self, centre: float, spread: float, count: int, way_out: str) -> None:
        # Rounding in float32 gives equal pictures scores that differ by about 1e-7 of their size.
        if spread <= 1e-6 * abs(centre) or spread < 1e-30:
            raise RewardError(
                f"{self}: {self.reward} gives the base model's {count} pictures the same score, {centre:.4g}, so "
                f"there is no spread to divide by; {way_out}"
            )


class ZScore(Measured):
    """`(score - mean) / std`, mean and standard deviation those of the base model's pictures.

    Without a unit, so that weights mean something: in `zscore(aesthetic) + 0.5*zscore(clip)` one standard deviation
    of the first is worth two of the second. `zscore(clip, mean=0.71, std=0.08)` measures nothing.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import calibrate, parse_reward
        >>> pictures = torch.linspace(0, 1, 21).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        >>> zscore = calibrate(parse_reward("zscore(brightness)"), pictures, [""] * 21, {})
        >>> zscore(torch.full((1, 3, 8, 8), 0.5), [""]).total.abs()
        tensor([0.])
    """

    name = "zscore"
    entry = RewardEntry(
        summary="a reward in standard deviations from the base model's mean, measured at the start: zscore(clip)",
        licence="no weights",
        range_text="about -3 to 3 for the base model's pictures",
        combines=True,
    )

    def __init__(self, reward: Reward, mean: float | int | None = None, std: float | int | None = None) -> None:
        self.reward = only_reward(self.name, reward)
        self.statistics = _both(self.name, mean=mean, std=std)
        if self.statistics and self.statistics["std"] <= 0:
            raise RewardError(f"zscore(std={std}): a standard deviation over 0 is needed")

    def combine(self, totals: list[Rewards]) -> Rewards:
        return (totals[0] - self.statistics["mean"]) / self.statistics["std"]

    def measure(self, scores: Tensor) -> dict[str, float]:
        mean, std = scores.mean().item(), scores.std().item()
        self._refuse_no_spread(mean, std, len(scores), "take it out of zscore, or out of the reward")
        return {"mean": _rounded(mean, std), "std": _rounded(std, std)}

    def _example(self) -> str:
        return f"zscore({self.reward}, mean=0.71, std=0.08)"


class Scaled(Measured):
    """`(score - low) / (high - low)`: 0 at the 5th and 1 at the 95th percentile of the base model's pictures.

    Percentiles, so that one odd picture does not decide. Not cut off: better than the base is over 1, and
    `clip_above(scaled(clip), 1)` stops pulling there. `scaled(clip, low=0.6, high=0.8)` measures nothing; `low` may
    be the higher number, which turns the reward round.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import calibrate, parse_reward
        >>> pictures = torch.linspace(0, 1, 21).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        >>> scaled = calibrate(parse_reward("scaled(brightness)"), pictures, [""] * 21, {})
        >>> scaled(torch.full((1, 3, 8, 8), 0.5), [""]).total
        tensor([0.5000])
    """

    name = "scaled"
    entry = RewardEntry(
        summary="a reward between the base model's 5th and 95th percentile, measured at the start: scaled(clip)",
        licence="no weights",
        range_text="0 to 1 for nine in ten of the base model's pictures",
        combines=True,
    )

    def __init__(self, reward: Reward, low: float | int | None = None, high: float | int | None = None) -> None:
        self.reward = only_reward(self.name, reward)
        self.statistics = _both(self.name, low=low, high=high)
        if self.statistics and low == high:
            raise RewardError(f"scaled(low={low}, high={high}): two different numbers are needed")

    def combine(self, totals: list[Rewards]) -> Rewards:
        low, high = self.statistics["low"], self.statistics["high"]
        return (totals[0] - low) / (high - low)

    def measure(self, scores: Tensor) -> dict[str, float]:
        low, high = torch.quantile(scores, scores.new_tensor([0.05, 0.95])).tolist()
        self._refuse_no_spread(low, high - low, len(scores), "use zscore, or take it out of the reward")
        return {"low": _rounded(low, high - low), "high": _rounded(high, high - low)}

    def _example(self) -> str:
        return f"scaled({self.reward}, low=0.6, high=0.8)"


# --- all of them at once ---------------------------------------------------------------------------------------------


class Min(Combination):
    """The smallest of the scores, picture by picture: a picture is as good as its worst side.

    The gradient goes to the smallest one alone. Scores of different units are not comparable: bring them to one scale
    first, as in `min(zscore(clip), zscore(aesthetic))`. The largest is `-min(-a, -b)`.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import parse_reward
        >>> parse_reward("min(brightness, symmetry)")(torch.ones(1, 3, 8, 8), [""]).total.abs()
        tensor([0.])
    """

    name = "min"
    entry = RewardEntry(
        summary="all of them at once, the smallest score counts: min(zscore(clip), zscore(jpeg))",
        licence="no weights",
        range_text="that of the rewards inside",
        combines=True,
    )

    def __init__(self, *rewards: Reward) -> None:
        _several(self.name, rewards)

    def combine(self, totals: list[Rewards]) -> Rewards:
        return torch.stack(totals).min(dim=0).values  # of equal ones, one gets the gradient


class SoftMin(Combination):
    """A smooth minimum, `-t * log(mean(exp(-score / t)))`, picture by picture: between the least score and the mean.

    Every reward gets gradient, the smallest the most: softmax(-score / t). `temperature` t has the unit of the scores:
    near 0 it is `min`, far above their differences it is the mean. Scores of different units are not comparable: bring
    them to one scale first, as in `softmin(zscore(clip), zscore(aesthetic))`, where t = 1 is one standard deviation.

    Examples:
        >>> from alignprop_pipe.rewards import parse_reward
        >>> str(parse_reward("softmin(zscore(clip), zscore(jpeg), temperature=0.5)"))
        'softmin(zscore(clip), zscore(jpeg), temperature=0.5)'
    """

    name = "softmin"
    entry = RewardEntry(
        summary="all of them at once, smoothly: softmin(zscore(clip), zscore(jpeg), temperature=1.0)",
        licence="no weights",
        range_text="between the smallest of the rewards inside and their mean",
        combines=True,
    )

    def __init__(self, *rewards: Reward, temperature: float | int = 1.0) -> None:
        _several(self.name, rewards)
        self.temperature = number_for(self.name, "temperature", temperature)
        if self.temperature <= 0:
            raise RewardError(f"softmin(temperature={temperature}): a number over 0 is needed; for 0 use min")

    def combine(self, totals: list[Rewards]) -> Rewards:
        spread = torch.logsumexp(-torch.stack(totals) / self.temperature, dim=0) - math.log(len(totals))
        return -self.temperature * spread


# --- brakes and watchers ---------------------------------------------------------------------------------------------


class ClipAbove(OfOne):
    """`min(score, value)`: past `value` a picture is good enough, and its gradient stops.

    A brake on over-optimisation. For a reward that shall stay low, put the minus inside: `clip_above(-tv, -0.02)`.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import parse_reward
        >>> parse_reward("clip_above(brightness, 0.4)")(torch.ones(1, 3, 8, 8), [""]).total
        tensor([0.4000])
    """

    name = "clip_above"
    entry = RewardEntry(
        summary="good enough at a value, where the gradient stops: clip_above(zscore(clip), 2)",
        licence="no weights",
        range_text="that of the reward inside, up to the value",
        combines=True,
    )

    def __init__(self, reward: Reward, value: float | int) -> None:
        self.reward = only_reward(self.name, reward)
        self.value = number_for(self.name, "value", value)

    def combine(self, totals: list[Rewards]) -> Rewards:
        return totals[0].clamp(max=self.value)


class Watch(Combination):
    """Logs a reward in training without training on it: 0 in the total, no gradient; a judge may stand here too.

    `clip + watch(jpeg)`; weights make no difference. Judges of the held-out pictures alone are cheaper: `judges=`.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import parse_reward
        >>> scores = parse_reward("brightness + watch(sharpness)")(torch.ones(1, 3, 8, 8), [""])
        >>> scores.total, "sharpness" in scores.parts
        (tensor([1.]), True)
    """

    name = "watch"
    entry = RewardEntry(
        summary="logged in training, never trained on: clip + watch(jpeg)",
        licence="no weights",
        range_text="0; what it watches is logged",
        combines=True,
    )

    def __init__(self, reward: Reward) -> None:
        self.reward = only_reward(self.name, reward)

    def trained(self) -> Iterator[Reward]:
        return iter(())

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Zeros for the total, and the parts of what is watched."""
        scores = self.reward(images.detach(), prompts, targets)
        return Scores(torch.zeros_like(scores.total), scores.parts)


# --- arguments -------------------------------------------------------------------------------------------------------


def only_reward(name: str, reward: Any) -> Reward:
    """The argument, where it is a reward that another can hold. Raises RewardError."""
    if not isinstance(reward, Reward):
        raise RewardError(f"{name}: a reward is needed, as in {name}(clip, ...), not {reward!r}")
    if isinstance(reward, Watch):
        raise RewardError(f"{name}: {reward} is always 0 and would be compared as such; add it outside: ... + {reward}")
    return reward


def _several(name: str, rewards: tuple[Any, ...]) -> None:
    if len(rewards) < 2:
        raise RewardError(f"{name}: two rewards or more are needed, as in {name}(clip, jpeg), not {len(rewards)}")
    for reward in rewards:
        only_reward(name, reward)


def number_for(name: str, argument: str, value: Any) -> float:
    """The argument as a float. Raises RewardError unless it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # also NaN, and whole numbers of 400 digits
        raise RewardError(f"{name}({argument}={value!r}): a finite number is needed")
    return float(value)


def _both(name: str, **numbers: Any) -> dict[str, float]:
    """Two numbers by name, or nothing where neither was given."""
    if all(value is None for value in numbers.values()):
        return {}
    for argument, value in numbers.items():
        if value is None:
            raise RewardError(f"{name}: {argument}= is missing; give both {' and '.join(numbers)}, or neither")
    return {argument: number_for(name, argument, value) for argument, value in numbers.items()}


def _rounded(value: float, spread: float) -> float:
    """To a ten-thousandth of the spread: the text stays short, and what it says is what the run uses."""
    return round(value, 3 - math.floor(math.log10(spread))) + 0.0
