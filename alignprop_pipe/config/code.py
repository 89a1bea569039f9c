"""Which texts may name Python code: those that a person typed, and those that name what `--import` has named already.

Nothing is imported, opened or called here: the text is looked at, and compared with the list of what was imported.
"""

import ast
import os
from pathlib import Path
from types import ModuleType

from alignprop_pipe.config.expression import names_in, pointed
from alignprop_pipe.sources import expanded

BY_TEXT = "python"
"""The reward that takes `module:function` as a text, for places that an expression cannot spell."""

WAY_OUT = (
    "names Python code, which a text from a file, an adapter or a workflow must not. If you trust it, name its file or "
    "module with --import, or type it with --reward or --judges; in Python give the function itself, or "
    "allow_code=True; start ComfyUI with ALIGNPROP_ALLOW_CODE=1"
)

_IMPORTED: dict[str, ModuleType] = {}


def code_in(text: str) -> list[tuple[str, int]]:
    """What an expression would import, each with its place in the text: `module:function`, `file.py:function`.

    `python(...)` stands for the texts in it, or for itself where it has none. Raises RewardError for a text that
    cannot be read.
    """
    found = []
    for name, place, call in names_in(text):
        if ":" in name:
            found.append((name, place))
        elif name == BY_TEXT:
            keywords = [] if call is None else [one.value for one in call.keywords if one.arg == "source"]
            given = [] if call is None else [*call.args, *keywords]
            texts = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            found += [(reference, place) for reference in texts or [BY_TEXT]]
    return found


def refuse_code(text: str) -> None:
    """Raises RewardError that points at the code in an expression, unless it is in what `--import` has named."""
    for reference, place in code_in(text):
        if imported(reference.rpartition(":")[0]) is None:
            raise pointed(text, place, f"{reference!r} {WAY_OUT}")


def remember(place: str, module: ModuleType) -> None:
    """From now on, texts from anywhere may name what is in `module`, which a person has named as `place`."""
    _IMPORTED[_key(place)] = module
    if place.endswith(".py"):
        _IMPORTED[str(Path(_key(place)).resolve())] = module


def imported(place: str) -> ModuleType | None:
    """The module that a person has named as `place` before, however the path is written."""
    return _IMPORTED.get(_key(place))


def _key(place: str) -> str:
    if not place.endswith(".py"):
        return place
    path = expanded(place)
    # By its letters alone: to look a stranger's path up would already touch it, on Windows over the network.
    return os.path.normpath(path.absolute())
