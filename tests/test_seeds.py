"""Generators made from (purpose, seed, step, sample): the same for the same four, another for any other."""

import itertools
import typing

import torch

from alignprop_pipe.seeds import Purpose, generator_for

PURPOSES = typing.get_args(Purpose)


def first_number(purpose: Purpose, *numbers: int) -> int:
    return int(torch.randint(2**62, (), generator=generator_for(purpose, *numbers)))


def test_the_same_values_give_the_same_numbers() -> None:
    torch.manual_seed(1)
    first = torch.randn(5, generator=generator_for("noise", 3, 2, 1))
    torch.manual_seed(2)
    assert torch.equal(torch.randn(5, generator=generator_for("noise", 3, 2, 1)), first)


def test_any_other_value_gives_other_numbers() -> None:
    drawn = [first_number(*each) for each in itertools.product(PURPOSES, range(4), range(4), range(4))]
    assert len(set(drawn)) == len(drawn) == len(PURPOSES) * 64
    assert first_number("noise", 1, 11, 1) != first_number("noise", 11, 1, 1) != first_number("noise", 1, 1, 11)


def test_the_numbers_never_change() -> None:
    """Another release that draws other numbers could not repeat a run."""
    assert generator_for("noise", 0).initial_seed() == 7840489267994297616
    assert generator_for("prompts", 2**63 - 1, 10**9, 10**6).initial_seed() < 2**63


def test_neighbouring_samples_are_independent() -> None:
    noise = torch.stack([torch.randn(4096, generator=generator_for("noise", 0, 0, sample)) for sample in range(8)])
    off_diagonal = torch.corrcoef(noise) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 4096**0.5


def test_generators_live_on_the_cpu() -> None:
    assert generator_for("truncation", 0).device.type == "cpu"
