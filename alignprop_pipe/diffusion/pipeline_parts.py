"""What a pipeline of diffusers is made of, found by structure: denoisers, decoder, scheduler.

No family is named here. A denoiser is a network of diffusers that is told the timestep and that pipelines load LoRAs
into; the decoder is the one that decodes.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from alignprop_pipe.errors import PipelineError


def components(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The neural networks of a pipeline by their names in it."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def parameters(pipe: DiffusionPipeline) -> Iterator[nn.Parameter]:
    """The weights of all networks of a pipeline."""
    for part in components(pipe).values():
        yield from part.parameters()


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


def is_half(pipe: DiffusionPipeline) -> bool:
    """Whether a denoiser computes in float16, whose small gradients need loss scaling."""
    return any(next(part.parameters()).dtype == torch.float16 for part in denoisers(pipe).values())


def decoding_dtype(network: nn.Module) -> torch.dtype:
    """float32 for a float16 decoder that says `force_upcast`, since it overflows otherwise; else its own."""
    own = next(network.parameters()).dtype
    upcast = own == torch.float16 and getattr(getattr(network, "config", None), "force_upcast", False)
    return torch.float32 if upcast else own
