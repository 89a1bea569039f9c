"""Rewards of the user's own: any Python function of images that keeps the gradient, given or named in text."""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from alignprop_pipe.config import code
from alignprop_pipe.config.expression import REFERENCE
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Scores, Targets
from alignprop_pipe.rewards.base import Reward, check_scores, literal
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.sources import expanded, is_file

_INPUTS = ("images", "prompts", "targets")
_FILE_MODULE = "alignprop_reward_"
_STAMP = "__alignprop_stamp__"
"""Time of change and size of the file, kept in its module: a file that has changed is another one."""


class PythonReward(Reward):
    """A function of (images), (images, prompts) or (images, prompts, targets) as a reward.

    Args:
        source: where the function is: module:function, or file.py:function with the path relative to the current
            folder; in Python also the function itself, a `Reward`, a `torch.nn.Module`, or a class of these two.
        options: passed on as keyword arguments.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import PythonReward
        >>> brightness = PythonReward(lambda images, factor: factor * images.mean(dim=(1, 2, 3)), factor=2)
        >>> brightness(torch.ones(1, 3, 8, 8), [""]).total
        tensor([2.])
    """

    name = "python"
    entry = RewardEntry(
        summary="your own: module:function or file.py:function, called with images (and prompts, and targets)",
        licence="yours",
        range_text="that of your function",
    )

    def __init__(self, source: str | Callable[..., Any], **options: Any) -> None:
        found = resolve(source) if isinstance(source, str) else source
        if isinstance(found, type):
            found, options = _instance(source, found, options), {}
        if not callable(found):
            raise RewardError(f"{source!r} is {type(found).__name__}: a function of images is needed")
        self.inner, self.options = found, options
        self.name = _name(source, found)
        if isinstance(found, Reward):
            self.trainable = found.trainable
            if options:
                raise RewardError(f"{source!r} is made already and takes no {', '.join(options)}")
        else:
            told = object()
            args, kwargs = _arguments(self.name, found, {**dict.fromkeys(_INPUTS), "prompts": told}, options)
            self.reads_prompts = any(value is told for value in (*args, *kwargs.values()))

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        if isinstance(self.inner, Reward):
            return self.inner(images, prompts, targets).total
        given = {"images": images, "prompts": prompts, "targets": targets}
        args, kwargs = _arguments(self.name, self.inner, given, self.options)
        return check_scores(self.name, self.inner(*args, **kwargs), len(images))

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score the images; a `Reward` inside logs its own parts."""
        return (self.inner if isinstance(self.inner, Reward) else super().__call__)(images, prompts, targets)

    def children(self) -> tuple[Reward, ...]:
        return (self.inner,) if isinstance(self.inner, Reward) else ()

    def networks(self) -> list[nn.Module]:
        """The function itself where it is a network, and those that it uses by name."""
        function = getattr(self.inner, "func", self.inner)  # of a functools.partial
        used: list[Any] = (
            [getattr(function, "__self__", None), *vars(function).values()] if hasattr(function, "__dict__") else []
        )
        try:
            names = inspect.getclosurevars(function)
            used += [*names.nonlocals.values(), *names.globals.values()]
        except TypeError:  # no Python function
            pass
        found = {id(one): one for one in (*super().networks(), *used) if isinstance(one, nn.Module)}
        return list(found.values())

    def trained(self) -> Iterator[Reward]:
        return self.inner.trained() if isinstance(self.inner, Reward) else super().trained()

    def rebuilt(self, change: Callable[[Reward], Reward]) -> Reward:
        # The name of the place would not hold what was changed; the reward's own text does.
        return change(self.inner) if isinstance(self.inner, Reward) else self

    def __str__(self) -> str:
        source = self._args[0] if self._args else self._kwargs["source"]
        text = source if isinstance(source, str) else reference(source)
        given = [f"{name}={literal(value)}" for name, value in self._kwargs.items() if name != "source"]
        if re.fullmatch(REFERENCE, text):
            return f"{text}({', '.join(given)})" if given else text
        return f"python({', '.join([literal(text), *given])})"


def named(name: str, source: Callable[..., Any]) -> type[Reward]:
    """What makes the rewards called `name`, in the log and in expressions: they call `source`.

    For a reward that is made already, `name` is short for its expression.
    """
    if isinstance(source, Reward):

        class Alias(Reward):
            """Gives the reward itself."""

            def __new__(cls) -> Any:
                return source

        return Alias

    class Named(PythonReward):
        """The function as a reward; keyword arguments are passed on to it."""

        __str__ = Reward.__str__

        def __init__(self, **options: Any) -> None:
            if "source" in options:
                raise RewardError(f"{name}: an argument cannot be called 'source'; that is what the name stands for")
            super().__init__(source, **options)
            self.name = name

    return Named


def _instance(source: Any, kind: type, options: Mapping[str, Any]) -> Any:
    """Only rewards and networks are made: any other class may do anything while it is made, as subprocess.Popen does.

    Raises RewardError.
    """
    if not issubclass(kind, Reward | nn.Module):
        raise RewardError(
            f"{reference(kind)} is a class, and only classes of Reward and torch.nn.Module are "
            "made: name a function, or an instance of the class"
        )
    try:
        return kind(**options)
    except TypeError as error:
        raise RewardError(f"{source!r} cannot be made: {error}") from error


def resolve(text: str) -> Any:
    """What `module:function` or `file.py:function` names. Raises RewardError that says which half is missing."""
    place, _, attribute = text.rpartition(":")
    if not (place and attribute):
        raise RewardError(f"{text!r} names no function: write module:function or file.py:function")
    return _within(place, _loaded(place), attribute)


def check_own(*texts: str) -> None:
    """Raises RewardError unless each text names what a module that `--import` has named defines itself.

    What the module has imported, such as `my.py:os.system`, is not its own.
    """
    for text in texts:
        place, _, attribute = text.rpartition(":")
        module = code.imported(place)
        if module is None:
            raise RewardError(f"{text!r} {code.WAY_OUT}")
        found = _within(place, module, attribute)
        while isinstance(found, functools.partial):
            found = found.func
        defined = found if isinstance(found, type) or inspect.isroutine(found) else type(found)
        home = getattr(defined, "__module__", None)
        if home != module.__name__ and not isinstance(found, Reward | nn.Module):
            raise RewardError(
                f"{text!r} is imported there from {home}; a text from a file may name what {place} defines"
            )


def _within(place: str, found: Any, attribute: str) -> Any:
    """The attribute of a module, or of what is in it, but not of what another module holds."""
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [
                name
                for name, value in getattr(found, "__dict__", {}).items()
                if callable(value) and not name.startswith("_")
            ]
            close = difflib.get_close_matches(part, names, n=3, cutoff=0.5) or names
            raise RewardError(f"{place} has no {part!r}; it has: {', '.join(close) or 'no function at all'}")
        found = getattr(found, part)
        if isinstance(found, ModuleType):
            raise RewardError(f"{place}:{part} is the module {found.__name__}: name it before the colon")
    return found


def load_module(place: str) -> ModuleType:
    """Run a file (`my/rewards.py`) or import a module by its name, as `--import` does. Raises RewardError.

    Texts from files, adapters and workflows may name what it defines from then on.
    """
    module = _loaded(place)
    code.remember(place, module)
    return module


def _loaded(place: str) -> ModuleType:
    return _file(Path(place)) if place.endswith(".py") else _module(place)


def _file(path: Path) -> ModuleType:
    path = expanded(path)
    if not is_file(path):
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; give a path from there, or a full one"
        minus = " (a minus between two rewards needs spaces around it)" if "-" in str(path) else ""
        raise RewardError(f"there is no file {str(path)!r} in {Path.cwd()}{hint}{minus}")
    # A name of its own: dataclasses and pickling inside the file look the module up in sys.modules.
    name = f"{_FILE_MODULE}{hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if (before := sys.modules.get(name)) is not None and vars(before).get(_STAMP) == stamp:
        return before  # what is named twice is run once
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{str(path)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    vars(module)[_STAMP] = stamp
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        file = f"{name.replace('.', '/')}.py:function"
        raise RewardError(
            f"there is no module {error.name!r} to import; install it, or name the file: {file}"
        ) from error
    except Exception as error:
        raise _failed(name, error) from error


def _failed(place: str, error: Exception) -> RewardError:
    return RewardError(f"{place} fails while it is loaded: {type(error).__name__}: {error}")


def _arguments(
    name: str, function: Callable[..., Any], given: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that `function` takes: those called images, prompts, targets by name, the others by position."""
    called = function.forward if isinstance(function, nn.Module) else function
    kinds = inspect.Parameter
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return [given["images"]], dict(options)
    kwargs = {p.name: given[p.name] for p in parameters if p.kind is kinds.KEYWORD_ONLY and p.name in given}
    if any(p.kind is kinds.VAR_KEYWORD and p.name == "targets" for p in parameters):
        kwargs.update(given["targets"] or {})
    kwargs.update(options)
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    wanted = [p.name for p in positional if p.name not in kwargs and (p.default is kinds.empty or p.name in given)]
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        wanted = list(_INPUTS)
    if 1 <= len(wanted) <= len(_INPUTS):
        by_name = all(wish in given for wish in wanted)
        args = [given[wish] for wish in wanted] if by_name else list(given.values())[: len(wanted)]
        try:
            inspect.signature(called).bind(*args, **kwargs)
            return args, kwargs
        except TypeError as error:
            raise RewardError(f"reward {name!r} cannot be called: {error}") from error
    raise RewardError(
        f"reward {name!r} takes {len(wanted)} arguments; a function of (images), (images, prompts) or "
        "(images, prompts, targets) is needed"
    )


def _name(source: str | Callable[..., Any], found: Any) -> str:
    if isinstance(found, Reward):
        return found.name
    text = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    return re.sub(r"\W+", "_", text.rpartition(":")[2]).strip("_") or "python"


def reference(function: Any) -> str:
    """Where a function is, as far as it can be said: one made in a script, or in a file that was run, by its file."""
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    file = getattr(sys.modules.get(module), "__file__", None)
    by_file = file and (module == "__main__" or module.startswith(_FILE_MODULE))
    return f"{file if by_file else module}:{name}"
