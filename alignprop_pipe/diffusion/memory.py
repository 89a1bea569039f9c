"""Whether a run fits into the memory that is there: told before it starts, since a kernel that kills says nothing.

The pipeline draws one picture at two small sizes; what its networks keep there is carried on in a straight line to the
size that was asked for. Attention may grow faster, and much else needs memory too: so this is the least that is
needed, and a run that is refused could not have ended well. Nothing is drawn where simple arithmetic says enough.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from alignprop_pipe.config.choices import KeepSteps, RecomputeNone
from alignprop_pipe.config.settings import AlignConfig, SamplingOptions
from alignprop_pipe.diffusion import patching, pipeline_call, pipeline_parts
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.seeds import SeededDraws, generator_for

SIZES = (64, 128)
"""Sides in pixels of the two pictures that are drawn."""

PLENTY = 32_000
"""Bytes a pixel that no pipeline needs with checkpointing; Stable Diffusion's decoder keeps about 20 000."""

FRAMES = 9
"""Frames of the two small videos at most; their number has a form that video pipelines take."""

LIMITS = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),)


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes of one picture: kept by one graded step and by the decoder for the backward pass, and by one operation."""

    denoiser: float
    decoder: float
    operation: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be drawn, and how many graded steps keep their activations; None: no gradient."""

    height: int
    width: int
    batch: int
    steps_kept: int | None


def check_training(pipe: DiffusionPipeline, config: AlignConfig, call_kwargs: Mapping[str, Any], held_out: int) -> None:
    """Raises ConfigError if a batch of the training, or of the evidence, cannot fit; says what would."""
    graded = config.truncation.most(config.sampling.num_inference_steps)
    match config.checkpointing:
        case RecomputeNone():
            kept = graded
        case KeepSteps(steps):
            kept = min(graded, steps)
        case _:
            kept = 0
    looked_at = min(config.evaluation.eval_batch_size, held_out)
    _check(pipe, config.sampling, call_kwargs, "batch_size", config.batch_size, kept)
    if looked_at:
        _check(pipe, config.sampling, call_kwargs, "eval_batch_size", looked_at, None)


def check_drawing(
    pipe: DiffusionPipeline, sampling: SamplingOptions, call_kwargs: Mapping[str, Any], batch: int
) -> None:
    """Raises ConfigError if `batch` pictures cannot be drawn at once; says what would fit."""
    _check(pipe, sampling, call_kwargs, "batch_size", batch, None)


def available(device: torch.device) -> float:
    """Bytes that are free on a device; on the CPU with the swap, and not above the limit of a container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for limit, used in LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit here, or "max"
            continue
    return free


# --- inside ----------------------------------------------------------------------------------------------------------


def _check(
    pipe: DiffusionPipeline,
    sampling: SamplingOptions,
    call_kwargs: Mapping[str, Any],
    name: str,
    batch: int,
    kept: int | None,
) -> None:
    height, width = _size(pipe, sampling)
    asked = Asked(height, width, batch, kept)
    there, frames = available(pipeline_parts.device_of(pipe)), _frames(call_kwargs)
    if height * width * batch * frames * PLENTY * (1 + (kept or 0)) < there:
        return
    line = _line(pipe, sampling, call_kwargs)
    if line is None or (needed := _needed(line, asked, frames)) <= there:
        return
    side = next(
        (s for s in range(64 * 512, 0, -64) if _needed(line, replace(asked, height=s, width=s), frames) <= there), 0
    )
    fewer = int(batch * there / needed)
    fits = [f"{side}x{side} at this number"] * (side > 0) + [f"{name}={fewer} at this size"] * (fewer > 0)
    raise ConfigError(
        f"height={height}, width={width}, {name}={batch}: at least {_gb(needed)} of memory are needed, and "
        f"{_gb(there)} are there. What would fit: {' or '.join(fits) or 'nothing on this machine'}"
        + (", or fewer steps that keep their activations (checkpointing='all')" if kept else "")
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _needed(line: Callable[[int], Use], asked: Asked, frames: float) -> float:
    use = line(asked.height * asked.width)
    if asked.steps_kept is None:
        return asked.batch * frames * use.operation
    backward = use.decoder + asked.steps_kept * use.denoiser
    return asked.batch * frames * max(backward, use.denoiser, use.operation)


def _size(pipe: DiffusionPipeline, sampling: SamplingOptions) -> tuple[int, int]:
    """What was asked for; else the pipeline's own size, as far as its configuration says it."""
    config: Any = getattr(next(iter(pipeline_parts.denoisers(pipe).values())), "config", {})
    latent, factor = config.get("sample_size"), getattr(pipe, "vae_scale_factor", 8)
    usual = latent * factor if isinstance(latent, int) and isinstance(factor, int) else 512
    return sampling.height or usual, sampling.width or usual


def _frames(call_kwargs: Mapping[str, Any]) -> float:
    """How many times as many frames are asked for as the small videos have."""
    asked = call_kwargs.get("num_frames")
    return asked / FRAMES if isinstance(asked, int) and asked > FRAMES else 1.0


def _line(
    pipe: DiffusionPipeline, sampling: SamplingOptions, call_kwargs: Mapping[str, Any]
) -> Callable[[int], Use] | None:
    """Pixels -> the least that one picture needs; None for a pipeline that draws no such small ones."""
    if not {"height", "width"} <= set(pipeline_call.call_parameters(pipe)):
        return None
    given = {**call_kwargs, **({"num_frames": FRAMES} if _frames(call_kwargs) > 1 else {})}
    try:
        small, large = (_measured(pipe, sampling, given, side) for side in SIZES)
    except Exception:  # whatever a pipeline says of a size that it does not take; the run itself will tell
        return None
    pixels = [side * side for side in SIZES]

    def carried_on(count: int) -> Use:
        share = (count - pixels[0]) / (pixels[1] - pixels[0])
        values = {}
        for name in Use.__slots__:
            first, second = getattr(small, name), getattr(large, name)
            values[name] = max(first + share * (second - first), 0.0)
        return Use(**values)

    return carried_on


def _measured(pipe: DiffusionPipeline, sampling: SamplingOptions, call_kwargs: Mapping[str, Any], side: int) -> Use:
    steps = sampling.num_inference_steps if {"sigmas", "timesteps"} & set(call_kwargs) else 2
    small = replace(sampling, height=side, width=side, num_inference_steps=steps)
    arguments = pipeline_call.call_arguments(pipe, ["a picture"], small, [generator_for("noise", 0)], call_kwargs)
    largest, kept = _Largest(), {"denoiser": 0, "decoder": 0}
    with (
        autograd_on(),
        _quiet(pipe),
        patching.frozen_for_training(pipe),
        _counting(pipe, kept),
        SeededDraws(0),
        largest,
    ):
        pipeline_call.pictures(pipe, type(pipe).__call__, arguments)  # pyright: ignore[reportAttributeAccessIssue]
    return Use(**kept, operation=largest.bytes)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    with ExitStack() as stack:
        for part in (pipe, *pipeline_parts.inner(pipe)):
            stack.enter_context(patching.replaced(part, "_progress_bar_config", {"disable": True}))
        yield


@contextmanager
def _counting(pipe: DiffusionPipeline, kept: dict[str, int]) -> Iterator[None]:
    """Inside, `kept` gets the bytes that one call of a denoiser and of the decoder would keep for its gradient."""
    weights = {p.untyped_storage().data_ptr() for p in pipeline_parts.parameters(pipe)}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    found[storage.data_ptr()] = storage.nbytes()
                return tensor

            with autograd_on(), saved_tensors_hooks(keep, lambda tensor: tensor):
                args, kwargs = tree_map(_with_gradient, (args, kwargs))
                output = forward(*args, **kwargs)
            kept[name] = max(kept[name], sum(found.values()))
            return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)

        return call

    decoder = pipeline_parts.decoder(pipe)
    with ExitStack() as stack:
        for network in pipeline_parts.denoisers(pipe).values():
            stack.enter_context(patching.replaced(network, "forward", counted("denoiser", network.forward)))
        if decoder is not None:
            stack.enter_context(patching.replaced(decoder, "decode", counted("decoder", decoder.decode)))  # type: ignore[arg-type]  # a method, though modules hide its type
        yield


def _with_gradient(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class _Largest(TorchDispatchMode):
    """The most bytes that the inputs and outputs of one operation fill."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        self.bytes = max(self.bytes, sum(storages.values()))
        return output
