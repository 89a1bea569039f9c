"""The choices that a setting can hold, as small frozen values: gradient checkpointing, loss, window.

Text becomes a value once, at the edge; `str(value)` gives the text back. Standard library only.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from alignprop_pipe.errors import ConfigError


def is_whole(value: Any) -> bool:
    """Whether this is a whole number; Python counts True and False among them, a setting does not."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_float(name: str, number: float) -> float:
    """The number as a float. Raises ConfigError for one that is too large."""
    try:
        return float(number)
    except OverflowError:
        raise ConfigError(f"{name} is a whole number of more than 300 digits: a smaller number is needed") from None


def _finite(name: str, value: Any) -> float:
    if not (is_whole(value) or isinstance(value, float)) or not math.isfinite(number := as_float(name, value)):
        raise ConfigError(f"{name}={value!r}): a finite number is needed")
    return number


# --- gradient checkpointing: which graded steps are computed twice ---


@dataclass(frozen=True, slots=True)
class RecomputeAll:
    """Every graded step is recomputed in the backward pass: least memory, flat in the number of steps.

    Examples:
        >>> from alignprop_pipe import AlignConfig, RecomputeAll
        >>> AlignConfig().replace(checkpointing="all").checkpointing == RecomputeAll()
        True
    """

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class RecomputeNone:
    """Every graded step keeps its activations: fastest, memory grows with K.

    Examples:
        >>> from alignprop_pipe import AlignConfig, RecomputeNone
        >>> AlignConfig().replace(checkpointing="none").checkpointing == RecomputeNone()
        True
    """

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class KeepSteps:
    """`steps` graded steps (the last ones) keep their activations, the others are recomputed.

    Examples:
        >>> from alignprop_pipe import AlignConfig, KeepSteps
        >>> AlignConfig().replace(checkpointing=2).checkpointing == KeepSteps(2)
        True
    """

    steps: int

    def __post_init__(self) -> None:
        if not is_whole(self.steps) or self.steps < 0:
            raise ConfigError(f"KeepSteps(steps={self.steps!r}): a number of graded steps, 0 or more, is needed")

    def __str__(self) -> str:
        return str(self.steps)


Checkpointing = RecomputeAll | RecomputeNone | KeepSteps


def checkpointing_from_text(text: str) -> Checkpointing:
    """`all`, `none` or a number of graded steps to keep -> the value. Raises ConfigError."""
    text = text.strip().lower()
    if text == "all":
        return RecomputeAll()
    if text == "none":
        return RecomputeNone()
    try:
        return KeepSteps(int(text))
    except ValueError:  # a ConfigError too: KeepSteps(-1)
        raise ConfigError(
            f"checkpointing {text!r} is not known; use one of: all, none, or a number of graded steps to keep"
        ) from None


# --- losses: what the optimizer makes of the rewards ---


@dataclass(frozen=True, slots=True)
class Maximize:
    """loss = -mean(reward).

    Examples:
        >>> from alignprop_pipe import AlignConfig, Maximize
        >>> AlignConfig().loss == Maximize()
        True
    """

    def __str__(self) -> str:
        return "maximize"


@dataclass(frozen=True, slots=True)
class Target:
    """loss = mean(|reward - value|); the paper's aesthetic run aims at 10.

    Examples:
        >>> from alignprop_pipe import AlignConfig, Target
        >>> AlignConfig().replace(loss="target:0.5").loss == Target(0.5)
        True
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _finite("Target(value", self.value))

    def __str__(self) -> str:
        return f"target:{self.value!r}"


@dataclass(frozen=True, slots=True)
class Hinge:
    """loss = mean(relu(margin - reward)): pictures past the margin pull no more (ReFL uses 2).

    Examples:
        >>> from alignprop_pipe import AlignConfig, Hinge
        >>> AlignConfig().replace(loss="hinge:0.8").loss == Hinge(0.8)
        True
    """

    margin: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", _finite("Hinge(margin", self.margin))

    def __str__(self) -> str:
        return f"hinge:{self.margin!r}"


Loss = Maximize | Target | Hinge


def loss_from_text(text: str) -> Loss:
    """`maximize`, `target:10` or `hinge:2` -> the value. Raises ConfigError."""
    name, _, rest = text.strip().lower().partition(":")
    try:
        if name == "maximize" and not rest:
            return Maximize()
        if name in ("target", "hinge"):
            return Target(float(rest)) if name == "target" else Hinge(float(rest))
    except ValueError:  # a ConfigError too: target:nan
        pass
    raise ConfigError(f"loss {text!r} is not known; use one of: maximize, target:10, hinge:2")


# --- window: in which denoising steps an adapter works ---

_NUMBER = r"\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*"


@dataclass(frozen=True, slots=True)
class Window:
    """The share of the denoising steps, from `start` to before `end`, in which an adapter works; outside the base does.

    0 is the first step, at full noise, and 1 the end. The windows 0.0-0.6 and 0.6-1.0 share no step and leave none out.

    Examples:
        >>> from alignprop_pipe import Window
        >>> Window(0.0, 0.6).steps(10)
        range(0, 6)
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = _finite(f"Window({name}", getattr(self, name))
            object.__setattr__(self, name, value + 0.0)  # the text of minus nought could not be read back
        if not 0 <= self.start <= self.end <= 1:
            raise ConfigError(
                f"Window(start={self.start!r}, end={self.end!r}): shares of the denoising steps with "
                "0 <= start <= end <= 1 are needed, for example 0.0-0.6 for the first 60 %"
            )

    @property
    def is_whole(self) -> bool:
        """Whether every step lies in it."""
        return (self.start, self.end) == (0, 1)

    def steps(self, num_steps: int) -> range:
        """The steps among `num_steps` that begin in the window."""
        first, end = (math.ceil(share * num_steps - 1e-9) for share in (self.start, self.end))
        return range(first, end)

    def __str__(self) -> str:
        return f"{self.start!r}-{self.end!r}"


def window_from_text(text: str) -> Window:
    """`0.0-0.6` -> the value. Raises ConfigError."""
    found = re.fullmatch(f"{_NUMBER}-{_NUMBER}", text.lower())
    if found is None:
        raise ConfigError(
            f"window {text!r} is not known; use two shares of the denoising steps between 0 and 1, such as 0.0-0.6"
        )
    return Window(float(found[1]), float(found[2]))


# --- which evaluation is the best one ---


def followed_from_text(text: str) -> bool | str:
    """`yes` and `no` as truths; `judge`, `reward` or a judge's name as they are. Raises ConfigError."""
    word = text.strip()
    if not word:
        raise ConfigError(f"keep_best = {text!r}: yes, no, judge, reward or a judge's name is needed")
    return {"yes": True, "true": True, "no": False, "false": False}.get(word.lower(), word)
