"""One scalar from the rewards of a batch, and from it what makes one adapter better than another."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from alignprop_pipe.choices import Hinge, Loss, Maximize, Target
from alignprop_pipe.records import Evidence, Rewards


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


def best_of(looks: Sequence[Evidence], keep_best: bool | str) -> Evidence | None:
    """The look at the adapter that is kept: the first of the best by `merit`, or the newest where `keep_best` is False.

    A look with a reward or merit that is not finite is never it. Looks that an earlier version wrote know no merit
    and are compared by their reward, as they were then.
    """
    known = [look for look in looks if all(map(math.isfinite, (look.reward, *look.merit)))]
    if not keep_best:
        return known[-1] if known and known[-1] is looks[-1] else None
    return max(known, key=lambda look: look.merit or (look.reward,), default=None)
