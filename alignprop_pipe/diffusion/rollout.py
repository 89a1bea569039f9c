"""The stock pipeline as a differentiable program: prompts -> finished pictures with a graph to the adapter.

There is no sampling loop here. `inspect.unwrap` takes the `no_grad` decorator off the stock
`__call__`; the denoisers' `forward` is wrapped so that steps before the cut run without a graph and graded steps
are checkpointed; the scheduler's `step` is the clock. This file alone switches autograd on and off.
"""

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from alignprop_pipe.config.choices import RecomputeNone
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, patching, pipeline_call, pipeline_parts
from alignprop_pipe.diffusion.checkpointing import recomputed
from alignprop_pipe.diffusion.clock import StepClock, announced_steps, steps_of_call, told_timestep
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.records import PromptBatch, Rollout
from alignprop_pipe.seeds import SeededDraws

Forward = Callable[..., Any]
Made = TypeVar("Made")


@contextmanager
def autograd_on() -> Iterator[None]:
    """Gradient on inside, also where the caller switched it off or into inference mode (as ComfyUI does)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


_counted_steps: WeakKeyDictionary[DiffusionPipeline, dict[int, int]] = WeakKeyDictionary()
"""How many steps a pipeline took where it had announced another number."""


_writing: WeakSet[DiffusionPipeline] = WeakSet()
"""Pipelines whose own code writes into tensors that the gradient needs."""


def with_backward(pipe: DiffusionPipeline, attempt: Callable[[], Made]) -> Made:
    """`attempt`: a rollout of `pipe` and its backward pass, which changes nothing if it fails.

    Some pipelines put the next latents, or a sum over parts of the picture, where the last were. Autograd refuses the
    backward pass then, so the attempt is made again with copies of what is overwritten, and without recomputation; the
    next one does so at once. Raises PipelineError where that does not help.
    """
    try:
        with torch.autograd.graph.allow_mutation_on_saved_tensors() if pipe in _writing else nullcontext():
            return attempt()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        if pipe in _writing:
            raise PipelineError(
                f"{type(pipe).__name__} writes into tensors that the gradient needs, in its own code: it can draw but "
                "not be aligned. Align the same model in another pipeline class, if diffusers has one"
            ) from error
    _writing.add(pipe)
    return with_backward(pipe, attempt)


@dataclass(slots=True)
class Trajectory:
    """One call of the stock pipeline with gradient: at which step it is, and which steps carry gradient."""

    pipe: DiffusionPipeline
    config: AlignConfig
    generator: torch.Generator
    clock: StepClock = field(default_factory=StepClock)
    announced: int | None = None
    num_steps: int = 0
    graded: range = range(0)
    distances: list[Tensor] = field(default_factory=list)
    carries_gradient: bool = False
    norms_at_end: Tensor | None = None

    @property
    def step(self) -> int:
        return self.clock.step

    def called(self, told: float | None = None) -> None:
        """A denoiser is called, or another network of each step. The first call fixes T and draws K, once for all."""
        self.clock.end_step()
        if self.announced is None:
            self.announced = steps_of_call(self.pipe, pipeline_parts.scheduler(self.pipe), told)
            self.num_steps = _counted_steps.get(self.pipe, {}).get(self.announced, self.announced)
            self.graded = self.config.truncation.plan(self.num_steps, self.generator)

    def stepped(self, latents: Tensor) -> None:
        """The scheduler, or a copy of it, has made `latents` of what the denoiser said."""
        self.clock.scheduler_stepped()
        self.carries_gradient = latents.requires_grad
        if (growth := self.config.optimizer.max_grad_growth) is not None and latents.requires_grad:
            latents.register_hook(functools.partial(self.limited, growth))

    def limited(self, growth: float, gradient: Tensor) -> Tensor:
        """The gradient of some step's latents, for each picture at most `growth` times that of the last ones.

        The backward pass comes to the finished latents first; where these pull at nothing, nothing is limited.
        """
        norms = torch.linalg.vector_norm(
            gradient, dim=tuple(range(1, gradient.ndim)), dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        at_end = self.norms_at_end
        if at_end is None or at_end.shape != norms.shape:
            at_end = self.norms_at_end = norms
        limits = growth * at_end
        scales = torch.where((norms > limits) & (limits > 0), limits / norms, 1.0)
        return gradient * scales.to(gradient).view(-1, *[1] * (gradient.ndim - 1))

    @property
    def was_right(self) -> bool:
        """Whether the steps that were taken are those that the cut was made for; if not, it is remembered."""
        if self.announced is not None and self.step not in (0, self.num_steps):
            _counted_steps.setdefault(self.pipe, {})[self.announced] = self.step
        return self.step == self.num_steps


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
    if pipe in _writing:
        config = config.replace(checkpointing=RecomputeNone())
    denoiser = next(iter(pipeline_parts.denoisers(pipe).values()))
    called = _with_the_same_draws(denoiser, functools.partial(_called, pipe, batch, config))
    try:
        trajectory, images = called(generators, truncation_generator, call_kwargs)
    except pipeline_call.LeavesTorch:
        trajectory, images = called(generators, truncation_generator, call_kwargs)
    if not trajectory.was_right:  # not every pipeline says how many steps it takes: now it is known
        trajectory, images = called(generators, truncation_generator, call_kwargs)
    if not trajectory.was_right:
        raise PipelineError(
            f"{type(pipe).__name__} took {trajectory.step} denoising steps where {trajectory.num_steps} were "
            "expected, and another number before: which steps are the last cannot be told. Try another scheduler or "
            "num_inference_steps"
        )
    if not images.requires_grad:
        place = "after its last denoising step" if trajectory.carries_gradient else "in its denoising loop"
        raise PipelineError(
            f"{type(pipe).__name__} loses the gradient {place} (a no_grad, detach or NumPy inside): its pictures "
            "tell the adapter nothing. Align the same model in another pipeline class, if diffusers has one"
        )
    distance = torch.stack(trajectory.distances).mean() if trajectory.distances else None
    return Rollout(images, trajectory.graded, trajectory.step, distance)


def _called(
    pipe: DiffusionPipeline,
    batch: PromptBatch,
    config: AlignConfig,
    generators: Sequence[torch.Generator],
    truncation_generator: torch.Generator,
    call_kwargs: Mapping[str, Any],
) -> tuple[Trajectory, Tensor]:
    """The stock call, once; where it failed or its steps were not those expected, the generators are as before."""
    trajectory = Trajectory(pipe, config, truncation_generator)
    arguments = pipeline_call.call_arguments(pipe, batch.prompts, config.sampling, generators, call_kwargs)
    call = inspect.unwrap(type(pipe).__call__)
    states = [(generator, generator.get_state()) for generator in (*generators, truncation_generator)]
    is_through = False
    try:
        with autograd_on(), _wrapped(pipe, trajectory), _quiet(pipe):
            images = pipeline_call.pictures(pipe, call, arguments)
        trajectory.clock.end_step()
        is_through = trajectory.was_right
        return trajectory, images
    finally:
        for generator, state in () if is_through else states:
            generator.set_state(state)


# --- what is put round the stock parts, and taken off again ---


@contextmanager
def _wrapped(pipe: DiffusionPipeline, trajectory: Trajectory) -> Iterator[None]:
    announced_steps(pipe)  # by an earlier call
    with ExitStack() as stack:
        for part in (pipe, *pipeline_parts.inner(pipe)):
            stack.enter_context(_undecorated(part))
        scheduler = pipeline_parts.scheduler(pipe)
        stack.enter_context(patching.wrapped(scheduler, "step", functools.partial(_counted, trajectory)))
        denoisers = pipeline_parts.denoisers(pipe)
        for name, network in pipeline_parts.called_each_step(pipe).items():
            graded = _graded if name in denoisers else _graded_helper
            stack.enter_context(patching.replaced(network, "forward", graded(network, trajectory)))
        decoder = pipeline_parts.decoder(pipe)
        if decoder is not None:
            stack.enter_context(patching.replaced(decoder, "decode", _checkpointed_decode(decoder)))
        yield


@contextmanager
def _undecorated(*owners: Any) -> Iterator[None]:
    """The `no_grad` decorator is off every method of these objects inside: pipelines, or modules of a network."""
    with ExitStack() as stack:
        for owner in owners:
            kind, bare = type(owner), _undecorated_class(type(owner))
            if bare is not None:
                stack.callback(setattr, owner, "__class__", kind)
                owner.__class__ = bare
        yield


@functools.cache
def _undecorated_class(kind: type) -> type | None:
    """A subclass without such decorators on what its call runs; None where there are none."""
    bare = {name: method.__wrapped__ for name, method in _run_by_call(kind).items() if _is_in_context(method)}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **bare}) if bare else None


def _run_by_call(kind: type) -> dict[str, Any]:
    """The methods that a call, or `decode`, comes by: those whose names stand in the code of one that it comes by."""
    static = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    roots = ("__call__",) if issubclass(kind, DiffusionPipeline) else ("forward", "decode")
    found: dict[str, Any] = {}
    waiting = [name for name in roots if name in static]
    while waiting:
        name = waiting.pop()
        found[name] = static[name]
        names = _names_in(getattr(inspect.unwrap(static[name]), "__code__", None)) if callable(static[name]) else ()
        waiting += [name for name in names if name in static and name not in found]
    return found


def _names_in(code: Any) -> set[str]:
    """The names that a piece of code looks up, in the functions inside it too."""
    inside = [constant for constant in getattr(code, "co_consts", ()) if hasattr(constant, "co_names")]
    return {*getattr(code, "co_names", ()), *(name for part in inside for name in _names_in(part))}


def _is_in_context(method: Any) -> bool:
    """Whether a function is one that torch's context managers make when they decorate."""
    code = getattr(method, "__code__", None)
    return code is not None and code.co_name == "decorate_context" and hasattr(method, "__wrapped__")


def _graph_throughout(network: nn.Module, forward: Forward) -> Forward:
    """`forward` with the decorators off the modules of `network`, also when it runs again in the backward pass."""
    decorated = [module for module in network.modules() if _undecorated_class(type(module)) is not None]
    if not decorated:
        return forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _undecorated(*decorated):
            return forward(*args, **kwargs)

    return call


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """No progress bar of the stock pipeline: the edges draw their own."""
    with ExitStack() as stack:
        for part in (pipe, *pipeline_parts.inner(pipe)):
            settings = {**getattr(part, "_progress_bar_config", {}), "disable": True}
            stack.enter_context(patching.replaced(part, "_progress_bar_config", settings))
        yield


def _counted(trajectory: Trajectory, step: Forward) -> Forward:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        trajectory.stepped(result[0])
        return result

    return call


def _graded(denoiser: nn.Module, trajectory: Trajectory) -> Forward:
    forward, helper = denoiser.forward, _graded_helper(denoiser, trajectory)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        trajectory.called(told_timestep(denoiser, args, kwargs))
        output = helper(*args, **kwargs)
        if trajectory.step in trajectory.graded and trajectory.config.distance_weight > 0:
            trajectory.distances.append(_distance_to_base(denoiser, forward, output, args, kwargs))
        return output

    return call


def _graded_helper(network: nn.Module, trajectory: Trajectory) -> Forward:
    """Without a graph before the cut. Before the first denoiser call nothing can carry gradient, so the same there."""
    forward = _graph_throughout(network, network.forward)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        trajectory.clock.end_step()
        if trajectory.step not in trajectory.graded:
            with torch.set_grad_enabled(False):
                return forward(*args, **kwargs)
        if recomputed(trajectory.config.checkpointing, trajectory.step, trajectory.graded) and _is_data((args, kwargs)):
            # The reentrant kind gives no gradient to LoRA: its inputs carry none at the first graded step.
            again = _as_of_now(network, forward, (args, kwargs))
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return call


def _is_data(arguments: Any) -> bool:
    """False where an object with a state of its own is among the arguments, such as a cache of keys and values.

    It is another one, or empty, by the time of the backward pass, so such a call is not recomputed.
    """
    plain = (Tensor, int, float, complex, str, np.ndarray, np.generic, torch.dtype, torch.device, type(None))
    return all(isinstance(leaf, plain) for leaf in tree_leaves(arguments))


def _as_of_now(network: nn.Module, forward: Forward, arguments: tuple[tuple, dict]) -> Forward:
    """`forward`, which a second time runs with the attention processors and the arguments of the first.

    A pipeline that perturbs attention puts its own processors in for the call and takes them out at its end; a UNet
    takes the residuals of a T2I-adapter out of the list that holds them.
    """
    processors = [(module, module.processor) for module in network.modules() if hasattr(module, "processor")]
    kept, runs, forward = _same_in_new_containers(arguments), 0, _with_the_same_draws(network, forward)
    versions = _versions(kept)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs > 1:
            args, kwargs = _same_in_new_containers(kept)
            if _versions(kept) != versions:
                raise RuntimeError("what the denoiser was given has been modified by an inplace operation")
        with ExitStack() as stack:
            for module, processor in processors:
                if module.processor is not processor:
                    stack.callback(_set_processor, module, module.processor)
                    _set_processor(module, processor)
            return forward(*args, **kwargs)

    return call


def _with_the_same_draws(network: nn.Module, forward: Forward) -> Forward:
    """`forward`, which a second time draws the random numbers of the first.

    A decoder may draw noise that nobody can give it a generator for. The process-wide generators, of torch, Python and
    NumPy, are set back only where `forward` draws from them itself.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    shared = _process_wide(device)
    draws, states, is_first = None, None, True

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal draws, states, is_first
        if is_first:
            is_first, entered = False, SeededDraws.entered()
            draws, before = entered and entered.from_here(), [read() for read, _ in shared]
            output = forward(*args, **kwargs)
            states = [
                state if _differ(state, read()) else None for state, (read, _) in zip(before, shared, strict=True)
            ]
            return output
        with ExitStack() as stack:
            if draws is not None:
                stack.enter_context(draws.from_here())
            for state, (read, write) in zip(states or (), shared, strict=False):
                if state is not None:
                    stack.callback(write, read())
                    write(state)
            return forward(*args, **kwargs)

    return call


def _process_wide(device: torch.device) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How to read and write the state of each generator that a network on `device` may share with the process."""
    numpy = np.random  # the generator that np.random.rand and the like draw from
    found = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    found.append((numpy.get_state, numpy.set_state))
    if device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        found.append((lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)))
    return found


def _differ(first: Any, second: Any) -> bool:
    return not all(map(np.array_equal, first, second)) if isinstance(first, tuple) else not torch.equal(first, second)


def _versions(arguments: Any) -> list[int]:
    """How often each tensor was written into; a pipeline may put the next latents in the place of the last."""
    return [leaf._version for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _same_in_new_containers(arguments: tuple[tuple, dict]) -> tuple[tuple, dict]:
    return tree_map(lambda leaf: leaf, arguments)


def _set_processor(module: nn.Module, processor: Any) -> None:
    del module.processor  # a processor may be a module or not; torch refuses one in the other's place
    module.processor = processor


def _distance_to_base(
    denoiser: nn.Module, forward: Forward, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    with torch.set_grad_enabled(False), lora.adapter_off(denoiser):
        base = forward(*args, **kwargs)
    # Some denoisers predict a list, one tensor for each picture.
    changes = zip(tree_leaves(output[0]), tree_leaves(base[0]), strict=True)
    return torch.stack([mse_loss(ours.float(), theirs.float()) for ours, theirs in changes]).mean()


class _Decoding(nn.Module):
    """`decode` as a forward, so that it can run with weights of another precision."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.call = _graph_throughout(decoder, decoder.decode)  # type: ignore[arg-type]  # modules hide its type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _checkpointed_decode(decoder: nn.Module) -> Forward:
    """Recomputed in the backward pass, which comes after the stock call has cast its decoder down again.

    So the weights are cast on the way in, each time; the decoder itself stays as it is.
    """
    dtype, decoding = pipeline_parts.decoding_dtype(decoder), _Decoding(decoder)

    def in_dtype(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        floats = {name: p for name, p in decoding.named_parameters() if p.is_floating_point() and p.dtype != dtype}
        weights = {name: parameter.to(dtype) for name, parameter in floats.items()}
        return functional_call(decoding, weights, (latents, *args), kwargs)

    @functools.wraps(decoding.call)
    def call(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        latents = latents.to(dtype)
        if not latents.requires_grad:
            return in_dtype(latents, *args, **kwargs)
        again = _with_the_same_draws(decoder, in_dtype)
        return checkpoint(again, latents, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
