"""Compressibility: the distance, the true size, and that one moves the other."""

import io

import pytest
import torch
from PIL import Image

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import Jpeg, parse_reward


def noisy_pictures(count=2, size=64):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 5, size // 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0.02, 0.98)


def climbed(text, images, steps=40):
    """The pictures after gradient ascent on their pixels."""
    reward, pixels = parse_reward(text), images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([pixels], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-reward(pixels.clamp(0, 1), ["a"] * len(images)).total.sum()).backward()
        optimizer.step()
    return pixels.detach().clamp(0, 1)


def kilobytes(images, quality=80):
    return Jpeg(quality)(images, ["a"] * len(images)).parts["jpeg_kb"].sum().item()


def test_climbing_makes_files_smaller_and_the_negative_larger():
    images = noisy_pictures()
    before = kilobytes(images)
    assert kilobytes(climbed("jpeg", images)) < 0.85 * before
    assert kilobytes(climbed("-jpeg", images)) > 1.2 * before


def test_the_size_is_that_of_pillows_file():
    image = noisy_pictures(1)[0]
    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, format="JPEG", quality=30)
    parts = Jpeg(quality=30)(image[None], ["a"]).parts
    assert parts["jpeg_kb"].item() == pytest.approx(len(file.getvalue()) / 1000)


def test_the_distance_is_near_that_of_a_real_jpeg():
    """At one quality: kornia's codec against Pillow's."""
    images = noisy_pictures(1)
    file = io.BytesIO()
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file, format="JPEG", quality=50)
    data = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(64, 64, 3)
    true = (images[0] - data.permute(2, 0, 1) / 255).square().mean().sqrt()
    ours = (images - Jpeg(50)._decoded(images, 1.0)).square().mean().sqrt()
    torch.testing.assert_close(ours, true, rtol=0.25, atol=0)


@pytest.mark.parametrize("quality", [1, 2, 100])
def test_the_ends_of_the_scale_are_finite(quality):
    images = noisy_pictures(size=20).requires_grad_(True)
    total = Jpeg(quality)(images, ["a"] * 2).total
    total.sum().backward()
    assert total.isfinite().all()
    assert (total < 0).all()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("quality", [0, 101, -3, True])
def test_quality_has_a_range(quality):
    with pytest.raises(RewardError, match="1 to 100"):
        Jpeg(quality=quality)


@pytest.mark.parametrize("quality", ["80", 80.5, None])
def test_quality_is_a_whole_number(quality, unchecked):
    with pytest.raises(RewardError, match="1 to 100"):
        Jpeg(quality=quality)
