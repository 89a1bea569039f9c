"""The training loop, as a generator of records: prompts -> pictures -> rewards -> loss -> gradient -> adapter.

It writes nothing and prints nothing. All randomness comes from (seed, step, sample), so the same
configuration gives the same adapter, whatever the batch is split into.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from alignprop_pipe.config.choices import Hinge
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, patching, pipeline_call, pipeline_parts, refusals
from alignprop_pipe.diffusion.rollout import autograd_on, rollout, with_backward
from alignprop_pipe.diffusion.text_encoders import EncodedPrompts
from alignprop_pipe.errors import ConfigError, PipelineError, RewardError, RewardValueError, TrainingDiverged
from alignprop_pipe.prompts import PromptSet, Split
from alignprop_pipe.records import Evidence, Images, PromptBatch, Rollout, Scores, StepRecord, Videos
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.combine import calibrate
from alignprop_pipe.rewards.guard import check_reward
from alignprop_pipe.seeds import SeededDraws, generator_for
from alignprop_pipe.training.evidence import (
    Rendered,
    assess,
    followed_judge,
    followed_words,
    judges_of,
    render,
    with_chosen_judge,
)
from alignprop_pipe.training.loss import loss_of

FEWEST_FOR_STATISTICS, USUAL_FOR_STATISTICS = 4, 16
"""Held-out pictures that are enough to measure a reward's spread on; how many are drawn where there are fewer."""
LARGEST_WEIGHT = float(torch.finfo(torch.float16).max)
"""No weight of a LoRA that works comes near to what float16 can hold."""
FEWEST_FOR_IDLE = 8
"""Pictures that must be past every brake before a run is refused: with fewer, it may be chance."""


Told = Callable[[int, int], object]


def unheard(done: int, total: int) -> None:
    """Where nobody wants to know of the pictures of an evaluation."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The adapter's weights after a step."""

    step: int
    weights: list[Tensor]


@dataclass(slots=True)
class Training:
    """What changes while the loop runs: the optimizer, and the adapters that may have to come back.

    `reward`, `judges` and the judges in `config` are calibrated: their texts hold the statistics that were measured.
    `base_pictures` are the pictures of the base model for the evidence until the first evaluation has scored them.
    `best` is the adapter of the best evaluation, by what `followed` says, `good` the newest one that gave a finite
    loss or
    look. `steps` were taken; `interrupted` says that one was broken off, `failure` why no more are taken, and is empty
    while all is well. `kept_step` is the step whose adapter is on the pipeline when the loop has ended. `told` hears of
    an evaluation how many pictures are drawn, and of how many.
    """

    pipe: DiffusionPipeline
    reward: Reward
    judges: Sequence[Reward]
    prompts: Split
    config: AlignConfig
    call_kwargs: Mapping[str, Any]
    denoisers: Mapping[str, nn.Module]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    good: Snapshot
    best: Snapshot | None = None
    best_merit: tuple[float, ...] = ()
    told: Told = unheard
    base_pictures: list[Rendered] = field(default_factory=list)
    base_look: Evidence | None = None
    encoded: EncodedPrompts = field(default_factory=EncodedPrompts)
    looks_without_gain: int = 0
    skipped_in_a_row: int = 0
    steps: int = 0
    kept_step: int = 0
    followed: str = ""
    interrupted: bool = False
    failure: str = ""


def align_steps(
    pipe: DiffusionPipeline,
    reward: Reward,
    prompts: PromptSet,
    config: AlignConfig,
    call_kwargs: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    judges: Sequence[Reward] | None = None,
) -> Generator[StepRecord, None, None]:
    """Train a new adapter on `pipe`, one optimizer step per record; leaving the loop early keeps what was learned.

    Record 0 carries the evidence before training, where the configuration asks for evidence; the last record carries
    the evidence after it. With `keep_best` the adapter of the best evaluation is on the pipeline at the end: the best
    by the
    loss, or by a judge. `call_kwargs` are arguments of this pipeline alone (`image`, `num_frames`, ...). When `stop()`
    turns true, the step at hand is the last one; where it turns true between two steps, the last record comes once
    more, with the evidence. KeyboardInterrupt within a step does the same without that step, a second one ends at once.

    `judges` are those that `config` names, where they are not given.

    Raises PipelineError, PromptError, RewardError, ConfigError at once, and TrainingDiverged while iterating.

    Examples:
        >>> from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, align_steps, parse_reward
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> config = AlignConfig.preset("emoji").replace(steps=2, batch_size=1, num_inference_steps=1, eval_prompts=0)
        >>> [record.step for record in align_steps(pipe, parse_reward("jpeg"), PromptSet(("a fox",)), config)]
        [1, 2]
    """
    with autograd_on():
        if judges is None:
            config = with_chosen_judge(config, reward)
            judges = judges_of(config)
        state = start(pipe, reward, judges, prompts, config, call_kwargs or {})
    return steps_of(state, stop)


def steps_of(state: Training, stop: Callable[[], bool] = lambda: False) -> Generator[StepRecord, None, None]:
    """The records of a training that `start` has made; see `align_steps`."""
    try:
        yield from _records(state, stop)
        if not state.failure and state.steps == state.config.steps:
            state.failure = unlearned(state)
        if state.failure:
            settle(state)
            raise TrainingDiverged(
                f"{state.failure}. The adapter that is kept is the last good one, of step {state.kept_step}. Try a "
                "lower --lr, --truncation last:1, --max-grad-norm 1, or bfloat16 instead of float16"
            )
    finally:
        state.optimizer.zero_grad(set_to_none=True)  # what an interrupted step left
        settle(state)


def _records(state: Training, stop: Callable[[], bool]) -> Generator[StepRecord, None, None]:
    record: StepRecord | None = None
    if state.config.evaluation.eval_prompts:
        with autograd_on():
            first = first_look(state)
        yield first
    for step in range(1, state.config.steps + 1):
        if stop():
            break
        try:
            with autograd_on():
                record = optimizer_step(state, step)
                if is_look(state, stop()):
                    record = replace(record, evidence=look(state))
        except KeyboardInterrupt:
            state.interrupted = True
            undo(state)
            if record is not None and record.step == step:  # the step is done, its evaluation is not
                yield record
            if stop():  # so this was the second time
                raise
            break
        yield record
        if state.failure or 0 < state.config.evaluation.patience <= state.looks_without_gain:
            return
    if record is not None and record.evidence is None and state.config.evaluation.eval_prompts:
        with autograd_on():
            record = replace(record, evidence=look(state))
        yield record


def unlearned(state: Training) -> str:
    """Why a run that went to its end has failed nevertheless; empty where it has not."""
    skipped = state.skipped_in_a_row
    if skipped == state.steps:
        return f"none of the {skipped} steps had a finite loss and gradient, so nothing was learned"
    unseen = skipped > 1 and not state.config.evaluation.eval_prompts
    return f"the last {skipped} steps had a loss or gradient that was not finite" if unseen else ""


def settle(state: Training) -> None:
    """Put the adapter on the pipeline that is kept: the best one, after a failure the last good one, or the newest."""
    undo(state)
    kept = state.best or (state.good if state.failure else None)
    state.kept_step = state.steps if kept is None else kept.step
    if kept is not None:
        lora.restore(state.denoisers, kept.weights)


def undo(state: Training) -> None:
    """Take back what a step that was broken off has done to the adapter."""
    if state.good.step == state.steps:
        lora.restore(state.denoisers, state.good.weights)


def usable_denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that get the adapter. Raises PipelineError for a pipeline that cannot be aligned as it stands."""
    denoisers = pipeline_parts.denoisers(pipe)
    pipeline_call.call_parameters(pipe)  # refuses a pipeline without prompts
    refusals.refuse_untrainable(pipe)
    if reason := lora.obstacle(pipeline_parts.components(pipe), denoisers):
        raise PipelineError(reason)
    return denoisers


def start(
    pipe: DiffusionPipeline,
    reward: Reward,
    judges: Sequence[Reward],
    prompts: PromptSet,
    config: AlignConfig,
    call_kwargs: Mapping[str, Any],
    told: Told = unheard,
) -> Training:
    """Check everything that can be checked before the first step, measure what rewards lack, add the adapter.

    `judges` are those that `config` names, as values.
    """
    denoisers = usable_denoisers(pipe)
    device = pipeline_parts.device_of(pipe)
    split = prompts.split(config.evaluation.eval_prompts, config.seed)
    judges = [judge.to(device) for judge in judges]
    followed = followed_judge(config.evaluation.keep_best, judges, config.evaluation.judges)
    reward = reward.to(device)
    sample = split.train.batch(config.seed, 0, 2)
    with ExitStack() as still:
        still.enter_context(SeededDraws.after(generator_for("hidden", config.seed)))
        for network in reward.networks():
            still.enter_context(patching.frozen(network))
        check_reward(reward, dry_pictures(device), sample.prompts, sample.targets)
    base_pictures: list[Rendered] = []
    encoded = EncodedPrompts()
    if not all(one.is_calibrated for one in (reward, *judges)):
        with encoded.used_by(pipe):
            drawn_for, base_pictures = draw_base(pipe, split, config, call_kwargs, told)
        for part in base_pictures:
            refuse_no_numbers(pipe, part.videos)
        with SeededDraws.after(generator_for("hidden", config.seed)):
            reward, *judges = calibrate_all((reward, *judges), drawn_for, base_pictures, device)
        config = config.replace(judges=tuple(str(judge) for judge in judges))
        base_pictures = base_pictures if drawn_for is split.evidence else []
    if followed is not None and config.evaluation.keep_best not in (True, False, "judge"):
        config = config.replace(keep_best=judges[followed].label)  # its text may hold measured numbers now
    lora.attach(denoisers, config.lora, config.seed)
    # One that was loaded may have layers in a text encoder too.
    lora.detach({name: part for name, part in pipeline_parts.components(pipe).items() if name not in denoisers})
    parameters = lora.trainable(denoisers)
    for parameter in parameters:
        parameter.requires_grad_(False)
    optimizer, schedule = optimizer_for(parameters, config)
    needs_scaling = config.mixed_precision == "fp16" or pipeline_parts.is_half(pipe)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=needs_scaling)
    return Training(
        pipe, reward, judges, split, config, call_kwargs, denoisers, parameters, optimizer, schedule, scaler,
        good=Snapshot(0, lora.snapshot(denoisers)), base_pictures=base_pictures,
        encoded=encoded, followed=followed_words(config, judges), told=told,
    )  # fmt: skip


def optimizer_for(
    parameters: list[nn.Parameter], config: AlignConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and how its rate goes: step n of a warmup of w steps has n/w of it; the falling ones end above zero."""
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "initial_lr": options.lr}],
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
    )
    constant = options.lr_scheduler == "constant"
    schedule = get_scheduler(
        "constant_with_warmup" if constant else options.lr_scheduler,
        optimizer,
        num_warmup_steps=max(1, options.warmup_steps),
        num_training_steps=config.steps + 1,
        last_epoch=0,  # the schedules count from 0, where a warmup and its rate begin; our steps count from 1
    )
    return optimizer, schedule


def dry_pictures(device: torch.device) -> Tensor:
    """Two grey noisy pictures, for the reward's dry call."""
    return (0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=generator_for("evidence", 0))).clamp(0, 1).to(device)


def draw_base(
    pipe: DiffusionPipeline, split: Split, config: AlignConfig, call_kwargs: Mapping[str, Any], told: Told
) -> tuple[PromptSet, list[Rendered]]:
    """Pictures of the base model: those of the evidence, or where these are few, of training prompts.

    An adapter of an earlier run is switched off meanwhile. The pictures are on the CPU.
    """
    prompts = split.evidence
    if len(prompts) < FEWEST_FOR_STATISTICS:
        batch = split.train.batch(config.seed, 0, USUAL_FOR_STATISTICS)
        prompts = PromptSet(tuple(batch.prompts), {name: tuple(values) for name, values in batch.targets.items()})
    with ExitStack() as base, patching.frozen_for_training(pipe):
        for network in pipeline_parts.components(pipe).values():
            base.enter_context(lora.adapter_off(network))
        rendered = counted(render(pipe, prompts, config, **call_kwargs), len(prompts), told)
        drawn = [replace(part, videos=part.videos.cpu()) for part in rendered]
    return prompts, drawn


def counted(rendered: Iterable[Rendered], total: int, told: Told) -> Iterator[Rendered]:
    """The same, while it is told how far it is."""
    done = 0
    told(done, total)
    for part in rendered:
        done += len(part.videos)
        told(done, total)
        yield part


def refuse_no_numbers(pipe: DiffusionPipeline, images: Tensor | None) -> None:
    """Raises PipelineError where the base model's pictures hold NaN or infinity."""
    if images is not None and not images.isfinite().all():
        raise PipelineError(
            f"{type(pipe).__name__} draws pictures that are no finite numbers before any training: load it in "
            "torch.bfloat16 or torch.float32 (--dtype), since a number format that is too small overflows so"
        )


def calibrate_all(
    rewards: Sequence[Reward], prompts: PromptSet, drawn: Sequence[Rendered], device: torch.device
) -> list[Reward]:
    """The rewards with the statistics that they lack measured on these pictures; of videos, on the middle frames."""
    images = torch.cat([part.pictures for part in drawn]).to(device)
    return [calibrate(reward, images, list(prompts.prompts), prompts.targets) for reward in rewards]


# --- one optimizer step ---


def optimizer_step(state: Training, step: int) -> StepRecord:
    """Roll out, score, and step; a loss or gradient that is not finite leaves the adapter as it was."""
    began = time.perf_counter()
    config = state.config
    whole = state.prompts.train.batch(config.seed, step - 1, config.batch_size * config.gradient_accumulation_steps)
    results = []
    if (device := pipeline_parts.device_of(state.pipe)).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with patching.frozen_for_training(state.pipe, state.parameters, state.reward.networks()):
        for first in range(0, len(whole.prompts), config.batch_size):
            results.append(with_backward(state.pipe, partial(accumulate, state, step, first, whole)))
        norm = clipped_norm(state)
    losses, scores, graded, distances, pictures = zip(*results, strict=True)
    if step == 1:
        refuse_satisfied_hinge(config, scores)
        refuse_idle(state, scores, norm)
    loss = sum(losses)
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    skipped = not apply_gradient(state, skipped)
    state.steps = step
    names = scores[0].parts
    return StepRecord(
        step=step,
        loss=loss,
        reward=torch.cat([score.total for score in scores]).mean().item(),
        parts={name: torch.cat([score.parts[name] for score in scores]).float().mean().item() for name in names},
        grad_norm=norm,
        distance=None if distances[0] is None else sum(distances) / len(distances),
        graded=tuple(graded[0]),
        seconds=time.perf_counter() - began,
        memory_mb=memory_mb(device),
        skipped=skipped,
        images=pictures[0],
    )


def refuse_satisfied_hinge(config: AlignConfig, scores: Sequence[Scores]) -> None:
    """Raises ConfigError if the first pictures are all past the margin already, so that nothing would ever pull."""
    lowest = min(score.total.min().item() for score in scores)
    if isinstance(config.loss, Hinge) and lowest >= config.loss.margin:
        raise ConfigError(
            f"loss = {config.loss}: the base model's pictures score {lowest:.4g} and more, past that margin, so "
            "nothing is left to learn; use loss='maximize' (--loss maximize) or a higher margin"
        )


def refuse_idle(state: Training, scores: Sequence[Scores], norm: float) -> None:
    """Raises RewardError if nothing pulls: no gradient, and one score for every picture of the base model seen so far.

    So it is where all are past a `clip_above`. One batch may be so by chance, hence the held-out pictures count too.
    """
    base = () if state.base_look is None else state.base_look.per_prompt["reward"]
    known = [*base, *(value for score in scores for value in score.total.tolist())]
    same = max(known) - min(known) <= 1e-6 * max(1.0, abs(known[0]))
    if norm == 0 and same and len(known) >= FEWEST_FOR_IDLE:
        raise RewardError(
            f"the reward {state.reward} gives all {len(known)} pictures of the base model {known[0]:.4g} and has no "
            "gradient there, so nothing is left to learn; with clip_above, use a higher value"
        )


def accumulate(
    state: Training, step: int, first: int, whole: PromptBatch
) -> tuple[float, Scores, range, float | None, Images | None]:
    """One batch: its gradient is added, scaled so that the batches of a step count as one large batch.

    Returns its share of the loss, the scores, the graded steps, the distance to the base model, and of the first batch
    the pictures.
    """
    config = state.config
    part = slice(first, first + config.batch_size)
    batch = PromptBatch(whole.prompts[part], {name: list(values)[part] for name, values in whole.targets.items()})
    noise = [generator_for("noise", config.seed, step, first + i) for i in range(len(batch.prompts))]
    share = len(batch.prompts) / len(whole.prompts)
    hidden = SeededDraws.after(generator_for("hidden", config.seed, step, first))
    with hidden, patching.mixed_precision(state.pipe, config.mixed_precision), state.encoded.used_by(state.pipe):
        # One draw of K for all pictures of a step: their calls share the graph, and a split batch draws the same.
        made = rollout(
            state.pipe, batch, config, noise, generator_for("truncation", config.seed, step), **state.call_kwargs
        )
        scores = score_pictures(state.reward, made, batch)
    loss = loss_of(config.loss, scores.total)
    if made.distance is not None:
        loss = loss + config.distance_weight * made.distance
    try:
        add_gradient(state.scaler.scale(loss * share), state.parameters)
    except CheckpointError as error:
        raise PipelineError(
            f"{type(state.pipe).__name__} computes something else the second time, when the backward pass repeats its "
            "steps: something in it keeps a state from call to call. Take patches and caches off, or keep all steps in "
            "memory with checkpointing='none'"
        ) from error
    distance = None if made.distance is None else made.distance.item()
    kept = Scores(scores.total.detach(), {name: part.detach() for name, part in scores.parts.items()})
    return loss.item() * share, kept, made.graded, distance, None if first else shown(made)


def add_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """As `backward` does, but to all parameters or, where it fails, to none."""
    for parameter, part in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if part is not None:
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)


def shown(made: Rollout) -> Images:
    """The pictures, or the middle frames of videos, without their graph."""
    images = made.images if made.images.ndim == 4 else made.images[:, made.images.shape[1] // 2]
    return images.detach().float().cpu()


def score_pictures(reward: Reward, made: Rollout, batch: PromptBatch) -> Scores:
    """Scores in float32; a video is scored frame by frame and gets the mean of its frames."""
    images = made.images if made.images.dtype == torch.float64 else made.images.float()
    if images.ndim == 4:
        return reward(images, batch.prompts, batch.targets)
    return score_frames(reward, images, batch)


def score_frames(reward: Reward, videos: Videos, batch: PromptBatch) -> Scores:
    """Every frame against its video's prompt; the mean of a video's frames is its score."""
    frames = videos.shape[1]
    prompts = [prompt for prompt in batch.prompts for _ in range(frames)]
    targets = {name: [value for value in values for _ in range(frames)] for name, values in batch.targets.items()}
    scores = reward(videos.flatten(0, 1), prompts, targets)
    means = {name: part.unflatten(0, (-1, frames)).mean(1) for name, part in scores.parts.items()}
    return Scores(scores.total.unflatten(0, (-1, frames)).mean(1), means)


def clipped_norm(state: Training) -> float:
    """Clip the gradient, and return its norm before that."""
    state.scaler.unscale_(state.optimizer)
    return torch.nn.utils.clip_grad_norm_(state.parameters, state.config.optimizer.max_grad_norm).item()


def apply_gradient(state: Training, skipped: bool) -> bool:
    """Step, or skip; returns whether the adapter was changed. Says in `state.failure` why the run cannot go on."""
    if skipped:
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= state.config.max_skipped:
            state.failure = f"{state.skipped_in_a_row} steps in a row had a loss or gradient that was not finite"
        state.optimizer.zero_grad(set_to_none=True)
        state.optimizer.step()  # moves nothing without gradients; the schedule wants to see a step before its own
    else:
        state.skipped_in_a_row = 0
        state.good = Snapshot(state.steps, lora.snapshot(state.denoisers))
        largest = largest_after_step(state)
        if not largest <= LARGEST_WEIGHT:
            undo(state)
            skipped = True
            state.failure = f"a step was undone that made weights of {largest:.3g}, which no adapter has"
    state.scaler.update()
    state.lr_scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    return not skipped


def largest_after_step(state: Training) -> float:
    """Step, and return the size of the adapter's largest weight then."""
    try:
        state.scaler.step(state.optimizer)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        return math.inf  # of a learning rate that no float32 holds
    return torch.stack([weight.detach().abs().max() for weight in state.parameters]).max().item()


# --- evidence ---


def is_look(state: Training, stopping: bool) -> bool:
    """Whether the evidence is rendered after this step: the last one, and every `eval_every`."""
    evaluation, step = state.config.evaluation, state.steps
    last = stopping or step == state.config.steps
    due = last or (evaluation.eval_every > 0 and step % evaluation.eval_every == 0)
    return evaluation.eval_prompts > 0 and due and not state.failure


def first_look(state: Training) -> StepRecord:
    """Record 0: pictures of the base model. Raises PipelineError, RewardValueError if these are no finite numbers."""
    evidence = look(state)
    return StepRecord(
        step=0,
        loss=math.nan,
        reward=math.nan,
        parts={},
        grad_norm=math.nan,
        distance=None,
        graded=(),
        seconds=0.0,
        memory_mb=memory_mb(pipeline_parts.device_of(state.pipe)),
        evidence=evidence,
    )


def look(state: Training) -> Evidence:
    """Render and score the prompts of the evidence; remember the adapter if it is the best so far."""
    device = pipeline_parts.device_of(state.pipe)
    # What was drawn for the statistics is not drawn again.
    drawn = (replace(part, videos=part.videos.to(device)) for part in state.base_pictures)
    hidden = SeededDraws.after(generator_for("hidden", state.config.seed))  # for a reward that looks at random crops
    if not state.base_pictures:
        drawn = render(state.pipe, state.prompts.evidence, state.config, **state.call_kwargs)
        drawn = counted(drawn, len(state.prompts.evidence), state.told)
    networks = [network for one in (state.reward, *state.judges) for network in one.networks()]
    # As in training, without guards too: one that is wrong would score as a black picture.
    with patching.frozen_for_training(state.pipe, others=networks), state.encoded.used_by(state.pipe), hidden:
        evidence = assess(state.reward, state.judges, state.prompts.evidence, drawn, state.config, state.steps)
    evidence = replace(evidence, held_out=state.prompts.held_out)
    state.base_pictures = []
    if state.steps == 0:
        refuse_broken_base(state, evidence)
        state.base_look = evidence
    elif wrong := not_finite(evidence, state.base_look):
        state.failure = f"after step {state.steps} {wrong} of the evidence are no finite numbers"
    else:
        judge_look(state, evidence)
    return evidence


def judge_look(state: Training, evidence: Evidence) -> None:
    """Remember the adapter of an evaluation: the best so far, or one more without a gain."""
    state.good = Snapshot(state.steps, lora.snapshot(state.denoisers))
    if evidence.merit > state.best_merit:
        state.best_merit, state.looks_without_gain = evidence.merit, 0
        state.best = state.good if state.config.evaluation.keep_best else None
    else:
        state.looks_without_gain += 1


def not_finite(evidence: Evidence, base: Evidence | None) -> str:
    """What about an evaluation is no finite number though it was for the base model; empty where all is well."""
    wrong = [] if evidence.images is None or evidence.images.isfinite().all() else ["pictures"]
    scores = {"reward": evidence.reward, **evidence.parts, **evidence.judges}
    before = {} if base is None else {"reward": base.reward, **base.parts, **base.judges}
    wrong += [
        name for name, value in scores.items() if not math.isfinite(value) and math.isfinite(before.get(name, 0.0))
    ]
    return " and ".join(wrong)


def refuse_broken_base(state: Training, evidence: Evidence) -> None:
    """Raises PipelineError for pictures of the base model with NaN, RewardValueError for scores that are none."""
    refuse_no_numbers(state.pipe, evidence.images)
    if not all(map(math.isfinite, (evidence.reward, *evidence.merit))):
        scores = {"reward": evidence.reward, **evidence.judges}
        listed = ", ".join(f"{name} {value}" for name, value in scores.items() if not math.isfinite(value))
        raise RewardValueError(
            f"the evidence before training holds scores that are no finite numbers ({listed or evidence.merit}); every "
            "picture needs one"
        )


def memory_mb(device: torch.device) -> float:
    """Peak memory of the accelerator, or the size of this process on a CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
