"""The small language of rewards: `clip + 0.5*hpsv2.1 - 0.1*jpeg(quality=80)`. Text in, values out.

Python's own parser reads it, after names that Python does not allow (`hpsv2.1`, `my/blur.py:score`) have been masked
by identifiers of the same length, so that every position stays true. Nothing is evaluated: the tree is walked.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alignprop_pipe.errors import RewardError

REFERENCE = r"(?:[A-Za-z]:(?=[\\/]))?[\w.~/\\][\w.~/\\-]*:[A-Za-z_][\w.]*"
"""`module:function` or `file.py:function`. A minus inside a path belongs to the path."""

_TOKEN = re.compile(
    r"""(?P<keep>"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*')"""
    rf"|(?P<name>{REFERENCE} | [^\W\d]\w*(?:\.\w+)*)|(?P<number>[\d.]+(?:[eE][+-]?\d+)?)"
    r"|(?P<space>\s)|(?P<other>\S)",
    re.VERBOSE,
)
_POINTED = re.compile(r"\n  [^\n]*\n  \s*\^\Z")
_ALLOWED = set("+-*()[]{},:=")
_UNREADABLE = "the reward expression is too long, too deep, or holds unreadable characters"
_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

MOST_LETTERS = 10_000
"""Of an expression. What is longer was not written by hand, and would keep the parser busy for long."""

Make = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any]


def read_expression(text: str, make: Make) -> Any:
    """The value of an expression; `make(name, args, kwargs)` gives that of a name. Raises RewardError."""
    reader = _Reader(text, make)
    try:
        return reader.value(reader.tree.body)
    except (RecursionError, MemoryError, ValueError) as error:
        raise RewardError(_UNREADABLE) from error


def names_in(text: str) -> Iterator[tuple[str, int, ast.Call | None]]:
    """Every name in an expression, at any depth: with its place in the text, and as it is called, if it is.

    The tree is walked and nothing is made. Raises RewardError for a text that cannot be read.
    """
    reader = _Reader(text, lambda *_: None)
    calls = {id(node.func): node for node in ast.walk(reader.tree) if isinstance(node, ast.Call)}
    for node in ast.walk(reader.tree):
        if isinstance(node, ast.Name):
            yield reader.true_name(node), reader.place(node.col_offset), calls.get(id(node))


class _Reader:
    """Walks the tree of the masked text; names and positions are those of the true text."""

    def __init__(self, text: str, make: Make) -> None:
        if not text.strip():
            raise RewardError("the reward expression is empty; use for example: clip + 0.1*jpeg")
        if len(text) > MOST_LETTERS:
            raise RewardError(f"the reward expression has {len(text)} letters; {MOST_LETTERS} at most are read")
        self.text, self.masked, self.make = text, _mask(text), make
        self.start = len(self.masked) - len(self.masked.lstrip())
        try:
            with warnings.catch_warnings():
                # Python's words about its own language: "invalid escape sequence" in a Windows path, "2or" and so on.
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                self.tree = ast.parse(self.masked[self.start :], mode="eval")
        except SyntaxError as error:
            place = self.start + error.offset - 1 if error.offset else len(text)  # Python gives none at the end
            raise pointed(text, place, "this cannot be read as a reward expression") from error
        except (RecursionError, MemoryError, ValueError) as error:
            raise RewardError(_UNREADABLE) from error

    def value(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as constant):
                return constant
            case ast.Name():
                return self.named(node, node, (), {})
            case ast.Call(func=ast.Name() as name, args=args, keywords=keywords) if all(k.arg for k in keywords):
                given = {self.keyword(keyword): self.value(keyword.value) for keyword in keywords}
                if len(given) < len(keywords):
                    raise self.at(node, "an argument is given twice")
                return self.named(node, name, tuple(self.value(arg) for arg in args), given)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return self.table(node, [self.value(key) for key in keys if key is not None], values)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                factor = -1 if isinstance(sign, ast.USub) else 1
                return self.combined(node, operator.mul, factor, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self.combined(node, _BINARY[type(op)], self.value(left), self.value(right))
        raise self.at(node, "this has no meaning in a reward expression")

    def named(self, node: ast.AST, name: ast.Name, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self.make(self.true_name(name), args, kwargs)
        except RewardError as error:
            raise self.at(node, str(error)) from error

    def true_name(self, node: ast.Name) -> str:
        return self.text[self.place(node.col_offset) : self.place(node.end_col_offset or 0)]

    def table(self, node: ast.AST, keys: list[Any], values: list[ast.expr]) -> dict[Any, Any]:
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise self.at(node, "a table has texts or numbers before its colons")
        return {key: self.value(value) for key, value in zip(keys, values, strict=True)}

    def keyword(self, node: ast.keyword) -> str:
        """The true name of an argument, which the mask may have changed."""
        start = self.place(node.col_offset)
        return self.text[start : start + len(node.arg or "")]

    def combined(self, node: ast.AST, do: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        message = "rewards are added and subtracted, and multiplied with numbers; this is neither"
        if any(isinstance(side, bool | str | list | dict | type(None)) for side in (left, right)):
            raise self.at(node, message)
        try:
            return do(left, right)
        except OverflowError as error:
            raise self.at(node, "this number is too large") from error
        except (TypeError, RewardError) as error:
            raise self.at(node, message if isinstance(error, TypeError) else str(error)) from error

    def place(self, offset: int) -> int:
        """The character of a byte offset: Python counts columns in UTF-8."""
        return self.start + len(self.masked[self.start :].encode()[:offset].decode())

    def at(self, node: ast.AST, message: str) -> RewardError:
        return pointed(self.text, self.place(getattr(node, "col_offset", 0)), message)


def _mask(text: str) -> str:
    def identifier(match: re.Match[str]) -> str:
        if match["name"]:
            return re.sub(r"^\d|[^A-Za-z0-9_]", "_", match["name"], flags=re.ASCII)
        if match["space"]:
            return " "
        if match["other"] and match["other"] not in _ALLOWED:
            raise pointed(text, match.start(), f"{match['other']!r} has no meaning in a reward expression")
        return match[0]

    return _TOKEN.sub(identifier, text)


def pointed(text: str, position: int, message: str) -> RewardError:
    """An error that shows the expression with a caret under `position`."""
    line = re.sub(r"\s", " ", text)
    message = _POINTED.sub("", message)  # of an expression inside: this one's caret is enough
    return RewardError(f"{message}\n  {line}\n  {' ' * min(max(position, 0), len(line))}^")
