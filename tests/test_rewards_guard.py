"""The dry call: every way to lose the gradient is refused, and the place is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop_pipe.errors import RewardError, RewardGradientError, RewardShapeError, RewardValueError
from alignprop_pipe.rewards import Brightness, Jpeg, Reward, as_reward, check_reward

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def check(reward, images=IMAGES, targets=None):
    check_reward(as_reward(reward), images, ["a"] * len(images), targets or {})


@pytest.mark.parametrize("text", ["brightness", "-jpeg", "colour + 0.1*jpeg(quality=50) - tv", "symmetry", "sharpness"])
def test_good_rewards_pass(text):
    check(text)
    check(text, IMAGES[:1])


def mean(images):
    return images.mean(dim=(1, 2, 3))


def detached(images):
    return mean(images.detach() * 2)


def data(images):
    return mean(images.data)


def eight_bit(images):
    return mean((images * 255).to(torch.uint8).float())


def byte(images):
    return mean(torch.clamp(images * 255, 0, 255).byte() / 255)


def through_numpy(images):
    return torch.from_numpy(images.detach().cpu().numpy().mean(axis=(1, 2, 3)))


def forgetful_numpy(images):
    return torch.tensor(np.asarray([image.numpy().mean() for image in images]))


def through_pil(images):
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([float(np.asarray(Image.fromarray(array)).mean()) for array in pixels])


def items(images):
    return torch.tensor([image.mean().item() for image in images])


def rewrapped(images):
    return torch.tensor([float(image.mean().detach()) for image in images])


def counted(images):
    return (images > 0.5).float().mean(dim=(1, 2, 3))


def biggest(images):
    return images.flatten(1).argmax(dim=1).float()


def no_grad(images):
    with torch.no_grad():
        return mean(images)


@torch.inference_mode()
def inferred(images):
    return mean(images)


def unrelated(images):
    return torch.rand(len(images))


def unrelated_with_gradient(images):
    return torch.rand(len(images), requires_grad=True) * 2


def logged_then_cut(images):
    images.detach().mean()  # a harmless look on the way
    return (images.sigmoid() * 255).int().float().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (detached, r"detach\(\) in test_rewards_guard.py, line \d+, cuts"),
        (data, r"data\(\) in .* cuts"),
        (eight_bit, r"to\(\) in .* whole numbers"),
        (byte, r"byte\(\) in .* whole numbers"),
        (through_numpy, r"detach\(\) in"),
        (forgetful_numpy, "NumPy"),
        (through_pil, r"to\(\) in .* whole numbers"),
        (items, r"item\(\) in .* leaves torch"),
        (rewrapped, r"detach\(\) in"),
        (counted, r"gt\(\) in .* threshold"),
        (biggest, r"argmax\(\) in .* positions"),
        (no_grad, r"mean\(\) in .* torch.no_grad"),
        (inferred, r"mean\(\) in .* torch.no_grad"),
        (unrelated, "computed from the images"),
        (unrelated_with_gradient, "other tensors"),
        (logged_then_cut, r"int\(\) in .* whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_lost_gradient_is_traced(function, said):
    with pytest.raises(RewardGradientError, match=said):
        check(function)


def test_whole_number_scores_are_traced(unchecked):
    with pytest.raises(RewardGradientError, match=r"int64.*argmax\(\) in"):
        check(lambda images: images.flatten(1).argmax(dim=1))


@pytest.mark.parametrize("function", [lambda i: mean((i * 4).round()), lambda i: mean(i.floor())])
def test_a_zero_gradient_is_traced_to_the_rounding(function):
    with pytest.raises(RewardGradientError, match=r"zero at every pixel: (round|floor)\(\) in test_rewards_guard.py"):
        check(function)


def test_a_zero_gradient_without_a_culprit():
    with pytest.raises(RewardGradientError, match="threshold or a clamp"):
        check(lambda images: mean(images.clamp(2, 3)))


def test_one_bad_term_is_found_beside_a_good_one():
    with pytest.raises(RewardGradientError, match="'detached'"):
        check(Brightness() + 0.5 * as_reward(detached))


@pytest.mark.parametrize("score", [torch.nan, torch.inf, -torch.inf])
def test_scores_are_finite(score):
    with pytest.raises(RewardValueError, match="finite"):
        check(lambda images: mean(images) * score)


def test_the_gradient_is_finite():
    with pytest.raises(RewardValueError, match="gradient is not"):
        check(lambda images: mean(images - images).sqrt() + mean(images))


@pytest.mark.parametrize("count", [1, 4])
def test_one_score_for_the_whole_batch_is_refused(count, unchecked):
    for function in (lambda i: i.mean(), lambda i: i.mean()[None], lambda i: i.mean(dim=(2, 3))):
        with pytest.raises(RewardShapeError, match="one score per image"):
            check(function, IMAGES[:count])


def test_a_reward_that_fails_says_so():
    with pytest.raises(RewardError, match="fails on a test batch: ZeroDivisionError"):
        check(lambda images: len(images) / 0)


def test_judges_are_only_watched():
    class Watcher(Brightness):
        name, trainable = "watcher", False

    for reward in (Watcher(), Brightness() + 0.5 * Watcher()):
        with pytest.raises(RewardError, match="watcher is only watched"):
            check(reward)
    with pytest.raises(RewardError, match="emoji_judge is only watched"):
        check("jpeg - 0.1*emoji_judge")


def test_targets_reach_the_reward_and_the_batch_is_doubled():
    seen = []

    class Counting(Reward):
        def score(self, images, prompts, targets):
            seen.append((len(images), prompts, list(targets["count"])))
            return mean(images)

    check_reward(Counting(), IMAGES[:1], ["a"], {"count": [3]})
    assert seen == [(2, ["a", "a"], [3, 3])]


def test_the_callers_images_are_left_alone():
    images = IMAGES.clone().requires_grad_(True)
    check(Brightness() - Jpeg(), images)
    assert images.grad is None
