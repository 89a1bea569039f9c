"""A reward is any function of pictures that keeps the gradient: python examples/custom_reward.py [STEPS].

On the command line the same function is `alignprop train --reward examples/custom_reward.py:warmth`.
"""

import sys

from torch import Tensor

from alignprop_pipe import AlignPropPipeline


def warmth(images: Tensor, prompts: list[str]) -> Tensor:
    """More red than blue. `images`: [batch, 3, height, width] in [0, 1]; one score per picture."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    pipe = AlignPropPipeline.from_pretrained("emoji")
    print(pipe.align(warmth, ["one dog", "two cats", "three houses"], steps=steps, eval_prompts=2, judges=()))
