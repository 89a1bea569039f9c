"""The README: its two commands come first, its commands parse, its tree is the tree on disk, its links lead on."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from alignprop_pipe.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def code_blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


BLOCKS = code_blocks(README)
NO_SOURCE = {"__pycache__", "models", "prompt_sets"}


def shell_lines(blocks: list[tuple[str, str]] = BLOCKS) -> list[str]:
    """The command lines of all shell blocks, continued lines joined, prompts and comments gone."""
    text = "\n".join(body for language, body in blocks if language in ("bash", "sh", "console", "shell"))
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line.removeprefix("$ ").strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def alignprop_commands(blocks: list[tuple[str, str]] = BLOCKS) -> list[list[str]]:
    """The words after `alignprop`; variables that are set before it are left out."""
    lines = (re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in shell_lines(blocks))
    parts = (part for line in lines for part in re.split(r"\s*&&\s*", line))
    words = [shlex.split(part, comments=True) for part in parts]
    return [command[1:] for command in words if command[:1] == ["alignprop"]]


def test_the_two_commands_come_first() -> None:
    plain = [re.sub(r"\s+#.*$", "", line) for line in shell_lines()]
    assert [line for line in plain if line.startswith("pip")][:2] == [
        "pip install -c constraints.txt . && alignprop train",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    assert alignprop_commands()[0] == ["train"]


@pytest.mark.usefixtures("unchecked")  # typer hands over another class of context than the one to ask for
@pytest.mark.parametrize(
    "arguments", alignprop_commands() + alignprop_commands(code_blocks(TROUBLESHOOTING)), ids=" ".join
)
def test_every_command_parses(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = command.make_context("alignprop", list(arguments))
    rest = [*getattr(context, "_protected_args", []), *context.args]
    if not rest:
        return
    name, chosen, after = command.resolve_command(context, rest)
    assert chosen is not None
    chosen.make_context(name, after, parent=context)


# --- the tree --------------------------------------------------------------------------------------------------------


def tree() -> Iterator[tuple[Path, str]]:
    """Every line of the tree, the block that begins with `alignprop_pipe/`: its path and what it says.

    A name, two or more spaces, words; two spaces of indentation for each folder. A line without a name goes on.
    """
    (body,) = (body for _, body in BLOCKS if body.startswith("alignprop_pipe/"))
    folders: list[str] = []
    for line in body.splitlines():
        match = re.match(r"^(?P<indent> *)(?P<name>[\w.]+/?)(?:  +(?P<words>.+))?$", line)
        if match is None or len(match["indent"]) > 2 * len(folders):
            continue
        folders = folders[: len(match["indent"]) // 2]
        yield Path(*folders, match["name"]), match["words"] or ""
        if match["name"].endswith("/"):
            folders.append(match["name"])


def test_the_tree_is_the_tree_on_disk() -> None:
    told = dict(tree())
    assert [str(path) for path in told if not (ROOT / path).exists()] == []
    package = Path("alignprop_pipe")
    opened = {path.parent for path in told} - {Path()}
    for folder in {package, *opened}:
        on_disk = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).iterdir()
            if (path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"))
            and (folder == package or path.name != "__init__.py")
        }
        assert sorted(on_disk - set(told)) == [], f"in {folder}/, but not in the README's tree"
    assert [str(path) for path, words in told.items() if not words and (ROOT / path).is_file()] == []


def test_links_lead_to_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
