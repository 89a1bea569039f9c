"""One scalar from the rewards of a batch, and from it what makes one adapter better than another."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from alignprop_pipe.config.choices import Hinge, Loss, Maximize, Target
from alignprop_pipe.records import Rewards


def loss_of(rule: Loss, rewards: Rewards) -> Float[Tensor, ""]:
    """The mean over the batch, so that equal batches can be accumulated."""
    match rule:
        case Maximize():
            return -rewards.mean()
        case Target(value):
            return (rewards - value).abs().mean()
        case Hinge(margin):
            return (margin - rewards).relu().mean()


def merit_of(rule: Loss, rewards: Sequence[float]) -> float:
    """How good pictures with these rewards are for this loss, higher is better: minus the loss over them."""
    return -loss_of(rule, torch.tensor(list(rewards), dtype=torch.float64)).item()
