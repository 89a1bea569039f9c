"""The rewards without weights: gradients, ranges, single pictures and batches."""

import pytest
import torch

from alignprop_pipe.rewards import parse_reward

NAMES = ["brightness", "colour", "sharpness", "symmetry", "tv", "jpeg", "jpeg(quality=20)"]


def pictures(count, height, width, dtype=torch.float64):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(4, 4), (5, 6)])
def test_the_gradient_is_right(name, size):
    reward = parse_reward(name)
    images = (pictures(2, *size) * 0.8 + 0.1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda pixels: reward(pixels, ["a", "b"]).total, images, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (16, 16), (30, 17)])
def test_a_batch_is_its_pictures_one_by_one(name, size):
    reward, images = parse_reward(name), pictures(3, *size)
    whole = reward(images, ["a"] * 3)
    single = torch.cat([reward(image[None], ["a"]).total for image in images])
    torch.testing.assert_close(whole.total, single, rtol=1e-10, atol=1e-10)
    assert whole.total.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_pictures_have_a_finite_slope(name, level):
    images = torch.full((2, 3, 20, 20), level, requires_grad=True)
    parse_reward(name)(images, ["a"] * 2).total.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_close(name):
    images = pictures(2, 24, 24, torch.float32)
    exact = parse_reward(name)(images, ["a"] * 2).total
    half = parse_reward(name)(images.bfloat16(), ["a"] * 2).total
    torch.testing.assert_close(half.float(), exact, rtol=2e-2, atol=5e-3)


def chessboard(size=16):
    board = (torch.arange(size)[:, None] + torch.arange(size)) % 2
    return board.float().expand(1, 3, size, size)


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("brightness", torch.ones(1, 3, 4, 4), 1.0),
        ("brightness", torch.zeros(1, 3, 4, 4), 0.0),
        ("brightness", torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1), 0.587),
        ("colour", torch.full((1, 3, 4, 4), 0.3), 0.0),
        ("colour", torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4), 0.3 * 1.25**0.5),
        ("tv", chessboard(64), 2 * 63 / 64),
        ("tv", torch.full((1, 3, 4, 4), 0.3), 0.0),
        ("symmetry", chessboard(15), 0.0),
        ("symmetry", chessboard(16), -1.0),
        ("sharpness", torch.full((1, 3, 4, 4), 0.3), 0.0),
        ("jpeg", torch.full((1, 3, 16, 16), 0.5), 0.0),
    ],
)
def test_the_range_is_as_documented(name, images, expected):
    assert parse_reward(name)(images, ["a"]).total.item() == pytest.approx(expected, abs=4e-3)


def test_sharpness_falls_with_blur():
    images = pictures(2, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    reward = parse_reward("sharpness")
    assert (reward(images, ["a"] * 2).total > 2 * reward(blurred, ["a"] * 2).total).all()
    assert 14 < reward(chessboard(64), ["a"]).total.item() <= 16
