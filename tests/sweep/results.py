"""The results of the sweep: a line of JSON for each class, and the page of the documentation that is made from them."""

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
PAGE = HERE.parents[1] / "docs" / "pipelines.md"

Line = dict[str, Any]
OUTCOMES = ("works", "refused", "cannot be built", "out of scope", "WRONG", "not reached")
"""In the order of the page. Refused: in words of ours, before anything is trained. Cannot be built: has no miniature
without the network, or the stock class does not run. Out of scope: draws no picture from text. WRONG: a bug. Not
reached: a sweep that goes on from here comes to it."""


def versions() -> dict[str, str]:
    """Of what a result depends on besides this repository."""
    return {name: version(name) for name in ("diffusers", "transformers", "torch")}


def read(path: Path = RESULTS) -> dict[str, Line]:
    """The results so far, by the name of the class."""
    if not path.is_file():
        return {}
    lines = (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text)
    return {line["name"]: line for line in lines}


def write(lines: Mapping[str, Line], path: Path = RESULTS) -> None:
    text = "".join(json.dumps(lines[name], sort_keys=True) + "\n" for name in sorted(lines))
    partial = path.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def not_reached(name: str) -> Line:
    return {
        "name": name,
        "outcome": "not reached",
        "words": "",
        "notes": [],
        "checks": [],
        "seconds": 0.0,
        "versions": {},
    }


def is_done(line: Line | None) -> bool:
    """Whether this class was swept with the versions that are installed."""
    return line is not None and line["outcome"] != "not reached" and line["versions"] == versions()


def counts(lines: Mapping[str, Line]) -> Counter[str]:
    return Counter(line["outcome"] for line in lines.values())


def page(lines: Mapping[str, Line]) -> str:
    """Markdown: how many, then a table for each outcome."""
    found = counts(lines)
    swept = sum(found.values()) - found["out of scope"] - found["not reached"]
    used = sorted({f"{name} {number}" for line in lines.values() for name, number in line["versions"].items()})
    text = [
        "# Which pipelines can be aligned",
        "",
        f"Every pipeline class that diffusers exports, tried as a miniature with random weights ({', '.join(used)}). "
        f"Of {swept} classes that draw pictures or videos from text, "
        f"{found['works']} work, {found['refused']} are refused, {found['cannot be built']} have no miniature, "
        f"{found['WRONG']} are wrong. {found['out of scope']} others draw no picture from text"
        f"{', and ' + str(found['not reached']) + ' were not reached by this sweep' if found['not reached'] else ''}.",
        "",
        "For a class that works, all of this holds: its pictures equal the stock call's, bit for bit; the gradient "
        "of the adapter's weights through the last 1, 2 and all denoising steps equals that of the undecorated stock "
        "call, and along a random direction it is the slope of the stock call; the adapter is saved, read by a fresh "
        "pipeline and draws the same pictures; `align` takes a step. What could not be checked of a class is noted "
        "next to it.",
        "",
        "This page is written by `python tests/sweep`, which tests/sweep/__main__.py explains.",
    ]
    for outcome in OUTCOMES:
        rows = [lines[name] for name in sorted(lines) if lines[name]["outcome"] == outcome]
        if rows:
            text += ["", f"## {outcome[0].upper()}{outcome[1:]}: {len(rows)}", "", *table(outcome, rows)]
    return "\n".join(text) + "\n"


def table(outcome: str, rows: list[Line]) -> list[str]:
    second = "noted" if outcome == "works" else "why"
    lines = [f"| class | {second} |", "|---|---|"]
    for row in rows:
        words = "; ".join(row["notes"]) if outcome == "works" else row["words"]
        lines.append(f"| {row['name']} | {cell(words)} |")
    return lines


def cell(text: str) -> str:
    """Text that neither ends a cell nor means anything in Markdown or HTML."""
    for sign in "\\`*_{}[]<>|#":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return " ".join(text.split())
