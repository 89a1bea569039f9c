"""Rules of truncation: which denoising steps carry gradient (AlignProp, section 3.3; DRaFT, arXiv 2309.17400).

A rule is a small frozen value that knows its text, its plan for a trajectory and what that costs. A new one is a class
here and a place in `RULES`: parsing, help, forecast and rollout ask the rule.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignprop_pipe.config.choices import is_whole
from alignprop_pipe.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Truncation(ABC):
    """Which steps of a trajectory carry gradient: always a tail, never empty."""

    keyword: ClassVar[str]
    """How its text begins."""
    examples: ClassVar[tuple[str, ...]]
    """Texts of it, for messages and help."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def from_rest(cls, rest: str) -> "Truncation":
        """The rule whose text has `rest` behind `keyword:`. Raises ValueError for none of its texts."""

    @abstractmethod
    def plan(self, num_steps: int, generator: "torch.Generator") -> range:
        """The graded steps of one trajectory of `num_steps` steps.

        Draws from `generator` at most once, so a trajectory has one plan from beginning to end.
        """

    @abstractmethod
    def expected(self, num_steps: int) -> float:
        """The mean number of graded steps."""

    @abstractmethod
    def most(self, num_steps: int) -> int:
        """The largest number of graded steps that a trajectory can have."""


@dataclass(frozen=True, slots=True)
class FullBackprop(Truncation):
    """Every denoising step carries gradient (DRaFT, arXiv 2309.17400; collapses early, AlignProp section 4).

    Examples:
        >>> from alignprop_pipe import FullBackprop
        >>> str(FullBackprop()), FullBackprop().expected(50)
        ('full', 50.0)
    """

    keyword = "full"
    examples = ("full",)

    @classmethod
    def from_rest(cls, rest: str) -> "FullBackprop":
        if rest:
            raise ValueError(rest)
        return cls()

    def plan(self, num_steps: int, generator: "torch.Generator") -> range:
        return range(num_steps)

    def expected(self, num_steps: int) -> float:
        return float(num_steps)

    def most(self, num_steps: int) -> int:
        return num_steps

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class LastK(Truncation):
    """The last `k` denoising steps carry gradient (DRaFT-K).

    Examples:
        >>> from alignprop_pipe import LastK
        >>> str(LastK(5)), LastK(5).expected(50)
        ('last:5', 5.0)
    """

    keyword = "last"
    examples = ("last:5",)

    k: int

    def __post_init__(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ConfigError(
                f"LastK(k={self.k!r}): k must be a whole number, 1 or more; with no graded step nothing is trained"
            )

    @classmethod
    def from_rest(cls, rest: str) -> "LastK":
        return cls(int(rest))

    def plan(self, num_steps: int, generator: "torch.Generator") -> range:
        return range(num_steps - self.most(num_steps), num_steps)

    def expected(self, num_steps: int) -> float:
        return float(self.most(num_steps))

    def most(self, num_steps: int) -> int:
        return min(self.k, num_steps)

    def __str__(self) -> str:
        return f"last:{self.k}"


@dataclass(frozen=True, slots=True)
class RandomLastK(Truncation):
    """The last K steps, K uniform on low..high, drawn once per trajectory (AlignProp, section 3.3).

    The paper draws from 0..T; K = 0 would train nothing, so `low` starts at 1. `high=None` means T.

    Examples:
        >>> from alignprop_pipe import RandomLastK
        >>> str(RandomLastK(1, 10)), RandomLastK(1, 10).expected(50), RandomLastK().most(50)
        ('random:1-10', 5.5, 50)
    """

    keyword = "random"
    examples = ("random", "random:1-10")

    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        whole = is_whole(self.low) and (self.high is None or is_whole(self.high))
        if not whole or self.low < 1 or (self.high is not None and self.high < self.low):
            raise ConfigError(
                f"RandomLastK(low={self.low!r}, high={self.high!r}): whole numbers with 1 <= low <= high are needed; "
                "high=None means every step"
            )

    @classmethod
    def from_rest(cls, rest: str) -> "RandomLastK":
        low, dash, high = rest.partition("-")
        if rest and not dash:
            raise ValueError(rest)
        return cls(int(low or 1), int(high) if high else None)

    def plan(self, num_steps: int, generator: "torch.Generator") -> range:
        import torch

        top = self.most(num_steps)
        k = int(torch.randint(min(self.low, top), top + 1, (), generator=generator))
        return range(num_steps - k, num_steps)

    def expected(self, num_steps: int) -> float:
        top = self.most(num_steps)
        return (min(self.low, top) + top) / 2

    def most(self, num_steps: int) -> int:
        return num_steps if self.high is None else min(self.high, num_steps)

    def __str__(self) -> str:
        if (self.low, self.high) == (1, None):
            return "random"
        return f"random:{self.low}-{'' if self.high is None else self.high}"


RULES: tuple[type[Truncation], ...] = (FullBackprop, LastK, RandomLastK)


def truncation_from_text(text: str) -> Truncation:
    """`full`, `last:5`, `random`, `random:1-10` or `random:3-` -> the rule. Raises ConfigError."""
    keyword, colon, rest = text.strip().lower().partition(":")
    for rule in RULES:
        if rule.keyword == keyword and (rest or not colon):
            try:
                return rule.from_rest(rest)
            except ConfigError:
                raise
            except ValueError:
                break
    known = ", ".join(example for rule in RULES for example in rule.examples)
    raise ConfigError(f"truncation {text!r} is not known; use one of: {known}")
