"""README and docs/: the two commands come first, commands parse, snippets run, links lead on, the tree is the tree."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import alignprop_pipe
from alignprop_pipe import bundled
from alignprop_pipe.cli.app import app
from alignprop_pipe.config.settings import FIELD_PATHS
from alignprop_pipe.rewards import REGISTRY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FIRST = PAGES[0]


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    """The command lines of all shell blocks, continued lines joined, prompts and comments gone."""
    text = "\n".join(body for language, body in code_blocks(page) if language in ("bash", "sh", "console", "shell"))
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line.removeprefix("$ ").strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def alignprop_commands(page: Path) -> list[list[str]]:
    """The words after `alignprop`; variables that are set before it are left out."""
    lines = (re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in shell_lines(page))
    parts = (part for line in lines for part in re.split(r"\s*&&\s*", line))
    words = [shlex.split(part, comments=True) for part in parts]
    return [command[1:] for command in words if command[:1] == ["alignprop"]]


def test_the_two_commands_come_first() -> None:
    plain = [re.sub(r"\s+#.*$", "", line) for line in shell_lines(FIRST)]
    assert [line for line in plain if line.startswith("pip")][:2] == [
        "pip install -c constraints.txt . && alignprop train",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    assert alignprop_commands(FIRST)[0] == ["train"]


def test_the_readme_is_a_page_for_newcomers() -> None:
    text = FIRST.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    linked = {Path(link) for link in links(FIRST)}
    made_at_build = {DOCS / f"{name}.md" for name in ("index", "api", "command-line")}
    assert [page.name for page in PAGES if page.parent == DOCS and page.relative_to(ROOT) not in linked] == sorted(
        page.name for page in made_at_build
    )


@pytest.mark.usefixtures("unchecked")  # typer hands over another class of context than the one to ask for
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(command, id=f"{page.name}: {' '.join(command)}")
        for page in PAGES
        for command in alignprop_commands(page)
    ],
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


# --- snippets --------------------------------------------------------------------------------------------------------


class Smaller(ast.NodeTransformer):
    """What makes a snippet quick: the bundled model and scorers in the place of large ones, one step, on a CPU."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        text = node.value.replace("aesthetic + 0.5*hpsv2.1", "clip + 0.5*colour").replace("cuda", "cpu")
        is_model = re.fullmatch(r"(stable-diffusion-v1-5|stabilityai|black-forest-labs)/\S+", text)
        return ast.Constant(str(bundled.bundled_path("emoji")) if is_model else text)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return ast.Attribute(node.value, node.attr.replace("bfloat16", "float32"), node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        quick: dict[str, Any] = {}
        if called == "align":
            quick = {"steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "eval_prompts": 2}
            quick |= {"num_inference_steps": 2, "truncation": "last:1"}
        elif called == "pipe":
            quick = {"num_inference_steps": 2}
        kept = [keyword for keyword in node.keywords if keyword.arg not in quick]
        return ast.Call(
            node.func, node.args, [*kept, *(ast.keyword(name, ast.Constant(value)) for name, value in quick.items())]
        )


def snippets(page: Path) -> str:
    """The Python blocks of a page as one program."""
    return "\n".join(body for language, body in code_blocks(page) if language == "python")


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page's blocks, one after the other."""
    monkeypatch.chdir(tmp_path)
    program = ast.fix_missing_locations(Smaller().visit(ast.parse(snippets(page))))
    names = set(REGISTRY)
    try:
        exec(compile(program, page.name, "exec"), {"__name__": "snippets"})
    finally:
        for name in set(REGISTRY) - names:
            del REGISTRY[name]


# --- the tree --------------------------------------------------------------------------------------------------------

ARCHITECTURE = DOCS / "architecture.md"


def tree() -> Iterator[tuple[Path, str]]:
    """Every line of the tree, the block that begins with `alignprop_pipe/`: its path and what it says.

    A name, two or more spaces, words; two spaces of indentation for each folder. A line without a name goes on.
    """
    (body,) = (body for _, body in code_blocks(ARCHITECTURE) if body.startswith("alignprop_pipe/"))
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
        assert sorted(on_disk - set(told)) == [], f"in {folder}/, but not in the tree of docs/architecture.md"
    assert [str(path) for path, words in told.items() if not words and (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Names of Python files with a folder before them, in the prose of the pages about the code."""
    named = set(re.findall(r"`((?:[\w.]+/)+[\w]+\.(?:py|md|txt|sh|toml))`", page.read_text(encoding="utf-8")))
    roots = (ROOT, ROOT / "alignprop_pipe", ROOT / "custom_nodes")
    assert [name for name in sorted(named) if not any((root / name).is_file() for root in roots)] == []


# --- links and the site ----------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """The links of a page to files."""
    return re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_messages_that_troubleshooting_explains_are_those_of_the_code() -> None:
    """Each row begins with words that are one piece of a message, between what the message names."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## By message")[2]
    told = [row for row in re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE) if row not in ("message", "---")]
    assert len(told) > 30
    sources = [*(ROOT / "alignprop_pipe").rglob("*.py"), *(ROOT / "comfy_nodes").glob("*.py"), ROOT / "__init__.py"]
    constants = [
        re.sub(r"\s+", " ", node.value)
        for source in sources
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [words for words in told if not any(words in constant for constant in constants)] == []


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="the extra docs is not installed")
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly, so that a warning (a broken link or anchor, a page that is in no menu) is an error; and offline."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr

    def page(name: str) -> str:
        return (tmp_path / "site" / name / "index.html").read_text(encoding="utf-8")

    assert [name for name in REGISTRY if f"<code>{name}</code>" not in page("rewards")] == []
    assert [name for name in FIELD_PATHS if f"<code>{name}</code>" not in page("settings")] == []
    assert [name for name in alignprop_pipe._HOME if f'.{name}"' not in page("api")] == []
    assert all(f">alignprop {name}<" in page("command-line") for name in ("train", "comfy install", "rewards check"))
    assert (tmp_path / "site" / "repository" / "examples" / "custom_reward.py").is_file()
    assert "<!--" not in re.sub(
        r"<!--\[if.*?\]-->", "", page("rewards").partition("<article")[2].partition("</article>")[0]
    )
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", page("get-started"))
    assert loaded == [], "fonts, scripts and pictures come from the site itself"


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(menu))
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent == DOCS)
