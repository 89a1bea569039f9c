"""What `inspect_adapter` says of a file, against the full matrices and against files made faulty on purpose."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import changes, made
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.inspect import Inspection, inspect_adapter, sha256_of
from alignprop_pipe.adapters.programs import hidden_by, unknown_to_comfyui, verdicts
from alignprop_pipe.errors import AdapterError


def inspected(adapter: Adapter, form: Any, folder: Path) -> Inspection:
    (file,) = adapter.save(folder / f"{form}.safetensors", format=form)
    return inspect_adapter(file)


def of_tensors(tensors: dict[str, Tensor], folder: Path, header: dict[str, str] | None = None) -> Inspection:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "theirs.safetensors", header)
    return inspect_adapter(folder / "theirs.safetensors")


def loads(found: Inspection) -> dict[str, bool | None]:
    return {verdict.program: verdict.loads for verdict in found.programs}


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_everything_that_is_in_a_file(tmp_path: Path) -> None:
    adapter = made("sdxl", ranks=(2, 3, 4), text=True)
    file = adapter.save(tmp_path / "a.safetensors", format="kohya", reward="clip")[0]
    found = inspect_adapter(file)
    content = file.read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert (found.file, found.size) == ("a.safetensors", len(content))
    assert (found.format, found.base_class, found.family) == ("kohya", "StableDiffusionXLPipeline", "xl")
    assert found.layers == {name: len(layers) for name, layers in adapter.layers.items()}
    assert sum(found.ranks.values()) == sum(found.alphas.values()) == sum(found.layers.values())
    assert set(found.ranks) == {2, 3, 4}
    assert set(found.alphas) == {5.0}
    assert found.targets["to_q"] == found.targets["to_out.0"] == 16
    assert found.targets["fc1"] == 4
    assert found.dtypes == {"float32": len(load_file(file))}
    assert found.parameters == sum(
        f.up.numel() + f.down.numel() for part in adapter.layers.values() for f in part.values()
    )
    assert found.metadata["alignprop.reward"] == "clip"
    assert found.problems == ()
    assert loads(found) == {"diffusers": True, "ComfyUI": True, "AUTOMATIC1111, kohya": True}
    assert dataclasses.is_dataclass(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.size = 1  # type: ignore[misc]


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_the_change_of_each_block_is_that_of_the_full_matrices(form: str, tmp_path: Path) -> None:
    adapter = made("flux", ranks=(1, 2, 3), text=True)
    found = inspected(adapter, form, tmp_path)
    squares: dict[tuple[str, str], float] = {}
    for path, change in changes(adapter).items():
        component, _, rest = path.partition(".")
        words = rest.removeprefix("text_model.encoder.").split(".")
        key = component, f"{words[0]}.{words[1]}"
        squares[key] = squares.get(key, 0.0) + float(change.double().square().sum())
    got = {(block.component, block.name): block.change for block in found.blocks}
    assert got == pytest.approx({key: square**0.5 for key, square in squares.items()}, rel=1e-5)
    assert found.change == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
    assert sum(block.layers for block in found.blocks) == sum(found.layers.values())


@given(
    rank=st.integers(1, 9),
    alpha=st.floats(-8, 8, width=16),
    inputs=st.integers(1, 9),
    kernel=st.sampled_from([0, 1, 3]),
)
def test_the_norm_needs_no_full_matrix(rank: int, alpha: float, inputs: int, kernel: int) -> None:
    """Also of convolutions, whose down has a kernel."""
    generator = torch.Generator().manual_seed(rank)
    window = (kernel, kernel) if kernel else ()
    down = torch.randn(rank, inputs, *window, generator=generator)
    up = torch.randn(7, rank, *(1 for _ in window), generator=generator)
    full = up.double().flatten(1) @ down.double().flatten(1) * alpha / rank
    assert Factors(down, up, alpha).norm() == pytest.approx(float(full.norm()), rel=1e-9, abs=1e-12)


def test_blocks_of_a_unet_and_conv_layers(tmp_path: Path) -> None:
    tensors = {}
    for layer in ("down_blocks.10.resnets.0.conv1", "down_blocks.2.resnets.0.conv1", "mid_block.resnets.1.conv2"):
        tensors |= {f"unet.{layer}.lora_A.weight": torch.ones(1, 2, 3, 3)}
        tensors |= {f"unet.{layer}.lora_B.weight": torch.ones(2, 1, 1, 1)}
    tensors |= {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 1)}
    found = of_tensors(tensors, tmp_path)
    assert [block.name for block in found.blocks] == ["conv_in", "down_blocks.2", "down_blocks.10", "mid_block"]
    assert found.blocks[1].change == pytest.approx(6.0)


# --- who loads it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form", "diffusers", "comfyui", "kohya"),
    [
        ("sd15", "diffusers", True, False, False),
        ("sd15", "kohya", True, True, True),
        ("sd3", "comfyui", True, True, False),
        ("flux", "diffusers", True, True, False),
        ("flux", "kohya", False, True, True),  # diffusers' converter knows the real width alone
        ("wan", "diffusers", True, False, False),
        ("wan", "comfyui", True, True, False),
        ("wan", "kohya", False, True, True),  # and of Wan no file that leaves layers out
        ("ltx", "diffusers", True, False, False),
        ("ltx", "comfyui", True, True, False),
        ("pixart", "diffusers", False, True, False),  # its pipeline has no load_lora_weights
    ],
)
def test_which_programs_load_it(
    family: str, form: str, diffusers: bool, comfyui: bool, kohya: bool, tmp_path: Path
) -> None:
    found = inspected(made(family), form, tmp_path)
    assert loads(found) == {"diffusers": diffusers, "ComfyUI": comfyui, "AUTOMATIC1111, kohya": kohya}
    assert all(verdict.reason for verdict in found.programs)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_stock_pipelines_agree_about_what_diffusers_loads(family: str, tmp_path: Path) -> None:
    """And the pair that they refuse: alphas next to A and B, in a UNet's file."""
    from miniatures import FAMILIES

    adapter = made(family)
    layer = next(iter(dict(adapter))).removesuffix(".lora_A.weight")
    for extra in ({}, {f"{layer}.alpha": torch.tensor(2.0)}):
        found = of_tensors({**dict(adapter), **extra}, tmp_path)
        pipe = FAMILIES[family].make()
        try:
            pipe.load_lora_weights(str(tmp_path / "theirs.safetensors"))
            loaded = True
        except ValueError:
            loaded = False
        assert loads(found)["diffusers"] == loaded
        assert loaded == (not extra)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("several", [False, True])
def test_alphas_that_stock_diffusers_would_take_for_others(several: bool, tmp_path: Path) -> None:
    """The change that its pipeline applies, by the matrices that it holds then."""
    from miniatures import FAMILIES

    layers = made("sd15").layers["unet"]
    layers = {p: dataclasses.replace(f, alpha=2.0 + several * (n % 2)) for n, (p, f) in enumerate(layers.items())}
    found = inspected(Adapter({"unet": layers}, made("sd15").base), "kohya", tmp_path)
    pipe = FAMILIES["sd15"].make()
    pipe.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    scales = {path: pipe.unet.get_submodule(path).scaling["default_0"] for path in layers}
    is_right = all(scales[path] == pytest.approx(f.alpha / f.rank) for path, f in layers.items())
    assert loads(found)["diffusers"] == is_right == (not several)
    assert ("applies it at another strength: unet." in found.programs[0].reason) == several


def test_an_unknown_model_is_called_so(tmp_path: Path) -> None:
    tensors = {"transformer.new.lora_A.weight": torch.ones(1, 2), "transformer.new.lora_B.weight": torch.ones(2, 1)}
    found = of_tensors(tensors, tmp_path)
    assert loads(found) == {"diffusers": None, "ComfyUI": None, "AUTOMATIC1111, kohya": False}
    assert (found.family, found.base_class, found.format) == ("", "", "diffusers")


@pytest.mark.parametrize(
    ("family", "header", "hidden"),
    [
        ("v1", {}, False),
        ("v1", {"format": "pt"}, False),
        ("v1", {"ss_v2": "True"}, True),
        ("v2", {"format": "pt"}, True),
        ("v2", {"ss_v2": "True"}, False),
        ("xl", {"ss_base_model_version": "sdxl_base_v1-0"}, False),
        ("xl", {"ss_base_model_version": "SDXL"}, True),
        ("xl", {}, False),
        ("FluxTransformer2DModel", {"format": "pt"}, False),
    ],
)
def test_headers_that_hide_a_file(family: str, header: dict[str, str], hidden: bool) -> None:
    assert bool(hidden_by(family, header)) == hidden
    verdict = verdicts(family, ["lora_unet_mid_block_x"], header, (True, ""))[-1]
    assert verdict.loads == (not hidden)


@pytest.mark.parametrize(
    ("family", "name", "known"),
    [
        ("v1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", False),
        ("v1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", False),
        ("v1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q", True),
        ("v1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", True),
        ("xl", "lycoris_down_blocks_1_attentions_0_proj_in", True),
        ("xl", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", True),
        ("xl", "text_encoder.encoder.layers.0.mlp.fc1", False),
        ("SD3Transformer2DModel", "base_model.model.transformer_blocks.0.attn.to_q", True),
        ("SD3Transformer2DModel", "transformer_blocks.0.attn.to_q", False),
        ("WanTransformer3DModel", "diffusion_model.blocks.0.attn1.to_q", False),
        ("HunyuanVideoTransformer3DModel", "transformer.transformer_blocks.0.attn.to_q", False),
        ("HunyuanVideoTransformer3DModel", "transformer.double_blocks.0.img_attn_qkv", True),
    ],
)
def test_names_that_comfyui_knows(family: str, name: str, known: bool) -> None:
    """As its key maps have them (the table was made by running it)."""
    assert unknown_to_comfyui(family, [name]) == ([] if known else [name])


# --- what is wrong ---------------------------------------------------------------------------------------------------

NAME = "lora_unet_mid_block_attentions_0_proj_in"
GOOD = {
    f"{NAME}.lora_down.weight": torch.ones(2, 4),
    f"{NAME}.lora_up.weight": torch.ones(4, 2),
    f"{NAME}.alpha": torch.tensor(2.0),
}
OTHER = {key.replace("proj_in", "proj_out"): tensor for key, tensor in GOOD.items()}
HALF = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 4),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(4, 1),
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(1, 4),
    "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(4, 1),
}
NAMED_TWICE = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in GOOD.items()}
FAULTS: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "zero up": ({**GOOD, f"{NAME}.lora_up.weight": torch.zeros(4, 2)}, {}, "it changes nothing"),
    "zero alpha": ({**GOOD, f"{NAME}.alpha": torch.tensor(0.0)}, {}, "it changes nothing"),
    "one of two": ({**GOOD, **OTHER, f"{NAME}.lora_up.weight": torch.zeros(4, 2)}, {}, "1 of 2 layers change nothing"),
    "no alpha": ({key: GOOD[key] for key in list(GOOD)[:2]}, {}, "1 layers have no alpha"),
    "NaN": ({**GOOD, f"{NAME}.lora_up.weight": torch.full((4, 2), torch.nan)}, {}, "1 tensors hold NaN"),
    "unknown key": ({**GOOD, "extra": torch.ones(1)}, {}, "1 key is not understood: 'extra' is no part"),
    "unknown keys": ({**GOOD, "extra": torch.ones(1), "more": torch.ones(1)}, {}, "2 keys are not understood"),
    "LoHa": ({**GOOD, "x.hada_w1_a": torch.ones(1)}, {}, "a LoHa"),
    "one matrix": ({**GOOD, "lora_unet_x.lora_up.weight": torch.ones(2, 2)}, {}, "only up of its two matrices"),
    "shapes": ({**GOOD, f"{NAME}.lora_up.weight": torch.ones(4, 3)}, {}, "do not fit together"),
    "twice": ({**GOOD, **NAMED_TWICE}, {}, "are the same layer"),
    "half applied": (HALF, {}, "ComfyUI would apply half of it: it drops 1 of 2 layers"),
    "hidden": (GOOD, {"ss_v2": "True", "ss_base_model_version": "sdxl_base_v1-0", "alignprop.base_class": "X",
                      "alignprop.families": '{"unet": "v1"}'}, "takes it for a file of xl and hides it"),
    "alpha in the header": (
        HALF, {"lora_adapter_metadata": '{"unet.r": 1, "unet.lora_alpha": 4}'}, "stands in the header",
    ),
    "window": (GOOD, {"alignprop.window": "0.9-0.1"}, "its window is damaged"),
    "not a layer of a UNet": (
        {**HALF, "unet.extra.lora_A.weight": torch.ones(1, 4), "unet.extra.lora_B.weight": torch.ones(4, 1)}, {},
        "this package does not load it: 'unet.extra' is no layer of Stable Diffusion 1's UNet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    tensors, header, problem = FAULTS[name]
    found = of_tensors(tensors, tmp_path, header)
    assert problem in " / ".join(found.problems)


def test_a_good_file_has_no_problems(tmp_path: Path) -> None:
    assert of_tensors({**GOOD, **OTHER}, tmp_path).problems == ()
    header = {"lora_adapter_metadata": '{"unet.r": 1, "unet.lora_alpha": 1}'}
    few = {key: tensor for key, tensor in HALF.items() if "proj_in" in key}
    assert of_tensors(few, tmp_path, header).problems == ()


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 50_000, "{}"])
def test_peft_settings_that_are_none(text: str, tmp_path: Path) -> None:
    few = {key: tensor for key, tensor in HALF.items() if "proj_in" in key}
    found = of_tensors(few, tmp_path, {"lora_adapter_metadata": text})
    assert found.layers
    assert bool(found.problems) == (text != "{}")


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "is empty: it has no bytes"), (b"PK\x03\x04", "is a pickle"), (b"\x02\0\0\0\0\0\0\0{}", "is empty")],
)
def test_what_is_no_adapter_file_is_an_error(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=match):
        inspect_adapter(tmp_path / "theirs.safetensors")


def test_a_run_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    made("sd15").save(tmp_path / "adapter.safetensors")
    assert inspect_adapter(tmp_path).file == "adapter.safetensors"


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        sha256_of(tmp_path / "gone")


def test_what_is_found_can_be_written_as_json(tmp_path: Path) -> None:
    from alignprop_pipe.cli.console import plain

    found = plain(of_tensors({**GOOD, f"{NAME}.lora_up.weight": torch.full((4, 2), torch.nan)}, tmp_path))
    assert json.loads(json.dumps(found, allow_nan=False))["blocks"][0]["change"] is None


def test_no_program_loads_layers_that_are_damaged(tmp_path: Path) -> None:
    found = of_tensors({**GOOD, f"{NAME}.lora_up.weight": torch.ones(4, 3)}, tmp_path)
    assert [verdict.loads for verdict in found.programs] == [False, False, False]
    assert "do not fit together" in found.programs[1].reason


def test_no_unet_has_a_third_text_encoder(tmp_path: Path) -> None:
    tensors = made("sd15", text=True).kohya_tensors()
    found = of_tensors({key.replace("lora_te_", "lora_te3_"): tensor for key, tensor in tensors.items()}, tmp_path)
    assert found.programs[1].loads is False
    assert "lora_te3_" in found.programs[1].reason
