"""The training loop, as a generator of records: prompts -> pictures -> rewards -> loss -> gradient -> adapter.

It writes nothing and prints nothing. All randomness comes from (seed, step, sample), so the same
configuration gives the same adapter, whatever the batch is split into.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from alignprop_pipe import lora, states, stock
from alignprop_pipe.choices import Hinge
from alignprop_pipe.config import AlignConfig
from alignprop_pipe.errors import ConfigError, PipelineError, RewardError, TrainingDiverged
from alignprop_pipe.evidence import Rendered, assess, render
from alignprop_pipe.loss import loss_of
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Evidence, Images, PromptBatch, Rollout, Scores, StepRecord, Videos
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.combine import calibrate
from alignprop_pipe.rewards.guard import check_reward
from alignprop_pipe.rewards.registry import parse_reward
from alignprop_pipe.rollout import autograd_on, rollout
from alignprop_pipe.seeds import generator_for

FEWEST_FOR_STATISTICS, USUAL_FOR_STATISTICS = 4, 16
"""Held-out pictures that are enough to measure a reward's spread on; how many are drawn where there are fewer."""
FEWEST_FOR_IDLE = 8
"""Pictures that must be past every brake before a run is refused: with fewer, it may be chance."""


@dataclass(slots=True)
class Training:
    """What changes while the loop runs: the optimizer, and the best adapter so far.

    `reward`, `judges` and the judges in `config` are calibrated: their texts hold the statistics that were measured.
    `base_pictures` are the held-out pictures of the base model until the first look has scored them.
    """

    pipe: DiffusionPipeline
    reward: Reward
    judges: Sequence[Reward]
    train: PromptSet
    held_out: PromptSet
    config: AlignConfig
    call_kwargs: Mapping[str, Any]
    denoisers: Mapping[str, nn.Module]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    best: list[Tensor] | None = None
    best_score: float = -math.inf
    base_pictures: list[Rendered] = field(default_factory=list)
    base_scores: tuple[float, ...] = ()
    looks_without_gain: int = 0
    skipped_in_a_row: int = field(default=0)


def align_steps(
    pipe: DiffusionPipeline,
    reward: Reward,
    prompts: PromptSet,
    config: AlignConfig,
    call_kwargs: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[StepRecord, None, None]:
    """Train a new adapter on `pipe`, one optimizer step per record; leaving the loop early keeps what was learned.

    Record 0 carries the evidence before training, where the configuration asks for evidence; the last record carries
    the evidence after it. With `keep_best` the adapter with the best held-out reward is on the pipeline at the end.
    `call_kwargs` are arguments of this pipeline alone (`image`, `num_frames`, ...). When `stop()` turns true, the
    step at hand is the last one.

    Raises PipelineError, PromptError, RewardError at once, TrainingDiverged while iterating.
    """
    with autograd_on():
        state = start(pipe, reward, prompts, config, call_kwargs or {})
    return steps_of(state, stop)


def steps_of(state: Training, stop: Callable[[], bool] = lambda: False) -> Generator[StepRecord, None, None]:
    """The records of a training that `start` has made; see `align_steps`."""
    config = state.config
    try:
        if config.evaluation.eval_prompts:
            with autograd_on():
                record = first_look(state)
            yield record
        for step in range(1, config.steps + 1):
            with autograd_on():
                record = optimizer_step(state, step, stop)
            yield record
            if stop() or (state.looks_without_gain and state.looks_without_gain == config.evaluation.patience):
                break
    finally:
        state.optimizer.zero_grad(set_to_none=True)  # what an interrupted step left
        if state.best is not None:
            lora.restore(state.denoisers, state.best)


def start(
    pipe: DiffusionPipeline, reward: Reward, prompts: PromptSet, config: AlignConfig, call_kwargs: Mapping[str, Any]
) -> Training:
    """Check everything that can be checked before the first step, measure what rewards lack, put the adapter on."""
    denoisers = stock.denoisers(pipe)
    stock.call_parameters(pipe)  # refuses a pipeline without prompts
    states.refuse_untrainable(pipe)
    if reason := lora.obstacle(stock.components(pipe), denoisers):
        raise PipelineError(reason)
    device = stock.device_of(pipe)
    train, held_out = prompts.split(config.evaluation.eval_prompts, config.seed)
    # A configuration that was read from a file has been searched for code by then.
    judges = [parse_reward(text, allow_code=True).to(device) for text in config.evaluation.judges]
    reward = reward.to(device)
    sample = train.batch(config.seed, 0, 2)
    check_reward(reward, dry_pictures(device), sample.prompts, sample.targets)
    base_pictures: list[Rendered] = []
    if not all(one.is_calibrated for one in (reward, *judges)):
        drawn_for, base_pictures = draw_base(pipe, train, held_out, config, call_kwargs)
        reward, *judges = calibrate_all((reward, *judges), drawn_for, base_pictures, device)
        config = config.replace(judges=tuple(str(judge) for judge in judges))
        base_pictures = base_pictures if drawn_for is held_out else []
    lora.detach(stock.components(pipe))  # one that was loaded may have layers in a text encoder too
    lora.attach(denoisers, config.lora, config.seed)
    parameters = lora.trainable(denoisers)
    for parameter in parameters:
        parameter.requires_grad_(False)
    options = config.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=config.steps + 1,  # so that the last step still moves
    )
    needs_scaling = config.mixed_precision == "fp16" or stock.is_half(pipe)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=needs_scaling)
    return Training(
        pipe, reward, judges, train, held_out, config, call_kwargs, denoisers, parameters, optimizer, schedule, scaler,
        base_pictures=base_pictures,
    )  # fmt: skip


def dry_pictures(device: torch.device) -> Tensor:
    """Two grey noisy pictures, for the reward's dry call."""
    return (0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=generator_for("evidence", 0))).clamp(0, 1).to(device)


def draw_base(
    pipe: DiffusionPipeline, train: PromptSet, held_out: PromptSet, config: AlignConfig, call_kwargs: Mapping[str, Any]
) -> tuple[PromptSet, list[Rendered]]:
    """Pictures of the base model: those of the held-out prompts, or where these are few, of training prompts.

    An adapter of an earlier run is switched off meanwhile. The pictures are on the CPU.
    """
    prompts = held_out
    if len(held_out) < FEWEST_FOR_STATISTICS:
        batch = train.batch(config.seed, 0, USUAL_FOR_STATISTICS)
        prompts = PromptSet(tuple(batch.prompts), {name: tuple(values) for name, values in batch.targets.items()})
    with ExitStack() as base, stock.guards_off(pipe):
        for network in stock.components(pipe).values():
            base.enter_context(lora.adapter_off(network))
        drawn = [replace(part, videos=part.videos.cpu()) for part in render(pipe, prompts, config, **call_kwargs)]
    return prompts, drawn


def calibrate_all(
    rewards: Sequence[Reward], prompts: PromptSet, drawn: Sequence[Rendered], device: torch.device
) -> list[Reward]:
    """The rewards with the statistics that they lack measured on these pictures; of videos, on the middle frames."""
    images = torch.cat([part.pictures for part in drawn]).to(device)
    return [calibrate(reward, images, list(prompts.prompts), prompts.targets) for reward in rewards]


# --- one optimizer step ---


def optimizer_step(state: Training, step: int, stop: Callable[[], bool] = lambda: False) -> StepRecord:
    """Roll out, score, and step; a loss or gradient that is not finite leaves the adapter as it was."""
    began = time.perf_counter()
    config = state.config
    whole = state.train.batch(config.seed, step, config.batch_size * config.gradient_accumulation_steps)
    results = []
    with stock.frozen_for_training(state.pipe, state.parameters):
        for first in range(0, len(whole.prompts), config.batch_size):
            results.append(accumulate(state, step, first, whole))
        norm = clipped_norm(state)
    losses, scores, graded, distances, pictures = zip(*results, strict=True)
    if step == 1:
        refuse_satisfied_hinge(config, scores)
        refuse_idle(state, scores, norm)
    loss = sum(losses)
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    apply_gradient(state, skipped)
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
        memory_mb=memory_mb(stock.device_of(state.pipe)),
        skipped=skipped,
        evidence=look(state, step) if is_look(config, step, stop()) else None,
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
    known = [*state.base_scores, *(value for score in scores for value in score.total.tolist())]
    same = max(known) - min(known) <= 1e-6 * max(1.0, abs(known[0]))
    if norm == 0 and same and len(known) >= FEWEST_FOR_IDLE:
        raise RewardError(
            f"the reward {state.reward} gives all {len(known)} pictures of the base model {known[0]:.4g} and has no "
            "gradient there, so nothing is left to learn; with clip_above, use a higher value"
        )


def accumulate(
    state: Training, step: int, first: int, whole: PromptBatch
) -> tuple[float, Scores, range, float | None, Images]:
    """One batch: its gradient is added, scaled so that the batches of a step count as one large batch.

    Returns its share of the loss, the scores, the graded steps, the distance to the base model, and the pictures.
    """
    config = state.config
    part = slice(first, first + config.batch_size)
    batch = PromptBatch(whole.prompts[part], {name: list(values)[part] for name, values in whole.targets.items()})
    noise = [generator_for("noise", config.seed, step, first + i) for i in range(len(batch.prompts))]
    share = len(batch.prompts) / len(whole.prompts)
    with autocast(state):
        # One draw of K for all pictures of a step: their calls share the graph, and a split batch draws the same.
        made = rollout(
            state.pipe, batch, config, noise, generator_for("truncation", config.seed, step), **state.call_kwargs
        )
    scores = score_pictures(state.reward, made, batch)
    loss = loss_of(config.loss, scores.total)
    if made.distance is not None:
        loss = loss + config.distance_weight * made.distance
    try:
        state.scaler.scale(loss * share).backward()
    except CheckpointError as error:
        raise PipelineError(
            f"{type(state.pipe).__name__} computes something else the second time, when the backward pass repeats its "
            "steps: something in it keeps a state from call to call. Take patches and caches off, or keep all steps in "
            "memory with checkpointing='none'"
        ) from error
    distance = None if made.distance is None else made.distance.item()
    kept = Scores(scores.total.detach(), {name: part.detach() for name, part in scores.parts.items()})
    return loss.item() * share, kept, made.graded, distance, shown(made)


def shown(made: Rollout) -> Images:
    """The pictures, or the middle frames of videos, without their graph."""
    images = made.images if made.images.ndim == 4 else made.images[:, made.images.shape[1] // 2]
    return images.detach().float().cpu()


def autocast(state: Training) -> AbstractContextManager[Any]:
    """The precision that the configuration asks for, or no change."""
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(state.config.mixed_precision)
    return nullcontext() if precision is None else torch.autocast(stock.device_of(state.pipe).type, precision)


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


def apply_gradient(state: Training, skipped: bool) -> None:
    """Step or skip; raises TrainingDiverged after too many skips in a row."""
    if skipped:
        state.skipped_in_a_row += 1
    else:
        state.skipped_in_a_row = 0
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.lr_scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.skipped_in_a_row >= state.config.max_skipped:
        raise TrainingDiverged(
            f"{state.skipped_in_a_row} steps in a row had a loss or gradient that was not finite. The adapter is the "
            "last good one. Try a lower --lr, --truncation last:1, --max-grad-norm 1, or bfloat16 instead of float16"
        )


# --- evidence ---


def is_look(config: AlignConfig, step: int, stopping: bool) -> bool:
    """Whether the held-out pictures are rendered after this step: the last one, and every `eval_every`."""
    every = config.evaluation.eval_every
    last = stopping or step == config.steps
    return config.evaluation.eval_prompts > 0 and (last or (every > 0 and step % every == 0))


def first_look(state: Training) -> StepRecord:
    """Record 0: the held-out pictures of the base model."""
    evidence = look(state, 0)
    state.base_scores = evidence.per_prompt["reward"]
    return StepRecord(
        step=0,
        loss=math.nan,
        reward=math.nan,
        parts={},
        grad_norm=math.nan,
        distance=None,
        graded=(),
        seconds=0.0,
        memory_mb=memory_mb(stock.device_of(state.pipe)),
        evidence=evidence,
    )


def look(state: Training, step: int) -> Evidence:
    """Render and score the held-out prompts; remember the adapter if it is the best so far."""
    device = stock.device_of(state.pipe)
    # What was drawn for the statistics is not drawn again.
    drawn = (replace(part, videos=part.videos.to(device)) for part in state.base_pictures)
    if not state.base_pictures:
        drawn = render(state.pipe, state.held_out, state.config, **state.call_kwargs)
    with stock.guards_off(state.pipe):  # a guard that is wrong would score as a black picture
        evidence = assess(state.reward, state.judges, state.held_out, drawn, step)
    state.base_pictures = []
    if step > 0 and math.isfinite(evidence.reward) and evidence.reward > state.best_score:
        state.best_score, state.looks_without_gain = evidence.reward, 0
        state.best = lora.snapshot(state.denoisers) if state.config.evaluation.keep_best else None
    elif step > 0:
        state.looks_without_gain += 1
    return evidence


def memory_mb(device: torch.device) -> float:
    """Peak memory of the accelerator, or the size of this process on a CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20
