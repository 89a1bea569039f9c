"""All randomness of a run, derived from (seed, step, sample, purpose), so that nothing about it need be saved.

A resumed run, a run in one piece and a run on two processes draw the same numbers. Generators live
on the CPU: a seed then gives the same start on every card.
"""

import hashlib
from typing import Literal

import torch

Purpose = Literal["noise", "truncation", "prompts", "adapter", "split", "evidence"]


def generator_for(purpose: Purpose, seed: int, step: int = 0, sample: int = 0) -> torch.Generator:
    """A CPU generator that depends on these four values and on nothing else."""
    text = f"{purpose}/{seed}/{step}/{sample}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return torch.Generator("cpu").manual_seed(number & (2**63 - 1))
