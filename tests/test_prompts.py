"""Prompt sets: every way in, every mistake with its way out, the split and the batches."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.errors import PromptError
from alignprop_pipe.prompts import PromptSet, named_sets

RENDER = Path(__file__).parent.parent / "examples" / "bundled_model"


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def numbered(count: int) -> PromptSet:
    return PromptSet(tuple(f"dog {i}" for i in range(count)), {"place": tuple(range(count))})


# --- ways in ---------------------------------------------------------------------------------------------------------


def test_a_list_is_taken_word_for_word_and_gets_no_targets():
    loaded = PromptSet.load(["emoji", "two dogs on a blue background", "dogs.txt", "# not a comment here"])
    assert loaded.prompts == ("emoji", "two dogs on a blue background", "dogs.txt", "# not a comment here")
    assert loaded.targets == {}
    assert PromptSet.load(("a dog",)).prompts == ("a dog",)
    assert PromptSet.load(loaded) is loaded


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_file(tmp_path, end, mark):
    text = end.join(["# animals", "a dog", "", "  a # cat  ", "\u00e9t\u00e9 \u2028 sea", "   ", "# end"])
    loaded = PromptSet.load(str(written(tmp_path, "p.txt", mark + text.encode())))
    assert loaded.prompts == ("a dog", "a # cat", "\u00e9t\u00e9 \u2028 sea")
    assert loaded.targets == {}


def test_jsonl_keeps_kinds_of_targets(tmp_path):
    rows = [{"prompt": "two dogs", "count": 2, "tags": ["x"]}, {"tags": None, "count": None, "prompt": "a\u2028b, c"}]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    loaded = PromptSet.load(written(tmp_path, "p.JSONL", text))
    assert loaded == PromptSet(("two dogs", "a\u2028b, c"), {"count": (2, None), "tags": (["x"], None)})


def test_csv(tmp_path):
    text = '\ufeffcount, "prompt",subject\r\ntwo,"two dogs, ""big"" ones", dog\n\n,,\n,a cat,\n"one","a\nb",x'
    loaded = PromptSet.load(written(tmp_path, "p.csv", text))
    assert loaded.prompts == ('two dogs, "big" ones', "a cat", "a\nb")
    assert loaded.targets == {"count": ("two", None, "one"), "subject": ("dog", None, "x")}


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(words, st.none() | st.integers() | words), min_size=1, max_size=5))
def test_jsonl_gives_back_what_was_written(tmp_path_factory, rows):
    text = "\n".join(json.dumps({"prompt": prompt, "note": note}, ensure_ascii=False) for prompt, note in rows)
    loaded = PromptSet.load(written(tmp_path_factory.mktemp("p"), "p.jsonl", text))
    assert loaded == PromptSet(tuple(p for p, _ in rows), {"note": tuple(n for _, n in rows)})


# --- named sets ------------------------------------------------------------------------------------------------------


def test_named_sets():
    assert set(named_sets()) == {"animals", "emoji", "objects"}
    assert len(PromptSet.load("animals")) == 45
    assert {"cat", "hedgehog", "kangaroo"} < set(PromptSet.load("animals").prompts)
    objects = PromptSet.load("objects")
    assert len(objects) >= 100
    for prompt, subject, count in zip(objects.prompts, *objects.targets.values(), strict=True):
        assert prompt.startswith(count + " ")
        assert subject[:3] in prompt
        assert count != "one" or prompt == f"one {subject}"
    for prompts in named_sets().values():
        assert len(set(prompts.prompts)) == len(prompts)


def test_emoji_set_has_the_words_of_the_bundled_model(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RENDER), *sys.path])
    render = pytest.importorskip("render")
    subjects, counts, backgrounds = render.ATTRIBUTES.values()
    emoji = PromptSet.load("emoji")
    rows = list(zip(*(emoji.targets[name] for name in ("subject", "count", "background")), strict=True))
    assert set(rows) == {(s, c, b) for s in subjects for c in counts for b in backgrounds}
    assert len(rows) == 16 * 4 * 8
    for prompt, (subject, count, background) in zip(emoji.prompts, rows, strict=True):
        article = "an" if background == "orange" else "a"
        things = render.things(subject, count)
        assert prompt == render.TEMPLATES[0].format(things=things, article=article, background=background)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ([], "at least one is needed"),
        ((), "at least one is needed"),
        (["a dog", " \n"], "prompt 2 is empty"),
        (["a dog", 3], "prompt 2 is 3, which is int; text is needed"),
        ([None], "text is needed"),
        (None, "a list of texts is needed"),
        (7, "named set: animals, emoji, objects"),
        ({"a dog": 1}, "a list of texts is needed"),
        (b"emoji", "a list of texts is needed"),
        ("emojii", "did you mean 'emoji'"),
        ("Animals", "did you mean 'animals'"),
        ("", "named sets: animals, emoji, objects"),
        ("a dog on the moon", r"\.csv or \.tsv.*single prompt into a list"),
        ("word " * 500, "single prompt into a list"),
        ("dogs\0.txt", "cannot be read"),
        ("nowhere/dogs.txt", "does not exist.*check the path"),
        ("emoij.txt", "did you mean the named set 'emoji'"),
        ("dogs.json", r"\.jsonl, \.csv or \.tsv"),
    ],
)
def test_a_wrong_source_is_told_the_way_out(source, way_out):
    with pytest.raises(PromptError, match=way_out):
        PromptSet.load(source)


@pytest.mark.parametrize(
    ("name", "text", "way_out"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.txt", "# only this\n\n", "holds no prompts"),
        ("p.txt", b"caf\xe9", "line 1 is not UTF-8 text; save the file again as UTF-8"),
        ("p.txt", b"a dog\na cat\n\xff fox", "line 3 is not UTF-8 text"),
        ("p.txt", "a dog".encode("utf-16-le"), "line 1 holds a zero byte"),
        ("p.csv", "\ufeffprompt\na dog\n".encode("utf-16-le") + b"\x3d\xd8", "line 3 is not UTF-16 text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a dog \\ud83d"}', "line 2 holds half a character"),
        ("p.jsonl", '{"prompt": "a", "n": ["\\udc36"]}', "line 1 holds half a character"),
        ("p.jsonl", '{"prompt": "a", "\\udc36": 1}', "line 1 holds half a character"),
        ("p.txt", b"a dog \xed\xa0\xbd", "line 1 is not UTF-8 text"),
        ("p.csv", "Prompt,PROMPT\na,b", "'Prompt' and 'PROMPT' may all be meant"),
        ("p.tsv", "prompt\ttext\na\tb\tc", "put a text that contains tabs"),
        ("p.tsv", "prompts,n\na,1", "with tabs between them"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("p.jsonl", '"a dog"', "one|every line"),
        ("p.jsonl", '{"text": "a dog"}', "line 1.*no 'prompt', only 'text'"),
        ("p.jsonl", "{}", "no 'prompt', only nothing"),
        ("p.jsonl", '\n{"prompt": 3}', "line 2: the prompt is 3, which is int"),
        ("p.jsonl", '{"prompt": null}', "the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "b"}', "line 2 has no 'n', which line 1 has"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "n": 1}', "line 1 has no 'n', which line 2 has"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "prompt,count\n", "holds no prompts"),
        ("p.csv", "a dog\na cat", "no column 'prompt' in the first line, only 'a dog'"),
        ("p.csv", "Prompt;count\na dog;one", "with commas between them"),
        ("p.csv", "prompt,count\na dog,one\na cat", "line 3 has 1 cells for 2 columns"),
        ("p.csv", "prompt\na dog, big", "line 2 has 2 cells for 1 columns; put a text .* in double quotes"),
        ("p.csv", "prompt,n\n,1", "line 2: the prompt is empty"),
        ("p.csv", 'prompt\n"a dog\na cat', "check the double quotes"),
        ("p.csv", "prompt,n,n\na,1,2", "two have the same"),
        ("p.csv", "prompt,\na,1", "has no name"),
    ],
)
def test_a_wrong_file_is_told_the_way_out(tmp_path, name, text, way_out):
    with pytest.raises(PromptError, match=way_out) as caught:
        PromptSet.load(written(tmp_path, name, text))
    assert "p." in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a fox\na 🐶\n"),
        ("p.csv", "Prompt,n\na fox,1\na 🐶,2\n"),
        ("p.tsv", "n\tPROMPT\n1\ta fox\n2\ta 🐶\n"),
        ("p.jsonl", '{"Prompt": "a fox"}\n{"prompt": "a \\ud83d\\udc36"}\n'),
    ],
)
def test_any_case_of_the_column_and_any_encoding_that_says_so(tmp_path, encoding, name, text):
    assert PromptSet.load(written(tmp_path, name, text.encode(encoding))).prompts == ("a fox", "a 🐶")


@pytest.mark.parametrize("source", [["a dog", "a \ud83d"], ["\udcff"]])
def test_half_a_character_is_refused_before_anything_is_drawn(source):
    with pytest.raises(PromptError, match=rf"prompt {len(source)} holds half a character"):
        PromptSet.load(source)


def test_files_that_cannot_be_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="cannot be read"):
        PromptSet.load("folder.txt")
    written(tmp_path, "prompts.md", "a dog")
    with pytest.raises(PromptError, match="not a prompt file by its name"):
        PromptSet.load("prompts.md")


def test_a_column_of_another_length_is_refused():
    with pytest.raises(PromptError, match="'count' has 1 values for 2 prompts"):
        PromptSet(("a", "b"), {"count": (1,)})


# --- split -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 5))
def test_split_shares_out_every_prompt_once(count, held_out, seed):
    prompts = numbered(count)
    split = prompts.split(held_out, seed)
    train, looked_at = split.train, split.evidence
    assert split == prompts.split(held_out, seed)
    for side in (train, looked_at):
        assert side.prompts == tuple(f"dog {i}" for i in side.targets["place"])
    if count < 8:
        assert (train, split.held_out, len(looked_at)) == (prompts, False, held_out)
        often = Counter(looked_at.prompts).values()
        assert max(often, default=0) - min(often, default=0) <= 1
        return
    assert split.held_out
    assert len(looked_at) == min(held_out, count // 2)
    assert sorted(train.targets["place"] + looked_at.targets["place"]) == list(range(count))


@given(st.integers(4, 30), st.data())
def test_more_held_out_prompts_leave_the_first_in_place(count, data):
    few = data.draw(st.integers(0, count // 2))
    more = numbered(count).split(few + 1, 3).evidence.prompts
    assert more[:few] == numbered(count).split(few, 3).evidence.prompts


def test_split_depends_on_the_seed():
    assert numbered(30).split(5, 0) != numbered(30).split(5, 1)


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 3))
def test_no_text_that_is_called_held_out_is_trained_on(letters, held_out, seed):
    split = PromptSet(tuple(letters)).split(held_out, seed)
    train, held = set(split.train.prompts), set(split.evidence.prompts)
    assert split.held_out == (len(set(letters)) >= 8)
    assert train | held == set(letters)
    if split.held_out:
        assert not train & held
        assert len(held) == len(split.evidence) == min(held_out, len(set(letters)) // 2)
    else:
        assert split.train.prompts == tuple(letters)
        assert len(split.evidence) == held_out


@pytest.mark.parametrize(
    ("count", "held_out", "words"),
    [
        (45, 16, "training on 29 prompts, 16 held out"),
        (8, 16, "training on 4 prompts, 4 held out"),
        (8, 0, "training on 8 prompts, no evidence is taken"),
        (
            3,
            16,
            "training on 3 prompts, too few to hold any out: the evidence is 16 pictures of the same prompts with "
            "fresh noise",
        ),
        (
            1,
            1,
            "training on 1 prompt, too few to hold any out: the evidence is 1 picture of the same prompts with fresh "
            "noise",
        ),
    ],
)
def test_the_split_in_words(count, held_out, words):
    assert numbered(count).split(held_out, 0).words == words


def test_a_prompt_that_is_repeated_counts_once_in_words():
    words = PromptSet(("a dog", "a cat", "a boat") * 3).split(2, 0).words
    assert words.startswith("training on 3 prompts (9 with repetitions), too few to hold any out: the evidence is 2 ")


def test_split_refuses_a_negative_number():
    with pytest.raises(PromptError, match="0 or more"):
        numbered(3).split(-1, 0)


# --- batches ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 30), st.integers(0, 3))
def test_batches_are_balanced(count, size, steps, seed):
    prompts, seen = numbered(count), Counter(dict.fromkeys(range(count), 0))
    for step in range(steps):
        batch = prompts.batch(seed, step, size)
        assert len(batch.prompts) == size
        assert batch.prompts == [f"dog {i}" for i in batch.targets["place"]]
        assert max(Counter(batch.prompts).values()) <= -(-size // count)
        seen.update(batch.targets["place"])
        assert max(seen.values()) - min(seen.values()) <= 1


def test_batches_come_from_seed_and_step_alone():
    prompts = numbered(10)
    assert prompts.batch(1, 7, 4) == prompts.batch(1, 7, 4)
    assert len({tuple(prompts.batch(seed, 0, 10).prompts) for seed in range(5)}) == 5
    assert prompts.batch(0, 0, 10).prompts != prompts.batch(0, 1, 10).prompts


@pytest.mark.parametrize(("count", "step", "size"), [(0, 0, 1), (3, 0, 0), (3, -1, 2)])
def test_a_batch_that_cannot_be_drawn(count, step, size):
    with pytest.raises(PromptError, match="cannot be drawn"):
        numbered(count).batch(0, step, size)
