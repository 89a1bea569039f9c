"""Which wing may import which: only those before it, and no files each other in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alignprop_pipe

PACKAGE = Path(alignprop_pipe.__file__).parent

# A wing may import those before it. Inside a wing files import each other without a circle.
WINGS = (
    *("", "config", "rewards", "diffusion", "adapters", "runs", "training", "scoring", "pipeline", "hub", "cli"),
    "__main__",
)
DELEGATES = ("adapters.adapter imports hub.push",)
"""Imports of a later wing that are allowed, each because what is public says so."""
APART = {("rewards", "diffusion"), ("diffusion", "rewards")}
"""What a picture is worth and how it is made: neither needs the other."""


def wing_of(module: str) -> str:
    if module == "comfy_install":
        return "cli"
    first, _, inside = module.partition(".")
    return first if inside or first in WINGS else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "models"}
FILES.pop("")  # the package itself names everything and imports it on demand


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also in a function or for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            base = node.module or ""
            for alias in node.names:
                home = alignprop_pipe._HOME.get(alias.name, "") if base == "alignprop_pipe" else ""
                if base == "alignprop_pipe" and alias.name in FILES:
                    yield alias.name
                elif base == "alignprop_pipe" and home:
                    yield home.removeprefix("alignprop_pipe").removeprefix(".") or alias.name
                elif base.startswith("alignprop_pipe."):
                    inside = base.removeprefix("alignprop_pipe.")
                    yield f"{inside}.{alias.name}" if f"{inside}.{alias.name}" in FILES else inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("alignprop_pipe."):
                    yield alias.name.removeprefix("alignprop_pipe.")


def imports_of(name: str) -> set[str]:
    found = set(imported(ast.parse(FILES[name].read_text(encoding="utf-8"))))
    # A wing's own face names what is in it and imports it on demand.
    return {other for other in found if not (other.startswith(f"{name}.") and FILES[name].name == "__init__.py")}


def test_every_folder_is_a_wing() -> None:
    assert {wing_of(name) for name in FILES} == set(WINGS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_wings_before_its_own(name: str) -> None:
    own = wing_of(name)
    upward = {
        f"{name} imports {other}"
        for other in imports_of(name)
        if WINGS.index(wing_of(other)) > WINGS.index(own) or (own, wing_of(other)) in APART
    }
    assert upward - set(DELEGATES) == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    arrows = {
        name: {other for other in imports_of(name) if f"{name} imports {other}" not in DELEGATES} for name in FILES
    }
    TopologicalSorter(arrows).prepare()


def test_the_test_would_see_an_import_from_above() -> None:
    source = (
        "from alignprop_pipe.diffusion import lora\nimport alignprop_pipe.pipeline\n"
        "def f():\n    from alignprop_pipe.cli import app\n"
    )
    assert list(imported(ast.parse(source))) == ["diffusion.lora", "pipeline", "cli.app"]
