"""`Reward`: a value that scores images, differentiably; `Combination` and the weighted sum of several.

A reward remembers the arguments it was made with: `str(reward)` is the expression that makes it again
(`clip + 0.1*jpeg(quality=80)`), and two rewards are equal when they were made alike.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignprop_pipe.errors import RewardError, RewardGradientError, RewardShapeError
from alignprop_pipe.records import Images, Rewards, Scores, Targets
from alignprop_pipe.rewards.entries import RewardEntry


class Reward:
    """One score per image, higher is better. A subclass sets `name` and writes `score`.

    Calling a reward gives `Scores`: the total, with its gradient, and the parts for the log, without.

    Examples:
        >>> import torch
        >>> from alignprop_pipe import Reward
        >>> class Redness(Reward):
        ...     def score(self, images, prompts, targets):
        ...         return images[:, 0].mean(dim=(1, 2))
        >>> (Redness() + 0.5 * Redness())(torch.ones(2, 3, 8, 8), ["a fox", "a cat"]).total
        tensor([1.5000, 1.5000])
    """

    entry: ClassVar[RewardEntry | None] = None
    """What lists say of it: what it measures, its range, weights and licence. None: it is not listed."""
    name: str
    """The part's name in the log, and the reward's name in an expression."""
    trainable: bool = True
    """False: a judge, which is only watched."""
    leads: bool = True
    """False: `keep_best` follows this judge only where it is named, since the base model has its best score."""
    reads_prompts: bool = True
    """False: the prompts make no difference, so pictures can be scored without. A reward with `children` asks those."""

    _args: tuple[Any, ...] = ()
    _kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__.lower()
        carried = vars(cls).get("entry")
        where = f"{cls.__module__}:{cls.__qualname__}"
        cls.entry = None if carried is None else replace(carried, name=cls.name, where=where)

    def __new__(cls, *args: Any, **kwargs: Any):
        made = super().__new__(cls)
        made._args, made._kwargs = args, kwargs
        return made

    def __init__(self) -> None:
        # Here so that arguments which a reward does not take are refused: object.__init__ would ignore them.
        pass

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        """Differentiable scores of `images`, which are in [0, 1]; one prompt per image."""
        raise NotImplementedError(f"{type(self).__name__} must define score(images, prompts, targets)")

    def extras(self, images: Images, prompts: list[str], targets: Targets) -> Mapping[str, Tensor]:
        """Further values to log, one per image; never trained on. `images` come without gradient."""
        return {}

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score the images. Raises RewardShapeError unless there is one number per image."""
        count, targets = len(images), {} if targets is None else targets
        if len(prompts) != count:
            raise RewardError(f"reward {self.name!r} got {count} images but {len(prompts)} prompts: one each is needed")
        watched = images.detach()
        scores = self.score(images if self.trainable else watched, prompts, targets)
        total = check_scores(self.name, scores, count)
        extras = self.extras(watched, prompts, targets)
        parts = {name: check_shape(name, values, count).detach().float() for name, values in extras.items()}
        return Scores(total=total, parts={self.name: total.detach(), **parts})

    def children(self) -> tuple["Reward", ...]:
        """The rewards that this one was made from."""
        return tuple(_rewards_in([*self._args, *self._kwargs.values()]))

    def networks(self) -> list[nn.Module]:
        """The networks that are loaded, those of the rewards inside too."""
        own = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        return own + [network for child in self.children() for network in child.networks()]

    def trained(self) -> Iterator["Reward"]:
        """The rewards that gradient flows through: the reward itself, or those inside a combination."""
        yield self

    @property
    def label(self) -> str:
        """What the total is called in the log."""
        return self.name

    # --- statistics of the base model's pictures ---

    @property
    def is_calibrated(self) -> bool:
        """Whether every statistic is known that it, or a reward inside it, takes from the base model's pictures."""
        return all(child.is_calibrated for child in self.children())

    def calibrated(self, images: Images, prompts: list[str], targets: Targets) -> "Reward":
        """The same reward with the statistics that it lacks measured on these pictures; itself where it lacks none.

        Nothing is changed in place, and `str()` of the result holds the numbers.
        """
        if self.is_calibrated:
            return self
        return self.rebuilt(lambda child: child.calibrated(images, prompts, targets))

    def rebuilt(self, change: Callable[["Reward"], "Reward"]) -> "Reward":
        """The reward made again, with `change(child)` in the place of each child among its arguments."""
        return type(self)(*_mapped(self._args, change), **_mapped(self._kwargs, change))

    def to(self, device: torch.device | str) -> "Reward":
        """Move all networks that are loaded; the others load where the images are. Returns the reward itself."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)
        for child in self.children():
            child.to(device)
        return self

    # --- arithmetic ---

    def __add__(self, other: "Reward") -> "Reward":
        return WeightedSum(((1.0, self), (1.0, other))) if isinstance(other, Reward) else NotImplemented

    def __sub__(self, other: "Reward") -> "Reward":
        return WeightedSum(((1.0, self), (-1.0, other))) if isinstance(other, Reward) else NotImplemented

    def __mul__(self, weight: float | int) -> "Reward":
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            return NotImplemented
        made = WeightedSum(((weight, self),))
        # 2*(0.5*r) is r: a sum of one reward with weight 1 would have the text of r without being equal to it.
        return made.terms[0][1] if len(made.terms) == 1 and made.terms[0][0] == 1 else made

    __rmul__ = __mul__

    def __neg__(self) -> "Reward":
        return -1 * self

    # --- text and equality ---

    def __str__(self) -> str:
        given = [literal(value) for value in self._args]
        given += [f"{name}={literal(value)}" for name, value in self._kwargs.items()]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def __repr__(self) -> str:
        return f"<reward {self}>"

    def _made_with(self) -> dict[str, Any]:
        bound = inspect.signature(type(self).__init__).bind(self, *self._args, **self._kwargs)
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if value is not self}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Reward) and self._made_with() == other._made_with()

    def __hash__(self) -> int:
        return hash((type(self), self.name))


class Combination(Reward):
    """Arithmetic on the scores of other rewards: a subclass writes `combine`.

    Logs its own total, as `label`, and the parts of its children under their own names.
    """

    def combine(self, totals: list[Rewards]) -> Rewards:
        """The total from those of the children, in their order."""
        raise NotImplementedError(f"{type(self).__name__} must define combine(totals)")

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score with every child, and combine."""
        scored = [child(images, prompts, targets) for child in self.children()]
        total = self.combine([scores.total for scores in scored])
        return Scores(total, merge_parts([{self.label: total.detach()}, *(scores.parts for scores in scored)]))

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        return self(images, prompts, targets).total

    def trained(self) -> Iterator[Reward]:
        for child in self.children():
            yield from child.trained()


class WeightedSum(Combination):
    """A sum of rewards with weights. Its parts are those of its terms, unweighted, under their own names.

    Sums inside sums are multiplied out: `2*(a - 0.5*b)` is `2*a - b`.

    Examples:
        >>> from alignprop_pipe.rewards import Brightness, Jpeg, WeightedSum
        >>> both = Brightness() + 0.1 * Jpeg()
        >>> isinstance(both, WeightedSum), str(both)
        (True, 'brightness + 0.1*jpeg')
    """

    name = "sum"

    def __init__(self, terms: Iterable[tuple[float | int, Reward]]) -> None:
        flat: list[tuple[float, Reward]] = []
        for weight, reward in terms:
            inner = reward.terms if isinstance(reward, WeightedSum) else ((1.0, reward),)
            flat += [(_product(weight, share, part), part) for share, part in inner]
        if not flat:
            raise RewardError("a sum of no rewards: at least one is needed")
        self.terms: tuple[tuple[float, Reward], ...] = tuple(flat)
        self.trainable = all(reward.trainable for _, reward in flat)

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score with every term: the total is their weighted sum."""
        scored = [reward(images, prompts, targets) for _, reward in self.terms]
        zero = scored[0].total.new_zeros(())
        total = sum((weight * scores.total for (weight, _), scores in zip(self.terms, scored, strict=True)), start=zero)
        return Scores(total=total, parts=merge_parts(scores.parts for scores in scored))

    def children(self) -> tuple[Reward, ...]:
        return tuple(reward for _, reward in self.terms)

    @property
    def label(self) -> str:
        return str(self)

    def rebuilt(self, change: Callable[[Reward], Reward]) -> Reward:
        return WeightedSum([(weight, change(reward)) for weight, reward in self.terms])

    def __str__(self) -> str:
        text = ""
        for weight, reward in self.terms:
            sign = "-" if weight < 0 else "+"
            text += f" {sign} " if text else sign.replace("+", "")
            size = abs(weight)
            text += f"{reward}" if size == 1 else f"{int(size) if size < 1e15 and size.is_integer() else size}*{reward}"
        return text

    def _made_with(self) -> dict[str, Any]:
        return {"terms": self.terms}


def members(reward: Reward) -> Iterator[Reward]:
    """The reward and every reward inside it."""
    yield reward
    for child in reward.children():
        yield from members(child)


def merge_parts(groups: Iterable[Mapping[str, Rewards]]) -> dict[str, Rewards]:
    """All parts in one mapping; the second of the same name becomes `name_2`."""
    merged: dict[str, Rewards] = {}
    for parts in groups:
        for name, values in parts.items():
            key, number = name, 1
            while key in merged:
                number += 1
                key = f"{name}_{number}"
            merged[key] = values
    return merged


def literal(value: Any) -> str:
    """An argument as it is written in an expression."""
    if isinstance(value, str | Path):
        # Half a surrogate pair, as in a file name that is not UTF-8, cannot stand in a file: it is escaped.
        return json.dumps(str(value), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(inner) for inner in value) + "]"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return str(value) if isinstance(value, Reward) else repr(value)


def _product(weight: float | int, share: float, reward: Reward) -> float:
    try:
        product = float(weight) * share
    except OverflowError:
        product = math.inf
    if not math.isfinite(product):
        raise RewardError(f"the weight of {reward} is {product}: a finite number is needed")
    return product


def _rewards_in(value: Any) -> Iterator[Reward]:
    if isinstance(value, Reward):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _rewards_in(inner)
    elif isinstance(value, Mapping):
        yield from _rewards_in(list(value.values()))


def _mapped(value: Any, change: Callable[[Reward], Reward]) -> Any:
    """The value with every reward inside it changed."""
    if isinstance(value, Reward):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(inner, change) for inner in value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return value


def check_shape(name: str, scores: Any, count: int) -> Tensor:
    """The scores themselves, when they are one number per image. Raises RewardShapeError."""
    if not isinstance(scores, Tensor):
        raise RewardShapeError(
            f"reward {name!r} returned {type(scores).__name__} for {count} images; a torch tensor of shape ({count},) "
            "is needed, computed from the images by torch operations: NumPy arrays and Python numbers carry no gradient"
        )
    if tuple(scores.shape) != (count,):
        splits = scores.numel() % count == 0
        way_out = f"scores.reshape({count}, -1).mean(dim=1)" if splits else "images.mean(dim=(1, 2, 3))"
        raise RewardShapeError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {count} images; one score per image is needed: "
            f"return a tensor of shape ({count},), for example {way_out}"
        )
    return scores


def check_scores(name: str, scores: Any, count: int) -> Rewards:
    """As `check_shape`, and of a type that can carry gradient."""
    scores = check_shape(name, scores, count)
    if not scores.is_floating_point():
        raise RewardGradientError(
            f"reward {name!r} returned {scores.dtype} values, which carry no gradient; compute the score in floating "
            "point from the images on: counting, comparing and rounding have no slope"
        )
    return scores
