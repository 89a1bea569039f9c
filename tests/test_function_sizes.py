"""Functions stay short: what is long is hard to change, and the tail says it, not the median."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import alignprop_pipe

PACKAGE = Path(alignprop_pipe.__file__).parent
MOST_LINES, NINE_IN_TEN, MOST_ARGUMENTS = 60, 40, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function, list[str]]]:
    """Every function of the package: where it stands, its tree, the lines of its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node, text.splitlines()


def code_lines(node: Function, lines: list[str]) -> int:
    """Lines of the body that hold code: no docstring, no blank line, no line that is only a comment."""
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(node.body) > 1
    start = node.body[1].lineno if has_docstring else first.lineno
    body = (line.strip() for line in lines[start - 1 : node.end_lineno])
    return sum(1 for line in body if line and not line.startswith("#"))


def arguments(node: Function) -> int:
    """Arguments that a caller can name; `self` and `cls` are none."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def test_no_function_is_long() -> None:
    sizes = {where: code_lines(node, lines) for where, node, lines in functions()}
    assert {where: size for where, size in sizes.items() if size > MOST_LINES} == {}
    ranked = sorted(sizes.values())
    assert ranked[math.ceil(0.9 * len(ranked)) - 1] < NINE_IN_TEN


def test_no_function_has_many_arguments() -> None:
    assert {where: n for where, node, _ in functions() if (n := arguments(node)) > MOST_ARGUMENTS} == {}


def test_the_ruler_measures() -> None:
    head = 'def f(self, a, *, b):\n    """Doc.\n\n    More.\n    """\n'
    source = head + "    # why\n    x = (\n        a\n    )\n\n    return x\n"
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert (code_lines(node, source.splitlines()), arguments(node)) == (4, 2)
