"""The stock pipeline as a differentiable program: prompts -> finished pictures with a graph to the adapter.

There is no sampling loop here. `inspect.unwrap` takes the `no_grad` decorator off the stock
`__call__`; the denoisers' `forward` is wrapped so that steps before the cut run without a graph and graded steps
are checkpointed; the scheduler's `step` is the clock. This file alone switches autograd on and off.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from alignprop_pipe import lora, stock
from alignprop_pipe.config import AlignConfig
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.memory import recomputed
from alignprop_pipe.records import PromptBatch, Rollout
from alignprop_pipe.truncation import graded_steps

Forward = Callable[..., Any]


@contextmanager
def autograd_on() -> Iterator[None]:
    """Gradient on inside, also where the caller switched it off or into inference mode (as ComfyUI does)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(slots=True)
class StepClock:
    """Counts scheduler steps; the first denoiser call asks it how many there will be and which are graded."""

    pipe: DiffusionPipeline
    config: AlignConfig
    generator: torch.Generator
    step: int = 0
    num_steps: int | None = None
    graded: range = range(0)
    distances: list[Tensor] = field(default_factory=list)

    def start(self) -> None:
        """Fix T and draw K, once for the trajectory."""
        if self.num_steps is None:
            announced = getattr(self.pipe, "_num_timesteps", None)
            timesteps = len(stock.scheduler(self.pipe).timesteps)
            begin = getattr(stock.scheduler(self.pipe), "begin_index", None) or 0
            num_steps = int(announced or timesteps - begin)
            self.num_steps, self.graded = num_steps, graded_steps(self.config.truncation, num_steps, self.generator)

    def finish(self) -> None:
        """Raises PipelineError if the steps that were taken are not those that the cut was made for."""
        if self.step != self.num_steps:
            raise PipelineError(
                f"{type(self.pipe).__name__} announced {self.num_steps} denoising steps and took {self.step}: "
                "the last steps cannot be told apart. Try another scheduler or num_inference_steps"
            )


def rollout(
    pipe: DiffusionPipeline,
    batch: PromptBatch,
    config: AlignConfig,
    generators: Sequence[torch.Generator],
    truncation_generator: torch.Generator,
    **call_kwargs: Any,
) -> Rollout:
    """Render `batch` with the stock call, keeping the graph of the graded steps (AlignProp, section 3.2).

    `generators` are one per picture; `call_kwargs` are further arguments of this pipeline. The pictures equal the
    stock call's, bit for bit. `distance` is the mean squared change of the noise prediction by the adapter at
    graded steps, where `config.distance_weight` asks for it. Raises PipelineError.
    """
    clock = StepClock(pipe, config, truncation_generator)
    arguments = stock.call_arguments(pipe, batch.prompts, config.sampling, generators, call_kwargs)
    call = inspect.unwrap(type(pipe).__call__)
    with autograd_on(), _wrapped(pipe, clock), _quiet(pipe):
        images = call(pipe, **arguments)[0]
    clock.finish()
    distance = torch.stack(clock.distances).mean() if clock.distances else None
    return Rollout(_pictures(images), clock.graded, clock.step, distance)


def _pictures(output: Any) -> Tensor:
    images = torch.stack(list(output)) if isinstance(output, list | tuple) else output
    if not isinstance(images, Tensor):
        raise PipelineError(f"the pipeline returned {type(images).__name__} for output_type='pt'; a tensor is needed")
    return images


# --- what is put round the stock parts, and taken off again ---


@contextmanager
def _wrapped(pipe: DiffusionPipeline, clock: StepClock) -> Iterator[None]:
    announced = pipe.__dict__.pop("_num_timesteps", None)
    with ExitStack() as stack:
        scheduler = stock.scheduler(pipe)
        stack.enter_context(_replaced(scheduler, "step", _counted(scheduler.step, clock)))
        denoisers = stock.denoisers(pipe)
        for name, network in stock.called_each_step(pipe).items():
            graded = _graded if name in denoisers else _graded_helper
            stack.enter_context(_replaced(network, "forward", graded(network, clock)))
        decoder = stock.decoder(pipe)
        if decoder is not None:
            stack.enter_context(_replaced(decoder, "decode", _checkpointed_decode(decoder)))
        try:
            yield
        finally:
            if announced is not None:
                pipe._num_timesteps = announced


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute and put back what was there, or nothing where there was nothing."""
    absent = object()
    before = vars(owner).get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """No progress bar of the stock pipeline: the edges draw their own."""
    settings = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    with _replaced(pipe, "_progress_bar_config", settings):
        yield


def _counted(step: Forward, clock: StepClock) -> Forward:
    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        clock.start()
        result = step(*args, **kwargs)
        clock.step += 1
        return result

    return call


def _graded(denoiser: nn.Module, clock: StepClock) -> Forward:
    forward, helper = denoiser.forward, _graded_helper(denoiser, clock)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        clock.start()
        output = helper(*args, **kwargs)
        if clock.step in clock.graded and clock.config.distance_weight > 0:
            clock.distances.append(_distance_to_base(denoiser, forward, output, args, kwargs))
        return output

    return call


def _graded_helper(network: nn.Module, clock: StepClock) -> Forward:
    """Without a graph before the cut. Before the first denoiser call nothing can carry gradient, so the same there."""
    forward = network.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if clock.step not in clock.graded:
            with torch.set_grad_enabled(False):
                return forward(*args, **kwargs)
        if recomputed(clock.config.checkpointing, clock.step, clock.graded):
            # The reentrant kind gives no gradient to LoRA: its inputs carry none at the first graded step.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return call


def _distance_to_base(
    denoiser: nn.Module, forward: Forward, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    with torch.set_grad_enabled(False), lora.adapter_off(denoiser):
        base = forward(*args, **kwargs)
    return mse_loss(output[0].float(), base[0].float())


class _Decoding(nn.Module):
    """`decode` as a forward, so that it can run with weights of another precision."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.call: Forward = decoder.decode  # type: ignore[assignment]  # a method, though modules hide its type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _checkpointed_decode(decoder: nn.Module) -> Forward:
    """Recomputed in the backward pass, which comes after the stock call has cast its decoder down again.

    So the weights are cast on the way in, each time; the decoder itself stays as it is.
    """
    dtype, decoding = stock.decoding_dtype(decoder), _Decoding(decoder)

    def in_dtype(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        floats = {name: p for name, p in decoding.named_parameters() if p.is_floating_point() and p.dtype != dtype}
        weights = {name: parameter.to(dtype) for name, parameter in floats.items()}
        return functional_call(decoding, weights, (latents, *args), kwargs)

    @functools.wraps(decoding.call)
    def call(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        latents = latents.to(dtype)
        if not latents.requires_grad:
            return in_dtype(latents, *args, **kwargs)
        return checkpoint(in_dtype, latents, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
