"""What a run's `config.json` may hold next to the settings, and of which types: a file may be a stranger's or damaged.

Standard library only. What is not listed is somebody else's, and is left alone.
"""

from collections.abc import Mapping
from typing import Any

from alignprop_pipe.errors import ConfigError

FORMAT = 1
"""Counts the changes of what follows. A file without it is of an earlier version, which held less."""

EACH = "*"
MOST_THREADS = 1024

NAMED: Mapping[str, Any] = {"model": str, "reward": str, "prompts": str | list}
"""What a file of settings may hold too."""

RUN: Mapping[str, Any] = {
    **NAMED,
    "format": range(1, FORMAT + 1),
    "config": Mapping,
    "calibrated_reward": str,
    "prompt_set": {"prompts": list, "targets": {EACH: list}},
    "pipeline": {
        "class": str,
        "source": {"hub": bool, "revision": str, "variant": str},
        "dtype": {EACH: str},
        "device": str,
        "threads": range(1, MOST_THREADS + 1),
        "scheduler": {"class": str, "config": Mapping},
        "adapters": list,
        "call": Mapping,
    },
    "not_repeatable": {EACH: str},
    "working_folder": str,
}

_WORDS = {str: "text", bool: "true or false", list: "a list", str | list: "text or a list", Mapping: "a table"}


def check_run(data: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is no run of this version's, with the place in the file and what is needed there."""
    if not isinstance(data.get("config"), Mapping):
        raise ConfigError(f"config = {_shown(data.get('config'))}: a table of settings is needed")
    said = data.get("format")
    if isinstance(said, int) and said > FORMAT:
        raise ConfigError("it was written by a newer version of alignprop-pipe: install that one")
    check_types(data, RUN)


def check_types(value: Any, kind: Any, place: str = "") -> None:
    """Raises ConfigError unless `value` is as `kind` says; None is as good as nothing.

    A kind is a type, a range of whole numbers, or a table of names and kinds, where `EACH` stands for every name.
    """
    if value is None:
        return
    if isinstance(kind, Mapping):
        check_types(value, Mapping, place)
        for name, inside in value.items():
            if (known := kind.get(name, kind.get(EACH))) is not None:
                check_types(inside, known, f"{place}.{name}" if place else name)
    elif isinstance(kind, range):
        if not isinstance(value, int) or isinstance(value, bool) or value not in kind:
            needed = str(kind[0]) if len(kind) == 1 else f"a whole number from {kind[0]} to {kind[-1]}"
            raise ConfigError(f"{place} = {_shown(value)}: {needed} is needed")
    elif not isinstance(value, kind):
        raise ConfigError(f"{place} = {_shown(value)}: {_WORDS[kind]} is needed")


def _shown(value: Any) -> str:
    """Never all of it: a number may have thousands of digits, more than Python makes a text of."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:57]}..."
