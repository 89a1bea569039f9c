"""Pipelines that have a single-file layout, in miniature, and the things around a checkpoint file.

`comfyui_checkpoint` writes a file that ComfyUI's own loader takes: the kinds are told there by the UNet's width (320)
and that of the text (768), the text encoder and the decoder have to be the whole ones, and the rest may be small.
"""

import json
from pathlib import Path
from typing import Any

import miniatures
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from miniatures import WIDTH, clip_tokenizer, finish, image_decoder, make_scheduler, unet
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.initialization import no_init_weights

from alignprop_pipe.adapters.checkpoint import write_checkpoint
from alignprop_pipe.diffusion import single_file

NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, *, projection: bool = False, **config: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(CLIPTextConfig(**{**settings, **config}))


def three_blocks(text_width: int, **config: Any) -> UNet2DConditionModel:
    """Attention in all but the deepest block, two layers in each: the published models' pattern."""
    usual = {
        "block_out_channels": (WIDTH, WIDTH, 2 * WIDTH),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": text_width,
    }
    return unet(**{**usual, **config})


def sd1(seed: int = 0, **unet_config: Any) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=image_decoder(),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=three_blocks(WIDTH, **unet_config),
        scheduler=make_scheduler("DDIMScheduler"),
        **NO_CHECKER,
    )
    return finish(pipe, seed)


def sd2(seed: int = 0, **unet_config: Any) -> StableDiffusionPipeline:
    """The text encoder is open_clip's, and as wide as in the real models, by which they are told apart."""
    tokenizer = clip_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "!"})
    pipe = StableDiffusionPipeline(
        vae=image_decoder(),
        text_encoder=text_encoder(tokenizer, 1024, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=three_blocks(1024, use_linear_projection=True, attention_head_dim=(2, 2, 4), **unet_config),
        scheduler=make_scheduler("DDIMScheduler", prediction_type="v_prediction"),
        **NO_CHECKER,
    )
    return finish(pipe, seed)


def sdxl(seed: int = 0, **unet_config: Any) -> StableDiffusionXLPipeline:
    """Two text encoders of two widths, the second one ten layers deep: the readers look for its tenth."""
    tokenizer, second = clip_tokenizer(), clip_tokenizer()
    second.add_special_tokens({"pad_token": "!"})
    denoiser = three_blocks(
        3 * WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
        **unet_config,
    )
    pipe = StableDiffusionXLPipeline(
        vae=image_decoder(),
        text_encoder=text_encoder(tokenizer),
        text_encoder_2=text_encoder(second, 2 * WIDTH, projection=True, num_hidden_layers=10, hidden_act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=denoiser,
        scheduler=miniatures.EulerDiscreteScheduler(
            **miniatures.NOISE_SCHEDULE, timestep_spacing="leading", steps_offset=1
        ),
        add_watermarker=False,
    )
    return finish(pipe, seed)


def weights(pipe: Any) -> dict[str, Tensor]:
    """Every weight of every network of a pipeline."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": weight for name, part in networks.items() for key, weight in part.state_dict().items()}


def tokenizer_folder(folder: Path, tokenizer: CLIPTokenizer | None = None) -> Path:
    """A tokenizer as ComfyUI keeps it: the two files, and a configuration that takes 8192 tokens."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or clip_tokenizer()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8192, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def shrunk_config(folder: Path, kind: str, pipe: Any) -> Path:
    """The configuration that ships for `kind`, with the sizes of a miniature; returns the folder of the kinds."""
    for file in (single_file.CONFIGS / kind).rglob("*.json"):
        inside = file.relative_to(single_file.CONFIGS)
        config = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "config.json":
            part = pipe.components[inside.parts[1]].config
            config |= {k: v for k, v in dict(part if isinstance(part, dict) else part.to_dict()).items() if k[0] != "_"}
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / inside).write_text(json.dumps(config, default=str), encoding="utf-8")
    return folder


def comfyui_pipeline(tokenizer: CLIPTokenizer | None = None, seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.5 with two small blocks (240 million weights, most of them the text encoder's).

    With `tokenizer` from a ComfyUI (`comfy/sd1_tokenizer`) it reads prompts as ComfyUI does.
    """
    words = tokenizer or clip_tokenizer()
    with no_init_weights():  # they are drawn at the end
        decoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=64,
        )
        text = text_encoder(
            words, 768, vocab_size=49408, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        denoiser = unet(
            block_out_channels=(320, 320), cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32
        )
    pipe = StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=words,
        unet=denoiser,
        scheduler=make_scheduler("DDIMScheduler"),
        **NO_CHECKER,
    )
    return finish(pipe, seed)


def comfyui_checkpoint(
    path: Path, tokenizer: CLIPTokenizer | None = None, seed: int = 0, dtype: torch.dtype = torch.float16
) -> StableDiffusionPipeline:
    """Write a checkpoint that ComfyUI loads (490 MB in float16); returns the pipeline with the file's weights."""
    pipe = comfyui_pipeline(tokenizer, seed)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        for weight in network.parameters():
            weight.data = weight.data.to(dtype).float()
    write_checkpoint(pipe, path, dtype)
    return pipe
