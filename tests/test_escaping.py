"""What comes from outside is shown and never obeyed: by a Markdown and an HTML parser, bash, Python, a terminal."""

import ast
import html
import subprocess

import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from alignprop_pipe.escaping import (
    cell,
    code,
    fenced,
    in_html,
    in_markdown,
    in_python,
    in_shell,
    link,
    one_line,
    visible,
)

ANY = st.one_of(st.text(), st.sampled_from(hostile.ALL), st.lists(st.sampled_from(hostile.ALL)).map("".join))
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def is_seen(text: str) -> bool:
    return not set(text) & set(hostile.UNSEEN)


def shown(markdown: str) -> str:
    """The text that a reader sees, and nothing but paragraphs and code in it."""
    found = hostile.structure(markdown)
    assert set(found["kinds"]) <= {"paragraph_open", "paragraph_close"}
    assert found["places"] == []
    return "".join(child.content for block in PARSER.parse(markdown) if block.children for child in block.children)


# --- a terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb", "a\\x0db"),
        ("a\x9bb", "a\\u009bb"),
        ("\u202egnp", "\\u202egnp"),
        ("a\u2028b\x85c", "a\\u2028b\\u0085c"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("a\r\nb\tc", "a\nb c"),
        (
            "一只狐狸 🦊 é ☕️ 👩\u200d🚀 \u0645\u06cc\u200c\u062e",
            "一只狐狸 🦊 é ☕️ 👩\u200d🚀 \u0645\u06cc\u200c\u062e",
        ),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, seen: str) -> None:
    assert visible(text) == seen


@given(ANY)
def test_nothing_unseen_is_left(text: str) -> None:
    assert is_seen(visible(text))
    assert visible(visible(text)) == visible(text)
    assert "\n" not in one_line(text)
    assert is_seen(one_line(text))


# --- Markdown --------------------------------------------------------------------------------------------------------


@given(ANY)
def test_text_in_a_paragraph_is_text(text: str) -> None:
    assert shown(f"said: {in_markdown(text)}.").strip() == f"said: {one_line(text)}.".strip()


@given(ANY)
def test_code_is_code(text: str) -> None:
    assert shown(f"said: {code(text)}.") == f"said: {one_line(text) or ' '}."


@given(ANY)
def test_a_cell_stays_one_cell(text: str) -> None:
    table = f"| a | b |\n|---|---|\n| {cell(text)} | {in_markdown(text)} |\n| c | d |"
    kinds = hostile.structure(table)["kinds"]
    assert (kinds["tr_open"], kinds["td_open"], kinds["heading_open"]) == (3, 4, 0)
    assert set(kinds) == {f"{tag}_{side}" for tag in ("table", "thead", "tbody", "tr", "th", "td")
                          for side in ("open", "close")}  # fmt: skip


@given(ANY, ANY)
def test_a_link_leads_where_it_says(label: str, name: str) -> None:
    found = hostile.structure(f"see {link(label, f'https://huggingface.co/{name}')}.")
    assert found["kinds"]["link_open"] == 1
    (place,) = found["places"]
    assert place.startswith("https://huggingface.co/")


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "vbscript:x", "JaVaScRiPt:x"])
def test_no_link_runs_anything(address: str) -> None:
    (place,) = hostile.structure(link("x", address))["places"]
    assert ":" not in place


@given(ANY)
def test_nothing_closes_a_fence(text: str) -> None:
    (block, after, *_) = PARSER.parse(f"{fenced('bash', text)}\n\nafter")
    assert (block.type, block.content.rstrip("\n")) == ("fence", visible(text).rstrip("\n"))
    assert after.type == "paragraph_open"


@given(ANY)
def test_html_is_text(text: str) -> None:
    page = hostile.Tags(f'<p title="{in_html(text)}">{in_html(text)}</p>')
    assert page.tags == {("p", "title"): 1}
    assert page.text == visible(text)
    assert page.comments == 0
    assert html.unescape(in_html(text)) == visible(text)


# --- code ------------------------------------------------------------------------------------------------------------


@given(ANY)
def test_a_literal_of_python_is_the_text(text: str) -> None:
    literal = in_python(text)
    assert ast.literal_eval(literal) == text.encode("utf-8", "replace").decode()
    assert "\n" not in literal
    assert is_seen(literal)


def test_a_word_of_the_shell_is_the_text() -> None:
    """One bash for all of them."""
    words = [text.replace("\ud800", "") for text in (*hostile.ALL, "🦊 \x7f\x01 \u202e \U000e0041 é\x85", "\x1b1f", "")]
    script = "; ".join(f"printf '%s\\0' {in_shell(word)}" for word in words)
    assert "\n" not in script
    assert is_seen(script)
    done = subprocess.run(
        ["bash", "-c", f"set -f; {script}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode().split("\0")[:-1] == words
    assert done.stderr == b""
