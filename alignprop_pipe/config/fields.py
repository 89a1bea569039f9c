"""A setting's field: its help text, type and range, and the error for a value that does not fit."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Literal

from alignprop_pipe.config.choices import as_float, is_whole
from alignprop_pipe.errors import ConfigError

LARGEST = 2**63 - 1
"""Of whole numbers without another limit: what they are reckoned with knows no more."""


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its help text and its range: `low` and `high` belong to it, `above` does not."""
    return field(default=default, metadata={"help": help, "parse": parse, "low": low, "high": high, "above": above})


def exact(name: str, spec: dataclasses.Field, value: Any) -> Any:
    """A list as a tuple and a whole number as a float, where the field holds these; anything else as it came."""
    kinds = _kinds(spec)
    if tuple in kinds and isinstance(value, list | tuple):
        floats = float in kinds[tuple]
        return tuple(as_float(name, one) if floats and is_whole(one) else one for one in value)
    return as_float(name, value) if float in kinds and is_whole(value) else value


def _kinds(spec: dataclasses.Field) -> dict[Any, tuple]:
    """The types that a field takes, each with its arguments: `int | None` -> {int: (), NoneType: ()}."""
    union = isinstance(spec.type, types.UnionType) or typing.get_origin(spec.type) is typing.Union
    members = typing.get_args(spec.type) if union else (spec.type,)
    return {typing.get_origin(member) or member: typing.get_args(member) for member in members}


def _fits(value: Any, kind: Any, arguments: tuple) -> bool:
    if kind is Literal:
        return value in arguments
    if kind is tuple:
        shape_ok = isinstance(value, tuple) and (Ellipsis in arguments or len(value) == len(arguments))
        return shape_ok and all(isinstance(v, arguments[0]) and not isinstance(v, bool) for v in value)
    return isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))


_WORDS: dict[type, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "truths"),
    types.NoneType: ("nothing (None)", ""),
}


def _type_text(spec: dataclasses.Field) -> str:
    names = []
    for kind, arguments in _kinds(spec).items():
        if kind is Literal:
            names.append(" or ".join(map(repr, arguments)))
        elif kind is tuple:
            inner = _WORDS[arguments[0]][1]
            names.append(f"a list of {inner}" if Ellipsis in arguments else f"a list of {len(arguments)} {inner}")
        else:
            names.append(_WORDS[kind][0] if kind in _WORDS else f"{kind.__name__}(...)")
    return " or ".join(names)


def check(name: str, spec: dataclasses.Field, value: Any) -> None:
    """Raises ConfigError, with what the field holds, for a value of another type or out of its range."""
    if not any(_fits(value, kind, arguments) for kind, arguments in _kinds(spec).items()):
        texts = f" ({spec.metadata['help']})" if spec.metadata["parse"] else ""
        raise ConfigError(f"{name} = {value!r}: {_type_text(spec)} is needed{texts}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) or is_whole(one):
            _check_range(name, spec.metadata, one)
        elif isinstance(one, str) and any("\ud800" <= letter <= "\udfff" for letter in one):
            raise ConfigError(f"{name} = {one!r}: text with half a character in it (a lone surrogate) cannot be used")


def _check_range(name: str, limits: Mapping[str, Any], number: float) -> None:
    low, high, above = limits["low"], limits["high"], limits["above"]
    if isinstance(number, int) and high is None and number > LARGEST:
        high = LARGEST
    finite = isinstance(number, int) or math.isfinite(number)
    if finite and (low is None or number >= low) and (above is None or number > above):
        if high is None or number <= high:
            return
    bounds = [f">= {low}" if low is not None else "", f"> {above}" if above is not None else ""]
    bounds.append(f"<= {high}" if high is not None else "")
    shown = "a number of thousands of digits" if isinstance(number, int) and abs(number) > 10**99 else repr(number)
    raise ConfigError(f"{name} = {shown}: a finite number {' and '.join(filter(None, bounds))} is needed")
