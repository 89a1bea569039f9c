"""The names that LoRA weights have in files, by program, and the one form that this package has them in between.

In memory an adapter is `Factors` by component and layer: two matrices and their alpha. Files in diffusers' form
(`unet.….lora_A.weight`) have alpha folded into B, because readers of that form take alpha = rank, and some refuse
anything beside A and B. Files in kohya's form (`lora_unet_….lora_down.weight`) carry `.alpha`.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_pipe.adapters import kohya, naming
from alignprop_pipe.adapters.factors import Factors as Factors
from alignprop_pipe.adapters.factors import Layers as Layers
from alignprop_pipe.adapters.header import Base, base_of
from alignprop_pipe.adapters.keys import PIPELINES, UNETS, check, family_of, place_of
from alignprop_pipe.adapters.model_layers import clip_path, found_in, is_text, names_for, names_in, pipeline_class
from alignprop_pipe.adapters.naming import Model
from alignprop_pipe.adapters.strength import BASE_CLASS, BESIDE, Settings, folded, settings_of
from alignprop_pipe.diffusion.lora import ADAPTER_NAME
from alignprop_pipe.diffusion.pipeline_parts import components
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

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
LANGUAGE = re.compile(
    r"^(base_model\.model\.)?((model\.)?(language_model\.)?layers|model\.(en|de)coder\.layers|transformer\.h|gpt_neox\.layers"
    r"|((bert|roberta|vit)\.)encoder\.layer)\.\d+\.((self_)?attn|(encoder_)?attn|mlp|attention|intermediate|output|fc\d)\."
)
PEFT_PREFIX = "base_model.model."

# --- out of a pipeline ----------------------------------------------------------------------------------------------


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
    return _flat_keys("lora_unet", layers)


def comfyui_text_keys(family: str, name: str, layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Tensors of a text encoder for the file of a denoiser of this family: kohya's names beside kohya's."""
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


# --- out of a file --------------------------------------------------------------------------------------------------


def layers_from(pipe: DiffusionPipeline, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Layers:
    """Sort the keys of any known format by component and layer, through the converter of the pipeline itself.

    Raises ValueError, and whatever the converter raises: the keys are none of a LoRA for such a pipeline.
    """
    options: dict[str, Any] = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    parts = networks(pipe)
    sole = next((n for n, part in parts.items() if isinstance(part, ModelMixin) and not hasattr(part, "decode")), "")
    known = {
        name: frozenset(clip_path(path, nested=True) for path in names_in(part)) if is_text(name) else names_in(part)
        for name, part in parts.items()
    }
    model = Model(
        lambda name: known.get(name, frozenset()),
        tuple(filter(is_text, parts)),
        sole,
        base_of(pipe).families.get(sole, ""),
        getattr(options.get("unet_config"), "layers_per_block", 2),
    )

    def exists(name: str, path: str) -> bool:
        part = parts.get(name)
        if is_text(name):
            path = clip_path(path, nested=hasattr(part, "text_model"))
        return part is not None and path in dict(part.named_modules())

    return named_for(pipe, _all_of(pipe, tensors, header, options, model, exists))


def layers_alone(base: Base, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Layers:
    """As `layers_from`, where no pipeline is there but what is known of it."""
    family = family_of(tensors, header)
    reader = pipeline_class(base.base_class) or pipeline_class(PIPELINES.get(family, ""))
    is_transformer = not hasattr(reader, "unet_name") and hasattr(reader, "transformer_name")
    # What diffusers asks of a UNet's configuration, to number the blocks of SDXL's original layout.
    options = {} if is_transformer else {"unet_config": SimpleNamespace(layers_per_block=2)}
    own = [name for name in base.families if name.isidentifier()]
    sole = next(iter(own), "transformer" if is_transformer else "unet")
    family = base.families.get(sole) or family
    if not family and any(LANGUAGE.search(key) for key in tensors):
        raise ValueError("it is a LoRA for a model of language or speech, which PEFT and transformers read")
    known = partial(names_for, getattr(reader, "__name__", ""), family=family)
    model = Model(known, tuple(filter(is_text, COMPONENTS)), sole, family, extra=frozenset({*COMPONENTS, *own}))
    components = {*inspect.signature(reader.__init__).parameters, *own} if reader else {*COMPONENTS, *own}

    def exists(name: str, path: str) -> bool:
        names = known(name)
        is_foreign = path.startswith(("lora_", "lycoris_", "diffusion_model."))
        return name in components and not is_foreign and (not names or bool(found_in(path, names)))

    is_ours = "alignprop.families" in header
    found = _all_of(reader, tensors, header, options, model, None if is_ours else exists)
    denoiser = header.get("alignprop.denoiser", "")
    if denoiser == "transformer_2" and found.keys() == {"transformer"}:  # ComfyUI's file of the second one
        return {denoiser: found["transformer"]}
    return found


def named_for(pipe: DiffusionPipeline, adapter: Layers) -> Layers:
    """The layers of text encoders by the paths that they have in `pipe`."""
    parts = networks(pipe)
    return {
        name: {clip_path(path, nested=hasattr(parts.get(name), "text_model")): f for path, f in layers.items()}
        if is_text(name)
        else layers
        for name, layers in adapter.items()
    }


def _all_of(
    reader: Any,
    tensors: dict[str, Tensor],
    header: Mapping[str, str],
    options: dict[str, Any],
    model: Model,
    exists: Callable[[str, str], bool] | None,
) -> Layers:
    """Every layer of the file, by component, or ValueError: nothing is dropped in silence."""
    if BESIDE in header:
        settings_of(header, "")  # refuses another kind of adapter by its name, before one of its keys is found unknown
    in_file = check(tensors).layers
    # Alphas of the layers' own come first; converters fold them in.
    said = {} if any("alpha" in parts for parts in in_file.values()) else header
    if told := _component_told(header, model):
        model = replace(model, sole=told)
    found, unknown = naming.read(in_file, model, lambda name, path, rank: settings_of(said, name).alpha_of(path, rank))
    if unknown:
        try:
            state = _converted(reader, tensors, options)
            paths = {key.partition(".lora_")[0] for key in state}
            if (
                BESIDE in said
                and settings_of(said, "").patterns
                and not all(place_of(n).path in paths for n in in_file)
            ):
                state, said = _converted(reader, folded(tensors, said), options), {}
            found = _sorted(state, said, model)
        except Exception as error:  # converters fail in any way, and name keys of their own
            raise model.missing(unknown) from error
        if exists is not None:
            _check_names(found, unknown, model, exists)
    if sum(map(len, found.values())) < len(in_file):
        raise ValueError("some of its keys name the same layer, or one that this model has not")
    return {name: found[name] for name in sorted(found, key=lambda name: (is_text(name), name))}


def _component_told(header: Mapping[str, str], model: Model) -> str:
    """The text encoder that PEFT's settings name, by its class; empty for what is a denoiser or not known."""
    told = header.get(BASE_CLASS, "")
    if told.startswith("CLIPText"):
        second = told.endswith("WithProjection") and model.has("text_encoder_2")
        return "text_encoder_2" if second else "text_encoder"
    return ""


def _check_names(found: Layers, unknown: Sequence[str], model: Model, exists: Callable[[str, str], bool]) -> None:
    """Raises UnknownLayerError for names that the converter left as they were or changed to those of no layer."""
    wrong = [path for name, layers in found.items() for path in layers if not exists(name, path)]
    if wrong:  # told by their names in the file
        ends = tuple(re.sub(r"[._]", "", path) for path in wrong)
        raise model.missing([name for name in unknown if re.sub(r"[._]", "", name).endswith(ends)] or unknown)


def _converted(reader: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors in diffusers' names, with their alphas, by the loader of a pipeline or of a pipeline class."""
    read: Any = getattr(reader, "lora_state_dict", StableDiffusionLoraLoaderMixin.lora_state_dict)
    if all(key.startswith(PEFT_PREFIX) for key in tensors) and not any(".double_blocks." in key for key in tensors):
        tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    if "return_alphas" in inspect.signature(read).parameters:
        options = {**options, "return_alphas": True}
    converted = read(dict(tensors), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return {**state, **(alphas or {})}


def _sorted(state: Mapping[str, Any], header: Mapping[str, str], model: Model) -> Layers:
    """By component, or the model's sole one where a key names none."""
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        name, path = (head, rest) if model.has(head) else (model.sole, key.removeprefix(PEFT_PREFIX))
        by_part.setdefault(name, {})[path.replace(".default.", ".")] = value
    found = {}
    for name, keys in by_part.items():
        if is_text(name):
            keys = convert_state_dict(keys, {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT})
            keys = {clip_path(key, nested=True): value for key, value in keys.items()}
        else:
            keys = convert_unet_state_dict_to_peft(keys)
        found[name] = _layers(keys, settings_of(header, name))
    return found


def _layers(keys: Mapping[str, Any], settings: Settings) -> dict[str, Factors]:
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
        alpha = values["alpha"] if "alpha" in values else settings.alpha_of(path, down.shape[0])
        layers[path] = naming.whole(down, up, alpha)
    return layers


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
