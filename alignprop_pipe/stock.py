"""What a stock diffusers pipeline is made of, found by structure: denoisers, decoder, scheduler, guards.

No family is named here. A denoiser is a component that takes LoRA layers and does not decode; the decoder is the
component that does. `frozen_for_training` puts a pipeline into the state that a rollout and its backward pass
need, and gives everything back as it was.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignprop_pipe.config import SamplingOptions
from alignprop_pipe.errors import PipelineError

GUARDS = ("safety_checker", "watermark")
"""Attributes of stock pipelines that look at finished pictures outside torch, and so cut the gradient."""


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The neural networks of a pipeline by their names in it."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that predict noise: one, or two where a pipeline splits its timesteps between them.

    Raises PipelineError if there is none, or if one is compiled, quantised or offloaded.
    """
    named = getattr(pipe, "_lora_loadable_modules", None)
    found = {}
    for name, part in components(pipe).items():
        inner = getattr(part, "_orig_mod", part)
        is_denoiser = isinstance(inner, PeftAdapterMixin) and not hasattr(inner, "decode")
        if is_denoiser and (named is None or name in named or name.startswith("transformer")):
            _refuse_unusable(name, part)
            found[name] = part
    if not found:
        names = ", ".join(f"{name} ({type(part).__name__})" for name, part in components(pipe).items()) or "none"
        raise PipelineError(
            f"{type(pipe).__name__} has no denoiser that can take a LoRA; its networks are: {names}. "
            "Load a text-to-image or text-to-video pipeline, for example AlignPropPipeline.from_pretrained('emoji')"
        )
    return found


def _refuse_unusable(name: str, part: nn.Module) -> None:
    if hasattr(part, "_orig_mod"):
        raise PipelineError(f"{name} is compiled: call align() first and torch.compile the pipeline afterwards")
    if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
        raise PipelineError(
            f"{name} is quantised, and a gradient through quantised weights is not exact: "
            "load the pipeline without a quantization_config, in torch.bfloat16 to save memory"
        )
    hook = getattr(part, "_hf_hook", None)
    grouped = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
    if hook is not None or any("offload" in key for key in grouped):
        raise PipelineError(
            f"{name} is offloaded, and its weights would leave the device before the backward pass needs them: "
            "call pipe.remove_all_hooks() and pipe.to('cuda'); gradient checkpointing already saves the memory"
        )


def decoder(pipe: DiffusionPipeline) -> nn.Module | None:
    """The network that turns latents into pixels, or None for a pipeline that denoises pixels."""
    return next((part for part in components(pipe).values() if callable(getattr(part, "decode", None))), None)


def scheduler(pipe: DiffusionPipeline) -> Any:
    """The scheduler whose `step` counts the denoising steps. Raises PipelineError if there is none."""
    found = getattr(pipe, "scheduler", None)
    if found is None or not callable(getattr(found, "step", None)):
        raise PipelineError(f"{type(pipe).__name__} has no scheduler with a step(); set pipe.scheduler first")
    return found


def device_of(pipe: DiffusionPipeline) -> torch.device:
    return next(next(iter(denoisers(pipe).values())).parameters()).device


def call_parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """The arguments that the stock `__call__` takes."""
    return inspect.signature(type(pipe).__call__).parameters


def call_arguments(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: SamplingOptions,
    generators: Sequence[torch.Generator],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments for the stock `__call__`, leaving out what this pipeline does not take or what was not set.

    `extra` holds arguments of this pipeline alone (`image`, `strength`, `num_frames`, ...).
    """
    wanted = {
        "prompt": list(prompts),
        "negative_prompt": [sampling.negative_prompt] * len(prompts) if sampling.negative_prompt else None,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "eta": sampling.eta,
        "height": sampling.height,
        "width": sampling.width,
        "generator": list(generators),
        "output_type": "pt",
        **(extra or {}),
    }
    taken = call_parameters(pipe)
    missing = [name for name in ("prompt", "output_type") if name not in taken]
    if missing:
        raise PipelineError(f"{type(pipe).__name__} takes no {' and no '.join(missing)}: it cannot be aligned to prompts")
    return {name: value for name, value in wanted.items() if name in taken and value is not None}


def is_half(pipe: DiffusionPipeline) -> bool:
    """Whether a denoiser computes in float16, whose small gradients need loss scaling."""
    return any(next(part.parameters()).dtype == torch.float16 for part in denoisers(pipe).values())


# --- the state that training needs -------------------------------------------------------------------------------------


@contextmanager
def frozen_for_training(pipe: DiffusionPipeline, trainable: Sequence[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradient to `trainable` alone, decoder in its safe precision, guards off; all undone on leaving."""
    with ExitStack() as stack:
        for part in components(pipe).values():
            stack.enter_context(_frozen(part))
        for parameter in trainable:
            parameter.requires_grad_(True)
        stack.enter_context(_safe_decoder(pipe))
        stack.enter_context(guards_off(pipe))
        stack.callback(lambda: [parameter.requires_grad_(False) for parameter in trainable])
        yield


@contextmanager
def _frozen(part: nn.Module) -> Iterator[None]:
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


@contextmanager
def _safe_decoder(pipe: DiffusionPipeline) -> Iterator[None]:
    """float32 for a half precision decoder that says `force_upcast`: it overflows otherwise.

    The stock pipeline casts such a decoder up and back inside its call, but the backward pass comes after the call.
    """
    network = decoder(pipe)
    half = network is not None and next(network.parameters()).dtype == torch.float16
    if network is None or not half or not getattr(getattr(network, "config", None), "force_upcast", False):
        yield
        return
    network.to(torch.float32)
    try:
        yield
    finally:
        network.to(torch.float16)


def guards_on(pipe: DiffusionPipeline) -> list[str]:
    """The names of the guards that are switched on."""
    return [name for name in GUARDS if getattr(pipe, name, None) is not None]


@contextmanager
def guards_off(pipe: DiffusionPipeline) -> Iterator[None]:
    """No safety checker and no watermark inside."""
    kept = {name: getattr(pipe, name) for name in guards_on(pipe)}
    try:
        for name in kept:
            setattr(pipe, name, None)
        yield
    finally:
        for name, guard in kept.items():
            setattr(pipe, name, guard)


def lost_words(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that no tokenizer of this pipeline takes, or an empty text."""
    lost = []
    for part in pipe.components.values():
        if isinstance(part, PreTrainedTokenizerBase):
            tokens = part(prompt, truncation=False, verbose=False).input_ids
            kept = part.model_max_length - 1  # the end token takes the last place
            lost.append(part.decode(tokens[kept:], skip_special_tokens=True) if len(tokens) > kept + 1 else "")
    return min(lost, key=len, default="").strip()
