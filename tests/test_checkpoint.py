"""One file in the original layout: diffusers reads back every weight and the same pictures, and no adapter slips in."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import miniatures
import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.adapters.checkpoint import original_checkpoint, write_checkpoint
from alignprop_pipe.config.settings import LoraOptions
from alignprop_pipe.diffusion import lora
from alignprop_pipe.errors import PipelineError, RunError

KINDS = {"sd1": checkpoints.sd1, "sd2": checkpoints.sd2, "sdxl": checkpoints.sdxl}


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red fox", height=16, width=16, num_inference_steps=2, output_type="pt", generator=generator).images


def read_back(pipe: Any, file: Path, folder: Path) -> Any:
    """What stock diffusers makes of a file, with the pipeline's own configuration."""
    pipe.save_pretrained(folder)
    return type(pipe).from_single_file(str(file), config=str(folder))


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_every_weight_back(kind: str, tmp_path: Path) -> None:
    pipe = KINDS[kind]()
    file = write_checkpoint(pipe, tmp_path / "new" / "model.safetensors")
    made = read_back(pipe, file, tmp_path / "folder")
    before, after = checkpoints.weights(pipe), checkpoints.weights(made)
    assert before.keys() == after.keys()
    assert [key for key, weight in before.items() if not torch.equal(weight, after[key])] == []
    assert torch.equal(picture(pipe), picture(made))


@pytest.mark.parametrize(
    "blocks",
    [
        {"layers_per_block": 1},
        {"layers_per_block": 3, "down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3},
        {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        {"num_class_embeds": 5},
        {"in_channels": 9},
    ],
    ids=str,
)
def test_blocks_of_other_shapes(blocks: dict[str, Any], tmp_path: Path) -> None:
    pipe = checkpoints.sd1(**blocks)
    made = read_back(pipe, write_checkpoint(pipe, tmp_path / "model.safetensors"), tmp_path / "folder")
    before, after = pipe.unet.state_dict(), made.unet.state_dict()
    assert [key for key, weight in before.items() if not torch.equal(weight, after[key])] == []


def test_the_names_are_the_published_ones() -> None:
    """Keys of the published files, by which the programs tell the kinds apart or count the blocks."""
    first, second, xl = (original_checkpoint(make()) for make in KINDS.values())
    unet, vae = "model.diffusion_model.", "first_stage_model."
    for state in (first, second):
        assert {unet + key for key in ("input_blocks.3.0.op.bias", "output_blocks.2.1.conv.weight")} <= state.keys()
        assert unet + "output_blocks.5.2.conv.weight" in state
        assert unet + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight" in state
        assert unet + "middle_block.2.out_layers.3.weight" in state
        assert unet + "output_blocks.8.0.skip_connection.weight" in state
    assert state[vae + "decoder.mid.attn_1.proj_out.weight"].shape[2:] == (1, 1)
    assert {vae + "encoder.down.0.downsample.conv.weight", vae + "decoder.up.1.upsample.conv.weight"} <= state.keys()
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in first
    assert second["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (3 * 1024, 1024)
    assert {unet + "label_emb.0.0.weight", unet + "label_emb.0.2.bias"} <= xl.keys()
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in xl
    assert "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias" in xl
    assert {"conditioner.embedders.1.model.text_projection", "conditioner.embedders.1.model.ln_final.bias"} <= xl.keys()
    assert "v_pred" not in xl


def test_velocity_is_marked_in_a_file_of_sdxl() -> None:
    pipe = checkpoints.sdxl()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert {"v_pred", "ztsnr"} & original_checkpoint(pipe).keys() == {"v_pred"}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= original_checkpoint(pipe).keys()


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_adapter(pipe: Any) -> Any:
    pipe = AlignPropPipeline.from_pipe(pipe)
    lora.attach({"unet": pipe.unet}, LoraOptions(rank=2, init_lora_weights="gaussian"), seed=0)
    for parameter in lora.trainable({"unet": pipe.unet}):
        torch.nn.init.normal_(parameter, std=0.3)
    return pipe


def test_an_adapter_is_in_it_only_where_it_is_fused() -> None:
    plain = original_checkpoint(checkpoints.sd1())
    pipe = with_adapter(checkpoints.sd1())
    with_one = original_checkpoint(pipe)
    assert with_one.keys() == plain.keys()
    assert all(torch.equal(weight, with_one[key]) for key, weight in plain.items())
    assert lora.trainable({"unet": pipe.unet}), "the adapter is still on the pipeline"
    pipe.fuse_lora()
    fused = original_checkpoint(pipe)
    changed = {key for key, weight in plain.items() if not torch.equal(weight, fused[key])}
    assert changed
    assert all(".attn1." in key or ".attn2." in key for key in changed)


def test_a_fused_file_draws_as_the_adapter_does(tmp_path: Path) -> None:
    pipe = with_adapter(checkpoints.sd1())
    expected = picture(pipe)
    pipe.fuse_lora()
    file = write_checkpoint(pipe, tmp_path / "model.safetensors")
    checkpoints.sd1().save_pretrained(tmp_path / "folder")
    made = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "folder"))
    assert torch.allclose(picture(made), expected, atol=1e-5)
    assert not torch.allclose(picture(checkpoints.sd1()), expected, atol=1e-3)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_header_follows_the_modelspec(tmp_path: Path) -> None:
    pipe = checkpoints.sdxl()
    header = header_of(write_checkpoint(pipe, tmp_path / "fox.safetensors"))
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.title"] == "fox"
    assert header["modelspec.resolution"] == "16x16"
    assert header["modelspec.prediction_type"] == "epsilon"
    header = header_of(write_checkpoint(checkpoints.sd2(), tmp_path / "v.safetensors"))
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert header["modelspec.prediction_type"] == "v"
    header = header_of(write_checkpoint(checkpoints.sd1(sample_size=(8, 16)), tmp_path / "one.safetensors"))
    assert header["modelspec.architecture"] == "stable-diffusion-v1"
    assert header["modelspec.resolution"] == "32x16"


def test_the_same_model_gives_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    pipe = checkpoints.sd1()
    pipe.register_to_config(_name_or_path=str(tmp_path / "private"))
    file = write_checkpoint(pipe, tmp_path / "a" / "model.safetensors")
    (tmp_path / "other").write_text("as files are here")
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    one = file.read_bytes()
    two = write_checkpoint(pipe, tmp_path / "b" / "model.safetensors").read_bytes()
    assert one == two
    length = int.from_bytes(one[:8], "little")
    assert "private" not in json.dumps(json.loads(one[8 : 8 + length])["__metadata__"])


def test_precision(tmp_path: Path) -> None:
    pipe = checkpoints.sd1()
    half = load_file(write_checkpoint(pipe, tmp_path / "half.safetensors", torch.float16))
    assert {weight.dtype for weight in half.values()} == {torch.float16}
    full = original_checkpoint(pipe)
    assert all(torch.equal(weight, full[key].half()) for key, weight in half.items())
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(PipelineError, match=r"input_blocks\.0\.0\.weight.*too large for torch\.float16.*bfloat16"):
        write_checkpoint(pipe, tmp_path / "large.safetensors", torch.float16)
    write_checkpoint(pipe, tmp_path / "large.safetensors", torch.bfloat16)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    pipe = checkpoints.sd1()
    with pytest.raises(PipelineError, match=r"\.safetensors"):
        write_checkpoint(pipe, tmp_path / "model.ckpt")
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(PipelineError, match="exists already"):
        write_checkpoint(pipe, taken)
    with pytest.raises(RunError, match="cannot be written"):
        write_checkpoint(pipe, taken / "model.safetensors")
    assert taken.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [taken]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    pipe = checkpoints.sd1()
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match=r"model\.safetensors.*cannot be written.*File too large"):
            write_checkpoint(pipe, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "part"), [(miniatures.sd3, "unet is missing"), (miniatures.flux, "unet is missing")])
def test_other_families_are_sent_to_the_folder_format(make: Any, part: str) -> None:
    with pytest.raises(PipelineError, match=rf"{part}.*UNet2DConditionModel.*save_pretrained\(folder\)"):
        original_checkpoint(make())


def test_another_decoder_is_refused() -> None:
    pipe = checkpoints.sd1()
    pipe.register_modules(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    with pytest.raises(
        PipelineError, match="vae is of the kind AutoencoderTiny and has to be of the kind AutoencoderKL"
    ):
        original_checkpoint(pipe)


def test_weights_without_a_place_are_refused() -> None:
    pipe = checkpoints.sd1(time_cond_proj_dim=8)
    with pytest.raises(PipelineError, match=r"time_embedding\.cond_proj\.weight has no place.*save_pretrained"):
        original_checkpoint(pipe)
    pipe = checkpoints.sd1()
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(miniatures.WIDTH, miniatures.WIDTH))
    with pytest.raises(PipelineError, match=r"attn2\.processor\.to_k_ip.* has no place"):
        original_checkpoint(pipe)


def test_an_offloaded_model_is_refused() -> None:
    pipe = checkpoints.sd1()
    pipe.unet.to("meta")
    with pytest.raises(PipelineError, match="has no values: the model is offloaded"):
        original_checkpoint(pipe)
