"""The names that LoRA weights have in files, by program, and the one form that this package has them in between.

In memory an adapter is `Factors` by component and layer: two matrices and their alpha. Files in diffusers' form
(`unet.….lora_A.weight`) have alpha folded into B, because readers of that form take alpha = rank, and some refuse
anything next to A and B. Files in kohya's form (`lora_unet_….lora_down.weight`) carry `.alpha`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from alignprop_pipe.adapters import kohya
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.keys import UNETS
from alignprop_pipe.errors import AdapterError

COMFYUI_KEYS: dict[str, dict[str, str]] = {
    "WanTransformer3DModel": {
        **{f".{ours}": f".{theirs}" for ours, theirs in kohya.WAN.items()},
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
    },
    "LTXVideoTransformer3DModel": {},
}
"""Transformers whose own key names ComfyUI wants, under `diffusion_model.`; it knows the others by `transformer.`."""


def diffusers_keys(adapter: Layers) -> dict[str, Tensor]:
    """Tensors as diffusers names them, ready for any pipeline's `load_lora_weights`."""
    tensors = {}
    for name, layers in adapter.items():
        for path, factors in layers.items():
            tensors[f"{name}.{path}.lora_A.weight"] = factors.down
            tensors[f"{name}.{path}.lora_B.weight"] = factors.folded()
    return tensors


def comfyui_keys(family: str, name: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of one denoiser as ComfyUI finds them: kohya's names for a UNet, else those of its own key map.

    `family` is the denoiser's class name, or `v1`, `v2` or `xl` for Stable Diffusion's UNets.
    """
    if name != "unet":
        prefix, renames = ("diffusion_model" if family in COMFYUI_KEYS else "transformer"), COMFYUI_KEYS.get(family, {})
        return diffusers_keys({prefix: {_renamed(path, renames): factors for path, factors in layers.items()}})
    return _flat_keys("lora_unet", layers)


def comfyui_text_keys(family: str, name: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of a text encoder for the file of a denoiser of this family: kohya's names next to kohya's."""
    if family in UNETS:
        return kohya_text_keys(family, name, layers)
    if not all(path.startswith("text_model.") for path in layers):
        raise AdapterError(f"ComfyUI knows no names for the layers of {name}, which is no CLIP; use 'diffusers'")
    return diffusers_keys({name: dict(layers)})


def kohya_keys(family: str, name: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of one denoiser as kohya's scripts name them, with alpha. Raises AdapterError: they have no names."""
    if name == "transformer_2":
        raise AdapterError("kohya's files hold one transformer, and this adapter is for two; use 'diffusers'")
    return _flat_keys("lora_unet", layers if name == "unet" else kohya.to_kohya(family, layers))


def kohya_text_keys(family: str, name: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of a text encoder as kohya's scripts name them: numbered where the model may have several."""
    number = "" if family in ("v1", "v2") else (name.removeprefix("text_encoder").strip("_") or "1")
    if family == "FluxTransformer2DModel" and number == "2":  # they count CLIP-G, which Flux has not
        number = "3"
    return _flat_keys(f"lora_te{number}", layers)


def _flat_keys(prefix: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors = {}
    for path, factors in layers.items():
        layer = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{layer}.lora_down.weight"] = factors.down
        tensors[f"{layer}.lora_up.weight"] = factors.up
        tensors[f"{layer}.alpha"] = torch.tensor(factors.alpha)
    return tensors


def _renamed(path: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        path = path.replace(ours, theirs)
    return path
