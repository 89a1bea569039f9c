"""Small rewards without weights, for play, tests, and as regularisers. Images [B, 3, H, W] in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.entries import RewardEntry


def luma(images: Images) -> Tensor:
    """Brightness as the eye weighs it (ITU-R BT.601), [B, H, W] in [0, 1]."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)


class Brightness(Reward):
    """Mean luma: 0 (black) to 1 (white).

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Brightness
        >>> Brightness()(torch.full((1, 3, 8, 8), 0.5), [""]).total
        tensor([0.5000])
    """

    name = "brightness"
    entry = RewardEntry(
        summary="mean luma",
        licence="no weights",
        range_text="0 (black) to 1 (white)",
    )
    reads_prompts = False

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        return luma(images).mean(dim=(1, 2))


class Colour(Reward):
    """Colourfulness (Hasler and Suesstrunk, 2003): 0 (grey) to about 1; vivid photographs 0.4 (109 / 255).

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Colour
        >>> Colour()(torch.full((1, 3, 8, 8), 0.5), [""]).total.round(decimals=2)
        tensor([0.])
    """

    name = "colour"
    entry = RewardEntry(
        summary="colourfulness after Hasler and Suesstrunk",
        licence="no weights",
        range_text="0 (grey) to about 1; vivid photographs: 0.4",
    )
    reads_prompts = False

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        red, green, blue = images.unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1)
        means = opponents.mean(dim=(2, 3))
        spread = (opponents - means[:, :, None, None]).square().mean(dim=(2, 3))
        return _root(spread.sum(dim=1)) + 0.3 * _root(means.square().sum(dim=1))


class Sharpness(Reward):
    """Variance of the Laplacian of the luma: 0 (flat) to 16 (a chessboard of pixels); photographs about 0.01.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Sharpness
        >>> Sharpness()(torch.full((1, 3, 8, 8), 0.5), [""]).total
        tensor([0.])
    """

    name = "sharpness"
    entry = RewardEntry(
        summary="variance of the Laplacian of the luma",
        licence="no weights",
        range_text="0 (flat) to 16 (a chessboard of pixels)",
    )
    reads_prompts = False

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        grey = luma(images)[:, None]
        kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
        edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel)
        return edges.var(dim=(1, 2, 3), correction=0)


class TotalVariation(Reward):
    """Mean absolute step to the right and lower neighbour: 0 (flat) to 2. As `-tv` it makes pictures calm.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import TotalVariation
        >>> TotalVariation()(torch.ones(1, 3, 8, 8), [""]).total
        tensor([0.])
    """

    name = "tv"
    entry = RewardEntry(
        summary="total variation: mean step between neighbouring pixels; -tv makes pictures calm",
        licence="no weights",
        range_text="0 (flat) to 2",
    )
    reads_prompts = False

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        across = images.diff(dim=3, append=images[..., -1:]).abs()
        down = images.diff(dim=2, append=images[..., -1:, :]).abs()
        return (across + down).mean(dim=(1, 2, 3))


class Symmetry(Reward):
    """Minus the mean squared difference between a picture and its mirror image: -1 to 0 (symmetric).

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Symmetry
        >>> Symmetry()(torch.ones(1, 3, 8, 8), [""]).total.abs()
        tensor([0.])
    """

    name = "symmetry"
    entry = RewardEntry(
        summary="minus the squared difference between left and right",
        licence="no weights",
        range_text="-1 to 0 (mirror-symmetric)",
    )
    reads_prompts = False

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        return -(images - images.flip(dims=(3,))).square().mean(dim=(1, 2, 3))


def _root(values: Tensor) -> Tensor:
    # The root has an infinite slope at 0, where a grey picture is: this one starts at 0 with a slope of 500.
    return (values + 1e-6).sqrt() - 1e-3
