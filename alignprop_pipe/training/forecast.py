"""What a run will cost, told before its first step: measured on two short chains of the pipeline itself."""

import time
from dataclasses import dataclass, replace

import psutil
import torch
from diffusers import DiffusionPipeline

from alignprop_pipe.config.choices import KeepSteps, RecomputeNone
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.config.truncation import LastK
from alignprop_pipe.diffusion import lora, patching, pipeline_parts, refusals
from alignprop_pipe.diffusion.checkpointing import recomputed
from alignprop_pipe.diffusion.rollout import autograd_on, rollout
from alignprop_pipe.records import PromptBatch
from alignprop_pipe.seeds import generator_for


@dataclass(frozen=True, slots=True)
class Forecast:
    """An estimate. Memory is weights plus what autograd keeps at the largest K; time is for a mean K.

    `process_mb` is what the process fills at its peak in the machine's own memory: libraries, the pipeline, and on the
    CPU what a step needs besides. `seconds_per_picture` are those of one picture of an evaluation of the held-out
    prompts.
    """

    trainable_parameters: int
    denoiser_calls_per_step: float
    memory_mb: float
    process_mb: float
    seconds_per_step: float
    seconds_per_picture: float

    def seconds(self, config: AlignConfig, held_out: int) -> float:
        """The whole run, with every look at so many held-out pictures."""
        return config.steps * self.seconds_per_step + looks(config) * held_out * self.seconds_per_picture


@dataclass(frozen=True, slots=True)
class Probe:
    """One measured chain: seconds forward and backward, and bytes kept for the backward pass."""

    forward: float
    backward: float
    kept: int
    steps: int


def forecast(pipe: DiffusionPipeline, config: AlignConfig) -> Forecast:
    """Measure chains of two and four steps, then scale to the configuration; leaves the pipeline as it was.

    The reward's own cost is not in it. Raises PipelineError.
    """
    denoisers = pipeline_parts.denoisers(pipe)
    refusals.refuse_untrainable(pipe)
    filled = psutil.Process().memory_info().rss
    with lora.taken_out(denoisers.values()):  # an adapter of an earlier run stays what it was
        try:
            lora.attach(denoisers, config.lora, config.seed)
            parameters = lora.trainable(denoisers)
            with patching.frozen_for_training(pipe, parameters):
                probe(pipe, config, 2)  # the first call pays for warming up
                short, long = probe(pipe, config, 2), probe(pipe, config, 4)
            cost = scaled(pipe, config, short, long, sum(parameter.numel() for parameter in parameters), filled)
            now = psutil.Process().memory_info().rss / 2**20  # with what the libraries keep for themselves
            return replace(cost, process_mb=max(cost.process_mb, now))
        finally:
            lora.detach(denoisers)


def probe(pipe: DiffusionPipeline, config: AlignConfig, steps: int) -> Probe:
    """A chain of `steps` steps whose last half carries gradient and keeps its activations."""
    short = config.replace(num_inference_steps=steps, truncation=LastK(steps // 2), checkpointing=RecomputeNone())
    batch = PromptBatch(["a picture"] * config.batch_size)
    noise = [generator_for("noise", config.seed, 0, i) for i in range(config.batch_size)]
    weights = {p.untyped_storage().data_ptr() for p in pipeline_parts.parameters(pipe)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with autograd_on():
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = rollout(pipe, batch, short, noise, generator_for("truncation", config.seed))
        middle = time.perf_counter()
        made.images.float().mean().backward()
    for parameter in lora.trainable(pipeline_parts.denoisers(pipe)):
        parameter.grad = None
    return Probe(middle - began, time.perf_counter() - middle, sum(kept.values()), made.num_steps)


def scaled(
    pipe: DiffusionPipeline, config: AlignConfig, short: Probe, long: Probe, trainable: int, filled: int
) -> Forecast:
    """From two short chains to the one that the configuration asks for; the process has `filled` so many bytes."""
    gained = max(1, long.steps - short.steps)
    graded_gained = max(1, long.steps // 2 - short.steps // 2)
    per_step = max(0.0, long.forward - short.forward) / gained
    per_graded = max(0.0, long.backward - short.backward) / graded_gained
    activations = max(0, long.kept - short.kept) / graded_gained

    total = config.sampling.num_inference_steps
    graded = config.truncation.expected(total)
    every = range(total - round(graded), total)
    twice = sum(recomputed(config.checkpointing, step, every) for step in every)
    fixed = short.forward + short.backward - short.steps * per_step - short.steps // 2 * per_graded
    seconds = max(0.0, fixed) + (total + twice) * per_step + graded * per_graded
    at_once = held_at_once(config, config.truncation.most(total))
    weights = sum(p.numel() * p.element_size() for p in pipeline_parts.parameters(pipe))
    decoder = max(0.0, short.kept - short.steps // 2 * activations)
    needed = 16 * trainable + decoder + at_once * activations
    drawn = max(0.0, short.forward - short.steps * per_step) + total * per_step
    return Forecast(
        trainable_parameters=trainable,
        denoiser_calls_per_step=(total + twice) * config.gradient_accumulation_steps,
        memory_mb=(weights + needed) / 2**20,
        process_mb=(filled + needed * (pipeline_parts.device_of(pipe).type == "cpu")) / 2**20,
        seconds_per_step=seconds * config.gradient_accumulation_steps,
        seconds_per_picture=drawn / config.batch_size,
    )


def looks(config: AlignConfig) -> int:
    """How often the held-out prompts are looked at: before the training, on the way, and after the last step."""
    evaluation = config.evaluation
    if not evaluation.eval_prompts:
        return 0
    on_the_way = (config.steps - 1) // evaluation.eval_every if evaluation.eval_every else 0
    return 2 + on_the_way


def held_at_once(config: AlignConfig, graded: int) -> int:
    """Graded steps whose activations exist at the same time: those kept, and one that is being recomputed."""
    match config.checkpointing:
        case RecomputeNone():
            return graded
        case KeepSteps(steps):
            return min(graded, steps + 1)
        case _:
            return 1
