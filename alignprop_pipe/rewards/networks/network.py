"""`NetworkReward`: a reward that a frozen pretrained network gives, loaded at the first score.

Images [B, 3, H, W] in [0, 1]. The network is where the images are and computes in `dtype`, or in float64 for float64
images. With `offload` it visits the images' device for one score at a time.
"""

import inspect
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_pipe.bundled import is_bundled
from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Cut, Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.networks.weights import place_of

logger = logging.getLogger(__name__)

EMOJI_SIZE = (64, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NetworkReward(Reward):
    """Base of scorers. A subclass writes `load`, which gives the network, and `rate`, which scores with it.

    Args:
        model: Hub id, folder or file of the weights.
        revision: branch, tag or commit on the Hub.
        dtype: number format of the network: "float32", "bfloat16" or "float16".
        offload: keep the network in main memory between scores. The slope of each score with respect to its picture
            is then computed at once, so that neither network nor activations wait for the backward pass.
    """

    sources: tuple[str, ...] = ()
    """The arguments that name folders, files or repositories on the Hub: looked at before anything is loaded."""
    for_other_pictures: str = ""
    """Of a reward whose default model knows emoji alone: a model on the Hub for all other pictures."""

    def __init__(
        self, model: str | Path, revision: str | None = None, dtype: str = "float32", offload: bool = False
    ) -> None:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise RewardError(f"{self.name}(dtype={dtype!r}): one of {', '.join(DTYPES)} is needed")
        self.model, self.revision, self.dtype, self.offload = str(model), revision, dtype, offload
        self._network: Any = None
        self._cuts: dict[str, Cut] = {}

    def left_out(self, argument: str) -> bool:
        """Whether it takes this argument and was made without it."""
        signature = inspect.signature(type(self).__init__)
        given = signature.bind(self, *self._args, **self._kwargs).arguments
        return argument in signature.parameters and argument not in given

    def check_sources(self) -> None:
        """Raises RewardError for a source that is neither here nor a name on the Hub, as far as it can be told here."""
        for name in self.sources:
            if (given := getattr(self, name)) not in (None, "emoji"):
                place_of(given)

    def load(self) -> nn.Module:
        """The network, frozen, on the CPU. Called once, before the first score. Raises RewardError."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def rate(self, network: Any, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        """Scores of float32 or float64 `images`, one for each, which depends on its own picture alone."""
        raise NotImplementedError(f"{type(self).__name__} must define rate(network, images, prompts, targets)")

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        images = images if images.dtype == torch.float64 else images.float()
        network = self.network_for(images)
        if not self.offload:
            return self.rate(network, images, prompts, targets)
        pixels = images.detach().requires_grad_(images.requires_grad)
        try:
            scores = self.rate(network, pixels, prompts, targets)
            if not scores.requires_grad:
                return scores
            (slopes,) = torch.autograd.grad(scores.sum(), pixels)
        finally:
            network.to("cpu")
        # The value of the scores and their exact slope: each score depends on its own picture alone.
        return scores.detach() + ((images - pixels.detach()) * slopes).flatten(1).sum(dim=1)

    def network_for(self, images: Tensor) -> Any:
        """The network on the device of the images, in the number format for them."""
        if self._network is None or not usable(self._network):
            self.check_sources()
            self._network = self.load().eval().requires_grad_(False)
        dtype = torch.float64 if images.dtype == torch.float64 else DTYPES[self.dtype]
        return self._network.to(images.device, dtype)

    def note_length(self, text: str, tokens: int, read: int, what: str = "prompt") -> None:
        """Remember a text of which the network reads `read` of its `tokens` only; the first one is told."""
        if tokens <= read or text in self._cuts:
            return
        if not self._cuts:
            shown = text if len(text) <= 60 else f"{text[:59]}…"
            logger.warning(
                "the reward %s reads the first %d of the %d tokens of the %s %r, and no more of any other; what is "
                "cut off changes no score",
                self.name,
                read,
                tokens,
                what,
                shown,
            )
        self._cuts[text] = Cut(self.name, text, tokens, read, what=what)

    def text_of(self, prompt: str) -> str:
        """What is read for a prompt, where that is not the prompt itself."""
        return prompt

    def cut(self, prompts: Iterable[str]) -> Cut | None:
        """Which of these prompts were longer than the network reads, of those that were scored; None: none."""
        texts = dict.fromkeys(map(self.text_of, prompts)) if self._cuts else {}
        found = [self._cuts[text] for text in texts if text in self._cuts]
        return replace(found[0], count=len(found)) if found else None

    def to(self, device: torch.device | str) -> "Reward":
        """Move the network, if it is loaded, unless it is offloaded."""
        return self if self.offload else super().to(device)


def check_sources(reward: Reward) -> Reward:
    """The reward; raises RewardError for a scorer in it whose weights are nowhere, before anything is loaded."""
    for member in members(reward):
        if isinstance(member, NetworkReward):
            member.check_sources()
    return reward


def emoji_by_default(reward: Reward) -> list[NetworkReward]:
    """The scorers in it that know emoji alone and were not asked for by `model="emoji"`."""
    found = [member for member in members(reward) if isinstance(member, NetworkReward) and member.for_other_pictures]
    return [member for member in found if member.model == "emoji" and member.left_out("model")]


def check_fits(reward: Reward, model: str) -> Reward:
    """The reward; raises RewardError where the scorer of emoji would score another model's pictures by default."""
    if not is_bundled(model) and (strange := emoji_by_default(reward)):
        raise RewardError(f"{what_to_name(strange[0])}. {model!r} is not the bundled model")
    return reward


def doubt_about(reward: Reward, sizes: Iterable[tuple[int, int]]) -> str:
    """What to say where the scorer of emoji scores, by default, pictures of sizes that no emoji picture has; or ""."""
    strange = emoji_by_default(reward) if any(size != EMOJI_SIZE for size in sizes) else []
    return f"{what_to_name(strange[0])}; the pictures are not the bundled model's" if strange else ""


def what_to_name(scorer: NetworkReward) -> str:
    """What a scorer of emoji is for, and what to write for other pictures, or to have it all the same."""
    name, other = scorer.name, scorer.for_other_pictures
    return (
        f"the reward {name!r} without a model takes the bundled scorer, which knows emoji pictures alone: name one "
        f'with model=, as in {name}(model="{other}"), or {name}(model="emoji") to take the bundled one on purpose'
    )


def cuts_in(rewards: Iterable[Reward], prompts: Iterable[str]) -> tuple[Cut, ...]:
    """What the scorers in these rewards did not read of these prompts, each name once."""
    prompts = list(prompts)
    scorers = (one for reward in rewards for one in members(reward) if isinstance(one, NetworkReward))
    return tuple(dict.fromkeys(found for one in scorers if (found := one.cut(prompts))))


def usable(network: nn.Module) -> bool:
    """Whether a network that was loaded before can be used: one loaded in inference mode can't enter autograd."""
    return torch.is_inference_mode_enabled() or not any(weight.is_inference() for weight in network.parameters())
