"""Text that may come from outside -> text that is shown and never obeyed: on a terminal, in Markdown, HTML and code.

Headers of foreign adapters, prompts, rewards and names of models and files reach cards, reports and the terminal. What
stands in them is text there: no heading, link or tag, no escape sequence, nothing that a shell or Python would run.
"""

import html
import json
import re
import shlex
import unicodedata
from urllib.parse import quote

UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's categories of signs that move a cursor, turn the direction of a line or are not seen at all."""

MEANT = frozenset("\n\u200c\u200d")
"""Among them what texts need: line breaks, and the joiners of emoji and of several scripts."""

MARKUP = re.compile(r"([\\`*_\[\]<>&|~#!$])")
AUTOLINKS = ((re.compile("@"), "&#64;"), (re.compile(":(?=//)"), "&#58;"), (re.compile(r"(?i)\b(www)\."), r"\1&#46;"))
"""What turns into a link without any markup: an entity in it is shown as the sign, and makes no link."""


# --- what is seen ----------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    r"""`text` with what a terminal would obey or nobody would see written out, such as `\x1b` and `\u202e`.

    Line breaks stay, and a tab becomes a space.
    """
    text = text.replace("\r\n", "\n").replace("\t", " ")
    if text.isprintable():
        return text
    return "".join(_written_out(sign) if _is_unseen(sign) else sign for sign in text)


def one_line(text: str) -> str:
    """`visible` text on one line, with single spaces."""
    return visible(" ".join(text.split()))


def _is_unseen(sign: str) -> bool:
    return sign not in MEANT and unicodedata.category(sign) in UNSEEN


def _written_out(sign: str) -> str:
    """An escape that Python and JSON read as the same sign: of four digits beyond ASCII, for bash and zsh too."""
    number = ord(sign)
    return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


# --- Markdown and HTML -----------------------------------------------------------------------------------------------


def in_html(text: str) -> str:
    """`visible` text for the content of an element and for an attribute in quotes."""
    return html.escape(visible(text))


def in_markdown(text: str) -> str:
    """One line of text within a paragraph, heading, cell or link, shown as it is."""
    text = MARKUP.sub(r"\\\1", one_line(text))
    for found, entity in AUTOLINKS:
        text = found.sub(entity, text)
    return text


def code(text: str) -> str:
    """One line of text as code in Markdown."""
    text = one_line(text) or " "
    ticks = "`" * (1 + _longest_run(text))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def cell(text: str) -> str:
    """Text as code in a cell of a table; plain where it holds a pipe, since programs differ on a pipe in code there."""
    return in_markdown(text) if "|" in text else code(text)


def link(label: str, address: str) -> str:
    """A link to `address`, which is https or a file next to the page: of another scheme only its text is left."""
    scheme, rest = ("https://", address[8:]) if address.startswith("https://") else ("", address)
    return f"[{in_markdown(label)}]({scheme}{quote(rest, safe='/#-._~+' + ':' * bool(scheme))})"


def fenced(language: str, text: str) -> str:
    """A block of code that nothing in `text` closes."""
    text = visible(text)
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


# --- code ------------------------------------------------------------------------------------------------------------


def in_python(text: str) -> str:
    """`text` as a literal of Python's, in double quotes and on one line."""
    return visible(json.dumps(_whole(text), ensure_ascii=False))


def in_shell(text: str) -> str:
    """`text` as one word of a shell, on one line: quoted, and as `$'...'` (bash, zsh) where it holds unseen signs."""
    text = _whole(text).replace("\0", "")
    if "\n" not in text and visible(text) == text:
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return "$'" + "".join(_written_out(sign) if _is_unseen(sign) else sign for sign in plain) + "'"


def _whole(text: str) -> str:
    """`text` without half a pair of surrogates, which no encoding can write."""
    return text.encode("utf-8", "replace").decode()
