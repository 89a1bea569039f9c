"""An adapter between files: every format to every other, nothing lost; what a foreign file is, told by its keys."""

import itertools
import json
from pathlib import Path
from typing import Any

import aligning
import pytest
import torch
from adapters import assert_same_changes, assert_same_tensors, changes, made, miniature, places
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_pipe import load_adapter
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import save_adapter
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import Base, carried
from alignprop_pipe.adapters.keys import PIPELINES, duplicates, family_of, place_of, split_key
from alignprop_pipe.adapters.kohya import own_layers, to_kohya
from alignprop_pipe.errors import AdapterError

KOHYA = ["sd15", "sdxl", "flux", "wan", "sd3"]
"""Miniatures that kohya's scripts have names for."""
ALL = [*KOHYA, "ltx", "pixart"]


def through(adapter: Adapter, *formats: str, folder: Path) -> Adapter:
    """Saved in one format after the other, each read from the file of the one before."""
    for number, form in enumerate(formats):
        (file,) = adapter.save(folder / f"{number}-{form}.safetensors", format=form)
        adapter = Adapter.load(file)
    return adapter


def pictures(pipe: Any, family: str) -> Tensor:
    with torch.no_grad():
        return pipe(
            prompt=["a red dog"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            return_dict=False,
            **FAMILIES[family].call(1),
        )[0]


# --- round trips -----------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40)
def test_diffusers_to_kohya_and_back_is_equal_to_the_bit(data: st.DataObject, tmp_path_factory) -> None:
    """Any ranks, alphas, components and subsets of layers: a file of diffusers' has its alphas in its weights."""
    family = data.draw(st.sampled_from(KOHYA))
    adapter = _drawn(data, family)
    folder = tmp_path_factory.mktemp("there")
    (first,) = adapter.save(folder / "first.safetensors", format="diffusers")
    back = through(Adapter.load(first), "kohya", "diffusers", folder=folder)
    assert_same_tensors(back, load_file(first))
    assert back.base == Adapter.load(first).base


@given(data=st.data())
@settings(max_examples=40)
def test_kohya_to_diffusers_and_back_is_the_same_change(data: st.DataObject, tmp_path_factory) -> None:
    """To the bit where alpha / rank is a power of two, else to a rounding of the up matrix."""
    family = data.draw(st.sampled_from(KOHYA))
    exact = data.draw(st.booleans())
    adapter = _drawn(data, family, exact=exact)
    there = through(adapter, "kohya", folder=tmp_path_factory.mktemp("there"))
    for name, layers in adapter.layers.items():
        for path, factors in layers.items():
            got = there.layers[name][path]
            if family != "flux":  # whose layers are fused in kohya's names, and may have several scales
                assert (got.alpha, got.rank) == (factors.alpha, factors.rank)
            assert torch.equal(got.down, factors.down)
    back = through(there, "diffusers", "kohya", folder=tmp_path_factory.mktemp("back"))
    found, wanted = changes(back), changes(adapter)
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        if exact:
            assert torch.equal(found[path], change)
        torch.testing.assert_close(found[path], change, rtol=1e-5, atol=1e-5)


def _drawn(data: st.DataObject, family: str, exact: bool = False) -> Adapter:
    here = places(family, text=family != "wan")
    names = data.draw(st.lists(st.sampled_from(sorted(here)), min_size=1, unique=True))
    if family in ("flux", "wan"):  # a file without a transformer says nothing of its model
        names = sorted({*names, "transformer"})
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    layers: Layers = {}
    for name in sorted(names, key=lambda name: (name.startswith("text"), name)):
        chosen = data.draw(st.lists(st.sampled_from(here[name]), min_size=1, max_size=6, unique=True))
        layers[name] = {}
        for path, outputs, inputs in chosen:
            rank = data.draw(st.integers(1, 5))
            scale = 2.0 ** data.draw(st.integers(-3, 3))
            alpha = scale * rank if exact else data.draw(st.floats(0.125, 64, width=16))
            down = torch.randn(rank, inputs, generator=generator)
            layers[name][path] = Factors(down, torch.randn(outputs, rank, generator=generator), float(alpha))
    return Adapter(layers, made(family).base)


@pytest.mark.parametrize(("alpha", "rank"), [(1.0, 3), (5.0, 3), (7.0, 6), (0.1, 4)])
def test_a_folded_alpha_is_off_by_one_rounding_at_most(alpha: float, rank: int) -> None:
    up = torch.randn(64, rank, generator=torch.Generator().manual_seed(0))
    folded = Factors(torch.ones(rank, 4), up, alpha).folded()
    exact = up.double() * alpha / rank
    step = (torch.nextafter(folded.abs(), torch.tensor(torch.inf)) - folded.abs()).double()
    assert bool(((folded.double() - exact).abs() <= step).all())
    assert torch.equal(Factors(torch.ones(rank, 4), up, rank / 4).folded(), up / 4)


@pytest.mark.parametrize("family", ALL)
def test_every_format_to_every_other(family: str, tmp_path: Path) -> None:
    adapter = made(family, ranks=(1, 2, 3), text=family in ("sd15", "sdxl", "sd3"))
    formats = ["diffusers", "comfyui", *(["kohya"] if family in KOHYA else [])]
    for one, other in itertools.permutations(formats, 2):
        folder = tmp_path / one / other
        got = through(adapter, one, other, folder=folder)
        assert_same_changes(got, adapter)
        assert got.base == adapter.base


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "wan"])
def test_pictures_are_the_same_from_every_file(family: str, tmp_path: Path) -> None:
    """Text encoders too, which the stock loaders read from the same files."""
    text = family in ("sd15", "sdxl")
    adapter = made(family, ranks=(2, 3), text=text, size=0.2)  # a strong one makes pictures of its rounding
    pipe = FAMILIES[family].make()
    base = pictures(pipe, family)
    load_adapter(pipe, adapter)
    wanted = pictures(pipe, family)
    assert (wanted - base).abs().max() > 1e-3
    for form in ("diffusers", "comfyui", "kohya"):
        (file,) = adapter.save(tmp_path / f"{form}.safetensors", format=form)
        load_adapter(pipe, file)
        torch.testing.assert_close(pictures(pipe, family), wanted, atol=1e-5, rtol=0)
        if form != "kohya" or text:  # diffusers' converter of kohya's Flux knows one width alone
            stock = FAMILIES[family].make()
            stock.load_lora_weights(str(file))
            torch.testing.assert_close(pictures(stock, family), wanted, atol=1e-5, rtol=0)


def test_text_encoders_stay_with_the_pipeline(tmp_path: Path) -> None:
    """What was loaded is saved again: they are no denoisers, and still a part of the adapter."""
    adapter, pipe = made("sdxl", text=True), FAMILIES["sdxl"].make()
    load_adapter(pipe, adapter)
    assert_same_changes(Adapter.of(pipe), adapter)
    files = save_adapter(pipe, tmp_path / "a.safetensors")
    for file in files:
        assert_same_changes(Adapter.load(file), adapter)


def test_names_of_text_encoders(tmp_path: Path) -> None:
    def keys(family: str, form: str) -> set[str]:
        (file,) = made(family, text=True).save(tmp_path / f"{family}-{form}.safetensors", format=form)
        return set(load_file(file))

    fc1 = "text_model_encoder_layers_0_mlp_fc1.alpha"
    assert f"lora_te_{fc1}" in keys("sd15", "comfyui")
    assert {f"lora_te1_{fc1}", f"lora_te2_{fc1}"} <= keys("sdxl", "kohya")
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in keys("sd3", "comfyui")


def test_the_second_of_two_transformers_stays_the_second(tmp_path: Path) -> None:
    """ComfyUI gets a file for each, in which both have the same names."""
    one, base = made("wan").layers["transformer"], made("wan").base
    two = {path: Factors(f.down, -f.up, f.alpha) for path, f in one.items()}
    adapter = Adapter({"transformer": one, "transformer_2": two}, base)
    files = adapter.save(tmp_path / "a.safetensors", format="comfyui")
    assert [file.name for file in files] == ["a.safetensors", "a-transformer_2.safetensors"]
    assert_same_changes(Adapter.load(files[0]), Adapter({"transformer": one}))
    assert_same_changes(through(Adapter.load(files[1]), "diffusers", folder=tmp_path), Adapter({"transformer_2": two}))


def test_a_text_encoder_alone(tmp_path: Path) -> None:
    whole = made("sdxl", text=True)
    adapter = Adapter({"text_encoder_2": whole.layers["text_encoder_2"]}, whole.base)
    for form in ("diffusers", "comfyui", "kohya"):
        assert_same_changes(through(adapter, form, folder=tmp_path / form), adapter)


@pytest.mark.parametrize("family", ["ltx", "pixart"])
def test_models_that_kohya_has_no_names_for(family: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="have no names for .*'comfyui'"):
        made(family).save(tmp_path / "a.safetensors", format="kohya")
    assert not list(tmp_path.iterdir())


def test_layers_that_kohya_has_no_names_for(tmp_path: Path) -> None:
    adapter = made("flux")
    pair = next(iter(adapter.layers["transformer"].values()))
    with pytest.raises(AdapterError, match="no name for transformer_blocks.0.attn.extra"):
        Adapter({"transformer": {"transformer_blocks.0.attn.extra": pair}}, adapter.base).kohya_tensors()
    wan = Adapter({"transformer": {}, "transformer_2": {"a": pair}}, made("wan").base)
    with pytest.raises(AdapterError, match="one transformer"):
        wan.kohya_tensors()


def test_a_text_encoder_that_comfyui_has_no_names_for(tmp_path: Path) -> None:
    adapter = made("flux")
    pair = next(iter(adapter.layers["transformer"].values()))
    layers = {**adapter.layers, "text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": pair}}
    with pytest.raises(AdapterError, match="text_encoder_2, which is no CLIP"):
        Adapter(layers, adapter.base).save(tmp_path / "a.safetensors", format="comfyui")


def test_diffusers_reads_flux_by_kohyas_names() -> None:
    """Its converter knows the real width alone, 3072; the same change comes out of our factors laid side by side."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for number, (path, outputs, inputs) in enumerate(
        [
            ("transformer_blocks.0.attn.to_q", 3072, 3072),
            ("transformer_blocks.0.attn.to_k", 3072, 3072),
            ("transformer_blocks.0.attn.to_v", 3072, 3072),
            ("transformer_blocks.0.norm1.linear", 64, 3072),
            ("single_transformer_blocks.2.attn.to_q", 3072, 3072),
            ("single_transformer_blocks.2.proj_mlp", 12288, 3072),
            ("single_transformer_blocks.2.proj_out", 3072, 15360),
        ]
    ):
        rank = 2 if number < 3 else 1 + number % 3
        down = torch.randn(rank, inputs, generator=generator)
        layers[path] = Factors(down, torch.randn(outputs, rank, generator=generator), 2.0 * rank)
    adapter = Adapter({"transformer": layers}, Base("", "FluxPipeline", {"transformer": "FluxTransformer2DModel"}))
    state: Any = FluxPipeline.lora_state_dict(adapter.kohya_tensors())
    for path, factors in layers.items():
        up, down = (state[f"transformer.{path}.lora_{matrix}.weight"] for matrix in "BA")
        rows = torch.arange(0, factors.up.shape[0], 97)
        torch.testing.assert_close(up[rows] @ down, 2 * factors.up[rows] @ factors.down, atol=1e-4, rtol=1e-5)


@given(
    ranks=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
    alphas=st.lists(st.floats(0.25, 8, width=16), min_size=4, max_size=4),
)
def test_layers_side_by_side_come_apart_again(ranks: list[int], alphas: list[float]) -> None:
    """Rank 0 stands for a layer that the adapter leaves alone."""
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    layers = {
        f"single_transformer_blocks.3.{name}": Factors(
            torch.randn(rank, 5), torch.randn(24 if name == "proj_mlp" else 6, rank), alpha
        )
        for name, rank, alpha in zip(names, ranks, alphas, strict=True)
        if rank
    }
    (together,) = to_kohya("FluxTransformer2DModel", layers).items()
    assert together[0] == "single_blocks_3_linear1"
    assert together[1].up.shape == (42, sum(ranks))
    apart = own_layers("FluxTransformer2DModel", *together)
    assert_same_changes(Adapter({"transformer": apart}), Adapter({"transformer": layers}))


def test_untrained_layers_side_by_side_all_come_back() -> None:
    layers = {
        f"transformer_blocks.0.attn.{name}": Factors(torch.randn(2, 4), torch.zeros(4, 2), 2.0)
        for name in ("to_q", "to_k", "to_v")
    }
    (together,) = to_kohya("FluxTransformer2DModel", layers).items()
    assert own_layers("FluxTransformer2DModel", *together).keys() == layers.keys()


@pytest.mark.parametrize("name", ["double_blocks_0_extra", "blocks_0_img_mlp_0", "nothing"])
def test_names_that_are_none_of_kohyas(name: str) -> None:
    assert own_layers("FluxTransformer2DModel", name, Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)) == {}


def test_rows_that_cannot_be_those_of_three_layers() -> None:
    with pytest.raises(ValueError, match="4 rows cannot be those of"):
        pair = Factors(torch.ones(1, 2), torch.ones(4, 1), 1.0)
        own_layers("FluxTransformer2DModel", "double_blocks_0_img_attn_qkv", pair)


def test_dtype_of_the_file(tmp_path: Path) -> None:
    (file,) = made("sd15").save(tmp_path / "a.safetensors", format="comfyui", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["a.bin", "a"])
def test_a_path_that_is_no_safetensors_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"'\.safetensors'"):
        made("sd15").save(tmp_path / name)


@pytest.mark.usefixtures("unchecked")
def test_a_format_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'diffusers', 'comfyui', 'kohya' or 'both'"):
        made("sd15").save(tmp_path / "a.safetensors", format="webui")


def test_an_empty_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is empty"):
        Adapter({}).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="is empty"):
        save_file({}, tmp_path / "a.safetensors")
        Adapter.load(tmp_path / "a.safetensors")


# --- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_that_hides_a_file_is_put_right(tmp_path: Path) -> None:
    """What describes another file is not carried over; what describes the adapter is."""
    theirs = {
        "format": "pt", "ss_base_model_version": "sd_v1", "ss_network_dim": "128", "ss_network_alpha": "1",
        "sshs_model_hash": "0a", "ss_tag_frequency": '{"a": 1}', "modelspec.author": "somebody",
        "modelspec.architecture": "stable-diffusion-v1/lora", "lora_adapter_metadata": '{"unet.lora_alpha": 99}',
        "alignprop.denoiser": "unet", "alignprop.format": "1", "alignprop.reward": "clip",
    }  # fmt: skip
    adapter = made("sdxl")
    (file,) = Adapter(adapter.layers, adapter.base, theirs).save(tmp_path / "k.safetensors", format="kohya")
    header = Adapter.load(file).metadata
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "5")
    assert header["ss_tag_frequency"] == '{"a": 1}'
    assert header["modelspec.author"] == "somebody"
    assert header["alignprop.reward"] == "clip"
    assert header["alignprop.format"] == "1"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert not {"sshs_model_hash", "lora_adapter_metadata", "alignprop.lora_adapter_metadata"} & header.keys()
    (file,) = Adapter.load(file).save(tmp_path / "d.safetensors", format="diffusers")
    assert not {"ss_network_dim", "alignprop.denoiser"} & Adapter.load(file).metadata.keys()


def test_of_an_unknown_model_the_header_keeps_what_it_says() -> None:
    assert carried({"ss_base_model_version": "new", "format": "pt"}, Base()) == {"ss_base_model_version": "new"}


def test_alpha_in_the_header_of_diffusers_is_taken_once(tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.proj_in"
    pair = {f"unet.{layer}.lora_A.weight": torch.ones(2, 3), f"unet.{layer}.lora_B.weight": torch.ones(3, 2)}
    settings_of_peft = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {}}
    save_file(pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings_of_peft)})
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert adapter.layers["unet"][layer].alpha == 8
    for form in ("diffusers", "kohya"):
        assert_same_changes(through(adapter, form, folder=tmp_path / form), adapter)


# --- whose file it is ------------------------------------------------------------------------------------------------


def keys_of(layer: str, width: int = 8, form: str = "A B") -> dict[str, Tensor]:
    names = [f"{layer}.lora_{matrix}.weight" for matrix in form.split()]
    return {names[0]: torch.ones(2, width), names[1]: torch.ones(6, 2)}


FLAT = "down up"
SAMPLES = [
    ("v1", keys_of("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, FLAT), {}),
    ("v1", keys_of("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 320), {}),
    ("v1", keys_of("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, FLAT), {}),
    ("v2", keys_of("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v", 1024, FLAT), {}),
    ("v2", keys_of("lora_unet_mid_block_attentions_0_proj_in", 1280, FLAT), {"ss_v2": "True"}),
    ("v2", keys_of("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1024, FLAT), {}),
    ("xl", keys_of("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, FLAT), {}),
    ("xl", keys_of("lora_unet_output_blocks_0_1_transformer_blocks_9_attn1_to_k", 1280, FLAT), {}),
    ("xl", keys_of("lora_te2_text_model_encoder_layers_31_mlp_fc1", 1280, FLAT), {}),
    ("xl", keys_of("unet.mid_block.resnets.0.conv1", 1280), {"ss_base_model_version": "sdxl_base_v1-0"}),
    ("SD3Transformer2DModel", keys_of("transformer.transformer_blocks.3.attn.add_q_proj", 1536), {}),
    ("SD3Transformer2DModel", keys_of("transformer.transformer_blocks.37.attn.to_q", 2432), {}),
    ("SD3Transformer2DModel", keys_of("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, FLAT), {}),
    ("FluxTransformer2DModel", keys_of("transformer.single_transformer_blocks.37.attn.to_q", 3072), {}),
    ("FluxTransformer2DModel", keys_of("transformer.transformer_blocks.0.attn.to_q", 3072)
     | keys_of("transformer.transformer_blocks.0.ff_context.net.2", 12288), {}),
    ("FluxTransformer2DModel", keys_of("base_model.model.transformer_blocks.0.attn.to_q", 3072),
     {"modelspec.architecture": "flux-1-dev/lora"}),
    ("Flux2Transformer2DModel", keys_of("diffusion_model.double_blocks.0.img_attn.qkv", 6144), {}),
    ("ChromaTransformer2DModel", keys_of("diffusion_model.distilled_guidance_layer.in_proj", 64), {}),
    ("Lumina2Transformer2DModel", keys_of("diffusion_model.layers.0.attention.qkv", 2304), {}),
    ("FluxTransformer2DModel", keys_of("lora_unet_double_blocks_18_img_attn_qkv", 3072, FLAT), {}),
    ("FluxTransformer2DModel", keys_of("diffusion_model.double_blocks.0.img_attn.qkv", 3072), {}),
    ("FluxTransformer2DModel", keys_of("lora_transformer_single_transformer_blocks_0_proj_mlp", 3072, FLAT), {}),
    ("Flux2Transformer2DModel", keys_of("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 6144), {}),
    ("HunyuanVideoTransformer3DModel", keys_of("transformer.double_blocks.0.img_attn_qkv", 3072), {}),
    ("HunyuanVideoTransformer3DModel", keys_of("transformer.single_transformer_blocks.39.attn.to_q", 3072), {}),
    ("WanTransformer3DModel", keys_of("transformer.blocks.0.attn1.to_q", 1536), {}),
    ("WanTransformer3DModel", keys_of("diffusion_model.blocks.0.cross_attn.k", 5120), {}),
    ("WanTransformer3DModel", keys_of("lora_unet_blocks_0_self_attn_q", 5120, FLAT), {}),
    ("LTXVideoTransformer3DModel", keys_of("diffusion_model.transformer_blocks.0.attn1.to_q", 2048), {}),
    ("PixArtTransformer2DModel", keys_of("transformer.transformer_blocks.0.attn1.to_q", 1152), {}),
    ("PixArtTransformer2DModel", keys_of("base_model.model.transformer_blocks.0.attn2.to_q", 1152), {}),
    ("CogVideoXTransformer3DModel", keys_of("transformer.transformer_blocks.0.attn1.to_q", 1920), {}),
    ("CogView4Transformer2DModel", keys_of("transformer.transformer_blocks.0.attn1.to_q", 4096), {}),
    ("SanaTransformer2DModel", keys_of("transformer.transformer_blocks.0.attn2.to_q", 2240), {}),
    ("MochiTransformer3DModel", keys_of("transformer.transformer_blocks.0.attn1.add_k_proj", 1536), {}),
    ("QwenImageTransformer2DModel", keys_of("transformer_blocks.0.attn.to_q", 3072), {}),
    ("QwenImageTransformer2DModel", keys_of("lora_unet_transformer_blocks_0_img_mlp_net_2", 12288, FLAT), {}),
    ("AuraFlowTransformer2DModel", keys_of("transformer.joint_transformer_blocks.0.attn.to_q", 3072), {}),
    ("Lumina2Transformer2DModel", keys_of("transformer.layers.0.attn.to_q", 2304), {}),
    ("ZImageTransformer2DModel", keys_of("diffusion_model.layers.0.attention.to_q", 3840), {}),
    ("HiDreamImageTransformer2DModel", keys_of("transformer.double_stream_blocks.0.block.attn1.to_q", 2560), {}),
    ("LTX2VideoTransformer3DModel", keys_of("diffusion_model.transformer_blocks.0.audio_attn1.to_q", 2048), {}),
    (
        "FluxTransformer2DModel",
        keys_of("transformer.x_embedder", 384) | keys_of("transformer.transformer_blocks.0.attn.to_q", 3072),
        {},
    ),
    ("", keys_of("transformer.something.new", 64), {}),
    ("", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tensors", "header"), SAMPLES, ids=lambda value: next(iter(value), ""))
def test_the_model_is_told_by_keys_and_shapes(family: str, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    assert family_of(tensors, header) == family
    base = Base.of_file(tensors, header)
    assert base.base_class == PIPELINES.get(family, "")
    assert list(base.families.values()) == ([family] if family else [])


@pytest.mark.parametrize("family", ALL)
def test_miniatures_are_told_without_a_header(family: str, tmp_path: Path) -> None:
    adapter = made(family, text=family == "sdxl")
    if family in ("ltx", "pixart"):  # told by their width, which is another one here
        assert family_of(dict(adapter), {}) == ""
        return
    assert family_of(dict(adapter), {}) == next(iter(adapter.base.families.values()))
    assert family_of(adapter.comfyui_tensors(), {}) == next(iter(adapter.base.families.values()))


def test_an_unknown_model_is_read_by_the_names_of_its_keys(tmp_path: Path) -> None:
    save_file(keys_of("transformer.something.new"), tmp_path / "a.safetensors")
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert list(adapter.layers["transformer"]) == ["something.new"]
    assert_same_changes(through(adapter, "diffusers", folder=tmp_path), adapter)


@pytest.mark.parametrize(
    ("key", "layer", "matrix"),
    [
        ("unet.a.b.lora_A.weight", "unet.a.b", "down"),
        ("a.lora_B.default.weight", "a", "up"),
        ("a.lora_A.default_0.weight", "a", "down"),
        ("lora_unet_a_b.lora_up.weight", "lora_unet_a_b", "up"),
        ("lora_unet_a_b.alpha", "lora_unet_a_b", "alpha"),
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q", "down"),
        ("text_encoder.a.q_proj.lora_linear_layer.up.weight", "text_encoder.a.q_proj", "up"),
        ("double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1", "up"),
    ],
)
def test_habits_of_keys(key: str, layer: str, matrix: str) -> None:
    assert split_key(key) == (layer, matrix)


@pytest.mark.parametrize("key", ["a.weight", "lora_A.weight", "a.lora_mid.weight", "a.lora_C.weight", "", ".alpha"])
def test_what_no_plain_lora_has(key: str) -> None:
    assert split_key(key) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("unet.a.attn1.to_q", "lora_unet_a_attn1_to_q"),
        ("unet.a.attn1.processor.to_out", "unet.a.attn1.to_out.0"),
        ("text_encoder.text_model.encoder.x", "text_encoder.encoder.x"),
        ("lora_te_text_model_x", "lora_te1_text_model_x"),
        ("transformer.a.b", "base_model.model.a.b"),
    ],
)
def test_one_layer_under_two_names(one: str, other: str) -> None:
    assert duplicates([one, "unet.c", other]) == (one, other)
    assert not duplicates([one, one])
    assert place_of(one).component == place_of(other).component


def test_other_names_of_denoisers_and_classes(tmp_path: Path) -> None:
    """A pipeline of somebody's own, with a prior next to the UNet: what the header says of it is enough."""
    pair = next(iter(made("sd15").layers["unet"].values()))
    base = Base("", "MyOwnPipeline", {"unet": "v1", "prior_prior": "PriorTransformer"})
    adapter = Adapter({"unet": {"mid_block.x": pair}, "prior_prior": {"transformer_blocks.0.attn1.to_q": pair}}, base)
    assert_same_changes(through(adapter, "diffusers", folder=tmp_path), adapter)
    wan = made("wan")
    own = Adapter(wan.layers, Base("", "MyOwnPipeline", wan.base.families))
    assert_same_changes(through(own, "comfyui", "diffusers", folder=tmp_path), wan)


def test_a_matrix_that_layers_share(tmp_path: Path) -> None:
    """Of a fused layer some converters give all three parts the same down matrix."""
    tensors = {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{m}.weight": torch.randn(9, 9) for m in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert len(adapter.layers["transformer"]) == 3
    assert_same_changes(through(adapter, "diffusers", folder=tmp_path), adapter)


def test_old_files_of_diffusers(tmp_path: Path) -> None:
    """The names of 2023, as `load_attn_procs` read them, and PEFT's without a component."""
    adapter = made("sd15")
    old, bare = {}, {}
    for path, factors in adapter.layers["unet"].items():
        name = f"unet.{path}".replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        old |= {f"{name}_lora.down.weight": factors.down, f"{name}_lora.up.weight": factors.folded()}
        bare |= {f"{path}.lora_A.weight": factors.down, f"{path}.lora_B.weight": factors.folded()}
    peft = {f"base_model.model.{key}": tensor.clone() for key, tensor in bare.items()}
    default = {key.replace(".weight", ".default.weight"): tensor.clone() for key, tensor in bare.items()}
    for tensors in (old, bare, peft, default):
        save_file(tensors, tmp_path / "a.safetensors")
        assert_same_changes(Adapter.load(tmp_path / "a.safetensors"), adapter)
        pipe = FAMILIES["sd15"].make()
        load_adapter(pipe, tmp_path / "a.safetensors")
        assert_same_changes(Adapter.of(pipe), adapter)


def test_sdxl_in_its_original_layout(tmp_path: Path) -> None:
    """As kohya's scripts name SDXL: `input_blocks_4_1_…` is `down_blocks.1.attentions.0.…`."""
    tensors = keys_of("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, FLAT)
    tensors |= {"lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(1, 4)}
    tensors |= {"lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = Adapter.load(tmp_path / "a.safetensors")
    paths = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in"}
    assert set(adapter.layers["unet"]) == paths
    assert repr(adapter) == "Adapter(StableDiffusionXLPipeline; unet: 2 layers of rank 2)"


def test_an_adapter_is_a_mapping() -> None:
    adapter = made("sd15")
    assert len(adapter) == len(list(adapter)) == len(dict(adapter))
    assert miniature("sd15").unet is not None


def test_a_large_adapter_is_a_dict_at_once(monkeypatch):
    """Reading it as a mapping folds each matrix once, not all of them for each."""
    factors = {f"block.{n}.to_q": Factors(torch.ones(2, 4), torch.ones(4, 2), alpha=1.0) for n in range(512)}
    adapter, folded = Adapter({"unet": factors}), []
    fold = Factors.folded
    monkeypatch.setattr(Factors, "folded", lambda self: folded.append(1) or fold(self))
    assert len(dict(adapter)) == len(adapter) == 1024
    assert len(folded) == 512
    assert list(adapter)[:2] == ["unet.block.0.to_q.lora_A.weight", "unet.block.0.to_q.lora_B.weight"]
    assert adapter["unet.block.3.to_q.lora_B.weight"].unique().tolist() == [0.5]


@pytest.mark.parametrize(
    "key", ["", "unet", "unet.block.lora_C.weight", "vae.block.lora_A.weight", "unet.x.lora_A.weight"]
)
def test_a_key_that_is_not_there(key):
    adapter = Adapter({"unet": {"block": Factors(torch.ones(2, 4), torch.ones(4, 2), alpha=2.0)}})
    assert key not in adapter
    with pytest.raises(KeyError):
        adapter[key]


def test_adapters_are_compared_by_their_tensors():
    def made(value: float, path: str = "block", alpha: float = 2.0) -> Adapter:
        return Adapter({"unet": {path: Factors(torch.ones(2, 4), torch.full((4, 2), value), alpha)}})

    assert made(1.0) == made(1.0)
    assert made(1.0) == made(2.0, alpha=1.0)  # the same change
    assert made(1.0) != made(1.5)
    assert made(1.0) != made(1.0, path="other")
    assert made(1.0) != dict(made(1.0))
    assert made(1.0) != "adapter"


def test_adapters_that_are_equal_have_one_hash() -> None:
    pipe = aligning.aligned()
    result = aligning.align(pipe, steps=1)
    again = Adapter.of(pipe)
    assert again == result.adapter
    assert len({again, result.adapter}) == 1
