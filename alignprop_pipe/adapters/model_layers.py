"""The names of the layers that a model has, from its classes and configurations, without weights.

A LoRA file says for which model it is; whether its names are layers of that model is looked up here. The model is built
on the meta device, which takes no memory and a tenth of a second, so that the names are diffusers' own. Numbers of
blocks are left open (`blocks.#.attn1.to_q`): models of one family differ in how many they have.
"""

import inspect
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from alignprop_pipe.diffusion.single_file import CONFIGS

Names = frozenset[str]
"""Paths of layers in one network, with `#` for the number of a block."""

CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")
"""How paths in a CLIP begin below its `text_model` level, which transformers 5.6 took away from some of its classes."""
OPTIONAL: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "PixArtTransformer2DModel": {"caption_channels": 8},
    "SanaTransformer2DModel": {"guidance_embeds": True},
    "SD3Transformer2DModel": {"dual_attention_layers": (0,)},
    "WanTransformer3DModel": {"image_dim": 8, "added_kv_proj_dim": 8, "num_layers": 1},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
                                       "attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": [8, 8],
                                       "text_emb_dim": 8, "num_routed_experts": 4, "num_activated_experts": 2},
}  # fmt: skip
"""Settings under which a class has all of the layers that models of its family may have, where its defaults do not."""
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_text(name: str) -> bool:
    """Whether a component is a text encoder."""
    return name.startswith("text_encoder")


def clip_path(path: str, *, nested: bool) -> str:
    """A path in a text encoder, with or without the level that some classes of CLIP have and others have not."""
    bare = path.removeprefix("text_model.")
    return f"text_model.{bare}" if nested and bare.startswith(CLIP_PARTS) else bare


def pipeline_class(name: str) -> Any:
    """The pipeline class of diffusers of that name, which a file's header may have made up; None if there is none."""
    if not name.endswith("Pipeline") or not name.isidentifier():
        return None
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def names_in(network: nn.Module) -> Names:
    """The layers of a network that take a LoRA: linear ones and convolutions, under whatever adapters they have."""
    numbered = {path for path, module in network.named_modules() if _is_list_of_blocks(module)}
    return frozenset(_open(path, numbered) for path in _linear_layers(network))


@cache
def names_for(base_class: str, component: str, family: str = "") -> Names:
    """The layers of one component of a pipeline class; empty where they are not known.

    Args:
        base_class: a pipeline class of diffusers.
        component: "unet", "transformer", "text_encoder", ...
        family: `v1`, `v2` or `xl` for the UNets of Stable Diffusion.
    """
    reader: Any = pipeline_class(base_class)
    annotation = inspect.signature(reader.__init__).parameters.get(component) if reader else None
    if annotation is None:
        return frozenset()
    kinds = [kind for kind in (annotation.annotation, *get_args(annotation.annotation)) if isinstance(kind, type)]
    found = (_names_of(kind, family) for kind in kinds if issubclass(kind, ModelMixin | PreTrainedModel))
    return frozenset().union(*found)


def _names_of(kind: Any, family: str) -> Names:
    """Of a class that can be built by itself; of diffusers' UNet those of the family, with motion modules."""
    configs = [OPTIONAL.get(kind.__name__, {})]
    if kind.__name__ == "UNet2DConditionModel":
        folder = CONFIGS / {"v2": "v2", "xl": "xl_base"}.get(family, "v1")
        configs = [{**kind.load_config(str(folder / "unet")), "transformer_layers_per_block": 1}]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers about its own classes
            if issubclass(kind, PreTrainedModel):
                configuration: Any = kind.config_class
                networks: list[nn.Module] = [kind(configuration(**options)) for options in _text_options(kind)]
            else:
                networks = [
                    kind.from_config(config) if "_class_name" in config else kind(**config) for config in configs
                ]
            if kind.__name__ == "UNet2DConditionModel":
                networks.append(diffusers.UNetMotionModel())
    except Exception:  # a base class, or one that cannot be built by its defaults
        return frozenset()
    is_clip = kind.__name__.startswith("CLIPText")
    names = frozenset().union(*map(names_in, networks))
    return frozenset(clip_path(name, nested=True) for name in names) if is_clip else names


def _text_options(kind: Any) -> list[dict[str, Any]]:
    """T5 has other layers in its first version and in the later one."""
    return [{}, {"feed_forward_proj": "gated-gelu"}] if "T5" in kind.__name__ else [{}]


def _linear_layers(network: nn.Module) -> Iterator[str]:
    for path, module in network.named_modules():
        if isinstance(module, _LINEAR) and ".lora_" not in path:
            yield path.removesuffix(".base_layer")


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Not `to_out` and `ff.net`, whose members are layers, so that their numbers are names."""
    members = [member for member in module if member is not None] if isinstance(module, nn.ModuleList) else []
    return bool(members) and all(any(True for _ in member.children()) for member in members)


def _open(path: str, numbered: set[str]) -> str:
    """`path` with `#` for each number of a block."""
    words = path.split(".")
    return ".".join("#" if ".".join(words[:at]) in numbered else word for at, word in enumerate(words))


# --- looking a name up -----------------------------------------------------------------------------------------------


def found_in(path: str, names: Names, *, flat: bool = False) -> str:
    """The path of the layer that `path` names, which may be flat (`a_b_0_c`); empty where the model has none."""
    for pattern, expression in _expressions(names, flat):
        if match := expression.fullmatch(path):
            words = pattern.split("#")
            return "".join(f"{word}{number}" for word, number in zip(words, (*match.groups(), ""), strict=True))
    return ""


@cache
def _expressions(names: Names, flat: bool) -> tuple[tuple[str, re.Pattern[str]], ...]:
    written = ((name, name.replace(".", "_") if flat else name) for name in sorted(names))
    return tuple((name, re.compile(re.escape(text).replace(r"\#", r"(\d+)"))) for name, text in written)
