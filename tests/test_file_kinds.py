"""Files and folders that hold no plain LoRA are called what they are, with what reads them."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import made, miniature
from diffusers import MotionAdapter
from miniatures import FAMILIES
from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
)

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.errors import AdapterError

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
FOUR = torch.ones(4, 4)
LORA = {f"{LAYER}.lora_down.weight": torch.ones(2, 4), f"{LAYER}.lora_up.weight": torch.ones(4, 2)}


def said(path: Path, **options: Any) -> str:
    """What both readers say of it."""
    texts = []
    for read in (Adapter.load, inspect_adapter):
        with pytest.raises(AdapterError) as refusal:
            read(path, **options)
        texts.append(str(refusal.value))
    assert texts[0] == texts[1]
    assert "damaged" not in texts[0]
    return texts[0]


def written(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, folder / "theirs.safetensors")
    return folder / "theirs.safetensors"


KINDS = {
    "LoHa": ({f"{LAYER}.hada_{name}": FOUR for name in ("w1_a", "w1_b", "w2_a", "w2_b")}, "a LoHa", "LyCORIS"),
    "LoKr without alpha": ({f"{LAYER}.lokr_{name}": FOUR for name in ("w1", "w2_a", "w2_b")}, "a LoKr", "LyCORIS"),
    "LoKr with alpha": ({f"{LAYER}.lokr_w1": FOUR, f"{LAYER}.lokr_w2": FOUR, f"{LAYER}.alpha": torch.tensor(1.0)},
                        "a LoKr", "diffusers for Flux 2"),
    "IA3": ({f"{LAYER}.weight": FOUR, f"{LAYER}.on_input": torch.tensor(True)}, "an IA3", "LyCORIS"),
    "OFT": ({f"{LAYER}.oft_blocks": FOUR, f"{LAYER}.alpha": torch.tensor(1.0)}, "an OFT or BOFT", "ComfyUI"),
    "OFT of kohya": ({f"{LAYER}.oft_diag": FOUR}, "an OFT or BOFT", "ComfyUI"),
    "GLoRA": ({f"{LAYER}.{name}.weight": FOUR for name in ("a1", "a2", "b1", "b2")}, "a GLoRA", "LyCORIS"),
    "full": ({f"{LAYER}.diff": FOUR, f"{LAYER}.diff_b": torch.ones(4)}, "whole weights or biases", "ComfyUI"),
    "norms": ({f"{LAYER}.w_norm": torch.ones(4), f"{LAYER}.b_norm": torch.ones(4)}, "changed norms", "ComfyUI"),
    "embedding": ({"emb_params": torch.ones(2, 768)}, "a textual inversion", "load_textual_inversion"),
    "embedding of SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 9)}, "textual inversion", "ComfyUI"),
    "embedding of diffusers": ({"<cat>": torch.ones(768)}, "a textual inversion", "load_textual_inversion"),
    "checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": FOUR, "first_stage_model.x": FOUR},
                   "a whole model", "from_single_file"),
    "original VAE": ({"first_stage_model.encoder.conv_in.weight": FOUR}, "a VAE", "AutoencoderKL"),
    "original ControlNet": ({"control_model.zero_convs.0.0.weight": FOUR}, "a ControlNet", "ControlNetModel"),
    "Control-LoRA": ({"lora_controlnet": torch.ones(1), "input_blocks.0.0.up": FOUR}, "a Control-LoRA", "ComfyUI"),
    "IP-Adapter": ({"image_proj.proj.weight": FOUR, "ip_adapter.1.to_k_ip.weight": FOUR}, "an IP-Adapter",
                   "load_ip_adapter"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": FOUR, "img_in.weight": FOUR}, "the weights of a denoiser",
             "from_single_file"),
    "upscaler": ({"conv_first.weight": FOUR, "body.0.rdb1.conv1.weight": FOUR}, "an upscaler|a T2I", "ComfyUI"),
    "Nunchaku": ({"transformer_blocks.0.attn.to_qkv.qweight": FOUR, "transformer_blocks.0.attn.to_qkv.proj_down": FOUR},
                 "Nunchaku", "Nunchaku reads it"),
    "language model": ({"model.layers.0.self_attn.q_proj.weight": FOUR}, "a language model", "transformers"),
    "LoRA with DoRA": ({**LORA, f"{LAYER}.dora_scale": torch.ones(4)}, "a DoRA", "ComfyUI"),
    "LoRA with biases of ComfyUI": ({**LORA, "diffusion_model.out.0.diff_b": torch.ones(4)},
                                    "ComfyUI's own training", "'Load LoRA' reads it"),
    "LoRA with embeddings": ({**LORA, "bundle_emb.<cat>.clip_l": torch.ones(768)}, "of new words", "OneTrainer"),
    "LoRA with a shape of ComfyUI": ({**LORA, f"{LAYER}.reshape_weight": torch.tensor([4, 4])},
                                     "ComfyUI's own training", "'Load LoRA' reads it"),
    "LoRA with norms": ({**LORA, "transformer.single_transformer_blocks.1.attn.norm_q.weight": torch.ones(4)},
                        "changed norms", "Flux's control LoRAs"),
    "ControlNet-LLLite": ({"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": FOUR},
                          "ControlNet-LLLite", "kohya"),
    "IP-Adapter of Flux": ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": FOUR,
                            "ip_adapter_proj_model.proj.weight": FOUR}, "an IP-Adapter", "ComfyUI's node packs"),
    "PuLID": ({"pulid_encoder.latents": FOUR, "pulid_ca.0.norm1.weight": FOUR}, "a PuLID", "ComfyUI"),
    "PhotoMaker": ({"id_encoder.fuse_module.mlp1.fc1.weight": FOUR}, "a PhotoMaker", "ComfyUI"),
    "hypernetwork": ({"320.0.linear.0.weight": FOUR}, "a hypernetwork", "AUTOMATIC1111"),
    "tiny VAE": ({"taesd_encoder.1.conv.0.weight": FOUR}, "a tiny VAE", "AutoencoderTiny"),
    "optimizer": ({"step": torch.ones(1), "exp_avg": FOUR}, "the state of an optimizer", "that trained"),
    "T5 of Wan": ({"token_embedding.weight": FOUR, "blocks.0.attn.q.weight": FOUR}, "a T5 text encoder", "Wan"),
    "LoRA with a third matrix": ({**LORA, f"{LAYER}.lora_mid.weight": FOUR}, "Tucker", "LyCORIS"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_called_what_they_are(name: str, tmp_path: Path) -> None:
    tensors, what, reader = KINDS[name]
    file = written(tensors, tmp_path)
    with pytest.raises(AdapterError, match=what) as refusal:
        Adapter.load(file)
    assert reader in str(refusal.value)
    assert "damaged" not in str(refusal.value)
    try:  # what has a LoRA in it too is described with its problem
        described = "; ".join(inspect_adapter(file).problems)
    except AdapterError as error:
        described = str(error)
    assert reader in described


CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
NETWORKS = {
    "a VAE": lambda: miniature("sd15").vae,
    "the weights of a denoiser": lambda: miniature("flux").transformer,
    "a CLIP text encoder": lambda: CLIPTextModel(CLIPTextConfig(vocab_size=8, **CLIP)),
    "a vision model": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **CLIP)),
    "a T5 text encoder": lambda: T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1)),
    "a ControlNet": lambda: miniature("sd15_controlnet").controlnet,
    "a T2I-Adapter": lambda: miniature("sdxl_adapter").adapter,
    "a motion module": lambda: MotionAdapter(
        block_out_channels=(8,), motion_layers_per_block=1, motion_num_attention_heads=1, motion_norm_num_groups=2
    ),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_networks_of_diffusers_and_transformers(what: str, tmp_path: Path) -> None:
    """As their own `save_pretrained` writes them: the file, and the folder that it is in."""
    NETWORKS[what]().save_pretrained(tmp_path / "folder")
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    assert what in said(file)
    assert "a single network" in said(tmp_path / "folder")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (IA3Config(target_modules=["a"], feedforward_modules=[]), "an IA3"),
        (LoHaConfig(target_modules=["a"], r=2), "a LoHa"),
        (LoKrConfig(target_modules=["a"], r=2), "a LoKr"),
        (OFTConfig(target_modules=["a"], oft_block_size=2, r=0), "an OFT"),
        (VeraConfig(target_modules=["a"], r=2), "a VeRA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_adapters_of_peft(config: Any, what: str, tmp_path: Path) -> None:
    """As PEFT writes them, with its settings next to and without."""
    model: Any = get_peft_model(nn.ModuleDict({"a": nn.Linear(4, 4)}), config)
    model.save_pretrained(str(tmp_path / "peft"))
    assert what in said(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    text = said(tmp_path / "peft" / "adapter_model.safetensors")
    assert what in text
    assert "PEFT" in text


@pytest.mark.parametrize(
    "layer",
    [
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "model.encoder.layers.0.self_attn.q_proj",  # speech
        "model.decoder.layers.0.fc1",
        "transformer.h.5.attn.c_attn",
        "gpt_neox.layers.1.attention.query_key_value",
        "bert.encoder.layer.0.attention.self.query",
    ],
)
def test_a_lora_for_a_language_model(layer: str, tmp_path: Path) -> None:
    name = f"base_model.model.{layer}"
    file = written({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}, tmp_path)
    with pytest.raises(AdapterError, match="for a model of language or speech, which PEFT"):
        Adapter.load(file)


def test_what_comfyui_left_at_zero_is_no_obstacle(tmp_path: Path) -> None:
    """Its own training writes a change for each bias and norm; by its names, which are those of the original UNet."""
    layer = "diffusion_model.middle_block.1.proj_in"
    lora = {key.replace(LAYER, layer): tensor for key, tensor in LORA.items()}
    zeros = {"diffusion_model.out.0.diff": torch.zeros(4), f"{layer}.diff_b": torch.zeros(4)}
    file = written({**lora, **zeros, f"{layer}.alpha": torch.tensor(1.0)}, tmp_path)
    factors = Adapter.load(file).layers["unet"]["mid_block.attentions.0.proj_in"]
    assert (factors.rank, factors.alpha) == (2, 1.0)
    assert not any("understood" in problem for problem in inspect_adapter(file).problems)


# --- no safetensors --------------------------------------------------------------------------------------------------

BYTES = {
    "empty": (b"", "is empty: it has no bytes"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page.*login"),
    "text": ("a caf\u00e9, a dog\n".encode() * 20, "a text file"),
    "JSON": (json.dumps({"lora_alpha": 4}).encode(), "a JSON file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "gzip.*unpack"),
}


@pytest.mark.parametrize("name", BYTES)
def test_files_of_other_formats(name: str, tmp_path: Path) -> None:
    content, match = BYTES[name]
    (tmp_path / "theirs.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=match):
        Adapter.load(tmp_path / "theirs.safetensors")
    assert "damaged" not in said(tmp_path / "theirs.safetensors")


def test_what_is_cut_off_is_called_damaged(tmp_path: Path) -> None:
    """Anywhere: in the length, the header or the data."""
    content = written(LORA, tmp_path).read_bytes()
    for end in (4, 8, 40, len(content) - 4):
        (tmp_path / "cut.safetensors").write_bytes(content[:end])
        with pytest.raises(AdapterError, match="cut off, damaged"):
            Adapter.load(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 10**9) + content[8:])
    with pytest.raises(AdapterError, match="cut off, damaged"):
        Adapter.load(tmp_path / "cut.safetensors")


def test_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("lora/a.safetensors", b"x")
    assert "a zip archive (lora/a.safetensors); unpack it" in said(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "cat"}, "a textual inv"),
        ({"<cat>": torch.ones(768)}, "a textual inversion"),
        ({768: ([{}], [{}]), 320: ([{}], [{}]), "step": 1, "name": "style"}, "a hypernetwork"),
        ({"state_dict": {"model.diffusion_model.out.0.weight": torch.ones(4)}, "global_step": 1}, "a whole model"),
        ({f"{LAYER}.hada_w1_a": torch.ones(2, 2)}, "a LoHa"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_pickles_are_called_what_they_are(content: Any, what: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "theirs.pt")
    assert "is a pickle, which can run any program" in said(tmp_path / "theirs.pt")
    assert what in said(tmp_path / "theirs.pt", allow_pickle=True)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_our_own_pipeline_writes_is_a_folder_with_an_adapter(tmp_path: Path) -> None:
    FAMILIES["sd15"].make().save_pretrained(tmp_path / "stock")
    pipe = AlignPropPipeline.from_pretrained(tmp_path / "stock")
    adapter = made("sd15")
    pipe.load_adapter(adapter)
    pipe.save_pretrained(tmp_path / "mine")
    assert Adapter.load(tmp_path / "mine").layers.keys() == adapter.layers.keys()
    assert inspect_adapter(tmp_path / "mine").file == "pytorch_lora_weights.safetensors"


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    FAMILIES["sd15"].make().save_pretrained(tmp_path / "pipeline")
    assert "a whole pipeline without an adapter; AlignPropPipeline.from_pretrained" in said(tmp_path / "pipeline")
    miniature("flux").transformer.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    assert "in several files (sharded)" in said(tmp_path / "sharded")
    (tmp_path / "several").mkdir()
    for name in ("one", "two"):
        save_file(LORA, tmp_path / "several" / f"{name}.safetensors")
    assert "name the file that is meant: 'one.safetensors', 'two.safetensors'" in said(tmp_path / "several")
    (tmp_path / "none").mkdir()
    assert "the folder is empty" in said(tmp_path / "none")
    (tmp_path / "none" / "a.txt").write_text("a", encoding="utf-8")
    assert "without weights" in said(tmp_path / "none")
