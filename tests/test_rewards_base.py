"""Rewards as values: arithmetic, parts, text, equality, and what is refused."""

import copy
import operator
import pickle

import pytest
import torch

from alignprop_pipe.errors import RewardError, RewardGradientError, RewardShapeError
from alignprop_pipe.rewards import Brightness, Colour, Jpeg, Reward, WeightedSum, as_reward
from alignprop_pipe.rewards.base import members


class Given(Reward):
    """Returns what it was made with."""

    def __init__(self, value=None, extras=None):
        self.value, self.more = value, extras or {}

    def score(self, images, prompts, targets):
        return self.value

    def extras(self, images, prompts, targets):
        assert not images.requires_grad
        return self.more


def pictures(count=3, height=16, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, height, width, generator=generator, dtype=dtype)


def test_a_sum_is_the_sum_of_its_terms():
    images = pictures()
    one, two = Brightness(), Colour()
    scores = (one + 0.5 * two - two * 2)(images, ["a"] * 3)
    expected = one(images, ["a"] * 3).total - 1.5 * two(images, ["a"] * 3).total
    torch.testing.assert_close(scores.total, expected)
    assert list(scores.parts) == ["brightness", "colour", "colour_2"]
    torch.testing.assert_close(scores.parts["colour"], two(images, ["a"] * 3).total)


def test_sums_are_flat_and_signs_multiply():
    value = -2 * (Brightness() - 0.25 * (Colour() + Jpeg()))
    assert isinstance(value, WeightedSum)
    assert [weight for weight, _ in value.terms] == [-2, 0.5, 0.5]
    assert str(value) == "-2*brightness + 0.5*colour + 0.5*jpeg"
    assert [type(member) for member in members(value)] == [WeightedSum, Brightness, Colour, Jpeg]


def test_only_the_total_carries_gradient():
    images = pictures().requires_grad_(True)
    scores = (Brightness() + Jpeg())(images, ["a"] * 3)
    assert scores.total.requires_grad
    assert not any(part.requires_grad for part in scores.parts.values())
    assert list(scores.parts) == ["brightness", "jpeg", "jpeg_kb"]


def test_a_judge_sees_images_without_gradient():
    class Watcher(Brightness):
        trainable = False

    assert not Watcher()(pictures().requires_grad_(True), ["a"] * 3).total.requires_grad
    assert not (Brightness() + Watcher()).trainable


def test_rewards_made_alike_are_equal():
    assert Jpeg() == Jpeg(80) == Jpeg(quality=80) != Jpeg(quality=81)
    assert Brightness() != Colour()
    assert hash(Jpeg()) == hash(Jpeg(quality=80))
    assert Brightness() + 2 * Jpeg() == Brightness() + 2 * Jpeg(80) != Brightness() + Jpeg()
    assert Jpeg() * 1 == Jpeg()
    assert repr(-Jpeg(quality=7)) == "<reward -jpeg(quality=7)>"


def test_rewards_copy_and_pickle():
    value = Brightness() - 0.1 * Jpeg(quality=7)
    assert copy.deepcopy(value) == value == pickle.loads(pickle.dumps(value))
    assert str(pickle.loads(pickle.dumps(value))) == str(value)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight):
    with pytest.raises(RewardError, match="finite"):
        _ = weight * Brightness()


@pytest.mark.parametrize("other", ["jpeg", 1, True, None])
def test_only_rewards_are_added(other):
    with pytest.raises(TypeError):
        _ = Brightness() + other


def test_only_numbers_multiply():
    for other in ("2", None, True, Jpeg()):
        with pytest.raises(TypeError):
            operator.mul(Brightness(), other)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError):
        Brightness(level=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(RewardError, match="no rewards"):
        WeightedSum(())


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (torch.zeros(()), r"\(3,\)"),
        (torch.zeros(1), r"\(3,\)"),
        (torch.zeros(3, 1), r"scores.reshape\(3, -1\)"),
        (torch.zeros(2), r"shape \(2,\) for 3 images"),
        (0.5, "float for 3 images"),
        ([1.0, 2.0, 3.0], "list for 3 images"),
        (None, "NoneType"),
    ],
)
def test_wrong_shapes_are_named_with_the_way_out(value, way_out, unchecked):
    with pytest.raises(RewardShapeError, match=way_out):
        Given(value)(pictures(), ["a"] * 3)


def test_whole_numbers_carry_no_gradient(unchecked):
    with pytest.raises(RewardGradientError, match="int64"):
        Given(torch.zeros(3, dtype=torch.int64))(pictures(), ["a"] * 3)


def test_extras_may_be_whole_numbers_but_one_per_image(unchecked):
    scores = Given(torch.zeros(3), {"n": torch.arange(3)})(pictures(), ["a"] * 3)
    assert scores.parts["n"].tolist() == [0, 1, 2]
    with pytest.raises(RewardShapeError, match="'n'"):
        Given(torch.zeros(3), {"n": torch.arange(2)})(pictures(), ["a"] * 3)


def test_one_prompt_per_image():
    with pytest.raises(RewardError, match="3 images but 2 prompts"):
        Brightness()(pictures(), ["a", "b"])


def test_a_subclass_without_a_name_has_its_own():
    assert Given(torch.zeros(1)).name == "given"
    with pytest.raises(NotImplementedError, match="score"):
        Reward().score(pictures(), [], {})


def test_to_moves_what_is_inside():
    class WithNetwork(Reward):
        def __init__(self):
            self.network = torch.nn.Linear(2, 2)

        def score(self, images, prompts, targets):
            return images.mean(dim=(1, 2, 3))

    inner = WithNetwork()
    value = 0.5 * inner + Brightness()
    assert value.to("meta") is value
    assert inner.network.weight.device.type == "meta"


def test_as_reward_takes_rewards_texts_functions_and_classes():
    reward = Jpeg()
    assert as_reward(reward) is reward
    assert as_reward("jpeg") == reward
    assert as_reward(Brightness) == Brightness()
    assert as_reward(lambda images: images.mean(dim=(1, 2, 3)))(pictures(), ["a"] * 3).total.shape == (3,)


def test_as_reward_says_what_can_be_given(unchecked):
    with pytest.raises(RewardError, match="expression"):
        as_reward(3)  # pyright: ignore[reportArgumentType]
