"""What mkdocs does beside the Markdown: files of the repository join the site, and tables come from the code.

Pages link to files outside `docs/` as they do on a code host (`../examples/custom_reward.py`). The site gets a copy of
each of these under `repository/`. A comment such as `<!-- rewards -->` is the place of a table that the code makes.
"""

import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File

import alignprop_pipe
from alignprop_pipe.cli.app import app
from alignprop_pipe.config.settings import FIELD_PATHS, PARTS, PRESETS, AlignConfig
from alignprop_pipe.rewards import REGISTRY

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add every file of the repository that a page links to, and what these link to themselves."""
    waiting, seen = [DOCS / page.src_uri for page in files.documentation_pages()], set()
    while waiting:
        page = waiting.pop()
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path = _target(page, link)
            if DOCS in path.parents or not path.is_file() or path in seen:
                continue
            seen.add(path)
            files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
            waiting += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables, and let links to the repository lead to the copies in the site."""
    at = page.file.src_uri
    source = ROOT / at.removeprefix("repository/") if at.startswith("repository/") else DOCS / at

    def led(match: re.Match) -> str:
        path = _target(source, match[0])
        return os.path.relpath(_uri(path), Path(at).parent).replace(os.sep, "/") if path.exists() else match[0]

    for name, table in TABLES.items():
        markdown = markdown.replace(f"<!-- {name} -->", table() if f"<!-- {name} -->" in markdown else "")
    return LINK.sub(led, markdown)


def _target(page: Path, link: str) -> Path:
    """The file that a link on this page is to; of a folder, its README."""
    path = (page.parent / link).resolve()
    return path / "README.md" if path.is_dir() else path


def _uri(path: Path) -> str:
    inside = path.relative_to(DOCS) if DOCS in path.parents else Path("repository") / path.relative_to(ROOT)
    return inside.as_posix()


# --- tables from the code --------------------------------------------------------------------------------------------


def rewards_table() -> str:
    """Every reward of the registry."""
    rows = [("name", "what it measures", "range", "default weights", "licence")]
    for entry in REGISTRY.values():
        weights = ", ".join(f"`{name}`" for name in dict.fromkeys(source for source, _ in entry.weights))
        size = f" ({entry.size_mb / 1000:.1f} GB)" if entry.size_mb else ""
        bundled = f"bundled: `{entry.bundled}`" if entry.bundled else "none"
        rows.append((f"`{entry.name}`", entry.summary, entry.range_text, (weights or bundled) + size, entry.licence))
    return _table(rows)


def settings_tables() -> str:
    """Every field of AlignConfig with its default, by part."""
    groups = {None: ("The run", AlignConfig), **{name: (f"`{name}`", kind) for name, kind in PARTS.items()}}
    blocks = []
    for part, (title, kind) in groups.items():
        rows = [("setting", "default", "what it does")]
        for spec in fields(kind):
            if FIELD_PATHS.get(spec.name, ("-",))[0] == part:
                default = ", ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
                rows.append((f"`{spec.name}`", "" if default in (None, "") else f"`{default}`", spec.metadata["help"]))
        blocks.append(f"### {title}\n\n{_table(rows)}")
    return "\n\n".join(blocks)


def presets_table() -> str:
    """What each preset sets, beside each other."""
    names = list(dict.fromkeys(name for preset in PRESETS.values() for name in preset))
    rows = [("setting", *(f"`{preset}`" for preset in PRESETS))]
    for name in names:
        values = [preset.get(name, "") for preset in PRESETS.values()]
        shown = [", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]
        rows.append((f"`{name}`", *shown))
    return _table(rows)


def commands() -> str:
    """Every command with its arguments and options."""
    root: Any = typer.main.get_command(app)
    return "\n\n".join(_command(f"alignprop {name}", command) for name, command in root.commands.items())


def _command(called: str, command: Any) -> str:
    inside = [_command(f"{called} {name}", one) for name, one in getattr(command, "commands", {}).items()]
    rows: list[tuple[str, ...]] = [("argument", "what it does")]
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = parameter.opts if is_option else [parameter.metavar or parameter.name]
        rows.append((", ".join(f"`{name}`" for name in names), getattr(parameter, "help", "") or ""))
    text = (command.help or "").partition("\f")[0].strip()
    return "\n\n".join([f"## {called}", text, *([_table(rows)] if len(rows) > 1 else []), *inside])


def public_names() -> str:
    """A directive of mkdocstrings for each public name."""
    return "\n\n".join(f"::: {home}.{name}" for name, home in alignprop_pipe._HOME.items())


def _table(rows: list[tuple[str, ...]]) -> str:
    clean = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in clean]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


TABLES: dict[str, Callable[[], str]] = {
    "rewards": rewards_table,
    "settings": settings_tables,
    "presets": presets_table,
    "commands": commands,
    "public names": public_names,
}
