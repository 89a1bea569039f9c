"""PickScore against its authors' code."""

import shutil
from pathlib import Path

import clip_family as family
import pytest
import torch
from clip_family import PROMPTS, SIZES, picture, tensor
from PIL import Image
from transformers import CLIPImageProcessorPil

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import PickScore, parse_reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return family.write_clip(tmp_path_factory.mktemp("pick"), 2)


@pytest.fixture(scope="module")
def reward(folder):
    return PickScore(folder)


ORIGINAL = family.originals("pickscore")


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_scores_are_those_of_the_authors_code(reward, number):
    images = tensor(picture(*SIZES[number], seed=number)).expand(len(PROMPTS), -1, -1, -1)
    # Scores of this miniature go from -90 to 90. PIL rounds resized pictures to 8 bits; the first is not resized.
    tolerance = 1e-4 if number == 0 else 0.18
    got = reward(images, PROMPTS).total
    torch.testing.assert_close(got, torch.tensor(ORIGINAL["scores"][number]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_the_authors_choice_among_pictures_is_ours(reward, row):
    """Their code gives the share of people who would pick each: the softmax of the scores."""
    scores = [reward(tensor(picture(*size, seed=n)), [PROMPTS[row]]).total for n, size in enumerate(SIZES)]
    shares = torch.cat(scores).softmax(dim=0)
    torch.testing.assert_close(shares, torch.tensor(ORIGINAL["shares"][row]), rtol=0, atol=0.02)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_with_the_pixels_of_pil_the_scores_are_equal(folder, reward, number):
    """The PIL path of transformers, and then our scorer."""
    prepared = CLIPImageProcessorPil.from_pretrained(folder)(picture(*SIZES[number], seed=number), do_normalize=False)
    levels = (prepared["pixel_values"][0].transpose(1, 2, 0) * 255).round().astype("uint8")
    got = reward(tensor(*[Image.fromarray(levels)] * len(PROMPTS)), PROMPTS).total
    torch.testing.assert_close(got, torch.tensor(ORIGINAL["scores"][number]), rtol=0, atol=1e-4)


def test_the_models_logit_scale_is_applied(reward):
    assert reward(tensor(picture(28, 28)), PROMPTS[:1]).total.abs() > 1
    assert reward.factor == pytest.approx(2.718281828459045**4.5)


@pytest.mark.parametrize("size", [(28, 28), (40, 37), (16, 20)])
def test_the_gradient_is_the_slope(folder, size):
    family.check_slope(PickScore(folder), size)


def test_batch_offload_and_judging(folder):
    family.check_batch(PickScore(folder))
    family.check_offload(PickScore(folder), PickScore(folder, offload=True))
    family.check_judging(PickScore(folder))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1.8), ("float16", 0.2)])
def test_half_precision_is_near(folder, dtype, tolerance):
    """1 % and 0.1 % of the range of -90 to 90."""
    assert family.half_error(PickScore(folder), PickScore(folder, dtype=dtype)) < tolerance


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(RewardError, match="hf download yuvalkirstain/PickScore_v1 --local-dir FOLDER"):
        parse_reward("pickscore")(torch.rand(1, 3, 28, 28), PROMPTS[:1])
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    with pytest.raises(RewardError, match=r"it needs.*model\.safetensors"):
        PickScore(copy)(torch.rand(1, 3, 28, 28), PROMPTS[:1])


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(RewardError, match="'pickscore' needs a CLIPModel"):
        PickScore(family.write_siglip(tmp_path / "siglip"))(torch.rand(1, 3, 28, 28), PROMPTS[:1])
