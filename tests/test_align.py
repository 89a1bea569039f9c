"""The loop: same seed, same adapter; accumulated gradients; steps that fail; what stays as it was, however it ends."""

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import by_hand
import miniatures
import pytest
import torch
from aligning import PROMPTS, adapter, align, align_until_ctrl_c, aligned, is_stock, pictures, same, settings, state
from torch import Tensor

from alignprop_pipe.config.choices import Target
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.errors import ConfigError, PipelineError, RewardError, RewardShapeError, TrainingDiverged
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Evidence, Images, Rewards, StepRecord, Targets
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.registry import parse_reward
from alignprop_pipe.rewards.scorers.simple import Brightness
from alignprop_pipe.runs.folder import read_metrics
from alignprop_pipe.runs.summary import best_of
from alignprop_pipe.training.evidence import evaluate, render
from alignprop_pipe.training.loop import accumulate, align_steps, optimizer_step, start
from alignprop_pipe.training.loss import merit_of


class Broken(Exception):
    pass


class Counted(Reward):
    """Brightness; call number 0 is the dry call before training, then one call for each batch."""

    name = "counted"

    def __init__(self) -> None:
        self.calls = -1

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        self.calls += 1
        return self.at(self.calls, images.mean(dim=(1, 2, 3)))

    def at(self, call: int, scores: Tensor) -> Tensor:
        return scores


class Raises(Counted):
    """An error, or a key press, in the middle of the second step."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def at(self, call: int, scores: Tensor) -> Tensor:
        if call == 2:
            raise self.error
        return scores


class NotFinite(Counted):
    """At the calls in `bad`: a loss that is NaN, or a finite loss with a gradient that is not."""

    def __init__(self, bad: range, gradient_only: bool = False) -> None:
        super().__init__()
        self.bad, self.gradient_only = bad, gradient_only

    def at(self, call: int, scores: Tensor) -> Tensor:
        if call not in self.bad:
            return scores
        return (scores - scores.detach()).sqrt() if self.gradient_only else scores * math.nan


# --- randomness -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_adapter_bit_for_bit() -> None:
    chosen: dict[str, Any] = {"truncation": "random", "eta": 1.0, "num_inference_steps": 3, "eval_prompts": 2}
    pipe, another = aligned(), aligned()
    torch.manual_seed(1)
    first = align(pipe, seed=3, **chosen)
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    second = align(another, seed=3, **chosen)
    assert torch.equal(torch.get_rng_state(), drawn)  # nothing comes from the global seed
    assert first.adapter.keys() == second.adapter.keys()
    assert all(torch.equal(weight, second.adapter[name]) for name, weight in first.adapter.items())
    assert [record.graded for record in first.history] == [record.graded for record in second.history]
    other = align(aligned(), seed=4, **chosen)
    assert not any(torch.equal(weight, other.adapter[name]) for name, weight in first.adapter.items())


def accumulated(batch_size: int, batches: int) -> tuple[list[Tensor], float]:
    """Gradient and loss of one step of four pictures in float64, the adapter in use already."""
    config = settings(
        batch_size=batch_size,
        gradient_accumulation_steps=batches,
        truncation="random",
        eta=1.0,
        distance_weight=0.5,
        num_inference_steps=3,
    )
    pipe = miniatures.sd15()
    with autograd_on():
        training = start(pipe, Brightness(), [], PromptSet.load(PROMPTS), config, {})
        pipe.to(torch.float64)
        generator = torch.Generator().manual_seed(11)
        for weight in training.parameters:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        whole = training.prompts.train.batch(config.seed, 0, 4)
        with patching.frozen_for_training(pipe, training.parameters):
            loss = sum(accumulate(training, 1, first, whole)[0] for first in range(0, 4, batch_size))
    return [weight.grad for weight in training.parameters if weight.grad is not None], loss


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    whole, loss = accumulated(4, 1)
    assert len(whole) > 10
    assert all(part.any() for part in whole)
    for batch_size, batches in ((1, 4), (2, 2)):
        split, split_loss = accumulated(batch_size, batches)
        # float64, but for the distance, which is computed in float32: sums of rounded numbers in another order.
        assert by_hand.relative_difference(split, whole) < 1e-6
        assert split_loss == pytest.approx(loss, rel=1e-6)


def test_a_split_batch_gives_the_same_adapter() -> None:
    results = [
        align(aligned(), batch_size=size, gradient_accumulation_steps=4 // size, steps=2) for size in (4, 2)
    ]  # fmt: skip
    for name, weight in results[0].adapter.items():
        # float32, and Adam divides by the gradient's size, which blows rounding up where the gradient is small.
        torch.testing.assert_close(results[1].adapter[name], weight, rtol=1e-2, atol=1e-4)
    assert results[0].history[0].reward == pytest.approx(results[1].history[0].reward, abs=1e-6)


# --- it learns ------------------------------------------------------------------------------------------------------


def test_brightness_rises() -> None:
    pipe = aligned()
    before = pictures(pipe)
    result = align(pipe, steps=8, eval_prompts=3, eval_every=0, truncation="full")
    change = result.changes["reward"]
    assert change.difference > 0.01
    assert change.difference > 3 * change.standard_error
    assert result.history[-1].reward > result.history[1].reward
    assert pictures(pipe).mean() > before.mean() + 0.005  # other noise, other prompts


def test_a_target_pulls_down_as_well_as_up() -> None:
    for target, sign in ((0.0, -1), (1.0, 1)):
        result = align(aligned(), loss=f"target:{target}", steps=4, eval_prompts=2, eval_every=0)
        assert sign * result.changes["reward"].difference > 0


def rate(schedule: str, warmup: int, steps: int, step: int) -> float:
    """The share of the learning rate that a step has, written down anew: n/w while it rises, then what is left."""
    if step < warmup:
        return step / warmup
    left = (steps + 1 - step) / (steps + 1 - max(1, warmup))
    return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_the_learning_rate_rises_and_falls_and_every_step_moves(schedule: str, warmup: int) -> None:
    config = settings(steps=5, lr=0.01, lr_scheduler=schedule, warmup_steps=warmup, num_inference_steps=1)
    with autograd_on():
        training = start(aligned(), Brightness(), [], PromptSet.load(PROMPTS), config, {})
        rates = []
        for step in range(1, 6):
            before = lora.snapshot(training.denoisers)
            rates.append(training.optimizer.param_groups[0]["lr"])
            optimizer_step(training, step)
            assert not same(before, lora.snapshot(training.denoisers))
    assert rates == pytest.approx([0.01 * rate(schedule, warmup, 5, step) for step in range(1, 6)])
    assert rates[max(warmup, 1) - 1] == pytest.approx(0.01)
    assert min(rates) > 0


def test_a_warmup_that_is_longer_than_the_run_only_rises() -> None:
    config = settings(steps=2, lr=0.01, warmup_steps=10)
    with autograd_on():
        training = start(aligned(), Brightness(), [], PromptSet.load(PROMPTS), config, {})
        rates = []
        for step in (1, 2):
            rates.append(training.optimizer.param_groups[0]["lr"])
            optimizer_step(training, step)
    assert rates == pytest.approx([0.001, 0.002])


@pytest.mark.parametrize(("size", "batches", "steps"), [(1, 1, 7), (2, 1, 5), (3, 2, 3), (4, 2, 2)])
def test_no_prompt_comes_twice_before_another_came_once(size: int, batches: int, steps: int) -> None:
    class Remembers(Brightness):
        def __init__(self) -> None:
            self.drawn: list[str] = []

        def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
            self.drawn += prompts
            return super().score(images, prompts, targets)

    reward = Remembers()
    drawn = {"batch_size": size, "gradient_accumulation_steps": batches, "steps": steps, "num_inference_steps": 1}
    for seed in range(3):
        reward.drawn.clear()
        align(aligned(), reward, seed=seed, **drawn)
        in_training = reward.drawn[2:]  # after the dry call
        assert len(in_training) == size * batches * steps
        seen = dict.fromkeys(PROMPTS, 0)
        for prompt in in_training:
            seen[prompt] += 1
            assert max(seen.values()) - min(seen.values()) <= 1


def test_a_hinge_that_every_picture_is_past_is_refused_at_the_first_step() -> None:
    pipe = aligned()
    before = pictures(pipe)
    with pytest.raises(ConfigError, match="--loss maximize"):
        align(pipe, loss="hinge:-1")
    assert is_stock(pipe)
    assert torch.equal(pictures(pipe), before)


def test_the_distance_penalty_is_logged_and_holds_the_adapter_back() -> None:
    free, held = (align(aligned(), steps=5, distance_weight=weight) for weight in (1e-9, 1e3))
    assert [record.distance for record in align(aligned()).history] == [None, None]
    for result in (free, held):
        distances = [record.distance for record in result.history]
        assert distances[0] == 0.0  # a new adapter changes nothing
        assert all(distance is not None and distance > 0 for distance in distances[1:])
    first, last = free.history[-1].distance, held.history[-1].distance
    assert first is not None
    assert last is not None
    assert last < 0.5 * first


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "mixed"),
    [
        (torch.float32, "bf16"),
        (torch.float32, "fp16"),
        (torch.bfloat16, "no"),
        (torch.float16, "no"),
        (torch.bfloat16, "bf16"),
    ],
)
def test_precision(base: torch.dtype, mixed: str) -> None:
    pipe = aligned()
    pipe.to(base)
    before = state(pipe)
    result = align(pipe, mixed_precision=mixed, eval_prompts=2)
    assert state(pipe) == before
    assert not any(record.skipped for record in result.history)
    assert all(weight.dtype == torch.float32 for weight in adapter(pipe))
    assert any(weight.any() for name, weight in result.adapter.items() if "lora_B" in name or ".up." in name)
    assert pictures(pipe).isfinite().all()


def test_the_scaled_loss_of_float16_gives_the_same_gradient() -> None:
    plain, scaled = (align(aligned(), steps=1, mixed_precision=mixed).history[0] for mixed in ("no", "fp16"))
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=0.05)  # unscaled before it is clipped and logged


# --- steps that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_recorded(gradient_only: bool) -> None:
    pipe, seen = aligned(), []

    def watch(record: StepRecord) -> None:
        seen.append(adapter(pipe))
        assert all(weight.isfinite().all() for weight in seen[-1])

    result = align(pipe, NotFinite(range(2, 3), gradient_only), steps=4, on_step=watch)
    assert [record.skipped for record in result.history] == [False, True, False, False]
    assert math.isnan(result.history[1].grad_norm) or math.isinf(result.history[1].grad_norm)
    assert math.isnan(result.history[1].loss) is not gradient_only
    assert same(seen[0], seen[1])
    assert not same(seen[1], seen[2])


def test_four_in_a_row_are_forgiven() -> None:
    result = align(aligned(), NotFinite(range(2, 6)), steps=6)
    assert [record.skipped for record in result.history] == [False, True, True, True, True, False]


def test_five_in_a_row_end_the_run_and_the_last_good_adapter_is_saved(tmp_path: Path) -> None:
    pipe, seen = aligned(), [[]]
    before = state(pipe)
    with pytest.raises(
        TrainingDiverged, match=r"5 steps in a row.*the last good one, of step 1\. Try a lower --lr"
    ) as told:
        align(
            pipe, NotFinite(range(3, 99)), steps=20, out=tmp_path / "run", on_step=lambda _: seen.append(adapter(pipe))
        )
    assert is_stock(pipe)
    assert state(pipe) == before
    assert [record.skipped for record in read_metrics(tmp_path / "run")] == [False] * 2 + [True] * 5
    pipe.load_adapter(tmp_path / "run" / "adapter.safetensors")
    assert same(adapter(pipe), seen[1])  # all that step 2 made of it gave NaN
    assert told.value.result.kept_step == 1
    assert told.value.result.adapter.keys() == align(pipe).adapter.keys()


# --- how a run ends ---------------------------------------------------------------------------------------------------


def peculiar() -> Any:
    """A pipeline in a state that nobody would choose."""
    pipe = aligned()
    pipe.unet.mid_block.train()
    pipe.vae.encoder.requires_grad_(True)
    pipe.text_encoder.train()
    pipe.set_progress_bar_config(leave=False)
    pipe.unet.register_forward_hook(lambda *_: None)
    return pipe


def test_everything_is_left_as_it_was_after_success() -> None:
    pipe = peculiar()
    before = state(pipe)
    align(pipe, eval_prompts=2, distance_weight=0.1)
    assert state(pipe) == before
    assert not any(weight.requires_grad for weight in lora.trainable(pipeline_parts.denoisers(pipe)))
    assert all(weight.grad is None for weight in lora.trainable(pipeline_parts.denoisers(pipe)))


def test_the_adapter_is_in_eval_mode_with_its_denoiser() -> None:
    pipe = aligned()
    align(pipe)
    assert not any(module.training for module in pipe.unet.modules())


def test_a_failure_in_the_middle_leaves_no_adapter(tmp_path: Path) -> None:
    pipe = peculiar()
    before, drawn = state(pipe), pictures(pipe)
    with pytest.raises(Broken):
        align(pipe, Raises(Broken("the reward gave up")), out=tmp_path / "run")
    assert is_stock(pipe)
    assert state(pipe) == before
    assert torch.equal(pictures(pipe), drawn)
    assert len(read_metrics(tmp_path / "run")) == 1
    assert "the reward gave up" in (tmp_path / "run" / "config.json").read_text()
    pipe.load_adapter(tmp_path / "run")  # the first step was good, and is kept


def interrupt_at(step: int, how: Any) -> Any:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            how()

    return on_step


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", [raise_interrupt, press_ctrl_c])
def test_an_interrupted_run_is_saved_whole(how: Any, tmp_path: Path) -> None:
    pipe, handler = peculiar(), signal.getsignal(signal.SIGINT)
    before = state(pipe)
    result = align(pipe, steps=9, eval_prompts=2, out=tmp_path / "run", on_step=interrupt_at(2, how))
    assert result.interrupted
    assert result.stopped == "interrupted after 2 of 9 steps"
    assert [record.step for record in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert state(pipe) == before
    assert signal.getsignal(signal.SIGINT) is handler
    kept = adapter(pipe)
    assert any(weight.any() for weight in kept)
    pipe.load_adapter(tmp_path / "run")
    assert same(adapter(pipe), kept)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


class PressesAtCall2(Counted):
    """Ctrl-C in the middle of the second step, once or twice."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def at(self, call: int, scores: Tensor) -> Tensor:
        for _ in range(self.times if call == 3 else 0):  # call 1 is the first evaluation
            press_ctrl_c()
        return scores


def test_ctrl_c_in_a_step_ends_after_it_with_the_last_look() -> None:
    result = align_until_ctrl_c(aligned(), PressesAtCall2(1), steps=9, eval_prompts=1, eval_every=0)
    assert result.interrupted
    assert [record.step for record in result.history] == [0, 1, 2]
    assert result.after is not None
    assert result.after.step == 2


def test_a_second_ctrl_c_ends_at_once_and_keeps_what_was_learned() -> None:
    pipe = peculiar()
    before, seen = state(pipe), []
    reward = PressesAtCall2(2)
    result = align_until_ctrl_c(
        pipe, reward, steps=9, eval_prompts=1, eval_every=0, on_step=lambda _: seen.append(adapter(pipe))
    )
    assert result.interrupted
    assert [record.step for record in result.history] == [0, 1]
    assert same(adapter(pipe), seen[-1])
    assert state(pipe) == before
    assert all(weight.grad is None for weight in lora.trainable(pipeline_parts.denoisers(pipe)))


def test_a_handler_of_the_program_is_kept() -> None:
    pressed, ours = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        result = align(aligned(), on_step=interrupt_at(1, press_ctrl_c))
    finally:
        signal.signal(signal.SIGINT, ours)
    assert pressed == [1]
    assert not result.interrupted
    assert result.steps == 2


def test_align_runs_in_a_thread() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(align(aligned())))
    thread.start()
    thread.join()
    assert results[0].steps == 2


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_looks_are_taken_when_the_settings_say() -> None:
    def looks(**changed: Any) -> list[int]:
        history = align(aligned(), steps=3, **changed).history
        return [record.step for record in history if record.evidence is not None]

    assert looks(eval_prompts=1, eval_every=2) == [0, 2, 3]
    assert looks(eval_prompts=1, eval_every=0) == [0, 3]
    assert looks(eval_prompts=0) == []


def test_no_held_out_prompts_give_no_evidence() -> None:
    result = align(aligned(), judges=("sharpness",))
    assert (result.before, result.after, dict(result.changes)) == (None, None, {})
    assert [record.step for record in result.history] == [1, 2]


def falling(**changed: Any) -> tuple[Any, Any, list[list[Tensor]]]:
    """A run whose reward falls at every evaluation, since the loss pulls it towards 0, while its contrary, a judge,
    rises.
    """
    pipe, seen = aligned(), []
    chosen = {"loss": "target:0", "steps": 4, "eval_prompts": 2, "eval_every": 1, **changed}
    result = align(pipe, on_step=lambda _: seen.append(adapter(pipe)), **chosen)
    looks = [record.evidence.reward for record in result.history if record.evidence is not None]
    assert looks[1:] == sorted(looks[1:], reverse=True)
    return pipe, result, seen


DARKER, BRIGHTER = "-1*brightness", "2*brightness"


@pytest.mark.parametrize(
    ("changed", "kept", "followed"),
    [
        ({}, 4, "the loss target:0.0"),
        ({"distance_weight": 1e-6}, 4, "the loss target:0.0 without the distance to the base model"),
        ({"judges": (DARKER,)}, 4, "the judge -brightness"),
        ({"judges": (BRIGHTER,)}, 1, "the judge 2*brightness"),
        ({"judges": (DARKER, BRIGHTER)}, 4, "the judge -brightness"),
        ({"judges": (DARKER, BRIGHTER), "keep_best": "judge"}, 4, "the judge -brightness"),
        ({"judges": (DARKER, BRIGHTER), "keep_best": "2*brightness"}, 1, "the judge 2*brightness"),
        ({"judges": (DARKER, "2.0 * brightness"), "keep_best": "2.0 * brightness"}, 1, "the judge 2*brightness"),
        ({"judges": (BRIGHTER,), "keep_best": "reward"}, 4, "the loss target:0.0"),
        ({"judges": ("zscore(brightness)",), "keep_best": "zscore(brightness)"}, 1, "the judge zscore_brightness"),
    ],
    ids=str,
)
def test_the_best_adapter_is_kept_by_the_loss_or_by_a_judge(changed: Any, kept: int, followed: str) -> None:
    pipe, result, seen = falling(**changed)
    assert (result.after.step, result.kept_step, result.chosen_from) == (kept, kept, 4)
    assert result.followed == followed
    assert same(adapter(pipe), seen[kept])
    assert not same(seen[1], seen[4])
    evidence = PromptSet.load(PROMPTS).split(2, 0).evidence
    again = evaluate(pipe, Brightness(), [], evidence, result.config, 1)
    assert again.per_prompt["reward"] == result.after.per_prompt["reward"]  # its pictures are the kept adapter's
    assert f"the best of 4 evaluations by {followed}" in result.choice
    assert result.choice in repr(result)


def test_single_pictures_count_not_their_mean() -> None:
    """For target:0.3, pictures at 0.1 and 0.5 are worse than at 0.2 and 0.4, though their means are alike."""
    looks = [
        Evidence(step, ("a", "b"), 0.3, {}, {}, 0.1, {"reward": values}, merit=(merit_of(Target(0.3), values),))
        for step, values in ((1, (0.1, 0.5)), (2, (0.2, 0.4)), (3, (0.0, 0.6)))
    ]
    assert best_of(looks, True) is looks[1]


def test_looks_that_are_alike_for_the_judge_are_told_apart_by_the_loss() -> None:
    _, result, _ = falling(judges=("clip_above(2*brightness, 0.1)",))  # every picture is past that
    judged = [record.evidence.merit[0] for record in result.history if record.evidence is not None]
    assert judged == pytest.approx([0.1] * 5)
    assert result.kept_step == 4


def test_the_last_adapter_is_kept_where_that_is_asked_for() -> None:
    pipe, result, seen = falling(keep_best=False, judges=(BRIGHTER,))
    assert (result.after.step, result.chosen_from, result.choice) == (4, 0, "")
    assert same(adapter(pipe), seen[4])


def test_patience_ends_a_run_that_gets_no_better_by_what_is_followed() -> None:
    _, result, _ = falling(steps=9, patience=2, judges=(BRIGHTER,))
    assert result.steps == 3
    assert not result.interrupted
    assert result.stopped == "no better evaluation by the judge 2*brightness for 2 evaluations: ended after 3 steps"
    _, result, _ = falling(steps=4, patience=2)  # the loss falls at every evaluation
    assert (result.steps, result.stopped) == (4, "")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"judges": (DARKER,), "keep_best": "nope"}, r"keep_best = 'nope'.*the judges are '-brightness'"),
        ({"keep_best": "judge"}, r"keep_best = 'judge': a judge to follow is needed"),
        (
            {"patience": 2, "eval_every": 0},
            r"patience = 2: with eval_every = 0 no evaluation.*eval_every|1 or more is needed",
        ),
        ({"patience": 2, "eval_prompts": 0}, r"patience = 2: with eval_prompts = 0 no evaluation"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_the_start(changed: Any, words: str) -> None:
    pipe = aligned()
    with pytest.raises(ConfigError, match=words):
        align(pipe, **{"eval_prompts": 2, **changed})
    assert is_stock(pipe)


# --- few prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["a dog"], ["a dog", "a cat"], ["a dog", "a dog"]])
def test_few_prompts_are_all_trained_on_and_nothing_is_called_held_out(prompts: list[str], tmp_path: Path) -> None:
    result = align(aligned(), prompts=prompts, eval_prompts=4, out=tmp_path / "run")
    assert result.before is not None
    assert result.after is not None
    assert result.before.images is not None
    assert not result.after.held_out
    assert len(result.before.prompts) == len(result.before.images) == 4
    assert set(result.before.prompts) == set(prompts)
    assert not torch.equal(result.before.images[0], result.before.images[2])  # the same prompt, other noise
    assert result.changes["reward"].standard_error > 0
    assert result.before.diversity > 0
    text = repr(result)
    assert "held-out" not in text
    assert "reward on training prompts, fresh noise" in text
    assert f"training on {len(set(prompts))} prompt" in text
    for record in read_metrics(tmp_path / "run"):
        assert record.evidence is None or not record.evidence.held_out


def test_one_picture_has_no_spread_and_no_nan_is_shown(tmp_path: Path) -> None:
    result = align(aligned(), prompts=[f"dog {i}" for i in range(9)], eval_prompts=1, out=tmp_path / "run")
    assert math.isnan(result.changes["reward"].standard_error)
    assert "nan" not in repr(result).replace("nance", "")
    assert "+-" not in repr(result)
    assert "diversity" not in repr(result)
    assert "training on 8 prompts, 1 held out" in repr(result)
    assert "nan" not in json.dumps(result.adapter.metadata).lower()


def test_judges_are_watched() -> None:
    result = align(aligned(), "brightness + 0.1*tv", eval_prompts=2, judges=("sharpness",))
    assert set(result.changes) == {"reward", "brightness", "tv", "sharpness"}
    assert set(result.history[1].parts) == {"brightness", "tv"}


# --- statistics of the base model ------------------------------------------------------------------------------------

MIXED = "zscore(brightness) + 0.5*min(scaled(colour), zscore(tv))"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each look at the pipeline drew, in the order of the evaluations."""
    sizes: list[int] = []

    def counting(pipe: Any, prompts: PromptSet, config: Any, **extra: Any) -> Any:
        sizes.append(len(prompts))
        return render(pipe, prompts, config, **extra)

    monkeypatch.setattr("alignprop_pipe.training.loop.render", counting)
    return sizes


def test_statistics_come_from_the_pictures_of_the_first_look(drawn: list[int]) -> None:
    many = [f"{prompt} {place}" for prompt in PROMPTS for place in ("here", "there")]
    result = align(aligned(), MIXED, many, eval_prompts=5, eval_every=0, eval_batch_size=2)
    assert drawn == [5, 5]  # before, which is the first evaluation too, and after
    assert result.before is not None
    normal = torch.tensor(result.before.per_prompt["zscore_brightness"])
    assert normal.mean().item() == pytest.approx(0, abs=1e-3)
    assert normal.std().item() == pytest.approx(1, rel=1e-3)
    assert list(result.before.parts) == list(result.history[1].parts)
    assert list(result.before.parts) == [
        "zscore_brightness", "brightness", "min", "scaled_colour", "colour", "zscore_tv", "tv",
    ]  # fmt: skip
    assert parse_reward(result.reward).is_calibrated


def test_the_calibrated_text_repeats_the_run_and_measures_nothing(drawn: list[int], tmp_path: Path) -> None:
    first = align(aligned(), MIXED, eval_prompts=0, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert drawn == [16]  # no first evaluation to measure on
    assert about["reward"] == MIXED
    assert about["calibrated_reward"] == first.reward != MIXED
    config = AlignConfig.from_dict(about["config"])
    second = aligned().align(about["calibrated_reward"], about["prompts"], config)
    assert drawn == [16]
    assert second.reward == first.reward
    assert second.adapter.keys() == first.adapter.keys()
    assert all(torch.equal(weight, second.adapter[name]) for name, weight in first.adapter.items())
    assert align(aligned(), "clip_above(brightness, 1) + watch(tv)").reward == "clip_above(brightness, 1) + watch(tv)"
    assert drawn == [16]


def test_the_first_look_is_the_same_with_numbers_that_were_measured_or_given() -> None:
    measured = align(aligned(), MIXED, PROMPTS * 2, eval_prompts=3, steps=1)  # too few: 16 others are drawn
    given = align(aligned(), measured.reward, PROMPTS * 2, eval_prompts=3, steps=1)
    more = [f"{prompt} {place}" for prompt in PROMPTS for place in ("here", "there")]
    kept = align(aligned(), MIXED, more, eval_prompts=6, steps=1)
    again = align(aligned(), kept.reward, more, eval_prompts=6, steps=1)
    for one, other in ((measured, given), (kept, again)):
        assert one.before is not None
        assert other.before is not None
        assert one.before.per_prompt == other.before.per_prompt
        assert torch.equal(one.before.images, other.before.images)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(weight, other.adapter[name]) for name, weight in one.adapter.items())


def test_statistics_are_the_base_models_also_with_an_earlier_adapter_on() -> None:
    pipe = aligned()
    first = align(pipe, MIXED)
    trained = pictures(pipe)
    assert align(pipe, MIXED).reward == first.reward
    assert torch.equal(pictures(pipe), trained)
    weights, before = adapter(pipe), state(pipe)
    with pytest.raises(RewardError, match="same score, 0.25, so there is no spread"):
        align(pipe, "zscore(clip_above(brightness, 0.25))")
    assert same(adapter(pipe), weights)
    assert state(pipe) == before


def test_judges_are_calibrated_and_their_numbers_kept(tmp_path: Path) -> None:
    judges = ("zscore(tv) + zscore(colour)", "sharpness", "scaled(sharpness)")
    result = align(aligned(), eval_prompts=3, judges=judges, steps=1, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    kept = result.config.evaluation.judges
    assert about["config"]["evaluation"]["judges"] == list(kept)
    assert all(parse_reward(text).is_calibrated for text in kept)
    assert kept[1] == "sharpness"
    assert {kept[0], "sharpness", "scaled_sharpness"} <= set(result.changes)


def test_videos_are_calibrated_by_their_middle_frames() -> None:
    family = miniatures.FAMILIES["ltx"]
    result = align(
        aligned(family.make()), "zscore(brightness)", **family.call(2), eval_prompts=1, guidance_scale=2.0, batch_size=1
    )
    assert "mean=" in result.reward
    assert not any(record.skipped for record in result.history)


# --- brakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["clip_above(brightness, 0.01)", "min(clip_above(brightness, 0.01), clip_above(brightness, 0.02))"]
)
def test_a_brake_that_every_picture_is_past_is_refused_at_the_first_step(text: str) -> None:
    pipe = aligned()
    before = pictures(pipe)
    for chosen in (
        {"batch_size": 8},
        {"batch_size": 2, "eval_prompts": 6, "prompts": [f"{p} {i}" for p in PROMPTS for i in "ab"]},
    ):
        with pytest.raises(RewardError, match=r"gives all 8 pictures.*0\.01 and has no gradient.*higher value"):
            align(pipe, text, **chosen)
        assert is_stock(pipe)
        assert torch.equal(pictures(pipe), before)


def test_a_brake_beside_a_reward_that_pulls_is_let_alone() -> None:
    for text in ("tv + clip_above(brightness, 0.01)", "clip_above(brightness, 0.99)"):
        result = align(aligned(), text, batch_size=8, steps=1)
        assert result.history[0].grad_norm > 0


def test_a_few_pictures_past_a_brake_may_be_chance() -> None:
    result = align(aligned(), "clip_above(brightness, 0.01)", batch_size=4, steps=1)
    assert result.history[0].grad_norm == 0
    assert not result.history[0].skipped


def test_what_is_watched_changes_nothing() -> None:
    plain, watching = align(aligned()), align(aligned(), "brightness + 3*watch(jpeg)")
    assert all(torch.equal(weight, watching.adapter[name]) for name, weight in plain.adapter.items())
    assert list(watching.history[0].parts) == ["brightness", "jpeg", "jpeg_kb"]


# --- what a pipeline takes besides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_videos(name: str) -> None:
    family = miniatures.FAMILIES[name]
    pipe = aligned(family.make())
    result = align(pipe, **family.call(2), eval_prompts=1, guidance_scale=2.0, batch_size=1)
    assert result.after is not None
    assert result.after.images is not None
    assert result.after.images.shape == (1, 3, family.height, family.width)
    assert not any(record.skipped for record in result.history)
    assert any(weight.any() for weight in adapter(pipe)[1::2])


# One picture for several prompts is what diffusers deprecates, in favour of repeating it.
@pytest.mark.filterwarnings("ignore:You have passed:FutureWarning")
def test_img2img() -> None:
    pipe = aligned(miniatures.sd15_img2img())
    picture = miniatures.FAMILIES["sd15_img2img"].extra(1)["image"][0]
    result = align(pipe, num_inference_steps=4, image=picture, strength=0.5, eval_prompts=2, truncation="full")
    assert [len(record.graded) for record in result.history] == [0, 2, 2]  # half of 4 steps
    assert not any(record.skipped for record in result.history)


# --- the generator ----------------------------------------------------------------------------------------------------


def test_leaving_the_loop_keeps_what_was_learned() -> None:
    pipe, modes, learned = miniatures.sd15(), [], []
    before = state(pipe)
    with torch.no_grad():
        for record in align_steps(pipe, Brightness(), PromptSet.load(PROMPTS), settings(steps=9, eval_prompts=1)):
            modes.append(torch.is_grad_enabled())
            learned = adapter(pipe)
            if record.step == 2:
                break
    assert modes == [False] * 3  # the loop's gradient mode does not leak into the consumer's code
    assert state(pipe) == before
    assert same(adapter(pipe), learned)


def test_what_is_wrong_is_said_at_once() -> None:
    pipe = miniatures.sd15()

    class Wrong(Brightness):
        def score(self, images: Any, prompts: Any, targets: Any) -> Any:
            return images.mean(dim=(2, 3))

    with pytest.raises(RewardShapeError, match=r"\(2, 3\)"):
        align_steps(pipe, Wrong(), PromptSet.load(PROMPTS), settings())
    with pytest.raises(PipelineError, match="target_modules"):
        align_steps(pipe, Brightness(), PromptSet.load(PROMPTS), settings(target_modules=("no_such_layer",)))
    assert is_stock(pipe)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    align(aligned(), eval_prompts=1)
    assert capsys.readouterr() == ("", "")
