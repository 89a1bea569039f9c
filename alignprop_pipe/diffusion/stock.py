"""What a stock diffusers pipeline is made of, found by structure: denoisers, decoder, scheduler, guards.

No family is named here. A denoiser is a network of diffusers that is told the timestep and that pipelines load LoRAs
into; the decoder is the one that decodes. `pictures` makes the call.
`frozen_for_training` puts a pipeline into the state that a rollout and its backward pass need, and gives everything
back as it was.
"""

import copy
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.errors import PipelineError

logger = logging.getLogger(__name__)

GUARDS = ("safety_checker", "watermark")
"""Attributes of stock pipelines that look at finished pictures outside torch, and so cut the gradient."""


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The neural networks of a pipeline by their names in it."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that predict noise: one, or two where a pipeline splits its timesteps between them.

    Raises PipelineError if there is none, or if something else is wrapped round one.
    """
    painter = painting(pipe)
    listed = getattr(painter, "_lora_loadable_modules", ())  # not every pipeline has the list
    found = {}
    for name, part in components(painter).items():
        inner = getattr(part, "_orig_mod", part)
        is_named = name in listed or name.startswith(("unet", "transformer"))
        is_chosen = is_named or (not listed and isinstance(inner, PeftAdapterMixin))
        if is_chosen and _is_told_the_time(inner):
            found[name] = part
        elif is_named and (path := _path_of_wrapped(part)):
            merging = ", or to put the adapters of PEFT into the weights, merge_and_unload()"
            raise PipelineError(
                f"{name} is a {type(part).__name__} round the network: set pipe.{name} = pipe.{name}.{path}"
                + merging * hasattr(part, "merge_and_unload")
            )
    if not found:  # nothing is named as one, nor made for LoRAs; PEFT can put one on any network
        found = {name: part for name, part in components(painter).items() if _is_told_the_time(part)}
    if not found:
        names = ", ".join(f"{name} ({type(part).__name__})" for name, part in components(pipe).items()) or "none"
        raise PipelineError(
            f"{type(pipe).__name__} has no denoiser that can take a LoRA; its networks are: {names}. "
            "Load a text-to-image or text-to-video pipeline, for example AlignPropPipeline.from_pretrained('emoji')"
        )
    return found


def painting(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that denoises the pictures: `pipe`, or, where a prior comes first, the one in it with its scheduler.

    Both give the networks the same names.
    """
    return next((part for part in inner(pipe) if getattr(part, "scheduler", None) is scheduler(pipe)), pipe)


def inner(pipe: DiffusionPipeline) -> list[DiffusionPipeline]:
    """The pipelines that this one calls."""
    return [part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline)]


def called_each_step(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoisers, and every other network that is told the timestep, such as a ControlNet."""
    return {name: part for name, part in components(pipe).items() if _is_told_the_time(part)} | denoisers(pipe)


def _is_told_the_time(part: Any) -> bool:
    taken = inspect.signature(type(part).forward).parameters
    is_told = any(name in ("t", "r") or "timestep" in name for name in taken)  # r: the share of noise that is left
    return is_told and isinstance(part, ModelMixin) and not hasattr(part, "decode")


def _path_of_wrapped(part: nn.Module) -> str:
    """Where in a PeftModel, a DataParallel and the like the network is; empty in one of diffusers."""
    found = () if isinstance(part, ModelMixin) else part.named_modules()
    return next((path for path, module in found if _is_told_the_time(module)), "")


def refuse_inference_weights(pipe: DiffusionPipeline) -> None:
    """Raises PipelineError for weights that were made under torch.inference_mode(): autograd cannot keep them."""
    for name, part in components(pipe).items():
        if any(parameter.is_inference() for parameter in part.parameters()):
            raise PipelineError(
                f"{name} was loaded under torch.inference_mode(), and no gradient goes through such weights: load the "
                "pipeline with AlignPropPipeline.from_pretrained(...), or under torch.inference_mode(False)"
            )


def decoder(pipe: DiffusionPipeline) -> nn.Module | None:
    """The network that turns latents into pixels, or None for a pipeline that denoises pixels."""
    parts = (getattr(part, "_orig_mod", part) for part in components(pipe).values())  # decode is never compiled with it
    return next((part for part in parts if callable(getattr(part, "decode", None))), None)


def scheduler(pipe: DiffusionPipeline) -> Any:
    """The scheduler whose `step` counts the denoising steps. Raises PipelineError if there is none."""
    found = getattr(pipe, "scheduler", None)
    if found is None or not callable(getattr(found, "step", None)):
        others = [name for name, part in pipe.components.items() if callable(getattr(part, "step", None))]
        way_out = f"it steps {', '.join(others)} instead" if others else "set pipe.scheduler first"
        raise PipelineError(f"{type(pipe).__name__} has no scheduler with a step(); {way_out}")
    return found


def device_of(pipe: DiffusionPipeline) -> torch.device:
    """Where the denoiser is."""
    return next(next(iter(denoisers(pipe).values())).parameters()).device


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


# --- the call ---

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
        for owner, name in ((scheduler(pipe), "step"), (decoder(pipe), "decode")):
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


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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
def wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`wrap(method)` in the place of a method of this object, and of deep copies that are made of it inside."""
    with replaced(owner, name, _Wrapped(owner, getattr(owner, name), wrap)):
        yield


class _Wrapped:
    """A method that follows its object into deep copies.

    A pipeline may step a deep copy of its scheduler, for each frame or for the sound: the copy's method acts on the
    copy. Or it may copy the scheduler's attributes and write them back: then it stays the method of that scheduler.
    """

    def __init__(self, owner: Any, method: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        functools.update_wrapper(self, method, updated=())
        self.owner, self.method, self.wrap, self.call = owner, method, wrap, wrap(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Wrapped":
        owner = memo.get(id(self.owner))
        if owner is None:
            return self
        is_bound = getattr(self.method, "__self__", None) is self.owner
        method = MethodType(self.method.__func__, owner) if is_bound else copy.deepcopy(self.method, memo)
        return _Wrapped(owner, method, self.wrap)


PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a configuration's `mixed_precision` stands for."""


@contextmanager
def mixed_precision(pipe: DiffusionPipeline, name: str) -> Iterator[None]:
    """Inside, the denoisers (and networks called beside them, such as a ControlNet) compute under autocast.

    The text encoders and the decoder stay as they are, since a decoder may overflow in float16. What the denoisers
    return has the number format that it has without autocast. `name` is a key of `PRECISIONS`.
    """
    dtype = PRECISIONS[name]
    with ExitStack() as stack:
        for network in called_each_step(pipe).values() if dtype is not None else ():
            stack.enter_context(replaced(network, "forward", _autocast(network, dtype)))
        yield


def _autocast(network: nn.Module, dtype: torch.dtype | None) -> Callable[..., Any]:
    forward = network.forward
    first = next(network.parameters())

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, dtype):
            output = forward(*args, **kwargs)
        return tree_map(lambda leaf: leaf.to(first.dtype) if _is_float(leaf) else leaf, output)

    return call


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def is_half(pipe: DiffusionPipeline) -> bool:
    """Whether a denoiser computes in float16, whose small gradients need loss scaling."""
    return any(next(part.parameters()).dtype == torch.float16 for part in denoisers(pipe).values())


# --- the state that training needs ---


@contextmanager
def frozen_for_training(
    pipe: DiffusionPipeline, trainable: Sequence[nn.Parameter] = (), others: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Eval mode, gradient to `trainable` alone, guards off; all undone on leaving. `others` are frozen too."""
    with ExitStack() as stack:
        for part in (*components(pipe).values(), *others):
            stack.enter_context(frozen(part))
        for parameter in trainable:
            parameter.requires_grad_(True)
        stack.enter_context(guards_off(pipe))
        stack.callback(lambda: [parameter.requires_grad_(False) for parameter in trainable])
        yield


@contextmanager
def frozen(part: nn.Module) -> Iterator[None]:
    """Eval mode inside, and no parameter wants a gradient."""
    training = [(module, module.training) for module in part.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, was in required:
            parameter.requires_grad_(was)


def decoding_dtype(network: nn.Module) -> torch.dtype:
    """float32 for a float16 decoder that says `force_upcast`, since it overflows otherwise; else its own."""
    own = next(network.parameters()).dtype
    upcast = own == torch.float16 and getattr(getattr(network, "config", None), "force_upcast", False)
    return torch.float32 if upcast else own


def guards_on(pipe: DiffusionPipeline) -> list[str]:
    """The names of the guards that are switched on."""
    return [name for name in GUARDS if getattr(pipe, name, None) is not None]


@contextmanager
def guards_off(pipe: DiffusionPipeline) -> Iterator[None]:
    """No safety checker and no watermark inside."""
    own = vars(pipe)  # setattr would also forget the guard's class in pipe.config, and save_pretrained then the guard
    kept = {name: own[name] for name in guards_on(pipe) if name in own}
    try:
        own.update(dict.fromkeys(kept))
        yield
    finally:
        own.update(kept)


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
