"""`smooth`: a reward asked about several slightly different copies of each picture, so that it is harder to fool."""

import torch
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Scores, Targets
from alignprop_pipe.rewards.base import Reward, merge_parts
from alignprop_pipe.rewards.combine import OfOne, number_for, only_reward
from alignprop_pipe.rewards.entries import RewardEntry

MOST_VIEWS = 64


class Smooth(OfOne):
    """The mean score of `views` views of each picture: moved by a little, with a little noise (SmoothGrad, 1706.03825).

    A network's gradient at one picture holds much that a neighbouring picture's does not, and a picture can be made
    that pleases it by just that. What all views agree on is left of it. Costs `views` times the reward. Pictures that
    need no gradient, such as those of the evidence, are scored as they are.

    Args:
        reward: what is asked; for one that measures noise or sharpness itself, such as `jpeg`, this makes no sense.
        views: how many views.
        noise: standard deviation of the noise, of pictures in [0, 1].
        shift: how far a picture is moved at most, as a share of its sides; its edge pixels fill the gap.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import parse_reward
        >>> parse_reward("smooth(clip, views=2)")(torch.rand(1, 3, 64, 64), ["a fox"]).total.shape
        torch.Size([1])
    """

    name = "smooth"
    entry = RewardEntry(
        summary="harder to fool, the mean over moved and noisy views of each picture: smooth(clip, views=4)",
        licence="no weights",
        range_text="that of the reward inside",
        combines=True,
    )

    def __init__(self, reward: Reward, views: int = 4, noise: float | int = 0.08, shift: float | int = 0.0625) -> None:
        self.reward = only_reward(self.name, reward)
        self.views, self.noise, self.shift = views, noise, shift
        if not isinstance(views, int) or isinstance(views, bool) or not 1 <= views <= MOST_VIEWS:
            raise RewardError(f"smooth(views={views!r}): a whole number from 1 to {MOST_VIEWS} is needed")
        for argument, value in (("noise", noise), ("shift", shift)):
            if not 0 <= number_for(self.name, argument, value) <= 1:
                raise RewardError(f"smooth({argument}={value!r}): a number from 0 to 1 is needed")

    def __call__(self, images: Images, prompts: list[str], targets: Targets | None = None) -> Scores:
        """Score the views, which are drawn anew each time."""
        pictures = [self._view(images) for _ in range(self.views)] if images.requires_grad else [images]
        scored = [self.reward(picture, prompts, targets) for picture in pictures]
        total = _mean([scores.total for scores in scored])
        parts = {name: _mean([scores.parts[name] for scores in scored]) for name in scored[0].parts}
        return Scores(total, merge_parts([{self.label: total.detach()}, parts]))

    def _view(self, images: Images) -> Images:
        moved = torch.stack([self._moved(image) for image in images])
        return (moved + self.noise * torch.randn(moved.shape, dtype=moved.dtype, device=moved.device)).clamp(0, 1)

    def _moved(self, image: Tensor) -> Tensor:
        for dim in (-2, -1):
            side = image.shape[dim]
            furthest = int(self.shift * side)
            start = int(torch.randint(-furthest, furthest + 1, ()))
            places = torch.arange(start, start + side, device=image.device).clamp(0, side - 1)
            image = image.index_select(dim, places)
        return image


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(dim=0)
