"""Rewards of rewards: one scale, all at once, brakes and watchers; values, gradients, statistics, what is refused."""

import copy
import math
import pickle

import pytest
import torch

from alignprop_pipe.errors import RewardError, RewardGradientError
from alignprop_pipe.rewards import (
    Brightness,
    ClipAbove,
    Colour,
    Jpeg,
    Min,
    Reward,
    Scaled,
    SoftMin,
    TotalVariation,
    Watch,
    ZScore,
    as_reward,
    calibrate,
    check_reward,
    parse_reward,
)
from alignprop_pipe.rewards.base import members
from alignprop_pipe.rewards.combine import SCORED_AT_ONCE


def pictures(count=6, dtype=torch.float64, seed=0):
    """Smooth-ish pictures of different brightness, colour and grain."""
    generator = torch.Generator().manual_seed(seed)
    grain = torch.rand(count, 3, 12, 12, generator=generator, dtype=dtype)
    level = torch.rand(count, 3, 1, 1, generator=generator, dtype=dtype)
    amount = torch.rand(count, 1, 1, 1, generator=generator, dtype=dtype)
    return (0.2 + 0.6 * level) * (1 - 0.4 * amount) + 0.15 * amount * grain


def scores(reward, images):
    return as_reward(reward)(images, ["a"] * len(images))


def totals(reward, images):
    return scores(reward, images).total


CALLS = (
    "zscore(brightness, mean=0.4, std=0.07)",
    "scaled(colour, low=0.1, high=0.3)",
    "scaled(brightness + sharpness, low=0.9, high=0.3)",
    "min(brightness, 3*colour, 40*sharpness)",
    "softmin(brightness, 3*colour, 40*sharpness, temperature=0.05)",
    "clip_above(brightness, 0.4)",
    "2*min(zscore(brightness, 0.4, 0.1) + sharpness, clip_above(zscore(colour, 0.1, 0.1), 0.3)) - sharpness"
    " + watch(colour)",
)


# --- values and gradients --------------------------------------------------------------------------------------------


def test_values_are_those_of_the_formulas():
    images = pictures()
    bright, colour, sharp = (totals(name, images) for name in ("brightness", "colour", "sharpness"))
    expected = [
        (bright - 0.4) / 0.07,
        (colour - 0.1) / 0.2,
        (bright + sharp - 0.9) / -0.6,
        torch.minimum(torch.minimum(bright, 3 * colour), 40 * sharp),
        -0.05 * torch.stack([bright, 3 * colour, 40 * sharp]).div(-0.05).exp().mean(dim=0).log(),
        bright.clamp(max=0.4),
        2 * torch.minimum((bright - 0.4) / 0.1 + sharp, ((colour - 0.1) / 0.1).clamp(max=0.3)) - sharp,
    ]
    for text, wanted in zip(CALLS, expected, strict=True):
        torch.testing.assert_close(totals(text, images), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", CALLS)
def test_gradients_equal_central_differences(text):
    images = pictures(4).requires_grad_(True)
    reward = parse_reward(text)
    (gradient,) = torch.autograd.grad(totals(reward, images).sum(), images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        # Small enough that no picture crosses the place where min and clip_above have a corner.
        direction = 1e-6 * torch.randn(images.shape, generator=generator, dtype=images.dtype)
        with torch.no_grad():
            slope = (totals(reward, images + direction) - totals(reward, images - direction)).sum() / 2
        assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_the_gradient_of_min_goes_to_the_smallest_one():
    images = pictures().requires_grad_(True)
    bright, colour = totals("brightness", images), totals("3*colour", images)
    smaller = torch.where((bright < colour)[:, None, None, None], *(
        torch.autograd.grad(values.sum(), images)[0] for values in (bright, colour)
    ))  # fmt: skip
    assert 0 < (bright < colour).sum() < len(images)
    (gradient,) = torch.autograd.grad(totals("min(brightness, 3*colour)", images).sum(), images)
    assert torch.equal(gradient, smaller)
    (equal,) = torch.autograd.grad(totals("min(tv, tv)", images).sum(), images)
    torch.testing.assert_close(equal, torch.autograd.grad(totals("tv", images).sum(), images)[0])


def test_softmin_lies_between_the_least_and_the_mean():
    images = pictures()
    parts = torch.stack([totals(name, images) for name in ("brightness", "colour", "tv")])
    last = parts.amin(dim=0)
    for temperature in (1e-4, 0.01, 0.1, 1, 100, 1e6):
        soft = totals(SoftMin(Brightness(), Colour(), TotalVariation(), temperature=temperature), images)
        assert (soft >= last - 1e-9).all()
        last = soft
    torch.testing.assert_close(last, parts.mean(dim=0), rtol=1e-4, atol=0)
    nearly = totals(SoftMin(Brightness(), Colour(), TotalVariation(), temperature=1e-4), images)
    torch.testing.assert_close(nearly, parts.amin(dim=0), rtol=0, atol=2e-4)


def test_softmin_has_no_overflow_in_float32():
    images = pictures(dtype=torch.float32).requires_grad_(True)
    total = totals("softmin(1000*brightness, -1000*brightness, temperature=0.001)", images)
    assert total.isfinite().all()
    assert torch.autograd.grad(total.sum(), images)[0].isfinite().all()


def test_clip_above_stops_the_gradient_of_pictures_that_are_good_enough():
    images = pictures().requires_grad_(True)
    bright = totals("brightness", images)
    value = bright.median().item()
    total = totals(ClipAbove(Brightness(), value - 1e-9), images)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    past = bright >= value
    assert not gradient[past].any()
    assert gradient[~past].flatten(1).any(dim=1).all()
    assert (total <= value).all()


def test_a_batch_scores_as_its_pictures_do():
    images = pictures()
    for text in CALLS:
        alone = torch.cat([totals(text, image[None]) for image in images])
        torch.testing.assert_close(totals(text, images), alone, rtol=1e-12, atol=1e-12)


# --- the log ---------------------------------------------------------------------------------------------------------


def test_parts_are_logged_under_their_own_names():
    images = pictures()
    value = parse_reward("zscore(brightness, 0.4, 0.1) + 0.5*min(jpeg, colour + tv) + clip_above(zscore(tv, 0, 1), 1)")
    logged = scores(value, images)
    assert list(logged.parts) == [
        "zscore_brightness", "brightness", "min", "jpeg", "jpeg_kb", "colour", "tv", "clip_above_zscore",
        "zscore_tv", "tv_2",
    ]  # fmt: skip
    torch.testing.assert_close(logged.parts["brightness"], totals("brightness", images))
    torch.testing.assert_close(logged.parts["zscore_brightness"], (totals("brightness", images) - 0.4) / 0.1)
    torch.testing.assert_close(logged.parts["min"], totals("min(jpeg, colour + tv)", images))
    assert not any(part.requires_grad for part in scores(value, images.requires_grad_(True)).parts.values())


def test_what_is_watched_is_logged_and_nothing_else():
    images = pictures().requires_grad_(True)
    seen = []

    class Spy(Brightness):
        name = "spy"

        def score(self, images, prompts, targets):
            seen.append(images.requires_grad)
            return super().score(images, prompts, targets)

    plain, watching = scores("tv", images), scores(TotalVariation() + 7 * Watch(Spy() + Jpeg()), images)
    assert seen == [False]
    assert list(watching.parts) == ["tv", "spy", "jpeg", "jpeg_kb"]
    assert torch.equal(watching.total, plain.total)
    gradients = [torch.autograd.grad(one.total.sum(), images)[0] for one in (plain, watching)]
    assert torch.equal(*gradients)
    torch.testing.assert_close(watching.parts["spy"], totals("brightness", images).detach())


def test_a_judge_may_be_watched_in_training():
    class Watcher(Brightness):
        name, trainable = "watcher", False

    images = pictures(dtype=torch.float32)
    check_reward(TotalVariation() + Watch(Watcher()), images, ["a"] * len(images), {})
    with pytest.raises(RewardError, match=r"watcher is only watched.*watch\(watcher\)"):
        check_reward(Min(TotalVariation(), Watcher()), images, ["a"] * len(images), {})
    with pytest.raises(RewardError, match="nothing is left to train on"):
        check_reward(Watch(TotalVariation()), images, ["a"] * len(images), {})


# --- statistics ------------------------------------------------------------------------------------------------------


def test_zscore_has_mean_0_and_deviation_1_on_the_pictures_it_was_calibrated_on():
    images = pictures(19)
    value = calibrate(parse_reward("zscore(brightness)"), images, ["a"] * 19)
    normal = totals(value, images)
    assert normal.mean().item() == pytest.approx(0, abs=1e-3)
    assert normal.std().item() == pytest.approx(1, rel=1e-3)
    bright = totals("brightness", images)
    assert isinstance(value, ZScore)
    assert value.statistics["mean"] == pytest.approx(bright.mean().item(), abs=1e-3 * bright.std().item())
    assert len(str(value)) < len("zscore(brightness, mean=0.12345678, std=0.12345678)")


def test_scaled_is_0_to_1_between_the_5th_and_the_95th_percentile():
    images = pictures(101)
    value = calibrate(Scaled(Colour()), images, ["a"] * 101)
    ordered = totals(value, images).sort().values
    assert ordered[5].item() == pytest.approx(0, abs=1e-3)
    assert ordered[95].item() == pytest.approx(1, abs=1e-3)
    assert isinstance(value, Scaled)
    assert set(value.statistics) == {"low", "high"}


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("text", ["zscore", "scaled"])
def test_the_text_after_calibration_repeats_the_values_exactly(text, factor):
    images = pictures()
    value = calibrate(parse_reward(f"{text}({factor}*brightness + tv*{factor})"), images, ["a"] * len(images))
    again = parse_reward(str(value))
    assert again == value
    assert again.is_calibrated
    assert torch.equal(totals(again, images), totals(value, images))
    assert totals(value, images).abs().max() < 10
    other = pictures(seed=1)
    assert calibrate(value, other, ["a"] * len(other)) is value  # nothing is measured anew


NESTED = (
    "zscore(min(zscore(brightness), 0.5*scaled(colour - tv))) + 0.1*tv - clip_above(zscore(tv), 2)"
    " + watch(zscore(colour))"
)


def test_calibration_reaches_every_depth_and_mutates_nothing():
    images = pictures(9)
    value = parse_reward(NESTED)
    kept, before = copy.deepcopy(value), str(value)
    ready = calibrate(value, images, ["a"] * 9)
    assert str(value) == before == NESTED
    assert value == kept
    assert not value.is_calibrated
    assert ready.is_calibrated
    assert [type(member) for member in members(ready)] == [type(member) for member in members(value)]
    assert parse_reward(str(ready)) == ready == pickle.loads(pickle.dumps(ready)) == copy.deepcopy(ready)
    outer = totals(list(members(ready))[1], images)
    assert outer.mean().item() == pytest.approx(0, abs=1e-3)  # measured on the calibrated inside
    with torch.no_grad():
        assert totals(ready, images).isfinite().all()


def test_statistics_that_are_given_are_kept_and_the_others_measured():
    images = pictures()
    value = calibrate(parse_reward("zscore(zscore(tv), mean=1, std=2) + zscore(tv, 5, 6)"), images, ["a"] * 6)
    assert str(value).startswith("zscore(zscore(tv, mean=")
    assert str(value).endswith("mean=1.0, std=2.0) + zscore(tv, 5, 6)")


def test_rewards_in_lists_and_dicts_of_a_users_combinator_are_calibrated():
    class Table(Reward):
        name = "table"

        def __init__(self, table, others=()):
            self.table, self.others = table, others

        def score(self, images, prompts, targets):
            return sum(one(images, prompts, targets).total for one in (*self.table.values(), *self.others))

    images = pictures()
    value = Table({"a": ZScore(Brightness()), "b": 3 * Scaled(Colour())}, others=[ZScore(TotalVariation())])
    assert len(value.children()) == 3
    ready = calibrate(value, images, ["a"] * 6)
    assert ready.is_calibrated
    assert str(ready).count("mean=") == 2
    assert totals(ready, images).shape == (6,)


def test_a_python_reward_that_is_a_reward_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from alignprop_pipe.rewards import parse_reward\nmine = parse_reward('zscore(tv) + watch(colour)')\n"
    )
    images = pictures()
    value = parse_reward("brightness - own.py:mine", allow_code=True)
    check_reward(value, images, ["a"] * 6, {})
    ready = calibrate(value, images, ["a"] * 6)
    assert str(ready).startswith("brightness - zscore(tv, mean=")
    assert parse_reward(str(ready)) == ready
    assert calibrate(parse_reward("brightness"), images, ["a"] * 6) == Brightness()


def test_prompts_and_targets_stay_with_their_pictures():
    class Given(Reward):
        name = "given"

        def score(self, images, prompts, targets):
            batches.append((len(images), prompts, list(targets["level"])))
            return images.mean(dim=(1, 2, 3)) * 0 + images.new_tensor(targets["level"])

    batches = []
    count = 2 * SCORED_AT_ONCE + 3
    prompts, levels = [f"prompt {i}" for i in range(count)], tuple(float(i) for i in range(count))
    value = calibrate(ZScore(Given()), pictures(count), prompts, {"level": levels})
    assert [size for size, _, _ in batches] == [SCORED_AT_ONCE, SCORED_AT_ONCE, 3]
    assert [one for _, some, _ in batches for one in some] == prompts
    assert [one for _, _, some in batches for one in some] == list(levels)
    assert isinstance(value, ZScore)
    assert value.statistics["mean"] == pytest.approx((count - 1) / 2)
    with pytest.raises(RewardError, match="19 images but 3 prompts"):
        calibrate(ZScore(Given()), pictures(count), prompts[:3])


def test_calibration_keeps_no_graph_and_the_networks_that_are_loaded():
    class Network(Reward):
        name = "network"

        def __init__(self):
            self.layer = torch.nn.Linear(3, 1).double()

        def score(self, images, prompts, targets):
            graded.append(images.requires_grad)
            return self.layer(images.mean(dim=(2, 3)))[:, 0]

    graded, images, network = [], pictures().requires_grad_(True), Network()
    ready = calibrate(2 * Scaled(network) + Min(network, ZScore(Brightness())), images, ["a"] * 6)
    assert graded == [False]
    assert images.grad is None
    assert [member is network for member in members(ready) if isinstance(member, Network)] == [True, True]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["zscore(tv)", "clip + 0.5*scaled(tv)", "min(tv, clip_above(zscore(tv), 1))"])
def test_a_score_before_calibration_is_refused_with_the_way_out(text):
    with pytest.raises(RewardError, match=r"\(tv\) cannot score yet.*align\(\) measures.*calibrate\(reward.*such as"):
        totals(text, pictures(2, torch.float32))


@pytest.mark.parametrize(("name", "way_out"), [("zscore", "take it out of zscore"), ("scaled", "use zscore")])
@pytest.mark.parametrize("level", [0.0, 0.3, -1e6])
def test_no_spread_is_refused_in_words(name, way_out, level):
    def flat(images):
        return images.mean(dim=(1, 2, 3)) * 0 + level

    value = {"zscore": ZScore, "scaled": Scaled}[name](as_reward(flat))
    with pytest.raises(RewardError, match=f"6 pictures the same score.*no spread to divide by; {way_out}"):
        calibrate(1.0 * value, pictures(dtype=torch.float32), ["a"] * 6)


def test_one_picture_has_no_spread():
    with pytest.raises(RewardError, match=r"two pictures or more.*got 1"):
        calibrate(ZScore(Brightness()), pictures(1), ["a"])


def test_scores_that_are_not_finite_have_no_statistics():
    def odd(images):
        return images.mean(dim=(1, 2, 3)) / 0

    with pytest.raises(RewardError, match="not finite"):
        calibrate(ZScore(as_reward(odd)), pictures(), ["a"] * 6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_numbers_are_finite(value):
    for make in (
        lambda: ClipAbove(Brightness(), value),
        lambda: ZScore(Brightness(), mean=value, std=1),
        lambda: Scaled(Brightness(), low=0, high=value),
        lambda: SoftMin(Brightness(), Colour(), temperature=value),
    ):
        with pytest.raises(RewardError, match="finite number is needed"):
            make()


# --- the dry call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*CALLS, NESTED, "clip_above(brightness, -5)", "min(brightness + 9*tv, tv)"])
def test_the_dry_call_passes_before_calibration_and_past_a_brake(text):
    images = 0.5 + 0.1 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    check_reward(parse_reward(text), images.clamp(0, 1), ["a", "b"], {})


@pytest.mark.parametrize("text", ["zscore({})", "min(tv, 9 * {})", "clip_above({}, -9)", "softmin(tv, tv + {})"])
def test_the_dry_call_finds_a_lost_gradient_inside(text):
    def detached(images):
        return images.detach().mean(dim=(1, 2, 3)) + 100

    inner = as_reward(detached)
    value = {
        "zscore({})": ZScore(inner),
        "min(tv, 9 * {})": Min(TotalVariation(), 9 * inner),
        "clip_above({}, -9)": ClipAbove(inner, -9),
        "softmin(tv, tv + {})": SoftMin(TotalVariation(), TotalVariation() + inner),
    }[text]
    with pytest.raises(RewardGradientError, match=r"'detached' lost the gradient.*detach\(\) in test_rewards_combine"):
        check_reward(value, pictures(2, torch.float32), ["a", "b"], {})


def test_equality_is_that_of_the_arguments():
    assert Min(Brightness(), Colour()) == parse_reward("min(brightness, colour)") != Min(Colour(), Brightness())
    assert ZScore(Brightness(), 0.1, 0.2) == ZScore(Brightness(), mean=0.1, std=0.2) != ZScore(Brightness())
    assert 0.5 * ClipAbove(Brightness(), 1) == parse_reward("clip_above(brightness, 1)*0.5")
