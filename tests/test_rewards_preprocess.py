"""Tensor preprocessing against PIL's, and its gradient."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.networks.preprocess import Preprocess, center_crop, resize, target_size

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


def by_hand(image, side):
    """Longer side to `side`, black on both sides of the shorter: one axis after the other, in PIL's float pictures."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    canvas = torch.zeros(3, side, side, dtype=torch.float64)
    left, top = (side - width) // 2, (side - height) // 2
    for channel, plane in enumerate(image.split()):
        small = plane.convert("F").resize((width, height), Image.Resampling.BICUBIC)
        canvas[channel, top : top + height, left : left + width] = torch.from_numpy(np.asarray(small).copy())
    return canvas[None] / 255


@pytest.mark.parametrize("size", [(64, 64), (50, 121), (121, 50), (40, 40), (33, 20), (512, 384), (64, 31), (3, 200)])
def test_letterbox(size):
    image = picture(*size)
    recipe = Preprocess(32, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), letterbox=True)
    got = recipe(tensor(image))
    assert got.shape == (1, 3, 32, 32)
    torch.testing.assert_close(got, by_hand(image, 32), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("spare", "down", "even"), [(1, 0, 0), (3, 1, 2), (5, 2, 2), (4, 2, 2)])
def test_half_a_pixel_beside_a_crop_is_rounded_as_asked(spare, down, even):
    images = torch.arange(4.0 + spare).expand(1, 3, 4, -1)
    assert center_crop(images, (4, 4))[0, 0, 0, 0] == down
    assert center_crop(images, (4, 4), rounds=True)[0, 0, 0, 0] == even


@pytest.mark.parametrize("size", [(8, 6), (5, 11)])
def test_the_gradient_of_a_letterbox_is_right(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recipe = Preprocess(4, None, MEAN, STD, letterbox=True)
    assert torch.autograd.gradcheck(recipe, images.requires_grad_(True), fast_mode=True)
