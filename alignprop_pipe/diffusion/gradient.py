"""Which denoising steps carry gradient (AlignProp, section 3.3; DRaFT, arXiv 2309.17400)."""

import torch

from alignprop_pipe.config.choices import FullBackprop, LastK, RandomLastK, Truncation


def graded_steps(rule: Truncation, num_steps: int, generator: torch.Generator) -> range:
    """The graded steps of one trajectory of `num_steps` steps; always a tail, never empty.

    Draws from `generator` at most once, so a trajectory has one K from beginning to end.
    """
    match rule:
        case FullBackprop():
            k = num_steps
        case LastK(k):
            pass
        case RandomLastK(low, high):
            top = num_steps if high is None else min(high, num_steps)
            k = int(torch.randint(min(low, top), top + 1, (), generator=generator))
    return range(max(0, num_steps - k), num_steps)


def mean_graded_steps(rule: Truncation, num_steps: int) -> float:
    """The expected number of graded steps, for forecasts."""
    match rule:
        case FullBackprop():
            return float(num_steps)
        case LastK(k):
            return float(min(k, num_steps))
        case RandomLastK(low, high):
            top = num_steps if high is None else min(high, num_steps)
            return (min(low, top) + top) / 2


def most_graded_steps(rule: Truncation, num_steps: int) -> int:
    """The largest K that a trajectory can draw."""
    match rule:
        case FullBackprop():
            return num_steps
        case LastK(k):
            return min(k, num_steps)
        case RandomLastK(_, high):
            return num_steps if high is None else min(high, num_steps)
