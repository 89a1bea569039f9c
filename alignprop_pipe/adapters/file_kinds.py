"""What a file or folder is that holds no plain LoRA, told by its first bytes and the names in it; and what reads it.

Nothing is opened but the beginning of a file and the names of its tensors, so that a file of any size is told at once.
"""

import re
from collections.abc import Iterable
from pathlib import Path

LYCORIS = "LyCORIS, ComfyUI and AUTOMATIC1111 read it"
PEFT = "PEFT reads it"

ADAPTERS = (
    (r"[._](dora_scale|lora_magnitude_vector)", "a DoRA", "ComfyUI reads it, and diffusers where it has PEFT's names"),
    (r"\.hada_", "a LoHa", f"{LYCORIS}; PEFT where it has its names"),
    (r"\.lokr_", "a LoKr", f"{LYCORIS}; diffusers for Flux 2 and Z-Image, and PEFT where it has its names"),
    (r"\.(oft_blocks|oft_diag|oft_r|oft_R|boft_)", "an OFT or BOFT", f"{LYCORIS}; PEFT where it has its names"),
    (r"\.[ab][12]\.weight$|glora_", "a GLoRA", f"{LYCORIS}; PEFT where it has its names"),
    (r"(^|\.)lllite_", "a ControlNet-LLLite", "ComfyUI's node pack of that name and kohya's scripts read it"),
    (r"^lora_weights\.|^id_encoder\.", "a PhotoMaker", "PhotoMaker's own pipeline and ComfyUI's loader of that name "
     "read it"),
    (r"\.on_input$|\.ia3_l", "an IA3", "LyCORIS reads it, or PEFT where it has its names"),
    (r"\.lora_mid\.", "a LoCon with a third matrix (Tucker)", LYCORIS),
    (r"\.[wb]_norm$", "changed norms next to a LoRA", "LyCORIS and ComfyUI read it"),
    (r"\.diff(_b)?$|\.(set|reshape)_weight$",
     "whole weights or biases (diff, diff_b), as ComfyUI's own training and extracted files have them",
     "ComfyUI's 'Load LoRA' reads it"),
    (r"^transformer\.\w+\.\d+\.(attn\.)?norm\w*(\.linear)?\.(weight|bias)$", "changed norms next to a LoRA",
     "diffusers reads it for Flux's control LoRAs"),
    (r"\.lora_[AB]\.bias$", "a LoRA with biases", "diffusers and PEFT read it"),
    (r"\.lora_embedding_[AB]", "a LoRA on embeddings", PEFT),
    (r"\.lora_E$|\.ranknum$", "an AdaLoRA", PEFT),
    (r"^bundle_emb\.", "embeddings of new words next to a LoRA (OneTrainer)", "OneTrainer and ComfyUI read it"),
    (r"\.(proj_down|proj_up|lora_down|lora_up)$|\.(qweight|smooth_factor|wscales)$", "a file of Nunchaku (SVDQuant)",
     "Nunchaku reads it"),
    (r"vera_(lambda_|[AB])", "a VeRA", PEFT),
    (r"\.(fourierft_|hra_u|c3a_kernel|shira_|miss_block|bone_|randlora_|road_|waveft_|delora_|hira_|gralora_|vblora_"
     r"|psoft_|tinylora_|ln_tuning_|trainable_tokens_)|^(prompt_embeddings|prompt_encoder)",
     "an adapter of PEFT's of another kind", PEFT),
)  # fmt: skip
"""Adapters that are no plain LoRA: part of a key, what it is, what reads it."""

_BLOCKS = (
    r"(double_blocks|single_blocks|(single_)?transformer_blocks|joint_blocks|joint_transformer_blocks|blocks|layers)"
)
OTHERS = (
    (r"^(emb_params|string_to_param|string_to_token)$|^(clip_l|clip_g|t5xxl)$|^<.+>$",
     "a textual inversion: embeddings of new words", "diffusers' load_textual_inversion and the embeddings folder of "
     "ComfyUI and AUTOMATIC1111 read it"),
    (r"^lora_controlnet$", "a Control-LoRA", "ComfyUI's 'Load ControlNet Model' reads it"),
    (r"^control_model\.|controlnet_|input_hint_block\.|(^|\.)zero_convs\.|^control_(net|blocks)", "a ControlNet",
     "ControlNetModel.from_single_file or from_pretrained of diffusers and ComfyUI's 'Load ControlNet Model' read it"),
    (r"^(image_proj|ip_adapter)\b|(^|[._])ip_adapter_", "an IP-Adapter", "diffusers' load_ip_adapter reads it, and "
     "ComfyUI's node packs for IP-Adapters"),
    (r"^pulid_(encoder|ca)\.", "a PuLID", "ComfyUI's node packs of that name read it"),
    (r"^\d+\.[01]\.linear\.\d+\.", "a hypernetwork of AUTOMATIC1111", "AUTOMATIC1111 and ComfyUI read it"),
    (r"^taes\w+_(encoder|decoder)\.|^(encoder|decoder)\.layers\.\d+\.conv\.", "a tiny VAE (TAESD)",
     "AutoencoderTiny of diffusers and ComfyUI's 'Load VAE' read it"),
    (r"^exp_avg(_sq)?$|^(optimizer|param_groups)\b", "the state of an optimizer", "the program that trained reads it"),
    (r"^(adapter\.)?body\.\d+\.|^adapter\.(body|conv_in|total_downscale)", "a T2I-Adapter",
     "T2IAdapter.from_pretrained of diffusers and ComfyUI's 'Load ControlNet Model' read it"),
    (r"motion_modules\.", "a motion module of AnimateDiff", "MotionAdapter.from_pretrained of diffusers reads it"),
    (r"^model\.diffusion_model\.", "a whole model", "AlignPropPipeline.from_single_file opens it"),
    (r"^(first_stage_model\.|(encoder|decoder)\.(conv_in|conv1|down|up|mid)|(post_)?quant_conv\.|vae\.)", "a VAE",
     "AutoencoderKL.from_single_file or from_pretrained of diffusers reads it"),
    (r"(^|\.)vision_model\.|^embeddings\.(patch_embedding|class_embedding)", "a vision model",
     "from_pretrained of transformers reads it"),
    (r"^token_embedding\.|^blocks\.\d+\.attn\.[qkvo]\.weight$", "a T5 text encoder in Wan's own names",
     "Wan's own programs read it, and ComfyUI's wrappers of Wan"),
    (r"^(shared\.|encoder\.block\.\d+\.layer\.)", "a T5 text encoder", "T5EncoderModel.from_pretrained of transformers "
     "reads it"),
    (r"^(text_model\.|cond_stage_model\.|conditioner\.)|text_model\.embeddings\.|^embeddings\.token|^transformer\.resblocks\.",
     "a CLIP text encoder", "CLIPTextModel.from_pretrained of transformers reads it"),
    (r"^(model\.)?layers\.\d+\.(self_attn|mlp)\.|^model\.embed_tokens\.", "a language model",
     "from_pretrained of transformers reads it"),
    (r"^(conv_first\.|model\.\d+\.|params\.|params_ema\.|body\.)", "an upscaler", "ComfyUI's 'Load Upscale Model' and "
     "spandrel read it"),
    (rf"^(diffusion_model\.|model\.)?{_BLOCKS}\.\d+\.|^(down|up|input|output)_blocks\.\d|^mid_block\.",
     "the weights of a denoiser, without a VAE and text encoders",
     "from_single_file or from_pretrained of its class in diffusers, and ComfyUI's 'Load Diffusion Model', read it"),
)  # fmt: skip
"""Files that are no adapters of a denoiser's layers at all, likewise."""

BEGINNINGS = (
    (b"GGUF", "a GGUF file: quantised weights of a whole model", "ComfyUI-GGUF and diffusers' GGUFQuantizationConfig"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "'git lfs pull' fetches it"),
    (b"\x89PNG", "a picture", ""), (b"\xff\xd8\xff", "a picture", ""), (b"GIF8", "a picture", ""),
    (b"RIFF", "a picture or sound", ""), (b"%PDF", "a PDF", ""), (b"\x1f\x8b", "a compressed file (gzip)", "unpack it"),
    (b"7z\xbc\xaf", "a compressed file (7z)", "unpack it"), (b"Rar!", "a compressed file (RAR)", "unpack it"),
    (b"\x93NUMPY", "a NumPy array", ""), (b"\x89HDF", "an HDF5 file", "Keras reads it"),
)  # fmt: skip


def said_of_unknown(keys: Iterable[str]) -> str:
    """What keys are that belong to no plain LoRA, in words."""
    keys = list(keys)
    for pattern, what, reader in (*ADAPTERS, *OTHERS):
        for key in keys:
            if re.search(pattern, key):
                return f"it holds {what}, which is not supported here ({reader}): {key!r}"
    return f"{keys[0]!r} is no part of a plain LoRA"


def kind_of(keys: Iterable[str]) -> str:
    """What a file with these names of tensors is, and what reads it; empty where it is not known."""
    keys = list(keys)
    for pattern, what, reader in (*ADAPTERS, *OTHERS):
        if any(re.search(pattern, key) for key in keys):
            return f"{what} ({reader})"
    return ""


def kind_of_bytes(start: bytes, size: int) -> str:
    """What a file is that begins so, where that is no safetensors file and no pickle; empty where it is not known."""
    if not size:
        return "empty: it has no bytes, as after a download that failed"
    for beginning, what, reader in BEGINNINGS:
        if start.startswith(beginning):
            return f"{what} ({reader})" if reader else what
    text = start.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if text.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page, as of a download that needs a login"
    if text and all(letter.isprintable() or letter in "\t\r\n" for letter in text[:100]) and len(text) > len(start) / 2:
        return "a text file" if text[0] not in "{[" else "a JSON file"
    return ""


def kind_of_folder(folder: Path) -> str:
    """What a folder is that holds no adapter by a usual name, and what to do with it."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".pt", ".ckpt"))]
    if "model_index.json" in files:
        return "a whole pipeline without an adapter; AlignPropPipeline.from_pretrained opens it"
    if any(name.endswith(".index.json") for name in files):
        return "a model in several files (sharded), which from_pretrained opens; an adapter is one file"
    if "config.json" in files and weights:
        return "a single network, which from_pretrained of its class opens"
    if weights:
        return f"no folder of one adapter; name the file that is meant: {', '.join(map(repr, weights[:5]))}"
    return "without weights" if files else "empty"
