"""A reward of your own, as a function or as a class, under its own name: python examples/custom_reward.py [STEPS].

On the command line, the names below are known once this file is imported:

    alignprop train --import examples/custom_reward.py --reward "warmth + 0.5*calm(strength=2)"
    alignprop score samples --import examples/custom_reward.py --reward warmth
    alignprop rewards check "clip + warmth" --import examples/custom_reward.py

A function needs no name for that: `--reward examples/custom_reward.py:warmth` does.

What a reward has to keep to, which `alignprop rewards check` looks after:

- `images` are float, [batch, 3, height, width], in [0, 1]; give back one score per picture, [batch]; more is better.
- Compute the scores from the images by torch operations: NumPy, PIL, `.detach()`, whole numbers, argmax, rounding and
  `torch.no_grad()` lose the gradient, and a reward without gradient teaches nothing.
- The score of a picture depends on that picture alone, and is finite with a finite slope for every picture.
"""

import sys
from collections.abc import Mapping

from torch import Tensor

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.rewards import Reward, parse_reward, register


# The simplest form: a function of (images), (images, prompts) or (images, prompts, targets). `targets` holds the other
# columns of the prompt file. Further arguments are settings: they need a default, and expressions give them by name.
@register("warmth", range_text="-1 to 1")
def warmth(images: Tensor, balance: float = 1.0) -> Tensor:
    """More red than blue."""
    return images[:, 0].mean((1, 2)) - balance * images[:, 2].mean((1, 2))


# A class, where there is something to set up, to load or to log.
@register("calm", range_text="-strength to 0")
class Calm(Reward):
    """Few steps between neighbouring pixels."""

    reads_prompts = False  # so that pictures can be scored without prompts

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = (
            strength  # a network would be loaded in `score`, at first use: networks in attributes move along
        )

    def score(self, images: Tensor, prompts: list[str], targets: Mapping) -> Tensor:
        return -self.strength * images.diff(dim=3).abs().mean((1, 2, 3))

    def extras(self, images: Tensor, prompts: list[str], targets: Mapping) -> dict[str, Tensor]:
        """Logged next to the score, never trained on: what has no slope may stand here."""
        return {"calm_share": (images.diff(dim=3).abs() < 0.01).float().mean((1, 2, 3))}


# A reward that is made already: a short name for an expression.
register("cosy", parse_reward("warmth + 0.5*calm"), summary="warm and calm")


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    pipe = AlignPropPipeline.from_pretrained("emoji")
    prompts = ["one dog", "two cats", "three houses"]
    print(pipe.align("warmth + 0.5*calm(strength=2)", prompts, steps=steps, eval_prompts=2, judges=()))
