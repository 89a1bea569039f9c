"""Texts that want to be more than text: what headers, prompts, rewards and names may hold in the hands of others."""

import html.parser
from collections import Counter
from typing import Any

from markdown_it import MarkdownIt

MARKDOWN = (
    "x\n\n## Licences\n\nAll of it is MIT.\n",
    "x](javascript:alert(1)) [y](https://evil.example/a)",
    "![x](https://evil.example/a.png)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "<!-- x",
    "--> x",
    "x | y | z \\| w",
    "| a | b |\n|---|---|\n| c | d |",
    "`",
    "``` \n````\n# x",
    "\n---\nlicense: mit\n---\n",
    "x\n===\n",
    "x\u2028## Licences\u2028y\x85# z",
    "</details>\n\n# x",
    "&lt;b&gt; &#35; x",
    "https://evil.example/ www.evil.example me@evil.example",
    "*x* _y_ ~~z~~ **w** $a$",
    "> [!NOTE]\n> x",
    "\\` `x` \\",
    "- x\n- y\n1. z",
    "    indented",
)
TERMINAL = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "x\rok: nothing wrong found",
    "x\nok: nothing wrong found",
    "\x9b31m \x08\x08",
    "\u202egnp.exe\u202c",
    "\u2066x\u2069 \u200e\ufeff",
    "\U000e0041 \xad",
)
RICH = (
    "[red]x[/red]",
    "[/]",
    "[/red]",
    "[link=https://evil.example]x[/link]",
    ":fire: [bold",
    "\\[x]",
    "[@click=x]y[/]",
)
SHELL = (
    "x; rm -rf ~",
    "$(touch x)",
    "`touch x`",
    "a' b",
    'a" b',
    "x\nrm -rf ~",
    "--debug",
    "\\",
    "!x",
    "*",
    "~",
    "x\\'",
)
PYTHON = ('"); import os  # ', "'''", '"""', "\\", '\\"', "{x}", "x\n\nimport os")
FAMILIES = (MARKDOWN, TERMINAL, RICH, SHELL, PYTHON)
ALL = tuple(text for family in FAMILIES for text in family)
SOME = (*map("".join, FAMILIES), *(text for family in FAMILIES for text in family[:3]))
"""For what takes a second: whole families in one text, and three of each."""


def harmless(text: str) -> str:
    """A text that is read as `text` is where names are: a dot makes a part of a judge, a bracket ends its name."""
    return "harmless text" + " (x)" * ("(" in text) + ".x" * ("." in text)


UNSEEN = "\x1b\x07\x08\x9b\r\x85\u2028\u2029\u202e\u202c\u2066\u2069\u200e\ufeff\xad\x7f\x00\U000e0041"


def structure(markdown: str) -> dict[str, Any]:
    """What a page is made of: every token but text by its type, and where the links and pictures lead."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    kinds: Counter[str] = Counter()
    places: list[str] = []
    headings: list[int] = []
    for block in parser.parse(markdown):
        for token in (block, *(block.children or ())):
            if token.type in ("text", "softbreak", "code_inline", "inline", "text_special", "fence"):
                continue
            if token.type in ("html_block", "html_inline"):
                places.append(token.content)
            kinds[token.type] += 1
            places += [str(value) for name, value in token.attrs.items() if name in ("href", "src")]
            headings += [len(token.tag)] * (token.type == "heading_open")
    return {"kinds": kinds, "places": sorted(places), "headings": headings}


class Tags(html.parser.HTMLParser):
    """The tags of a page with the names of their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, ...]] = Counter()
        self.text = ""
        self.comments = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[(tag, *sorted(name for name, _ in attrs))] += 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1
