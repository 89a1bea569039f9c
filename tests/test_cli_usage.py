"""Wrong values of flags: what came, what is needed, and no word of the library that checks them."""

import pytest
from command_line import run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --steps x", "'--steps': 'x': a whole number is needed"),
        ("train --steps 1.5", "'1.5': a whole number is needed"),
        ("train --lr abc", "'--lr': 'abc': a number is needed"),
        ("train --betas 0.9 x", "'x': a number is needed"),
        ("train --eval-prompts many", "'many': a whole number is needed"),
        ("sample --num 0", "'--num': '0': 1 or more is needed"),
        ("sample --seed -1", "'-1': 0 or more is needed"),
        ("sample --scale strong", "'strong': a number is needed"),
        ("sample --dtype half", "'half' is not one of 'float32', 'float16', 'bfloat16'"),
        ("rewards check clip --size big", "'--size': 'big': a whole number is needed"),
        ("score x.png --batch-size 0", "'0': 1 or more is needed"),
        (f"sample --num {'9' * 200}x", "…': a whole number is needed"),
    ],
)
def test_a_wrong_value_is_told_in_our_words(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*words.split())
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not [
        word for word in ("Input should", "Value error", "parse string", "valid integer") if word in result.stderr
    ]
