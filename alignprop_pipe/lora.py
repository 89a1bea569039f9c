"""The adapter inside the denoisers: put it on, find what trains, switch it off, take it away. PEFT does the work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_pipe.config import LoraOptions
from alignprop_pipe.errors import PipelineError

ADAPTER_NAME = "alignprop"


def attention_linears(denoiser: nn.Module) -> list[str]:
    """Names of every linear layer inside an attention module, found by the processor that diffusers gives those.

    The paper adapts the q, k, v and output projections of self- and cross-attention.
    """
    found = []
    for name, module in denoiser.named_modules():
        if hasattr(module, "get_processor") or hasattr(module, "set_processor"):
            found += [f"{name}.{inner}" for inner, layer in module.named_modules() if _is_linear(inner, layer)]
    return found


def _is_linear(name: str, layer: nn.Module) -> bool:
    is_inside_adapter = "lora_" in name or name.endswith("base_layer")
    return not is_inside_adapter and isinstance(getattr(layer, "base_layer", layer), nn.Linear)


def attach(denoisers: Mapping[str, nn.Module], options: LoraOptions, seed: int) -> None:
    """Put a new adapter in float32 on every denoiser, beside adapters that are active already.

    An adapter of the same name is replaced. The start is drawn from `seed` alone. Raises PipelineError.
    """
    detach(denoisers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, denoiser in denoisers.items():
            _attach_one(name, denoiser, options)


def _attach_one(name: str, denoiser: nn.Module, options: LoraOptions) -> None:
    targets = list(options.target_modules) or attention_linears(denoiser)
    if not targets:
        raise PipelineError(
            f"{name} ({type(denoiser).__name__}) has no linear attention projections; "
            "name the layers to adapt with target_modules=(...)"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,  # type: ignore[arg-type]  # floats work
        target_modules=targets,
        init_lora_weights=True if options.init_lora_weights == "default" else options.init_lora_weights,
    )
    others = list(denoiser.active_adapters()) if getattr(denoiser, "peft_config", None) else []
    required = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise PipelineError(f"target_modules={tuple(targets)} do not fit {name}: {error}") from error
    if others:
        denoiser.set_adapter([*others, ADAPTER_NAME])
    for parameter, was in required:
        parameter.requires_grad_(was)
    for parameter in _parameters(denoiser):
        parameter.data = parameter.data.float()


def detach(denoisers: Mapping[str, nn.Module]) -> None:
    """Take our adapter away; other adapters stay, and without any the denoiser is the stock one again."""
    for denoiser in denoisers.values():
        adapters = getattr(denoiser, "peft_config", {})
        if ADAPTER_NAME not in adapters:
            continue
        if len(adapters) == 1:
            denoiser.unload_lora()
        else:
            denoiser.delete_adapters(ADAPTER_NAME)


def trainable(denoisers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters of our adapter, in a fixed order."""
    return [parameter for denoiser in denoisers.values() for parameter in _parameters(denoiser)]


def _parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    mine = (f".{ADAPTER_NAME}.", f".{ADAPTER_NAME}")
    named = denoiser.named_parameters()
    return [p for name, p in named if "lora_" in name and (mine[0] in name or name.endswith(mine[1]))]


def snapshot(denoisers: Mapping[str, nn.Module]) -> list[Tensor]:
    """A copy of the adapter's weights, for `restore`."""
    return [parameter.detach().clone() for parameter in trainable(denoisers)]


def restore(denoisers: Mapping[str, nn.Module], weights: list[Tensor]) -> None:
    for parameter, weight in zip(trainable(denoisers), weights, strict=True):
        parameter.data.copy_(weight)


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[None]:
    """The base model inside: our adapter alone is switched off, other active adapters belong to the base."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    scales = [(layer, layer.scaling[ADAPTER_NAME]) for layer in layers if ADAPTER_NAME in layer.scaling]
    try:
        for layer, _ in scales:
            layer.scaling[ADAPTER_NAME] = 0.0
        yield
    finally:
        for layer, scale in scales:
            layer.scaling[ADAPTER_NAME] = scale
