"""Tensor preprocessing against PIL's, and its gradient."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.preprocess import Preprocess, center_crop, resize, target_size

PILLOW, TALL = int(PIL.__version__.split(".")[0]), (200, 77)
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)


def picture(height, width, seed=0):
    """A smooth picture with a few hard edges, 8 bit as PIL has it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    smooth[..., height // 4 : height // 2, width // 4 : width // 2] = 1
    return Image.fromarray((smooth[0] * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].double() / 255


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (50, 121), TALL, (40, 40), (33, 20), (512, 384)])
@pytest.mark.parametrize("shape", [{"shortest_edge": 64}, {"height": 48, "width": 56}])
@pytest.mark.parametrize("resample", [2, 3])
def test_as_transformers_does_it_with_pil(size, shape, resample):
    if PILLOW < 13 and size == TALL:
        pytest.skip("this Pillow resizes the width first; at hard edges the order shows")
    image = picture(*size)
    crop = {"height": 64, "width": 64}
    processor = CLIPImageProcessorPil(size=shape, crop_size=crop, image_mean=MEAN, image_std=STD, resample=resample)
    expected = processor(image, return_tensors="pt")["pixel_values"].double()
    got = Preprocess.from_config(processor.to_dict())(tensor(image))
    assert got.shape == expected.shape == (1, 3, 64, 64)
    difference = ((got - expected) * torch.tensor(STD).view(1, 3, 1, 1)).abs().max()
    assert difference <= 2.01 / 255


def test_a_picture_of_the_right_size_is_only_normalised():
    images = torch.rand(2, 3, 64, 64)
    recipe = Preprocess(size=64, crop=(64, 64), mean=MEAN, std=STD)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(recipe(images), (images - mean) / std)
    assert resize(images, (64, 64)) is images


@pytest.mark.parametrize(("size", "crop"), [(6, (4, 4)), (4, (4, 4)), ((5, 3), (6, 6)), (None, None), (8, (8, 8))])
def test_the_gradient_is_right(size, crop):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 6, generator=generator, dtype=torch.float64) * 0.5 + 0.25
    recipe = Preprocess(size=size, crop=crop, mean=MEAN, std=STD)
    assert torch.autograd.gradcheck(recipe, images.requires_grad_(True), fast_mode=True)


def test_half_precision_is_computed_in_float32():
    recipe = Preprocess(size=4, crop=None, mean=MEAN, std=STD)
    assert recipe(torch.rand(1, 3, 8, 8).half()).dtype == torch.float32
    assert recipe(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (7, 64)])
def test_the_shorter_side_is_resized(size):
    assert min(target_size(torch.zeros(1, 3, *size), 16)) == 16


def test_black_is_added_where_a_picture_is_smaller_than_the_crop():
    cropped = center_crop(torch.ones(1, 3, 4, 9), (7, 5))
    assert cropped.shape == (1, 3, 7, 5)
    assert cropped.sum() == 3 * 4 * 5


GOOD = {"size": {"shortest_edge": 8}, "image_mean": MEAN, "image_std": STD}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Preprocess(8, None, MEAN, STD)),
        ({"size": 9, "crop_size": 7}, Preprocess(9, (7, 7), MEAN, STD)),
        ({"crop_size": {"height": 3, "width": 4}, "do_center_crop": False}, Preprocess(8, None, MEAN, STD)),
        ({"do_resize": False, "resample": 2}, Preprocess(None, None, MEAN, STD, "bilinear")),
        ({"do_normalize": False}, Preprocess(8, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
    ],
)
def test_the_recipe_is_read_from_the_config(change, expected):
    assert Preprocess.from_config(GOOD | change) == expected


@pytest.mark.parametrize(
    ("bad", "way_out"),
    [
        ({"size": {"longest_edge": 8}}, "height"),
        ({"size": None}, "size"),
        ({"resample": 1}, "bicubic"),
        ({"image_mean": None}, "image_mean"),
        ({"rescale_factor": 1}, "1/255"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(bad, way_out):
    with pytest.raises(RewardError, match=way_out):
        Preprocess.from_config(GOOD | bad)
