"""Transformers' layers by the names that kohya's scripts give them, and back.

Those names are the models' own, flat. Where the own model has one matrix for several of diffusers' (query, key and
value of Flux), the factors are laid side by side: their downs one below the other, their ups along a diagonal.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.errors import AdapterError

Names = dict[str, str]

_QWEN = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1",
    "txt_mod.1",
)  # fmt: skip
WAN: Names = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
"""Layers in a block of Wan: diffusers' name -> the model's own."""
_FLUX_DOUBLE: Names = {
    "attn.to_out.0": "img_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "norm1.linear": "img_mod.lin", "attn.to_add_out": "txt_attn.proj", "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2", "norm1_context.linear": "txt_mod.lin",
}  # fmt: skip
_FLUX_OTHERS: Names = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}  # fmt: skip
HALVES_SWAPPED = "norm_out.linear"
"""The model's own layer gives shift and scale in the other order."""


@dataclass(frozen=True, slots=True)
class Fused:
    """Layers that are one in the model itself, and how many rows each has, in rows of the first."""

    parts: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A list of like blocks: its name in the model itself, its layers, and those of them that are fused."""

    name: str
    layers: Names
    fused: Mapping[str, Fused] = field(default_factory=dict)


_FLUX_FUSED = {
    "img_attn.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1)),
    "txt_attn.qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), (1, 1, 1)),
}
_FLUX_SINGLE = {"linear1": Fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4))}

_SD3: Names = {
    "attn.to_out.0": "x_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_SD3_FUSED = {
    "x_block.attn.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1)),
    "x_block.attn2.qkv": Fused(("attn2.to_q", "attn2.to_k", "attn2.to_v"), (1, 1, 1)),
    "context_block.attn.qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), (1, 1, 1)),
}

BLOCKS: dict[str, dict[str, Blocks]] = {
    "SD3Transformer2DModel": {"transformer_blocks": Blocks("joint_blocks", _SD3, _SD3_FUSED)},
    "FluxTransformer2DModel": {
        "transformer_blocks": Blocks("double_blocks", _FLUX_DOUBLE, _FLUX_FUSED),
        "single_transformer_blocks": Blocks(
            "single_blocks", {"proj_out": "linear2", "norm.linear": "modulation.lin"}, _FLUX_SINGLE
        ),
    },
    "QwenImageTransformer2DModel": {
        "transformer_blocks": Blocks("transformer_blocks", {name: name for name in _QWEN}),
    },
    "WanTransformer3DModel": {"blocks": Blocks("blocks", WAN)},
}
"""Families that kohya's scripts train -> their lists of blocks."""
OTHERS: dict[str, Names] = {"FluxTransformer2DModel": _FLUX_OTHERS}


# --- names that are read and not written -----------------------------------------------------------------------------

_QKV = Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1))
_HUNYUAN = {
    "attn.to_out.0": "img_attn_proj", "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
    "norm1.linear": "img_mod.linear", "attn.to_add_out": "txt_attn_proj", "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2", "norm1_context.linear": "txt_mod.linear",
}  # fmt: skip
_HUNYUAN_REFINER = Blocks(
    "txt_in.individual_token_refiner.blocks",
    {
        "attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
        "norm_out.linear": "adaLN_modulation.1",
    },
    {"self_attn_qkv": _QKV},
)  # fmt: skip
_LUMINA = {
    "attn.to_out.0": "attention.out", "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2", "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip
_LUMINA_FUSED = {"attention.qkv": Fused(_QKV.parts, (3, 1, 1))}
"""Lumina 2 has three heads of the query for one of key and value."""
_Z_IMAGE_FUSED = {"attention.qkv": Fused(("attention.to_q", "attention.to_k", "attention.to_v"), (1, 1, 1))}

_FLUX2 = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
_FLUX_LIKE = tuple(BLOCKS["FluxTransformer2DModel"].items())

READ_BLOCKS: dict[str, tuple[tuple[str, Blocks], ...]] = {
    "HunyuanVideoTransformer3DModel": (
        ("transformer_blocks", Blocks("double_blocks", _HUNYUAN, {
            "img_attn_qkv": _FLUX_FUSED["img_attn.qkv"], "txt_attn_qkv": _FLUX_FUSED["txt_attn.qkv"],
        })),
        ("transformer_blocks", Blocks("double_blocks", _FLUX_DOUBLE)),
        ("single_transformer_blocks", Blocks(
            "single_blocks", {"proj_out": "linear2", "norm.linear": "modulation.linear"}, _FLUX_SINGLE
        )),
        ("single_transformer_blocks", Blocks("single_blocks", {"norm.linear": "modulation.lin"})),
        ("context_embedder.token_refiner.refiner_blocks", _HUNYUAN_REFINER),
        ("context_embedder.token_refiner.refiner_blocks", Blocks(
            _HUNYUAN_REFINER.name,
            {"attn.to_out.0": "self_attn.proj", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"},
            {"self_attn.qkv": _QKV},
        )),
    ),
    "ChromaTransformer2DModel": (
        *_FLUX_LIKE,
        ("distilled_guidance_layer.layers", Blocks(
            "distilled_guidance_layer.layers", {"linear_1": "in_layer", "linear_2": "out_layer"}
        )),
    ),
    "Flux2Transformer2DModel": (
        ("transformer_blocks", Blocks("double_blocks", _FLUX2, _FLUX_FUSED)),
        ("single_transformer_blocks", Blocks(
            "single_blocks", {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
        )),
    ),
    "Lumina2Transformer2DModel": tuple(
        (stem, Blocks(stem, _LUMINA, _LUMINA_FUSED)) for stem in ("layers", "noise_refiner", "context_refiner")
    ),
    "ZImageTransformer2DModel": tuple(
        (stem, Blocks(stem, {"attention.to_out.0": "attention.out"}, _Z_IMAGE_FUSED))
        for stem in ("layers", "noise_refiner", "context_refiner")
    ),
    "SD3Transformer2DModel": (
        ("transformer_blocks", Blocks("joint_blocks", {
            "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
            "attn.to_q": "x_block.attn.qkv.0", "attn.to_k": "x_block.attn.qkv.1", "attn.to_v": "x_block.attn.qkv.2",
            "attn.add_q_proj": "context_block.attn.qkv.0", "attn.add_k_proj": "context_block.attn.qkv.1",
            "attn.add_v_proj": "context_block.attn.qkv.2",
        })),
    ),
}  # fmt: skip
"""As `BLOCKS`, of other families and of other programs."""
READ_OTHERS: dict[str, Names] = {
    "ChromaTransformer2DModel": {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    },
    "Flux2Transformer2DModel": {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    },
    "HunyuanVideoTransformer3DModel": {
        **_FLUX_OTHERS,
        "x_embedder.proj": "img_in.proj",
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    },
    "SD3Transformer2DModel": {
        "context_embedder": "context_embedder", "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    "WanTransformer3DModel": {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    },
    "ZImageTransformer2DModel": {
        "all_final_layer.2-1.linear": "final_layer.linear", "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    },
    "Lumina2Transformer2DModel": {
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear",
    },
}  # fmt: skip


ALIKE = {
    "WanVACETransformer3DModel": "WanTransformer3DModel", "SkyReelsV2Transformer3DModel": "WanTransformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel": "HunyuanVideoTransformer3DModel",
}  # fmt: skip
"""Classes whose layers have the names of another."""


def is_known(family: str) -> bool:
    """Whether a transformer of this family has names of kohya's."""
    return family in BLOCKS


def to_kohya(family: str, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Layers of a transformer by kohya's flat names, without prefix. Raises AdapterError: it has none."""
    if family not in BLOCKS:
        raise AdapterError(
            f"kohya's scripts have no names for {family or 'this transformer'}, only for "
            f"{', '.join(BLOCKS)} and the UNets of Stable Diffusion; take the format 'comfyui' or 'diffusers'"
        )
    found: dict[str, Factors] = {}
    together: dict[str, dict[str, Factors]] = {}
    kinds: dict[str, Fused] = {}
    for path, factors in layers.items():
        name, fused = _name(family, path)
        if fused is None:
            found[name] = _swapped(factors) if path == HALVES_SWAPPED else factors
        else:
            together.setdefault(name, {})[path] = factors
            kinds[name] = fused
    return found | {name: _side_by_side(kinds[name], parts) for name, parts in together.items()}


def own_layers(family: str, flat: str, factors: Factors) -> dict[str, Factors]:
    """The layers of a transformer that its own code calls `flat` (dots as underscores); empty where it has none.

    Raises ValueError: the rows cannot be those of the layers that the name stands for.
    """
    family = ALIKE.get(family, family)
    for path, name in {**READ_OTHERS.get(family, {}), **OTHERS.get(family, {})}.items():
        if _flat(name) == flat:
            return {path: _swapped(factors) if path == HALVES_SWAPPED else factors}
    for stem, blocks in (*BLOCKS.get(family, {}).items(), *READ_BLOCKS.get(family, ())):
        match = re.fullmatch(rf"{_flat(blocks.name)}_(\d+)_(\w+)", flat)
        if match is None:
            continue
        place = f"{stem}.{match[1]}"
        for layer, name in blocks.layers.items():
            if _flat(name) == match[2]:
                last = layer == "norm1_context.linear" and factors.up.shape[0] == 2 * factors.down.shape[1]
                return {f"{place}.{layer}": _swapped(factors) if last else factors}  # as `HALVES_SWAPPED`
        for name, fused in blocks.fused.items():
            if _flat(name) == match[2]:
                return {f"{place}.{layer}": part for layer, part in _taken_apart(fused, factors).items()}
    return {}


def _name(family: str, path: str) -> tuple[str, Fused | None]:
    """The flat name of a layer, and what it is fused with."""
    if path in OTHERS.get(family, {}):
        return _flat(OTHERS[family][path]), None
    stem, _, rest = path.partition(".")
    number, _, layer = rest.partition(".")
    blocks = BLOCKS[family].get(stem, Blocks("", {}))
    if layer in blocks.layers:
        return _flat(f"{blocks.name}.{number}.{blocks.layers[layer]}"), None
    for name, fused in blocks.fused.items():
        if layer in fused.parts:
            return _flat(f"{blocks.name}.{number}.{name}"), fused
    raise AdapterError(f"kohya's scripts have no name for {path} of {family}; take the format 'diffusers'")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _swapped(factors: Factors) -> Factors:
    first, second = factors.up.chunk(2)
    return Factors(factors.down, torch.cat([second, first]), factors.alpha)


def _side_by_side(fused: Fused, parts: Mapping[str, Factors]) -> Factors:
    """One pair of factors for all of `parts`, by path; parts that have none get zeros."""
    by_layer = {
        layer: next((f for path, f in parts.items() if path.endswith(f".{layer}")), None) for layer in fused.parts
    }
    unit = next(f.up.shape[0] // rows for f, rows in zip(by_layer.values(), fused.rows, strict=True) if f is not None)
    given = [factors for factors in by_layer.values() if factors is not None]
    total = sum(factors.rank for factors in given)
    one_scale = len({factors.alpha / factors.rank for factors in given}) == 1
    alpha = given[0].alpha * total / given[0].rank if one_scale else float(total)
    ups, column = [], 0
    for factors, rows in zip(by_layer.values(), fused.rows, strict=True):
        up = given[0].up.new_zeros(unit * rows, total)
        if factors is not None:
            up[:, column : column + factors.rank] = factors.up if one_scale else factors.folded()
            column += factors.rank
        ups.append(up)
    return Factors(torch.cat([factors.down for factors in given]), torch.cat(ups), alpha)


def _taken_apart(fused: Fused, factors: Factors) -> dict[str, Factors]:
    """The factors of each part: the columns of `up` that do something in its rows."""
    unit = sum(fused.rows)
    if factors.up.shape[0] % unit:
        raise ValueError(f"{factors.up.shape[0]} rows cannot be those of {' and '.join(fused.parts)}")
    blocks = factors.up.split([factors.up.shape[0] // unit * rows for rows in fused.rows])
    columns = _columns(blocks, factors.rank)
    found = {}
    for layer, block, chosen in zip(fused.parts, blocks, columns, strict=True):
        if len(chosen):
            down, up = factors.down[chosen], block[:, chosen].contiguous()
            found[layer] = Factors(down, up, factors.alpha * len(chosen) / factors.rank)
    return found


def _columns(blocks: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Which columns of each block count: an equal share where the rest is zero, as kohya's scripts lay them."""
    share, left = divmod(rank, len(blocks))
    shares = [torch.arange(number * share, (number + 1) * share) for number in range(len(blocks))]
    used = [(block != 0).any(dim=0).nonzero().flatten() for block in blocks]
    if not left and all(set(one.tolist()) <= set(mine.tolist()) for one, mine in zip(used, shares, strict=True)):
        return shares
    return used
