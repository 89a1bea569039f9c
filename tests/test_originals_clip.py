"""The committed numbers of the originals are what their code gives today, where it is here."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import clip_family as family
import pytest
import torch
from originals_clip import TEXTS
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from alignprop_pipe.rewards.networks import weights
from alignprop_pipe.rewards.networks.open_clip import token_ids
from alignprop_pipe.rewards.scorers.aesthetic import linear_head

ORIGINALS = os.environ.get("ALIGNPROP_ORIGINALS", "")


@pytest.mark.skipif(not ORIGINALS, reason="ALIGNPROP_ORIGINALS names no folder with the originals' checkouts")
def test_the_originals_give_the_committed_numbers(tmp_path):
    """`ALIGNPROP_ORIGINALS` is as originals_clip.py describes it; venv/bin/python in it is used where it is."""
    inputs, out, here = family.write_inputs(tmp_path / "inputs"), tmp_path / "out.json", Path(__file__).parent
    own = Path(ORIGINALS) / "venv" / "bin" / "python"
    python = own if own.exists() else sys.executable
    subprocess.run([python, here / "originals_clip.py", inputs, ORIGINALS, out], check=True)
    found = json.loads(out.read_text())
    assert found["commits"] == family.originals("commits")
    for name in ("hpsv2", "pickscore", "aesthetic", "aesthetic2.5"):
        committed = family.originals(name)
        assert found[name].keys() == committed.keys()
        assert numbers(found[name]["scores"]) == pytest.approx(numbers(committed["scores"]), abs=1e-4)
        assert numbers(found[name].get("pixels", [])) == pytest.approx(numbers(committed.get("pixels", [])), abs=1)


@pytest.mark.skipif(not ORIGINALS, reason="ALIGNPROP_ORIGINALS names no folder with the originals' checkouts")
def test_the_tokenizer_of_transformers_reads_as_the_authors_does():
    """With the true vocabulary, which is in HPSv2's checkout."""
    file = Path(ORIGINALS) / "HPSv2" / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges, letters = [tuple(line.split()) for line in lines], sorted(ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocab = {piece: number for number, piece in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    for text, expected in zip(TEXTS, family.originals("pieces"), strict=True):
        ids = token_ids(tokenizer, text)
        ids = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == expected[1:-1]


@pytest.mark.skipif(not ORIGINALS, reason="ALIGNPROP_ORIGINALS names no folder with the originals' checkouts")
@pytest.mark.parametrize(
    ("file", "part", "takes"),
    [
        ("improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth", "layers", 768),
        ("aesthetic-predictor-v2-5/models/aesthetic_predictor_v2_5.pth", "scoring_head", 1152),
    ],
)
def test_the_published_heads_load(tmp_path, monkeypatch, file, part, takes):
    """The true weights of the heads stand in the authors' repositories; without activations they are one matrix."""
    monkeypatch.setattr(weights, "cached_assets_path", lambda *_: tmp_path)
    head = linear_head(weights.load_tensors(Path(ORIGINALS) / file), part, file).double()
    held = torch.load(Path(ORIGINALS) / file, map_location="cpu", weights_only=True)
    embedding = torch.eye(takes, dtype=torch.float64)[:5]
    expected = embedding
    for name in [name for name in held if name.endswith("weight")]:
        expected = expected @ held[name].double().T + held[name.replace("weight", "bias")].double()
    torch.testing.assert_close(head(embedding), expected[:, 0])
    assert head(embedding).std() > 0


def numbers(nested):
    return [v for inner in nested for v in numbers(inner)] if isinstance(nested, list) else [nested or 0]
