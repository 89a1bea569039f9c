"""A whole Stable Diffusion -> one file in its original layout, which ComfyUI, A1111 and `from_single_file` read.

The layout is that of the models' first releases (CompVis, Stability AI): `model.diffusion_model.` is the UNet,
`first_stage_model.` the VAE, `cond_stage_model.` or `conditioner.embedders.N.` the text encoders, which are CLIPs by
the names of transformers or of open_clip. Which block gets which number follows from the networks as they are built.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, Transformer2DModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from alignprop_pipe import __version__
from alignprop_pipe.adapters.header import ARCHITECTURES, base_of
from alignprop_pipe.diffusion import lora
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.files import appearing_whole
from alignprop_pipe.sources import exists

Names = dict[str, str]
"""Paths of modules in diffusers -> in the original; a module takes everything in it along."""

IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""The metadata standard's word for this layout."""


def original_checkpoint(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x, 2.x or XL in the original layout, most of them not copied.

    A LoRA is in it only where it was fused into the weights. What is not part of a checkpoint stays out: ControlNets,
    image encoders, safety checkers. The last layer of the text encoder of 2.x, which no program uses, is not in
    diffusers' model and so not in the file.

    Raises:
        PipelineError: another model, or one whose weights are not all here.
    """
    networks = _networks(pipe)
    state: dict[str, Tensor] = {}
    with lora.taken_out(networks.values()):
        for prefix, convert, network in _layout(networks):
            for key, weight in convert(network).items():
                state[prefix + key] = weight.detach()
    absent = next((key for key, weight in state.items() if weight.is_meta), None)
    if absent is not None:
        raise PipelineError(
            f"{absent} has no values: the model is offloaded; load it without device_map and offloading"
        )
    config = pipe.scheduler.config
    if "text_encoder_2" in networks and config.get("prediction_type") == "v_prediction":
        state["v_pred"] = torch.tensor([])  # how files of this model tell it
        if config.get("rescale_betas_zero_snr"):
            state["ztsnr"] = torch.tensor([])
    return state


def write_checkpoint(pipe: DiffusionPipeline, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write `original_checkpoint(pipe)` as safetensors with the metadata of the modelspec standard; returns the path.

    The file appears when it is complete; the same model gives the same bytes.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL.
        path: ends in .safetensors and does not exist; folders are made.
        dtype: precision of the weights; default: the pipeline's own.

    Raises:
        PipelineError: another model, a path that is not usable, or weights that do not fit `dtype`.
        RunError: the disk does not take it.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise PipelineError(f"checkpoints are saved as safetensors: {str(path)!r} has to end in '.safetensors'")
    if exists(target):
        raise PipelineError(f"{str(path)!r} exists already and is not overwritten; choose another name")
    state = original_checkpoint(pipe)
    ready = {key: _ready(key, weight, dtype) for key, weight in state.items()}
    with appearing_whole(target) as beside:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        try:
            save_file(ready, beside, _metadata(pipe, target.stem))
        except SafetensorError as error:  # also what it makes of a full disk
            raise OSError(str(error)) from error
        beside.chmod(mode)  # the library lets nobody but the owner read it, and ComfyUI may run as another user
        _sort_header(beside)
    return target


def _ready(key: str, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and weight.numel() and torch.finfo(dtype).max < torch.finfo(weight.dtype).max:
        least, most = weight.aminmax()
        if bool(torch.maximum(-least, most) > torch.finfo(dtype).max):
            raise PipelineError(f"{key} holds values too large for {dtype}; use bfloat16 or float32")
    return weight.to("cpu", dtype or weight.dtype).contiguous()


def _metadata(pipe: DiffusionPipeline, title: str) -> dict[str, str]:
    base = base_of(pipe)
    family = base.families["unet"]
    architecture = ARCHITECTURES[family]
    if family == "v2" and base.prediction == "v":
        architecture = "stable-diffusion-v2-768-v"
    size: Any = pipe.unet.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    scale: int = pipe.vae_scale_factor
    header = {
        "format": "pt",
        "alignprop.version": __version__,
        "alignprop.base_model": base.base_model,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.resolution": f"{width * scale}x{height * scale}",
        "modelspec.prediction_type": base.prediction,
    }
    return {key: value for key, value in header.items() if value}


def _sort_header(path: Path) -> None:
    """The library alone writes the texts in an order that changes from file to file."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        described = json.loads(file.read(length))
        described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


# --- which networks, and where they go ---


def _networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    found = {}
    for name, kind in kinds.items():
        part = pipe.components.get(name)
        part = getattr(part, "_orig_mod", part)  # torch.compile's wrapper
        if part is None and name == "text_encoder_2":
            continue
        if not isinstance(part, kind):
            is_there = "missing" if part is None else f"of the kind {type(part).__name__}"
            raise PipelineError(
                f"{type(pipe).__name__} has no single-file layout here: its {name} is {is_there} and has to be of the "
                f"kind {kind.__name__}; Stable Diffusion 1.x, 2.x and XL have one. A folder in diffusers' format "
                "takes every model: pipe.save_pretrained(folder)"
            )
        found[name] = part
    return found


Convert = Callable[[Any], Mapping[str, Tensor]]


def _layout(networks: Mapping[str, Any]) -> Iterator[tuple[str, Convert, nn.Module]]:
    """Prefix, conversion and network for each part of the file."""
    yield "model.diffusion_model.", unet_weights, networks["unet"]
    yield "first_stage_model.", vae_weights, networks["vae"]
    text_encoder = networks["text_encoder"]
    if "text_encoder_2" in networks:
        yield "conditioner.embedders.0.transformer.text_model.", clip_weights, text_encoder
        yield "conditioner.embedders.1.model.", open_clip_weights, networks["text_encoder_2"]
    elif text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of 1.x
        yield "cond_stage_model.transformer.text_model.", clip_weights, text_encoder
    else:
        yield "cond_stage_model.model.", open_clip_weights, text_encoder


# --- the UNet ---


def unet_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Its state by the original names, of which every stage has a number, in the order in which they are run."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if isinstance(unet.class_embedding, nn.Embedding):
        names["class_embedding"] = "label_emb"
    for embedding in ("add_embedding", "class_embedding"):
        names |= {f"{embedding}.linear_1": "label_emb.0.0", f"{embedding}.linear_2": "label_emb.0.2"}
    names |= _stages("down_blocks", unet.down_blocks, "input_blocks", 1)
    names |= _stages("up_blocks", unet.up_blocks, "output_blocks", 0)
    middle: Any = unet.mid_block
    for number in range(len(middle.resnets) if middle is not None else 0):
        names |= _resnet(f"mid_block.resnets.{number}", f"middle_block.{2 * number}")
    for number, attention in enumerate(getattr(middle, "attentions", ())):
        if isinstance(attention, Transformer2DModel):
            names[f"mid_block.attentions.{number}"] = f"middle_block.{2 * number + 1}"
    return _renamed(unet, names)


def _stages(blocks_name: str, blocks: Any, there: str, place: int) -> Names:
    """The blocks on the way down or up. A downsampler is a stage of its own, an upsampler belongs to the last one."""
    names: Names = {}
    for number, block in enumerate(blocks):
        here, inside = f"{blocks_name}.{number}", 1
        attentions = getattr(block, "attentions", ())
        for layer in range(len(block.resnets)):
            names |= _resnet(f"{here}.resnets.{layer}", f"{there}.{place}.0")
            if layer < len(attentions) and isinstance(attentions[layer], Transformer2DModel):
                names[f"{here}.attentions.{layer}"] = f"{there}.{place}.1"
                inside = 2
            place += 1
        names[f"{here}.upsamplers.0.conv"] = f"{there}.{place - 1}.{inside}.conv"
        if getattr(block, "downsamplers", None):
            names[f"{here}.downsamplers.0.conv"] = f"{there}.{place}.0.op"
            place += 1
    return names


def _resnet(here: str, there: str) -> Names:
    layers = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return {f"{here}.{ours}": f"{there}.{original}" for ours, original in layers.items()}


# --- the VAE ---


def vae_weights(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Its state by the original names; the attention's linear layers are convolutions of one pixel there."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    for side, network, blocks in (("encoder", encoder, encoder.down_blocks), ("decoder", decoder, decoder.up_blocks)):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names |= _vae_middle(network.mid_block, f"{side}.mid_block", f"{side}.mid")
        for number, block in enumerate(blocks):
            # Both ways count from the side of the picture.
            down = side == "encoder"
            here = f"{side}.down_blocks.{number}" if down else f"{side}.up_blocks.{number}"
            there = f"{side}.down.{number}" if down else f"{side}.up.{len(blocks) - 1 - number}"
            for layer in range(len(block.resnets)):
                names |= _vae_resnet(f"{here}.resnets.{layer}", f"{there}.block.{layer}")
            way = "downsample" if down else "upsample"
            names[f"{here}.{way}rs.0.conv"] = f"{there}.{way}.conv"
    state = _renamed(vae, names)
    attention = {key for key in state if ".attn_" in key and key.endswith(".weight") and state[key].ndim == 2}
    return {key: weight[:, :, None, None] if key in attention else weight for key, weight in state.items()}


def _vae_middle(middle: Any, here: str, there: str) -> Names:
    names: Names = {}
    for number in range(len(middle.resnets)):
        names |= _vae_resnet(f"{here}.resnets.{number}", f"{there}.block_{number + 1}")
    layers = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for number in range(len(middle.attentions)):
        names |= {
            f"{here}.attentions.{number}.{ours}": f"{there}.attn_{number + 1}.{original}"
            for ours, original in layers.items()
        }
    return names


def _vae_resnet(here: str, there: str) -> Names:
    layers = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
    return {f"{here}.{ours}": f"{there}.{original}" for ours, original in layers.items()}


# --- the text encoders ---


def clip_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Its state by the names of transformers, which had a level `text_model` for every CLIP before 5.6."""
    return {key.removeprefix("text_model."): weight for key, weight in text_encoder.state_dict().items()}


def open_clip_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Its state by open_clip's names: q, k and v in one matrix, the projection and the positions bare."""
    state = clip_weights(text_encoder)
    names = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    made = {"positional_embedding": state.pop("embeddings.position_embedding.weight")}
    if "text_projection.weight" in state:
        made["text_projection"] = state.pop("text_projection.weight").T
    for number in range(int(text_encoder.config.num_hidden_layers)):  # type: ignore[union-attr]  # CLIPTextConfig
        here, there = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            qkv = [state.pop(f"{here}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            made[f"{there}.attn.in_proj_{kind}"] = torch.cat(qkv)
        layers = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        layers["self_attn.out_proj"] = "attn.out_proj"
        names |= {f"{here}.{ours}": f"{there}.{original}" for ours, original in layers.items()}
    return made | {_original(key, names): weight for key, weight in state.items()}


def _renamed(network: nn.Module, names: Names) -> dict[str, Tensor]:
    return {_original(key, names): weight for key, weight in network.state_dict().items()}


def _original(key: str, names: Names) -> str:
    """The original name of a weight, by the innermost module that has one. Raises PipelineError."""
    path = key
    while path and ".processor." not in key:  # what an IP-Adapter brings lies inside the attention
        path = path.rpartition(".")[0]
        if path in names:
            return names[path] + key[len(path) :]
    raise PipelineError(
        f"{key} has no place in the original layout of Stable Diffusion: the network has parts of its own; use "
        "pipe.save_pretrained(folder), since a folder in diffusers' format takes every model"
    )
