"""The layers of a pipeline that an adapter changes: which it holds, their names, their shapes."""

import math
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.model_layers import clip_path, is_text
from alignprop_pipe.diffusion.lora import ADAPTER_NAME
from alignprop_pipe.diffusion.pipeline_parts import components
from alignprop_pipe.errors import AdapterError


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline by name, without the wrapper of compiled ones."""
    return {name: getattr(part, "_orig_mod", part) for name, part in components(pipe).items()}


def layers_in(pipe: DiffusionPipeline) -> Layers:
    """The adapter that the networks of `pipe` hold, denoisers first. Raises AdapterError if they hold none."""
    found = {}
    for name, part in networks(pipe).items():
        found[name] = {
            clip_path(path, nested=True) if is_text(name) else path: _factors_of(layer)
            for path, layer in part.named_modules()
            if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.lora_A
        }
    found = {name: found[name] for name in sorted(found, key=is_text) if found[name]}
    if not found:
        raise AdapterError(
            f"{type(pipe).__name__} holds no adapter yet: train one with align(), or load_adapter() first"
        )
    return found


def _factors_of(layer: Any) -> Factors:
    down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    alpha = float(layer.lora_alpha[ADAPTER_NAME])
    if layer.use_rslora.get(ADAPTER_NAME, False):
        alpha *= math.sqrt(layer.r[ADAPTER_NAME])  # scaled by alpha / sqrt(rank) there
    return Factors(down.detach(), up.detach(), alpha)


def named_for(pipe: DiffusionPipeline, adapter: Layers) -> Layers:
    """The layers of text encoders by the paths that they have in `pipe`."""
    parts = networks(pipe)
    return {
        name: {clip_path(path, nested=hasattr(parts.get(name), "text_model")): f for path, f in layers.items()}
        if is_text(name)
        else layers
        for name, layers in adapter.items()
    }


def shape_mismatch(part: nn.Module, path: str, factors: Factors) -> str:
    """Why the factors cannot stand next to the layer at `path`, or an empty text."""
    try:
        layer = part.get_submodule(path)
    except AttributeError:
        return "does not exist there"
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(base, nn.Linear):
        wanted = (base.out_features, base.in_features)
    elif isinstance(base, nn.Conv2d):
        wanted = tuple(base.weight.shape)
    else:
        return f"is a {type(base).__name__} and takes no LoRA"
    down, up = factors.down, factors.up
    got = (up.shape[0], *down.shape[1:]) if down.ndim and up.ndim else ()
    if got != wanted or up.ndim != len(wanted) or up.shape[1] != factors.rank or not factors.rank:
        return f"is {'x'.join(map(str, wanted))}, the file has {tuple(up.shape)} and {tuple(down.shape)}"
    return ""
