"""The call of the stock pipeline: its arguments, its pictures in [0, 1], and the words that it does not read."""

import copy
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.diffusion import pipeline_parts
from alignprop_pipe.diffusion.patching import wrapped
from alignprop_pipe.errors import PipelineError

logger = logging.getLogger(__name__)


def call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The arguments that the stock `__call__` takes. Raises PipelineError where a prompt is not among them."""
    taken = inspect.signature(type(pipe).__call__).parameters
    missing = [name for name in ("prompt", "output_type") if name not in taken]
    if missing:
        lacking = " and no ".join(missing)
        raise PipelineError(
            f"{type(pipe).__name__} takes no {lacking}: it cannot be aligned to prompts. Load the model as a "
            "text-to-image or text-to-video pipeline, for example with diffusers' AutoPipelineForText2Image"
        )
    return taken


def call_arguments(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: SamplingOptions,
    generators: Sequence[torch.Generator],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments for the stock `__call__`, leaving out what this pipeline does not take or what was not set.

    `extra` holds arguments of this pipeline alone (`image`, `strength`, `num_frames`, ...); a None in it is handed on,
    since it may stand for something else than the argument's default. One prompt goes in as a text with its generator,
    not as a list of one: every pipeline takes it so, and some nothing else.
    """
    usual = {
        "prompt": _one_or_list(prompts),
        "negative_prompt": _one_or_list([sampling.negative_prompt or ""] * len(prompts)),
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "eta": sampling.eta,
        "height": sampling.height,
        "width": sampling.width,
        "generator": _one_or_list(generators),
        "output_type": "pt",
    }
    if not sampling.negative_prompt:
        del usual["negative_prompt"]
    wanted = {**{name: value for name, value in usual.items() if value is not None}, **(extra or {})}
    taken = call_parameters(pipe)
    # Some pipelines write into the lists that they are given, such as a chat template into each prompt.
    given = {name: value for name, value in wanted.items() if name in taken}
    return {name: copy.copy(value) if type(value) in (list, dict) else value for name, value in given.items()}


def _one_or_list(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


_leaving_torch: WeakSet[DiffusionPipeline] = WeakSet()
"""Pipelines that turn their pictures into NumPy arrays, whatever they are asked for."""


class LeavesTorch(Exception):
    """The call ended at NumPy; the next one keeps the decoder's pictures, and goes through."""


def pictures(pipe: DiffusionPipeline, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Tensor:
    """Pictures [batch, 3, height, width] or videos [batch, frames, 3, height, width] in [0, 1] that `call` draws.

    `call` is the stock `__call__`, with its decorator or without. A few pipelines hand out the decoder's own output
    in [-1, 1] for output_type="pt"; it is brought to [0, 1] as they do for PIL. Pictures with an alpha channel are
    put on white, where people mostly see them. Where the last step or the decoder made
    infinities, all pictures are NaN: clamped, they would be white or black as if nothing had happened. Raises
    PipelineError.
    """
    with _watched(pipe) as last:
        output = _output(pipe, call, arguments, last)
    images = _laid_out(_stacked(_as_the_decoder_made(output, last)), arguments)
    if not isinstance(images, Tensor) or images.ndim not in (4, 5) or images.shape[-3] not in (3, 4):
        kind = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(output).__name__
        raise PipelineError(
            f"{type(pipe).__name__} returned {kind} for output_type='pt'; pictures [batch, 3, height, width] or videos "
            "[batch, frames, 3, height, width] are needed. Load a text-to-image or text-to-video pipeline"
        )
    if len(images) != _pictures_asked(arguments):
        raise PipelineError(
            f"{type(pipe).__name__} drew {len(images)} for {_pictures_asked(arguments)} prompts: to it, several "
            "prompts are the parts of one video. Give it one prompt at a time, with batch_size=1"
        )
    images = (images / 2 + 0.5 if _is_raw(images, last) else images).clamp(0, 1)
    if images.shape[-3] == 4:
        colours, alpha = images.split([3, 1], dim=-3)
        images = colours * alpha + (1 - alpha)
    return images if all(part.detach().isfinite().all() for part in last.values()) else images * math.nan


def _output(
    pipe: DiffusionPipeline, call: Callable[..., Any], arguments: Mapping[str, Any], last: Mapping[str, Any]
) -> Any:
    """What the call returns first; the errors that tell of a wrong argument or of NumPy become PipelineError."""
    name = type(pipe).__name__
    try:
        return call(pipe, **arguments)[0]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        if "step" in last:
            raise
        raise PipelineError(
            f"{name} stopped before its first denoising step with {type(error).__name__}: {error}. "
            f"Arguments of this pipeline alone are given by name; it takes {', '.join(_own_arguments(pipe))}"
        ) from error
    except Exception as error:
        if re.search(r"\bpt\b|output_type", str(error)):
            raise PipelineError(
                f"{name} cannot hand out tensors, with output_type='pt': {error}. It can draw but not be aligned; a "
                "newer pipeline class for the same model may do better"
            ) from error
        if "numpy() on Tensor that requires grad" not in str(error):
            raise
        if pipe not in _leaving_torch:
            _leaving_torch.add(pipe)
            raise LeavesTorch(name) from error
        raise PipelineError(
            f"{name} turns its pictures into NumPy arrays, where gradients end, also for output_type='pt': "
            "it can draw but not be aligned; a newer pipeline class for the same model may do better"
        ) from error


def _as_the_decoder_made(output: Any, last: Mapping[str, Tensor]) -> Any:
    """Pictures that come in an array, with the gradient that they had before, where they are the decoder's own."""
    if not isinstance(output, np.ndarray):
        return output
    shown, made = torch.from_numpy(output).movedim(-1, -3), last.get("decode")
    if made is not None and made.numel() == shown.numel():
        made = (made / 2 + 0.5).clamp(0, 1).reshape(shown.shape)
        if torch.equal(made.detach().to(shown.dtype), shown):
            return made
    return shown


def _laid_out(images: Any, arguments: Mapping[str, Any]) -> Any:
    """A video as [batch, frames, 3, height, width], where a pipeline has another order or leaves the batch out."""
    if isinstance(images, Tensor) and images.ndim == 5 and images.shape[1] == 3 != images.shape[2]:
        return images.transpose(1, 2)
    is_batch = isinstance(images, Tensor) and images.ndim == 4 and len(images) != _pictures_asked(arguments)
    return images[None] if is_batch and _pictures_asked(arguments) == 1 else images


def _pictures_asked(arguments: Mapping[str, Any]) -> int:
    prompts = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    return prompts * (arguments.get("num_images_per_prompt") or 1)


def _stacked(output: Any) -> Any:
    is_list = isinstance(output, list | tuple) and output and all(isinstance(part, Tensor) for part in output)
    return torch.stack(list(output)) if is_list else output


@contextmanager
def _watched(pipe: DiffusionPipeline) -> Iterator[dict[str, Tensor]]:
    """The last output of the scheduler's `step` and of the decoder's `decode`, by these names.

    A pipeline that leaves torch gets from `decode` what has no gradient any more.
    """
    last: dict[str, Tensor] = {}

    def remembering(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            last[name] = output if isinstance(output, Tensor) else output[0]
            return tree_map(_detached, output) if name == "decode" and pipe in _leaving_torch else output

        return call

    with ExitStack() as stack:
        for owner, name in ((pipeline_parts.scheduler(pipe), "step"), (pipeline_parts.decoder(pipe), "decode")):
            if owner is not None:
                stack.enter_context(wrapped(owner, name, functools.partial(remembering, name)))
        yield last


def _is_raw(images: Tensor, last: Mapping[str, Any]) -> bool:
    """Whether pictures are in [-1, 1], as a network made them.

    Their values alone would not tell: one pixel just below 0 is an overshoot.
    """
    for part in last.values():
        if isinstance(part, Tensor):
            if images.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
                return True
            if images.shape == part.shape:
                made, shown = part.detach().float(), images.detach().float()
                if torch.equal(made, shown):
                    return True
                if torch.allclose((made / 2 + 0.5).clamp(0, 1), shown.clamp(0, 1), atol=1e-2):
                    return False
    return bool((images.detach() < -0.05).float().mean() > 0.01)


def _own_arguments(pipe: DiffusionPipeline) -> list[str]:
    """The arguments of the call that tell this pipeline from others, for messages."""
    usual = ("self", "generator", "output_type", "return_dict", "callback", "prompt", "num_inference", "guidance_scale")
    taken = [name for name in call_parameters(pipe) if "embeds" not in name and "_mask" not in name]
    return [name for name in taken if not name.removeprefix("negative_").startswith(usual)]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def lost_words(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that no tokenizer of this pipeline takes, or an empty text."""
    lost = []
    for part in pipe.components.values():
        if isinstance(part, PreTrainedTokenizerBase):
            tokens = part(prompt, truncation=False, verbose=False).input_ids
            kept = part.model_max_length - 1  # the end token takes the last place
            lost.append(part.decode(tokens[kept:], skip_special_tokens=True) if len(tokens) > kept + 1 else "")
    return min(lost, key=len, default="").strip()


def tell_lost_words(pipe: DiffusionPipeline, prompts: Sequence[str]) -> None:
    """Say how many prompts are longer than the pipeline reads, and what is lost of the first."""
    lost = {prompt: words for prompt in prompts if (words := lost_words(pipe, prompt))}
    if lost:
        prompt, words = next(iter(lost.items()))
        logger.warning(
            "%d of %d prompts are longer than the tokenizer takes; of %r these words are lost: %r",
            len(lost),
            len(prompts),
            prompt,
            words,
        )
