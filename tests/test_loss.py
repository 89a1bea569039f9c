"""One scalar from the rewards of a batch: by hand, and its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.config.choices import Hinge, Loss, Maximize, Target
from alignprop_pipe.training.loss import loss_of, merit_of

NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("rule", "loss", "slopes"),
    [
        (Maximize(), -2.0, [-1 / 3, -1 / 3, -1 / 3]),
        (Target(2), 4 / 3, [-1 / 3, 1 / 3, 0.0]),
        (Target(-1), 3.0, [1 / 3, 1 / 3, 1 / 3]),
        (Hinge(3), 4 / 3, [-1 / 3, 0.0, -1 / 3]),
        (Hinge(-5), 0.0, [0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_values_and_slopes(rule: Loss, loss: float, slopes: list[float]) -> None:
    rewards = torch.tensor([0.0, 4.0, 2.0], requires_grad=True)
    got = loss_of(rule, rewards)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx(slopes)


@given(NUMBERS, st.sampled_from([Maximize(), Target(1.5), Hinge(2)]))
def test_equal_batches_have_the_mean_of_their_losses(numbers: list[float], rule: Loss) -> None:
    rewards = torch.tensor(numbers, dtype=torch.float64)
    whole = loss_of(rule, torch.cat([rewards, rewards + 1]))
    parts = (loss_of(rule, rewards) + loss_of(rule, rewards + 1)) / 2
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("rule", "worse", "better"),
    [
        (Maximize(), [0.0, 1.0], [0.5, 1.0]),
        (Target(0.2), [0.4, 0.4], [0.2, 0.3]),
        (Target(0.2), [0.0, 0.4], [0.1, 0.3]),  # of the single pictures, not of their mean
        (Target(-3.0), [1.0, 1.0], [0.0, 0.0]),
        (Hinge(1.0), [0.5, 9.0], [0.9, 1.0]),
    ],
    ids=str,
)
def test_merit_follows_the_loss(rule: Loss, worse: list[float], better: list[float]) -> None:
    assert merit_of(rule, better) > merit_of(rule, worse)
    assert merit_of(rule, better) == pytest.approx(-loss_of(rule, torch.tensor(better)).item())
