"""HPSv2 against its authors' code: the same weights and pictures give the same scores; both layouts load."""

import os
import shutil
from pathlib import Path

import clip_family as family
import pytest
import torch
from clip_family import PROMPTS, SIDE, SIZES, picture, tensor
from safetensors.torch import load_file, save_file

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import HpsV2, HpsV21, parse_reward
from alignprop_pipe.rewards.networks import weights
from alignprop_pipe.rewards.networks.open_clip import clip_names


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted pickles go here."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(weights, "cached_assets_path", lambda *_: folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family.write_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


ORIGINAL = family.originals("hpsv2")


@pytest.mark.parametrize("file", ["HPS_v2_compressed.pt", "model.safetensors"])
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_scores_are_those_of_the_authors_code(folder, number, file):
    expected = ORIGINAL["scores"][number]
    if expected is None:  # the authors' code cannot score this size
        assert max(SIZES[number]) == SIDE != min(SIZES[number])
        return
    images = tensor(picture(*SIZES[number], seed=number)).expand(len(PROMPTS), -1, -1, -1)
    torch.testing.assert_close(HpsV2(folder / file)(images, PROMPTS).total, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_pixels_are_those_of_the_authors_code(folder, number):
    reward = HpsV2(folder)
    reward(tensor(picture(30, 30)), PROMPTS[:1])
    pixels = reward.preprocess(tensor(picture(*SIZES[number], seed=number)))
    green = (pixels[0, 1] * reward.preprocess.std[1] + reward.preprocess.mean[1]) * 255
    expected = torch.tensor(ORIGINAL["pixels"][number])
    if expected.shape != (SIDE, SIDE):  # not padded there
        spare = SIDE - expected.shape[1]
        expected = torch.nn.functional.pad(expected, (spare // 2, spare - spare // 2))
    torch.testing.assert_close(green, expected.float(), rtol=0, atol=0.51)  # the file holds whole levels


@pytest.mark.parametrize("size", [(28, 28), (40, 37), (37, 60), (16, 20)])
def test_the_gradient_is_the_slope(folder, size):
    family.check_slope(HpsV2(folder), size)


def test_batch_offload_and_judging(folder):
    family.check_batch(HpsV2(folder))
    family.check_offload(HpsV2(folder), HpsV2(folder, offload=True))
    family.check_judging(HpsV2(folder))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_half_precision_is_near(folder, dtype, tolerance):
    """Of a cosine, -1 to 1."""
    assert family.half_error(HpsV2(folder), HpsV2(folder, dtype=dtype)) < tolerance


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (8, 8), (301, 299)])
def test_any_size_scores(folder, size):
    assert HpsV2(folder)(torch.rand(1, 3, *size), PROMPTS[:1]).total.isfinite().all()


def test_the_weights_of_2_1_have_their_own_file(folder, copy):
    (copy / "HPS_v2_compressed.pt").rename(copy / "HPS_v2.1_compressed.pt")
    (copy / "model.safetensors").unlink()
    images = torch.rand(1, 3, 28, 28)
    assert torch.equal(HpsV21(copy)(images, PROMPTS[:1]).total, HpsV2(folder)(images, PROMPTS[:1]).total)
    assert str(parse_reward("0.5*hpsv2.1 - hpsv2")) == "0.5*hpsv2.1 - hpsv2"


def test_configuration_and_tokenizer_can_stand_elsewhere(folder, copy, tmp_path):
    file = Path(shutil.move(copy / "HPS_v2_compressed.pt", tmp_path / "weights.pt"))
    images = torch.rand(1, 3, 28, 28)
    got = HpsV2(file, processor=copy)(images, PROMPTS[:1]).total
    assert torch.equal(got, HpsV2(folder)(images, PROMPTS[:1]).total)


@pytest.mark.parametrize("front", ["module.", "model.", ""])
def test_wrappers_leave_their_names_in_front(folder, front):
    state = torch.load(folder / "HPS_v2_compressed.pt")["state_dict"]
    wrapped = {front + name: value for name, value in state.items()} | {f"{front}attn_mask": torch.zeros(77, 77)}
    expected = load_file(folder / "model.safetensors")
    named = clip_names(wrapped)
    assert set(named) == set(expected)
    assert all(torch.equal(named[name], expected[name]) for name in expected)
    assert set(clip_names(expected)) == set(expected)


def score(model: Path | str) -> torch.Tensor:
    return HpsV2(model)(torch.rand(1, 3, 28, 28), PROMPTS[:1]).total


def test_missing_weights_are_named(copy):
    for file in ("HPS_v2_compressed.pt", "model.safetensors"):
        (copy / file).unlink()
    with pytest.raises(RewardError, match="lacks HPS_v2_compressed.pt, model.safetensors"):
        score(copy)
    with pytest.raises(RewardError, match=r"nobody/nothing HPS_v2_compressed\.pt.*laion/\S+ config\.json tok"):
        score("nobody/nothing")


def test_a_missing_tokenizer_says_what_to_do(copy):
    for path in copy.glob("tok*"):
        path.unlink()
    with pytest.raises(RewardError, match=r"hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K config\.json"):
        score(copy)


@pytest.mark.parametrize("file", ["HPS_v2_compressed.pt", "model.safetensors"])
def test_a_truncated_file_is_named(copy, file):
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RewardError, match=f"{file}.*is damaged"):
        score(copy / file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("visual_projection.weight"), "visual_projection.weight is missing"),
        (
            lambda state: state.update({"text_projection.weight": torch.zeros(3, 32)}),
            r"shape \(3, 32\), not \(16, 32\)",
        ),
        (lambda state: state.update({"extra": torch.zeros(1)}), "extra is not known"),
        (lambda state: state.update({"logit_scale": torch.tensor(torch.nan)}), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(copy, change, complaint):
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors")
    with pytest.raises(RewardError, match=complaint):
        score(copy / "model.safetensors")


def test_no_code_in_a_pickle_runs(copy):
    torch.save({"state_dict": family.Bomb(copy / "executed")}, copy / "HPS_v2_compressed.pt")
    with pytest.raises(RewardError, match="can run code"):
        score(copy)
    assert not (copy / "executed").exists()


def test_another_kind_of_configuration_is_refused(copy, tmp_path):
    family.write_siglip(tmp_path / "siglip")
    shutil.copy(tmp_path / "siglip" / "config.json", copy / "config.json")
    with pytest.raises(RewardError, match="'siglip' model; a CLIPModel is needed"):
        score(copy)
