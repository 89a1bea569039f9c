"""The names that LoRA weights have in files, by program, and the one form that this package has them in between.

In memory an adapter is `Factors` by component and layer: two matrices and their alpha. Files in diffusers' form
(`unet.….lora_A.weight`) have alpha folded into B, because readers of that form take alpha = rank, and some refuse
anything beside A and B. Files in kohya's form (`lora_unet_….lora_down.weight`) carry `.alpha`.
"""

import inspect
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_pipe.errors import AdapterError
from alignprop_pipe.lora import ADAPTER_NAME
from alignprop_pipe.stock import components

COMFYUI_KEYS: dict[str, dict[str, str]] = {
    "WanTransformer3DModel": {
        ".attn1.": ".self_attn.",
        ".attn2.": ".cross_attn.",
        ".to_q": ".q",
        ".to_k": ".k",
        ".to_v": ".v",
        ".to_out.0": ".o",
        ".add_k_proj": ".k_img",
        ".add_v_proj": ".v_img",
        ".ffn.net.0.proj": ".ffn.0",
        ".ffn.net.2": ".ffn.2",
    },
    "LTXVideoTransformer3DModel": {},
}
"""Transformers whose own key names ComfyUI wants, under `diffusion_model.`; it knows the others by `transformer.`."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The low-rank change of one layer: delta-W = up @ down * alpha / rank."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def folded(self) -> Tensor:
        """`up` for readers that take alpha = rank."""
        return self.up if self.alpha == self.rank else self.up * (self.alpha / self.rank)


Layers = dict[str, dict[str, Factors]]
"""Factors by component ("unet", "transformer", "transformer_2", "text_encoder") and by the layer's name in it."""


# --- out of a pipeline ----------------------------------------------------------------------------------------------


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline by name, without the wrapper of compiled ones."""
    return {name: getattr(part, "_orig_mod", part) for name, part in components(pipe).items()}


def layers_in(pipe: DiffusionPipeline) -> Layers:
    """The adapter that the denoisers of `pipe` hold. Raises AdapterError if they hold none."""
    found = {}
    for name, part in networks(pipe).items():
        if isinstance(part, ModelMixin):  # no text encoder
            found[name] = {
                path: _factors_of(layer)
                for path, layer in part.named_modules()
                if isinstance(layer, LoraLayer) and ADAPTER_NAME in layer.lora_A
            }
    found = {name: layers for name, layers in found.items() if layers}
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


def common_shape(layers: Mapping[str, Factors]) -> tuple[int, float]:
    """The rank and alpha that most layers have."""
    return Counter((factors.rank, factors.alpha) for factors in layers.values()).most_common(1)[0][0]


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
    plain = {}
    for path, factors in layers.items():
        plain[f"unet.{path}.lora_A.weight"] = factors.down
        plain[f"unet.{path}.lora_B.weight"] = factors.up
    tensors = convert_state_dict_to_kohya(plain)
    for path, factors in layers.items():  # the converter writes the rank, whatever alpha is
        tensors[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(factors.alpha)
    return tensors


def _renamed(path: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        path = path.replace(ours, theirs)
    return path


# --- out of a file --------------------------------------------------------------------------------------------------


def layers_from(pipe: DiffusionPipeline, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Layers:
    """Sort the keys of any known format by component and layer, through the converter of the pipeline itself."""
    options: dict[str, Any] = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    parts = networks(pipe)
    sole = next((n for n, part in parts.items() if isinstance(part, ModelMixin) and not hasattr(part, "decode")), "")
    bare = {
        name for name, part in parts.items() if not isinstance(part, ModelMixin) and not hasattr(part, "text_model")
    }
    return _sorted(_converted(pipe, tensors, options), header, set(parts), sole, bare)


COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip


def layers_alone(reader: Any, tensors: dict[str, Tensor], header: Mapping[str, str], unet_config: Any) -> Layers:
    """As `layers_from`, where there is no pipeline but its class alone; None: any UNet of Stable Diffusion."""
    is_transformer = not hasattr(reader, "unet_name") and hasattr(reader, "transformer_name")
    options = {} if is_transformer else {"unet_config": unet_config}
    sole = "transformer" if is_transformer else "unet"
    return _sorted(_converted(reader, tensors, options), header, COMPONENTS, sole, COMPONENTS)


def _converted(reader: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors in diffusers' names, with their alphas, by the loader of a pipeline or of a pipeline class."""
    read: Any = getattr(reader, "lora_state_dict", StableDiffusionLoraLoaderMixin.lora_state_dict)
    if "return_alphas" in inspect.signature(read).parameters:
        options = {**options, "return_alphas": True}
    converted = read(dict(tensors), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return {**state, **(alphas or {})}


def _sorted(
    state: Mapping[str, Any], header: Mapping[str, str], names: Collection[str], sole: str, bare: Collection[str]
) -> Layers:
    """By component: of `names`, or `sole` where a key names none; text encoders in `bare` have no text_model level."""
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        name, path = (head, rest) if head in names else (sole, key.removeprefix("base_model.model."))
        by_part.setdefault(name, {})[path] = value
    config = json.loads(header.get("lora_adapter_metadata", "{}"))
    found = {}
    for name, keys in by_part.items():
        if name.startswith("text_encoder"):
            keys = convert_state_dict(keys, {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT})
            if name in bare:
                keys = {key.removeprefix("text_model."): value for key, value in keys.items()}
        else:
            keys = convert_unet_state_dict_to_peft(keys)
        found[name] = _layers(keys, _config_of(config, name))
    return found


def _config_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What diffusers wrote about one component; bare where a single component was saved."""
    mine = {key.removeprefix(f"{name}."): value for key, value in config.items() if key.startswith(f"{name}.")}
    return mine or dict(config)


def _layers(keys: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Factors]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        path, lora, kind = key.partition(".lora_")
        kind = "alpha" if key.endswith(".alpha") else kind
        if kind not in ("A.weight", "B.weight", "alpha"):
            raise ValueError(f"{key!r} is no part of a plain LoRA")
        found.setdefault(path if lora else key.removesuffix(".alpha"), {})[kind] = value
    layers = {}
    for path, values in found.items():
        if not {"A.weight", "B.weight"} <= values.keys():
            raise ValueError(f"{path} has only {' and '.join(sorted(values))} of its two matrices")
        down, up = values["A.weight"], values["B.weight"]
        alpha = values.get("alpha", _alpha_in(config, path, down.shape[0]))
        layers[path] = Factors(down, up, float(alpha))
    return layers


def _alpha_in(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Alpha as PEFT's own settings in the header have it; the rank where there are none."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if f".{path}".endswith(f".{key.removeprefix('^')}"))
    alpha = next(matching, config.get("lora_alpha", rank))
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def misfit(part: nn.Module, path: str, factors: Factors) -> str:
    """Why the factors cannot stand beside the layer at `path`, or an empty text."""
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
