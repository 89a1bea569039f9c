"""Tables in a terminal of 60 columns: a number stands on one line, and nothing is cut away."""

import pytest

from alignprop_pipe.cli import console

CHANGES = [
    ("reward", "0.6523", "0.7812", "+0.129 ± 0.021"),
    ("emoji_judge.background", "0.53", "0.75", "+0.22 ± 0.051"),
    ('clip(model="openai/clip-vit-large-patch14")', "-0.0005234", "0.75", "+0.0000221 ± 0.0051"),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_numbers_stay_whole_and_all_of_it_is_there(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console.Output().table("", ("", "before", "after", "change"), CHANGES, numbers=True)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    letters = "".join(text.split())
    for name, *numbers in CHANGES:
        assert set(name) <= set(letters)
        if width >= 60:
            assert all(number in text for number in numbers)
    if width >= 80:
        assert "emoji_judge.background" in text


def test_many_columns_are_folded_before_any_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    titles = ("reward", "score", "gradient", "seconds", "weights MB", "batch MB", "")
    row = ("hpsv2.1", "0.1234 to 0.5678", "0.00213", "0.0457", "3.94e+03", "1.23e+03", "refused")
    console.Output().table("", titles, [row], numbers=range(1, 6))
    text = capsys.readouterr().out
    assert "…" not in text
    assert len("".join(text.split())) >= len("".join("".join((*titles, *row)).split()))
