"""What each scorer's tokenizer gets for a prompt, against what its authors' code gives it; and what it cuts off."""

# ruff: noqa: RUF001  # letters that look like others are what this is about

import logging
from pathlib import Path
from typing import Any

import clip_family as family
import pytest
import torch
from clip_family import picture, tensor

from alignprop_pipe.rewards import HpsV2, HpsV21, PickScore, parse_reward
from alignprop_pipe.rewards.clip import ClipScore, TwoTowers
from alignprop_pipe.rewards.open_clip import cleaned

OPEN_CLIP = {
    "two dogs": "two dogs",
    "“Two dogs”": '"two dogs"',
    "a fox’s tail": "a fox's tail",
    "fish &amp; chips": "fish & chips",
    "fish &amp;amp; chips": "fish & chips",
    "&lt;b&gt;bold&lt;/b&gt; &#39;quoted&#39;": "<b>bold</b> 'quoted'",
    "ｆｕｌｌ　ｗｉｄｔｈ": "full width",
    "ﬁne ﬂowers": "fine flowers",
    "a cafÃ©": "a café",
    "e\u0301toile": "étoile",
    "  a\u00a0b\t c\n": "a b c",
    "猫 and 🦊": "猫 and 🦊",
}
"""Prompt -> what open_clip's SimpleTokenizer splits into tokens: ftfy.fix_text, html.unescape twice, blanks, lower."""


class Recorded:
    """A tokenizer that keeps the texts it gets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.texts += texts if isinstance(texts, list) else [texts]
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def texts_of(reward: TwoTowers, prompts: list[str]) -> list[str]:
    """What the tokenizer gets for these prompts."""
    image = tensor(picture(32, 32))
    reward(image, ["a first one, that loads it"])
    recorded = reward.tokenizer = Recorded(reward.tokenizer)
    for prompt in prompts:
        reward(image, [prompt])
    return recorded.texts


@pytest.mark.parametrize("kind", [HpsV2, HpsV21])
def test_hpsv2_cleans_as_open_clip_does(kind: Any, tmp_path: Path) -> None:
    folder = family.write_hps(tmp_path)
    if kind is HpsV21:
        (folder / HpsV2.file).rename(folder / HpsV21.file)
    assert texts_of(kind(folder), list(OPEN_CLIP)) == list(OPEN_CLIP.values())


def test_cleaning_twice_is_cleaning_once() -> None:
    for text in OPEN_CLIP.values():
        assert cleaned(text) == text


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_authors_who_use_transformers_give_it_the_prompt_as_it_is(kind: Any, tmp_path: Path) -> None:
    folder = family.write_clip(tmp_path, 2)
    assert texts_of(kind(folder), list(OPEN_CLIP)) == list(OPEN_CLIP)


@pytest.mark.parametrize(("count", "told"), [(3, 0), (500, 1)])
def test_a_prompt_that_is_cut_is_told_once(count: int, told: int, caplog: pytest.LogCaptureFixture) -> None:
    reward = parse_reward("clip")
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        for ending in ("dog", "cat"):
            reward(torch.rand(1, 3, 64, 64), ["two " * count + ending])
    assert len(caplog.messages) == told
    if told:
        assert caplog.messages[0].startswith("the reward clip reads the first 16 of the ")
        assert "tokens of the prompt 'two two two" in caplog.messages[0]
        assert len(caplog.messages[0]) < 250
