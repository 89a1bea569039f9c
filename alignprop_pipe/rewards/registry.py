"""The rewards that can be asked for by name, users' own among them, and text -> reward.

Importing this module loads no torch.
"""

import dataclasses
import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from alignprop_pipe.config.code import BY_TEXT, refuse_code
from alignprop_pipe.config.expression import read_expression
from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.entries import ENTRIES, RewardEntry

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward

logger = logging.getLogger(__name__)

REGISTRY: dict[str, RewardEntry] = {entry.name: entry for entry in ENTRIES}
GROUP = "alignprop.rewards"
"""The group of entry points in which an installed package names rewards of its own."""
_asked: set[EntryPoint] = set()


def parse_reward(text: str, accept_license: bool = False, allow_code: bool = False) -> "Reward":
    """`clip + 0.1*jpeg(quality=80) - tv` -> the reward. `str()` of it gives the text back.

    Terms are names of `REGISTRY`, with arguments or without; they are added, subtracted, and multiplied with numbers.
    `accept_license` adds `accept_license=True` to the terms that need it, so that the text of the result can be read
    again. `allow_code` is for texts that you typed yourself: then `module:function` and `file.py:function` are terms
    too, and what they name is imported. Without it, nothing outside this package is imported or called, and a text
    that names code is refused before anything in it is made, unless the code was named by `--import` before.

    Raises RewardError that points at the character.

    Examples:
        >>> from alignprop_pipe import parse_reward
        >>> str(parse_reward("jpeg(quality=60) - 0.5*tv"))
        'jpeg(quality=60) - 0.5*tv'
    """
    if not allow_code:
        refuse_code(text)

    def make(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Reward":
        needs = accept_license and name in REGISTRY and REGISTRY[name].needs_acceptance
        kwargs = {**kwargs, "accept_license": kwargs.get("accept_license", True)} if needs else kwargs
        return _made(name, args, kwargs, allow_code)

    value = read_expression(text, make)
    from alignprop_pipe.rewards.base import Reward

    if not isinstance(value, Reward):
        raise RewardError(f"{text!r} is no reward; use names and numbers, for example: clip + 0.1*jpeg")
    return value


def register(
    name: str,
    reward: Any = None,
    *,
    summary: str = "",
    range_text: str = "",
    licence: str = "",
    replace: bool = False,
) -> Any:
    """Give a reward of your own a name for expressions: `@register("warmth")`, or `register("warmth", reward)`.

    `reward` is a function of images (and prompts, and targets), whose other arguments are given by keyword; a subclass
    of `Reward`, whose `name` becomes this one; or a reward that is made already, for whose expression the name is
    short. The texts are for the list. Where they are not given, a class's own `entry`
    says them, else `summary` is the first line of the docstring. Returns `reward`.

    Raises RewardError for a name that is taken (by a reward of your own: `replace=True` puts this in its place; the
    same function from the same file always does) or that cannot stand in an expression.

    Examples:
        >>> from alignprop_pipe.rewards import parse_reward, register
        >>> @register("example_redness", summary="how red", replace=True)
        ... def redness(images):
        ...     return images[:, 0].mean(dim=(1, 2))
        >>> str(parse_reward("clip + 0.5*example_redness"))
        'clip + 0.5*example_redness'
    """
    if reward is None:
        about = {"summary": summary, "range_text": range_text, "licence": licence, "replace": replace}
        return lambda found: register(name, found, **about)
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.rewards.scorers.python import named, reference

    _check_name(name)
    where, taken = reference(reward), REGISTRY.get(name)
    again = taken is not None and taken.where == where and hasattr(reward, "__qualname__")
    if taken is not None and (taken.registered is None or not (replace or again)):
        way_out = "choose another" if taken.registered is None else "choose another, or give replace=True"
        raise RewardError(f"the reward name {name!r} is taken by {taken.where}; {way_out}")
    other = next((one.name for one in REGISTRY.values() if one.registered is reward and one.name != name), None)
    if other is not None:
        raise RewardError(f"{reward.__name__} is registered as {other!r}; a class has one name: make a subclass of it")
    if isinstance(reward, type) and issubclass(reward, Reward):
        reward.name, made_by = name, reward
    elif callable(reward):
        made_by = named(name, reward)
    else:
        raise RewardError(
            f"register({name!r}, ...) got {type(reward).__name__}; a function of images or a Reward is needed"
        )
    first_line = str(reward) if isinstance(reward, Reward) else (inspect.getdoc(reward) or "").partition("\n")[0]
    of_class = reward.entry if isinstance(reward, type) and issubclass(reward, Reward) else None
    carried = of_class or RewardEntry(summary=first_line, licence="yours")
    given = {"summary": summary, "range_text": range_text, "licence": licence}
    given = {field: text for field, text in given.items() if text}
    REGISTRY[name] = dataclasses.replace(carried, **given, name=name, where=where, registered=made_by)
    return reward


def register_installed() -> None:
    """Register the rewards that installed packages name as entry points of the group `alignprop.rewards`, once.

    Each is what `register` takes, under the entry point's name. One that cannot be loaded, or whose name is taken, is
    told and left out.
    """
    for point in entry_points(group=GROUP):
        if point not in _asked:
            _asked.add(point)
            try:
                register(point.name, point.load())
            except Exception as error:  # whatever somebody else's package raises when it is imported
                logger.warning("the reward %r of %r is left out: %s", point.name, point.value, error)


def _check_name(name: str) -> None:
    """Raises RewardError for a name that an expression would not read as this one name."""
    read: list[str] = []

    def note(found: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        read.append(found)
        return len(args) + len(kwargs)

    try:
        read_expression(f"1*{name} + {name}(1)", note)
    except RewardError:
        read = []
    if read != [name, name] or ":" in name:
        raise RewardError(
            f"{name!r} cannot be the name of a reward: letters, digits and _ are needed, also with dots between "
            "('style2.1'), no digit first, and no word of Python such as 'in'"
        )


def as_reward(source: "Reward | str | Callable[..., Any]") -> "Reward":
    """Make a reward of a reward, an expression, or any Python function that keeps the gradient.

    An expression is taken as typed by you and may name code; use `parse_reward` for one that came from elsewhere.

    Examples:
        >>> import torch
        >>> from alignprop_pipe import as_reward
        >>> as_reward(lambda images: images.mean(dim=(1, 2, 3)))(torch.ones(1, 3, 8, 8), [""]).total
        tensor([1.])
    """
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.rewards.scorers.python import PythonReward

    if isinstance(source, Reward):
        return source
    if isinstance(source, str):
        return parse_reward(source, allow_code=True)
    if callable(source):
        return source() if isinstance(source, type) and issubclass(source, Reward) else PythonReward(source)
    raise RewardError(
        f"a reward cannot be made of {type(source).__name__}: give an expression such as 'clip + 0.1*jpeg', a Reward, "
        "or a function of (images), (images, prompts) or (images, prompts, targets)"
    )


def _made(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], allow_code: bool) -> "Reward":
    if ":" in name:
        name, args = BY_TEXT, (name, *args)
    if name not in REGISTRY:
        register_installed()
    if name not in REGISTRY:
        close = difflib.get_close_matches(name.lower(), REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(REGISTRY))}"
        raise RewardError(f"reward {name!r} is not known; {hint}")
    if name == BY_TEXT and not allow_code:
        from alignprop_pipe.rewards.scorers.python import check_own

        check_own(*(text for text in (*args, kwargs.get("source")) if isinstance(text, str)))
    return REGISTRY[name].make(*args, **kwargs)
