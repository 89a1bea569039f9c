"""`smooth`: the mean over views of a picture, its gradient, and what it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import Smooth, parse_reward
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.seeds import SeededDraws

PROMPTS = ["two cats on a blue background", "one dog on a red background"]


class Corner(Reward):
    """The first pixel of the last colour, so that a moved picture scores its neighbour."""

    name = "corner"

    def score(self, images, prompts, targets):
        return images[:, -1, 0, 0].clone()

    def extras(self, images, prompts, targets):
        return {"corner.twice": 2 * images[:, -1, 0, 0].detach()}


def pictures(size=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator, dtype=dtype)


def graded(reward, images, seed=5):
    images = images.clone().requires_grad_(True)
    with SeededDraws(seed):
        scores = reward(images, PROMPTS)
    return scores, torch.autograd.grad(scores.total.sum(), images)[0]


def test_pictures_without_a_gradient_are_scored_as_they_are():
    images = pictures(dtype=torch.float32)
    scores = Smooth(Corner())(images, PROMPTS)
    assert torch.equal(scores.total, images[:, -1, 0, 0])
    assert torch.equal(scores.parts["corner.twice"], 2 * images[:, -1, 0, 0])
    assert {"smooth_corner", "corner"} <= set(scores.parts)


def test_one_view_that_neither_moves_nor_is_noisy_is_the_picture():
    images = pictures()
    scores, gradient = graded(Smooth(Corner(), views=3, noise=0, shift=0), images)
    plain, wanted = graded(Corner(), images)
    assert torch.equal(scores.total, plain.total)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-15)


def test_a_picture_is_moved_no_further_than_it_may_and_its_edge_fills_the_gap():
    images = (torch.arange(16.0) / 16).expand(2, 3, 16, 16).clone()  # each column its own value
    seen = {
        round(float(value) * 16)
        for seed in range(60)
        for value in graded(at(shift=0.25), images, seed)[0].total.detach()
    }
    assert seen == {0, 1, 2, 3, 4}  # moved the other way, the first column stays


def at(**changed):
    return Smooth(Corner(), **{"views": 1, "noise": 0, **changed})


def test_the_noise_has_its_size():
    grey = torch.full((2, 3, 8, 8), 0.5)
    values = torch.cat([graded(at(noise=0.05, shift=0), grey, seed)[0].total for seed in range(400)]).detach()
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert values.std() == pytest.approx(0.05, rel=0.15)


def test_the_score_is_the_mean_of_the_views_and_so_is_the_gradient():
    images = pictures()
    scores, gradient = graded(Smooth(Corner(), views=50, noise=0, shift=0.25), images)
    torch.testing.assert_close(gradient.sum(dim=(1, 2, 3)), torch.ones(2, dtype=gradient.dtype))
    assert not gradient[:, :2].any()  # the score is of the last colour
    torch.testing.assert_close(scores.total, (gradient * images).sum(dim=(1, 2, 3)))  # it is linear in the pixels
    assert (gradient[0] > 0).sum() > 10


def test_views_are_those_of_the_seed_and_no_state_of_the_process_moves():
    images, before = pictures(), torch.get_rng_state()
    first, again, other = (graded(Smooth(Corner()), images, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 64), st.floats(0, 1), st.floats(0, 1))
def test_the_text_gives_it_back(views, noise, shift):
    reward = Smooth(parse_reward("clip"), views=views, noise=noise, shift=shift)
    assert parse_reward(str(reward)) == reward


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smooth(clip, views=0)", "from 1 to 64"),
        ("smooth(clip, views=2.5)", "from 1 to 64"),
        ("smooth(clip, noise=-1)", "from 0 to 1"),
        ("smooth(clip, shift=2)", "from 0 to 1"),
        ("smooth(clip, noise='a')", "finite number"),
        ("smooth(3)", "a reward is needed"),
        ("smooth(watch(clip))", "always 0"),
    ],
)
def test_wrong_arguments(text, said, unchecked):
    with pytest.raises(RewardError, match=said):
        parse_reward(text)
