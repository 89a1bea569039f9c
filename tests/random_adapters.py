"""Adapters with random weights for the denoisers of a miniature, as training could leave them, and its pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import by_hand
import torch
from miniatures import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.header import base_of
from alignprop_pipe.diffusion.lora import attention_linears
from alignprop_pipe.diffusion.pipeline_parts import denoisers


def factors_for(layer: Any, rank: int, alpha: float, generator: torch.Generator, size: float = 0.3) -> Factors:
    """Factors for a linear layer or a convolution; every entry is drawn, so that no change is zero."""
    shape = layer.weight.shape
    down, up = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    drawn = [(size * torch.randn(one, generator=generator)).to(layer.weight.dtype) for one in (down, up)]
    return Factors(*drawn, alpha)


def random_adapter(
    pipe: Any,
    *,
    rank: int = 3,
    alpha: float = 5.0,
    seed: int = 0,
    paths: Callable[[Any], Sequence[str]] = attention_linears,
    size: float = 0.3,
    **metadata: str,
) -> Adapter:
    """An adapter for all denoisers of a pipeline without adapters; `paths` picks the layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: {path: factors_for(part.get_submodule(path), rank, alpha, generator, size) for path in paths(part)}
        for name, part in denoisers(pipe).items()
    }
    return Adapter(layers, base_of(pipe), metadata)


def draw(pipe: Any, steps: int = 4, guidance: float = 2.0, **call: Any) -> Tensor:
    """The stock call with fixed noise, also where a network draws its own."""
    with torch.no_grad(), by_hand.same_hidden_draws():
        return pipe(
            prompt=["a red dog"],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            return_dict=False,
            **call,
        )[0]


def by_peft(folder: Path, settings: dict[str, Any], family: str = "sd15", name: str = "unet") -> Tensor:
    """A folder by PEFT's own `save_pretrained`, and the picture of the model onto which PEFT loads it."""
    pipe = FAMILIES[family].make()
    network = getattr(pipe, name)
    targets = attention_linears(network) if name in ("unet", "transformer") else ["q_proj", "fc1"]
    model = get_peft_model(network, LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    pipe = FAMILIES[family].make()
    PeftModel.from_pretrained(getattr(pipe, name), str(folder))
    return draw(pipe, **FAMILIES[family].call(1))
