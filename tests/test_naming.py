"""Names in files of other programs, looked up in the model: against diffusers' own converters and classes."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from adapters import assert_same_changes, made, miniature
from miniatures import FAMILIES
from safetensors.torch import save_file
from torch import Tensor

from alignprop_pipe import load_adapter
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.checkpoint import unet_weights
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.adapters.keys import PIPELINES, UNETS
from alignprop_pipe.adapters.model_layers import found_in, names_for, names_in
from alignprop_pipe.adapters.naming import original_unet
from alignprop_pipe.adapters.reading import COMPONENTS
from alignprop_pipe.diffusion.single_file import CONFIGS
from alignprop_pipe.errors import AdapterError

WIDTH = 3072
T5 = "encoder_block_0_layer_0_SelfAttention_q"
CLIP = "text_model_encoder_layers_0_self_attn_q_proj"
CLIP_DOTTED = "text_model.encoder.layers.0.self_attn.q_proj"


def pair(
    layer: str, inputs: int = WIDTH, outputs: int = WIDTH, alpha: float | None = None, form: str = ""
) -> dict[str, Tensor]:
    """A LoRA of rank 2 on one layer; flat names have kohya's `lora_down` and an alpha."""
    generator = torch.Generator().manual_seed(len(layer) + inputs)
    down, up = (form or ("A B" if alpha is None else "down up")).split()
    found = {
        f"{layer}.lora_{down}.weight": torch.randn(2, inputs, generator=generator),
        f"{layer}.lora_{up}.weight": torch.randn(outputs, 2, generator=generator),
    }
    return found if alpha is None else {**found, f"{layer}.alpha": torch.tensor(alpha)}


def loaded(tensors: dict[str, Tensor], folder: Path) -> Adapter:
    save_file(tensors, folder / "theirs.safetensors")
    return Adapter.load(folder / "theirs.safetensors")


def acting(adapter: Adapter) -> dict[str, Tensor]:
    """What each layer's change does to one fixed input: as telling as the full matrix, and cheap for real widths."""
    return {
        f"{name}.{path}": f.up @ (f.down @ torch.linspace(-1, 1, f.down.shape[1])) * f.alpha / f.rank
        for name, layers in adapter.layers.items()
        for path, f in layers.items()
    }


def assert_acts_like(got: Adapter, wanted: dict[str, Tensor]) -> None:
    found = acting(got)
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(found[path], change, atol=1e-4, rtol=1e-5)


def refused(tensors: dict[str, Tensor], folder: Path) -> str:
    with pytest.raises(AdapterError) as refusal:
        loaded(tensors, folder)
    return str(refusal.value)


# --- the names of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_has_the_names_of_every_model_of_it(family: str) -> None:
    pipe = miniature(family)
    kind = type(pipe).__name__
    for name in ("unet", "transformer"):
        if name in pipe.components:
            known = names_for(kind, name, "xl" if "sdxl" in family else "v1")
            assert names_in(pipe.components[name]) <= known
            assert len(known) > 10


@pytest.mark.parametrize("family", PIPELINES)
def test_every_family_that_is_told_apart_can_be_asked(family: str) -> None:
    """And all of its names, flat ones too, are found again."""
    names = names_for(PIPELINES[family], "unet" if family in UNETS else "transformer", family)
    assert len(names) > 10
    for name in names:
        path = name.replace("#", "7")
        assert found_in(path, names) == path
        assert found_in(path.replace(".", "_"), names, flat=True) == path
        assert not found_in(f"{path}_", names)
        assert not found_in(f"{path.replace('.', '_')}_", names, flat=True)


def test_numbers_of_blocks_are_open_and_others_are_names() -> None:
    names = names_for("FluxPipeline", "transformer")
    assert {"transformer_blocks.#.ff.net.0.proj", "transformer_blocks.#.attn.to_out.0"} <= names
    assert not found_in("transformer_blocks.0.attn.to_out.1", names)
    assert not found_in("transformer_blocks.x.attn.to_out.0", names)
    assert names_for("NoPipeline", "transformer") == names_for("FluxPipeline", "nothing") == frozenset()
    assert names_for("SanaPipeline", "text_encoder") == frozenset()  # whose class is a base of several


@pytest.mark.parametrize("name", ["v1", "xl_base"])
def test_the_original_unet_has_the_layers_of_a_whole_checkpoint(name: str) -> None:
    """Every layer with its own number in it, by the names under which a checkpoint file is written."""
    small = {"block_out_channels": [32] * (4 if name == "v1" else 3), "transformer_layers_per_block": 1}
    small |= {"attention_head_dim": 8, "cross_attention_dim": 8, "projection_class_embeddings_input_dim": 8}
    stored: Any = diffusers.UNet2DConditionModel.load_config(str(CONFIGS / name / "unet"))
    config: Any = {**stored, **small}
    unet: Any = diffusers.UNet2DConditionModel.from_config({key: v for key, v in config.items() if v is not None})
    for number, weight in enumerate(unet.parameters()):
        weight.data.fill_(number)
    ours = {float(weight.detach().flatten()[0]): key for key, weight in unet.named_parameters()}
    names, looked_up = names_in(unet), 0
    for original, weight in unet_weights(unet.requires_grad_(False)).items():
        path = original.removesuffix(".weight")
        if original.endswith(".weight") and weight.ndim > 1:
            looked_up += 1
            found = found_in(original_unet(path.replace(".", "_"), 2), names, flat=True)
            assert f"{found or path}.weight" == ours[float(weight.flatten()[0])], original
    assert looked_up > 150


# --- names that are none ---------------------------------------------------------------------------------------------

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
NONE = [
    (pair(f"lora_unet_{ATTENTION.replace('.', '_')}_to_q_", 320, 320, 1.0), "Stable Diffusion 1's UNet"),
    (pair(f"unet.{ATTENTION}.to_q_", 320, 320), "Stable Diffusion 1's UNet"),
    (pair(f"unet.{ATTENTION}.to_out.1", 320, 320), "Stable Diffusion 1's UNet"),
    (pair("unet.down_blocks.0.attentions.0.attn1.to_q", 320, 320), "Stable Diffusion 1's UNet"),
    (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k_", 2048, 640, 1.0), "Stable Diffusion"),
    (pair("lora_te2_text_model_encoder_layers_0_mlp_fc3", 1280, 1280, 1.0), "text_encoder_2"),
    (pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj_", 768, 768, 1.0), "text_encoder"),
    (pair("transformer.single_transformer_blocks.0.attn.to_q_"), "FluxTransformer2DModel"),
    (pair("lora_unet_double_blocks_0_img_attn_qkv_", WIDTH, 3 * WIDTH, 1.0), "FluxTransformer2DModel"),
    (pair("base_model.model.single_transformer_blocks.0.attn.to_x"), "FluxTransformer2DModel"),
    (pair("diffusion_model.layers.0.attention.to_q_", 3840), "ZImageTransformer2DModel"),
    (pair("diffusion_model.blocks.0.self_attn.q_", 1536), "WanTransformer3DModel"),
    (pair("transformer.blocks.0.attn1.to_q.x", 1536), "WanTransformer3DModel"),
    (pair("lycoris_joint_blocks_0_x_block_attn_qk", 1536, 1536, 1.0), "SD3Transformer2DModel"),
    (pair("transformer.transformer_blocks.0.ff.conv_deep", 2240), "SanaTransformer2DModel"),
]


@pytest.mark.parametrize(("tensors", "model"), NONE, ids=[next(iter(tensors)) for tensors, _ in NONE])
@pytest.mark.parametrize("with_others", [False, True])
def test_a_name_that_is_no_layer_is_refused_by_its_name_in_the_file(
    tensors: dict[str, Tensor], model: str, with_others: bool, tmp_path: Path
) -> None:
    """Alone and among layers that are there."""
    wrong = next(iter(tensors)).partition(".lora_")[0]
    good = re.sub(r"_$|\.x$", "", wrong)
    others = {key.replace(wrong, good): tensor.clone() for key, tensor in tensors.items()}
    said = refused({**(others if with_others and good != wrong else {}), **tensors}, tmp_path)
    assert f"'{wrong}' is no layer of {model}" in said
    verdicts = inspect_adapter(tmp_path / "theirs.safetensors").programs
    assert not any(verdict.loads for verdict in verdicts if not wrong.startswith("diffusion_model."))


def test_a_fused_projection_is_called_one(tmp_path: Path) -> None:
    assert "but a fused projection" in refused(pair(f"unet.{ATTENTION}.to_qkv", 320, 960), tmp_path)
    assert "but a fused projection" not in refused(pair(f"unet.{ATTENTION}.to_x", 320, 320), tmp_path)


@pytest.mark.parametrize("name", ["diffusion_model.blocks.0.block.attn.to_q", "lora_unet_nothing"])
def test_a_model_that_nobody_knows(name: str, tmp_path: Path) -> None:
    assert f"which model has a layer '{name}' is not known here" in refused(pair(name), tmp_path)


# --- names of other programs -----------------------------------------------------------------------------------------

QKV, MLP = 3 * WIDTH, 7 * WIDTH
NATIVE_FLUX = pair("diffusion_model.double_blocks.0.txt_attn.qkv", WIDTH, QKV) | pair(
    "diffusion_model.single_blocks.1.linear1", WIDTH, MLP
)
HUNYUAN = {
    **pair("transformer.double_blocks.0.img_attn_qkv", WIDTH, QKV),
    **pair("transformer.double_blocks.0.txt_attn_qkv", WIDTH, QKV),
    **pair("transformer.double_blocks.0.img_attn_proj"),
    **pair("transformer.double_blocks.0.txt_mlp.fc1", WIDTH, 64),
    **pair("transformer.double_blocks.0.img_mod.linear", WIDTH, 64),
    **pair("transformer.single_blocks.39.linear1", WIDTH, MLP),
    **pair("transformer.single_blocks.39.linear2", 64, WIDTH),
    **pair("transformer.single_blocks.39.modulation.linear", WIDTH, 64),
    **pair("transformer.txt_in.individual_token_refiner.blocks.1.self_attn_qkv", WIDTH, QKV),
    **pair("transformer.txt_in.individual_token_refiner.blocks.1.mlp.fc2", 64, WIDTH),
    **pair("transformer.txt_in.input_embedder", 64, WIDTH),
    **pair("transformer.time_in.mlp.2", 64, WIDTH),
}
HUNYUAN_SHARED = {key: tensor for key, tensor in HUNYUAN.items() if "refiner" not in key}
"""Without the refiner's, of which diffusers' converter takes apart the down matrix."""
LUMINA = {
    f"diffusion_model.{place}.{key}": tensor
    for place in ("layers.0", "noise_refiner.0")
    for layer, rows in (("attention.qkv", 3840), ("attention.out", 2304), ("adaLN_modulation.1", 64),
                        *((f"feed_forward.w{n}", 64) for n in (1, 2, 3)))
    for key, tensor in pair(layer, 2304, rows).items()
}  # fmt: skip
Z_IMAGE = {
    **pair("lora_unet_layers_0_attention_qkv", 3840, 3 * 3840, 1.0),
    **pair("lora_unet_layers_0_attention_out", 3840, 3840, 1.0),
    **pair("lora_unet_noise_refiner_1_feed_forward_w1", 3840, 64, 4.0),
    **pair("lora_unet_layers_3_adaLN_modulation_0", 256, 64, 4.0),
}
FLUX2 = {
    **pair("diffusion_model.double_blocks.0.img_attn.qkv", 6144, 3 * 6144),
    **pair("diffusion_model.double_blocks.0.txt_mlp.0", 6144, 64),
    **pair("diffusion_model.single_blocks.3.linear1", 6144, 64),
    **pair("diffusion_model.single_blocks.3.linear2", 64, 6144),
    **pair("diffusion_model.double_stream_modulation_img.lin", 6144, 64),
    **pair("diffusion_model.time_in.in_layer", 256, 6144),
}
WAN = {
    **pair("diffusion_model.blocks.0.self_attn.q", 1536, 1536),
    **pair("diffusion_model.blocks.0.self_attn.k", 1536, 1536),
    **pair("diffusion_model.blocks.0.self_attn.v", 1536, 1536),
    **pair("diffusion_model.blocks.0.self_attn.o", 1536, 1536),
    **pair("diffusion_model.blocks.0.cross_attn.q", 1536, 1536),
    **pair("diffusion_model.blocks.0.cross_attn.k", 1536, 1536),
    **pair("diffusion_model.blocks.0.cross_attn.v", 1536, 1536),
    **pair("diffusion_model.blocks.0.cross_attn.o", 1536, 1536),
    **pair("diffusion_model.blocks.0.ffn.0", 1536, 64),
    **pair("diffusion_model.blocks.0.ffn.2", 64, 1536),
}
QWEN = pair("lora_unet_transformer_blocks_0_img_mlp_net_2", 64, WIDTH, 1.0) | pair(
    "lora_unet_transformer_blocks_0_attn_add_q_proj", WIDTH, WIDTH, 1.0
)
XLABS = {
    f"double_blocks.0.processor.{layer}.{matrix}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for layer, rows in (("qkv_lora1", QKV), ("proj_lora1", WIDTH), ("qkv_lora2", QKV), ("proj_lora2", WIDTH))
    for matrix, shape in (("down", (2, WIDTH)), ("up", (rows, 2)))
}
SDXL = {
    **pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640, 3.0),
    **pair("lora_unet_middle_block_1_proj_in", 1280, 1280, 3.0),
    **pair("lora_unet_output_blocks_0_1_transformer_blocks_9_ff_net_0_proj", 1280, 64, 3.0),
    **pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, 3.0),
    **pair("lora_te2_text_model_encoder_layers_31_mlp_fc1", 1280, 64, 3.0),
}
SHARED = [
    ("FluxPipeline", XLABS), ("FluxPipeline", pair("lora_unet_double_blocks_0_img_attn_qkv", WIDTH, QKV, 8.0)),
    ("FluxPipeline", pair("lora_transformer_single_transformer_blocks_0_attn_to_q", WIDTH, WIDTH, 8.0)),
    ("HunyuanVideoPipeline", HUNYUAN_SHARED), ("Lumina2Pipeline", LUMINA), ("ZImagePipeline", Z_IMAGE),
    ("Flux2Pipeline", FLUX2), ("WanPipeline", WAN), ("QwenImagePipeline", QWEN), ("StableDiffusionXLPipeline", SDXL),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pipeline", "tensors"), SHARED, ids=[f"{name}-{len(tensors)}" for name, tensors in SHARED])
def test_what_diffusers_reads_too_is_the_same_change(pipeline: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Of the stock class's own converter."""
    found = loaded({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path)
    assert found.base.base_class == pipeline
    kind: Any = getattr(diffusers, pipeline)
    options = {"unet_config": SimpleNamespace(layers_per_block=2)} if pipeline == "StableDiffusionXLPipeline" else {}
    state = kind.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, **options)
    if isinstance(state, tuple):  # with alphas, under the names of 2023
        save_file({**state[0]}, tmp_path / "old.safetensors")
        wanted = Adapter.load(tmp_path / "old.safetensors")
        assert {float(alpha) for alpha in state[1].values()} == {3.0}
        threefold = {n: {p: Factors(f.down, f.up, 3.0) for p, f in part.items()} for n, part in wanted.layers.items()}
        assert_acts_like(found, acting(Adapter(threefold)))
        return
    wanted = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            wanted[path] = state[f"{path}.lora_B.weight"] @ (down @ torch.linspace(-1, 1, down.shape[1]))
    assert_acts_like(found, wanted)


def test_the_halves_of_the_last_norm_are_swapped(tmp_path: Path) -> None:
    """As diffusers' converters for whole checkpoints do; that for LoRA leaves those of Flux 2 as they are."""
    for name, tensors in (("Flux2", FLUX2), ("HunyuanVideo", HUNYUAN)):
        last = pair(f"{next(iter(tensors)).partition('.')[0]}.final_layer.adaLN_modulation.1", 8, 6)
        up = next(tensor for key, tensor in last.items() if "lora_B" in key)
        found = loaded({**{k: t.clone() for k, t in tensors.items()}, **last}, tmp_path)
        assert torch.equal(found.layers["transformer"]["norm_out.linear"].up, torch.cat([up[3:], up[:3]])), name


def musubi(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dotted names by kohya's flat ones, with an alpha that halves them."""
    found = {}
    for key, tensor in tensors.items():
        layer, _, matrix = key.partition(".lora_")
        flat = f"lora_unet_{layer.partition('.')[2].replace('.', '_')}"
        found[f"{flat}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = tensor.clone()
        found[f"{flat}.alpha"] = torch.tensor(1.0)
    return found


@pytest.mark.parametrize("tensors", [HUNYUAN, LUMINA, FLUX2, WAN, NATIVE_FLUX], ids=lambda t: next(iter(t)))
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "transformer.", "diffusion_model.", "default"])
def test_a_models_own_names_are_read_in_every_habit(prefix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """PEFT's (Flux's were refused with a key that is not in the file), bare ones and flat ones with alphas."""
    wanted = loaded({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path)
    bare = {key.partition(".")[2]: tensor.clone() for key, tensor in tensors.items()}
    dotted = {key.replace("_A.", "_A.default.").replace("_B.", "_B.default."): t for key, t in bare.items()}
    other = dotted if prefix == "default" else {f"{prefix}{key}": tensor for key, tensor in bare.items()}
    assert_acts_like(loaded(other, tmp_path), acting(wanted))
    halved = {path: change / 2 for path, change in acting(wanted).items()}
    assert_acts_like(loaded(musubi(tensors), tmp_path), halved)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "own", "lora_transformer_", "lycoris_", "lora_unet_"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan", "ltx", "pixart"])
def test_diffusers_names_are_read_in_every_habit(family: str, prefix: str, tmp_path: Path) -> None:
    """PEFT's, bare, OneTrainer's (`lora_transformer_`) and those of LyCORIS and kohya; alone and into a pipeline."""
    adapter = made(family)
    (name,) = adapter.layers
    prefix = f"{name}." if prefix == "own" else prefix
    flat = prefix.endswith("_")
    tensors = {}
    for path, factors in adapter.layers[name].items():
        layer = prefix + (path.replace(".", "_") if flat else path)
        down, up = ("down", "up") if flat else ("A", "B")
        tensors[f"{layer}.lora_{down}.weight"] = factors.down.clone()
        tensors[f"{layer}.lora_{up}.weight"] = factors.up.clone() if flat else factors.folded().clone()
        if flat:
            tensors[f"{layer}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, tmp_path / "theirs.safetensors")
    if family not in ("ltx", "pixart"):  # which are told by their widths, that a miniature has not
        assert_same_changes(Adapter.load(tmp_path / "theirs.safetensors"), adapter)
    pipe = FAMILIES[family].make()
    load_adapter(pipe, tmp_path / "theirs.safetensors")
    assert_same_changes(Adapter.of(pipe), adapter)


@pytest.mark.parametrize(
    ("pipeline", "layers", "texts"),
    [
        ("FluxPipeline", ["lora_unet_double_blocks_0_img_mlp_0"], {f"lora_te3_{T5}": 2, f"lora_te1_{CLIP}": 1}),
        ("FluxPipeline", ["lora_transformer_single_transformer_blocks_0_attn_to_q"],
         {f"lora_te2_{T5}": 2, f"lora_te1_{CLIP}": 1}),
        ("FluxPipeline", ["transformer.single_transformer_blocks.0.attn.to_q"],
         {"text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": 2, f"text_encoder.{CLIP_DOTTED}": 1}),
        ("StableDiffusion3Pipeline", ["lora_unet_joint_blocks_0_x_block_attn_proj"],
         {f"lora_te3_{T5}": 3, f"lora_te2_{CLIP}": 2, f"lora_te1_{CLIP}": 1}),
        ("StableDiffusion3Pipeline", ["lora_transformer_transformer_blocks_0_attn_add_q_proj"],
         {f"lora_te3_{T5}": 3, f"lora_te1_{CLIP}": 1}),
        ("StableDiffusion3Pipeline", ["lora_transformer.transformer_blocks.0.attn.add_q_proj"],
         {f"lora_te2.{CLIP_DOTTED}": 2}),
        ("StableDiffusionXLPipeline", ["lora_unet_input_blocks_4_1_proj_in"],
         {f"text_encoders.clip_g.transformer.{CLIP_DOTTED}": 2, "lora_te1_encoder_layers_0_mlp_fc1": 1}),
    ],
)  # fmt: skip
def test_text_encoders_are_told_by_their_layers(
    pipeline: str, layers: list[str], texts: dict[str, int], tmp_path: Path
) -> None:
    """Programs number them by what they are; Flux has T5 as its second."""
    tensors: dict[str, Tensor] = {}
    for layer in (*layers, *texts):
        width = WIDTH if "Flux" in pipeline else 1536
        tensors |= pair(layer, width if layer in layers else 768, 64, 1.0)
    found = loaded(tensors, tmp_path)
    assert found.base.base_class == pipeline
    wanted = {f"text_encoder_{number}".removesuffix("_1") for number in texts.values()}
    assert set(found.layers) - {"unet", "transformer"} == wanted
    assert set(found.layers) <= set(COMPONENTS)


def test_one_layer_by_two_names_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", WIDTH, QKV, 1.0)
    tensors |= pair("transformer.transformer_blocks.0.attn.to_k")
    assert "both mean transformer_blocks.0.attn.to_k" in refused(tensors, tmp_path)
    rows = pair("diffusion_model.layers.0.attention.qkv", 3840, 3841)
    assert "3841 rows cannot be those of" in refused(rows, tmp_path)


ODD = {
    "a trailing underscore": (r"_attn1_to_q\.", "_attn1_to_q_."),
    "doubled underscores": ("_attn1_to_q", "__attn1_to_q"),
    "the wrong case": ("_to_q", "_To_Q"),
    "a number of no text encoder": ("^lora_te_", "lora_te4_"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_name_of_no_layer_is_told_as_the_file_has_it(name: str, tmp_path: Path) -> None:
    """Also where a converter of diffusers has changed it to something else before it was found to be none."""
    old, new = ODD[name]
    tensors = {re.sub(old, new, key): tensor for key, tensor in made("sd15", text=True).kohya_tensors().items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    pipe = FAMILIES["sd15"].make()
    for use in (Adapter.load, lambda path: load_adapter(pipe, path)):
        with pytest.raises(AdapterError, match=rf"'\w*{new.rstrip('.')}\w*' is no layer of"):
            use(tmp_path / "theirs.safetensors")
    assert not hasattr(pipe.unet, "peft_config")


def test_layers_of_two_models_in_one_file(tmp_path: Path) -> None:
    """The component of the other model is none that the pipeline has."""
    flux = {key: tensor for key, tensor in made("flux").items() if "single" in key}
    save_file({**made("sd15"), **flux}, tmp_path / "theirs.safetensors")
    with pytest.raises(AdapterError, match=r"transformer.single_.* is no layer of Stable Diffusion 1's UNet"):
        Adapter.load(tmp_path / "theirs.safetensors")
