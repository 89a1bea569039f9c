"""The tokens that each scorer reads for a prompt, against those of its authors' tokenizer; and what is cut off."""

# ruff: noqa: RUF001  # letters that look like others are what this is about

import html
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import clip_family as family
import ftfy
import pytest
import regex
import test_rewards_ask as ask
import test_rewards_imagereward as imagereward
import torch
from miniatures import clip_tokenizer
from torch import Tensor, nn
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from alignprop_pipe.rewards import HpsV2, HpsV21, ImageReward, PickScore, Reward, parse_reward
from alignprop_pipe.rewards.networks.clip import ClipScore
from alignprop_pipe.rewards.networks.network import cuts_in
from alignprop_pipe.rewards.networks.open_clip import cleaned
from alignprop_pipe.rewards.scorers.ask import Ask

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

AWKWARD = [
    *OPEN_CLIP,
    "J\u030c, a caron over a J",
    "A\u030aNGSTROM, İstanbul, ẞ, Ω, K",
    "a dog <|endoftext|> a cat",
    "a dog <|startoftext|> a cat",
    "a dog <end_of_text> a cat",
    "a dog!<end_of_text> a cat",
    "<start_of_text>a dog<END_OF_TEXT>a cat",
    "a dog [SEP] a cat [MASK] [PAD] [ENC] [DEC] [CLS][UNK]",
    "a dog <eos> a cat <bos> <pad>",
    "zero\u200bwidth\u200d and \ufeffmark and soft\u00adhyphen",
    "👩‍👩‍👧 family ❤️ 🇫🇷",
    "TWO DOGS, don't we'LL they'Re I'D 'S",
    "12345 x+y=z (very) [odd] #1 half-timbered under_score",
    "two  dogs\n\nthree\tcats\r\nand\u2028more\u0085lines",
    "‘single’ «double» „low“ — dash… ellipsis ½ ² ①",
    "Ελλάδα Россия 日本語 한국어 العربية हिन्दी",
    "a\x1ab\x07c\x7fd",
    "'ſ and ﬀ and ǅ",
    "",
    "   ",
    "word " * 100,
]


# --- what the authors' tokenizers do, written anew -------------------------------------------------------------------


def by_simple_tokenizer(words: Sequence[str], marks: tuple[str, str], longest: int = 77) -> list[int]:
    """Byte pair encoding as in CLIP's first code, with the miniature's vocabulary; `words` are split already."""
    state = json.loads(clip_tokenizer().backend_tokenizer.to_str())["model"]
    ids, ranks = clip_tokenizer().get_vocab(), {tuple(pair): rank for rank, pair in enumerate(state["merges"])}
    names = {marks[0]: "<|startoftext|>", marks[1]: "<|endoftext|>"}
    found = []
    for word in [marks[0], *words, marks[1]]:
        if word in names:
            found.append(ids[names[word]])
            continue
        pieces = [byte_letters()[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(pieces)))
            if rank == len(ranks):
                break
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
        found += [ids[piece] for piece in pieces]
    return found if len(found) <= longest else [*found[: longest - 1], found[-1]]


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def by_open_clip(prompt: str) -> list[int]:
    """HPSv2's tokenizer.py."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    text = re.sub(r"\s+", " ", text).strip().lower()
    marks = ("<start_of_text>", "<end_of_text>")
    return by_simple_tokenizer(regex.findall(f"{'|'.join(marks)}|{WORDS}", text, regex.IGNORECASE), marks)


def by_transformers_clip(prompt: str) -> list[int]:
    """CLIPTokenizerFast, which PickScore's authors use: marks are found first, then texts are composed."""
    marks = ("<|startoftext|>", "<|endoftext|>")
    words = []
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", prompt):
        text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", part)).lower()
        words += [part] if part in marks else regex.findall(WORDS, text)
    return by_simple_tokenizer(words, marks)


def by_bert(vocab: Path, longest: int) -> Callable[[str], list[int]]:
    """The tokenizer in Python that ImageReward and BLIP were made with."""
    words = BertTokenizerLegacy(str(vocab))
    words.add_special_tokens({"bos_token": "[DEC]"})
    words.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return lambda prompt: words(prompt, truncation=True, max_length=longest).input_ids


# --- parity ----------------------------------------------------------------------------------------------------------


def ids_read(reward: Reward, network: nn.Module, prompts: Sequence[str]) -> list[list[int]]:
    """The ids that the text network gets for each prompt, without what is masked out."""
    seen: list[list[int]] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        seen.extend(row[kept.bool()].tolist() for row, kept in zip(ids, torch.ones_like(ids) if mask is None else mask))  # noqa: B905

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    for prompt in prompts:
        reward(image(), [prompt])
    hook.remove()
    return seen


def image() -> Tensor:
    return family.tensor(family.picture(32, 32))


def check_parity(reward: Reward, text_network: str, by_authors: Callable[[str], list[int]]) -> None:
    reward(image(), ["a first one, that loads it"])
    (network,) = reward.networks()
    found = ids_read(reward, network.get_submodule(text_network), AWKWARD)
    wrong = [
        (prompt, ids, by_authors(prompt))
        for prompt, ids in zip(AWKWARD, found, strict=True)
        if ids != by_authors(prompt)
    ]
    assert not wrong


@pytest.mark.parametrize("kind", [HpsV2, HpsV21])
def test_hpsv2_reads_what_its_authors_tokenizer_makes(kind: Any, tmp_path: Path) -> None:
    folder = family.write_hps(tmp_path)
    if kind is HpsV21:
        (folder / HpsV2.file).rename(folder / HpsV21.file)
    check_parity(kind(folder), "text_model", by_open_clip)


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_clip_and_pickscore_read_what_transformers_tokenizer_makes(kind: Any, tmp_path: Path) -> None:
    check_parity(kind(family.write_clip(tmp_path, 2)), "text_model", by_transformers_clip)


def test_imagereward_reads_what_the_bert_of_its_authors_makes(tmp_path: Path) -> None:
    folder = imagereward.save_miniature(tmp_path)
    check_parity(ImageReward(folder), "text_encoder", by_bert(folder / "vocab.txt", 35))


def test_ask_reads_what_the_bert_of_blip_makes(tmp_path: Path) -> None:
    folder = ask.save_blip(tmp_path / "blip")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in ask.WORDS))
    words = by_bert(tmp_path / "vocab.txt", 24 - 1 - 1)
    unknown = {len(ask.WORDS), len(ask.WORDS) + 1}  # [DEC] and [ENC] have no vectors in this miniature

    def by_authors(prompt: str) -> list[int]:
        return [1 if one in unknown else one for one in words(f"is it {prompt}?")]

    reward = Ask("is it {prompt}?", model=folder)
    prompts = [prompt for prompt in AWKWARD if "[" not in prompt]
    reward(image(), ["a first one, that loads it"])
    (network,) = reward.networks()
    assert ids_read(reward, network.get_submodule("text_encoder"), prompts) == [*map(by_authors, prompts)]


def test_siglip_reads_small_letters_padded_to_its_full_length(tmp_path: Path) -> None:
    folder = family.write_siglip(tmp_path)
    words = family.siglip_tokenizer().backend_tokenizer

    def by_authors(prompt: str) -> list[int]:
        ids = words.encode(prompt.lower()).ids[:24]
        return ids + [0] * (24 - len(ids))

    check_parity(ClipScore(folder), "text_model", by_authors)


def test_hpsv2_cleans_as_open_clip_does() -> None:
    assert [cleaned(prompt) for prompt in OPEN_CLIP] == list(OPEN_CLIP.values())
    assert [cleaned(text) for text in OPEN_CLIP.values()] == list(OPEN_CLIP.values())


# --- what is cut -----------------------------------------------------------------------------------------------------


LONG = ["7" * 76, "\U00013000" * 40, "\ua66e" * 30]
"""More than 77 tokens in 76 letters and fewer: of a letter, CLIP's tokens are bytes, and its ends count."""


@pytest.mark.parametrize("kind", [ClipScore, PickScore, HpsV2])
@pytest.mark.parametrize("prompt", LONG)
def test_a_prompt_of_fewer_letters_than_tokens_is_told(kind: Any, prompt: str, tmp_path: Path) -> None:
    folder = family.write_hps(tmp_path) if kind is HpsV2 else family.write_clip(tmp_path, 2)
    reward = kind(folder)
    reward(image(), [prompt])
    (cut,) = cuts_in([reward], [prompt])
    assert (cut.reward, cut.first, cut.read, cut.count) == (reward.name, prompt, 77, 1)
    assert cut.tokens == len(clip_tokenizer()(prompt, verbose=False).input_ids) > 77


def test_imagereward_tells_of_34_chinese_letters(tmp_path: Path) -> None:
    reward = ImageReward(imagereward.save_miniature(tmp_path))
    reward(image(), ["猫" * 33])
    assert not cuts_in([reward], ["猫" * 33])
    reward(image(), ["猫" * 34])
    (cut,) = cuts_in([reward], ["猫" * 34])
    assert (cut.tokens, cut.read) == (36, 35)


def test_siglip_counts_the_letters_that_it_reads(tmp_path: Path) -> None:
    reward = ClipScore(family.write_siglip(tmp_path))
    for prompt, told in (("DOG " * 12, False), ("DOG " * 13, True)):
        reward(image(), [prompt.strip()])
        assert bool(cuts_in([reward], [prompt.strip()])) is told


def test_of_a_question_it_is_told_that_it_is_cut(tmp_path: Path) -> None:
    folder = ask.save_blip(tmp_path / "blip")
    fixed, asking = Ask("is it a dog?" * 9, model=folder), Ask("is it {prompt}?", model=folder)
    reward = fixed + asking
    reward(image().expand(2, -1, -1, -1), ["dog", "dog " * 40])
    first, second = cuts_in([reward], ["dog", "dog " * 40])
    assert (first.what, first.count, first.first) == ("question", 1, fixed.question)
    assert (second.what, second.count, second.first) == ("question", 1, f"is it {'dog ' * 40}?")
    assert not cuts_in([asking], ["dog"])


def test_all_cut_prompts_are_counted_and_the_first_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    reward, prompts = parse_reward("clip + smooth(clip)"), ["a dog", "two " * 30 + "dogs", "two " * 30 + "cats"]
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        reward(torch.rand(3, 3, 64, 64), prompts)
        reward(torch.rand(1, 3, 64, 64), ["two " * 30 + "foxes"])
    (cut,) = cuts_in([reward, parse_reward("jpeg")], [*prompts, prompts[1]])
    assert (cut.count, cut.first, cut.read) == (2, prompts[1], 16)
    told = [message for message in caplog.messages if message.startswith("the reward clip reads the first 16 of the ")]
    assert len(told) == 2  # one of each of the two scorers
    assert len(told[0]) < 250
    assert not cuts_in([reward], ["a dog"])
