"""A judge that needs no weights: are these still pictures such as the base model draws?

Over-optimised pictures go out of the range of what pictures are like: flat, noisy, overexposed, full of blobs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.entries import RewardEntry
from alignprop_pipe.rewards.scorers.simple import luma

MEASURES = 10
SMALL_CLIPS = ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LEAST_SPREAD = 0.02
"""Of a measure: where all pictures of the base model are alike, a little more is no fault."""


class Likeness(Reward):
    """How much a picture is like the base model's in light, contrast, saturation and detail: 0 (not at all) to 1.

    `mean` and `std` are those of what `measures_of` finds in pictures of the base model, which `align` measures.
    The score is exp(-d/2), with d the mean squared distance in standard deviations, of the ten measures: about 0.7
    for the base model's own pictures. Watched, never trained on, and never followed by `keep_best` unless it is named:
    the base model itself has the best score.
    """

    name = "likeness"
    entry = RewardEntry(
        summary="is it like the base model's pictures in light, contrast, colour, detail; a judge",
        licence="no weights",
        judge=True,
        range_text="0 to 1 (as the base model draws: about 0.7)",
    )
    trainable = False
    leads = False
    reads_prompts = False

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        if (mean is None) != (std is None):
            raise RewardError("likeness: give both mean and std, or neither")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != MEASURES or not torch.tensor(values).isfinite().all()):
                raise RewardError(f"likeness({name}={values!r}): {MEASURES} finite numbers are needed")
        if std is not None and min(std) <= 0:
            raise RewardError(f"likeness(std={std!r}): numbers above 0 are needed")
        self.mean, self.std = mean, std

    @property
    def is_calibrated(self) -> bool:
        return self.mean is not None

    def calibrated(self, images: Images, prompts: list[str], targets: Targets) -> Reward:
        if self.is_calibrated:
            return self
        if len(images) < 2:
            raise RewardError(f"likeness needs two pictures or more to measure a spread, and got {len(images)}")
        found = torch.cat([measures_of(image[None]) for image in images]).double()
        std = found.std(dim=0).clamp(min=LEAST_SPREAD)
        mean, spread = ([round(number, 4) for number in row.tolist()] for row in (found.mean(dim=0), std))
        return Likeness(mean=mean, std=spread)

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        if self.mean is None or self.std is None:
            raise RewardError(
                "likeness cannot score yet: it compares with the base model's pictures, which align() measures at its "
                "start; elsewhere call alignprop_pipe.rewards.calibrate(reward, images, prompts)"
            )
        found = measures_of(images)
        away = (found - found.new_tensor(self.mean)) / found.new_tensor(self.std)
        return (-away.square().mean(dim=1) / 2).exp()


def measures_of(images: Images) -> Float[Tensor, "batch measures"]:
    """Mean and spread of light and of saturation; as logarithms, edges at three sizes and how lively blocks are.

    Pictures of all sizes are looked at in 64x64.
    """
    images = (
        F.interpolate(images.float(), size=(64, 64), mode="area") if min(images.shape[-2:]) > 64 else images.float()
    )
    grey = luma(images)[:, None]
    saturation = images.amax(dim=1) - images.amin(dim=1)
    found = [grey.mean(dim=(1, 2, 3)), grey.std(dim=(1, 2, 3)), saturation.mean(dim=(1, 2)), saturation.std(dim=(1, 2))]
    for size in (1, 2, 4):
        coarse = F.avg_pool2d(grey, size)
        steps = coarse.diff(dim=3).square().mean(dim=(1, 2, 3)) + coarse.diff(dim=2).square().mean(dim=(1, 2, 3))
        found.append((steps + 1e-6).log() / 2)
    blocks = F.unfold(grey, 8, stride=8).var(dim=1)
    shares = grey.new_tensor([0.1, 0.5, 0.9])
    return torch.stack([*found, *torch.quantile((blocks + 1e-6).log() / 2, shares, dim=1)], dim=1)


def free_judge(reward: Reward) -> str:
    """A judge of another kind than the reward that costs no download: a small CLIP where one is here, else this one.

    CLIP judges what does not read the prompts; what does may be fooled as it is.
    """
    if any(member.reads_prompts for member in members(reward) if not member.children()):
        return Likeness.name
    from huggingface_hub import try_to_load_from_cache

    for source in SMALL_CLIPS:
        is_here = [isinstance(try_to_load_from_cache(source, file), str) for file in ("config.json", *WEIGHTS)]
        if is_here[0] and any(is_here[1:]) and isinstance(try_to_load_from_cache(source, "tokenizer_config.json"), str):
            return f'clip(model="{source}")'
    return Likeness.name
