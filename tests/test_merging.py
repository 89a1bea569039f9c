"""A model with an adapter in its weights opens in stock diffusers and draws what the two drew apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import made
from diffusers import DiffusionPipeline
from miniatures import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from alignprop_pipe import AlignPropPipeline, load_adapter
from alignprop_pipe.adapters import merge as subject
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.merge import fused_weight, merge
from alignprop_pipe.errors import AdapterError, PipelineError, RunError


def pictures(pipe: Any, family: str) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            prompt=["a red dog"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            return_dict=False,
            **FAMILIES[family].call(1),
        )[0]


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_folder_that_stock_diffusers_opens(family: str, tmp_path: Path) -> None:
    adapter = made(family, ranks=(2, 3), text=family == "sdxl", size=0.2)
    pipe = FAMILIES[family].make()
    before, base = weights(pipe), pictures(pipe, family)
    assert merge(pipe, adapter, tmp_path / "deep" / "merged") == tmp_path / "deep" / "merged"
    after = weights(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)
    load_adapter(pipe, adapter)
    wanted = pictures(pipe, family)
    assert (wanted - base).abs().max() > 1e-3
    stock = DiffusionPipeline.from_pretrained(tmp_path / "deep" / "merged")
    assert type(stock).__name__ == type(pipe).__name__
    torch.testing.assert_close(pictures(stock, family), wanted, atol=1e-5, rtol=0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["merged"]


def test_an_adapter_that_the_pipeline_holds_is_not_in_the_result(tmp_path: Path) -> None:
    pipe, adapter = FAMILIES["sd15"].make(), made("sd15", size=0.2)
    merge(pipe, adapter, tmp_path / "first")
    load_adapter(pipe, made("sd15", ranks=(1,), size=0.4))
    held = pictures(pipe, "sd15")
    (file,) = adapter.save(tmp_path / "adapter.safetensors", format="kohya")
    merge(AlignPropPipeline.from_pipe(pipe), file, tmp_path / "second")
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(tmp_path / "first" / name), load_file(tmp_path / "second" / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list((tmp_path / "second").glob("*lora*"))
    assert torch.equal(pictures(pipe, "sd15"), held)


def test_scale_and_precision(tmp_path: Path) -> None:
    pipe, adapter = FAMILIES["sd15"].make(), made("sd15", size=0.2)
    before = weights(pipe)
    merge(pipe, adapter, tmp_path / "merged", scale=0.5, dtype=torch.float16)
    after = weights(pipe)
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    got = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in got.values()} == {torch.float16}
    for path, f in adapter.layers["unet"].items():
        wanted = before[f"unet.{path}.weight"] + 0.5 * (f.up @ f.down) * f.alpha / f.rank
        torch.testing.assert_close(got[f"{path}.weight"].float(), wanted, atol=1e-3, rtol=1e-3)


def test_the_sum_is_taken_in_float32() -> None:
    """In float16 a change of 2^-11 of a weight of 1 would be lost twice over."""
    weight = torch.ones(1, 1, dtype=torch.float16)
    pair = Factors(torch.full((4, 1), 2.0**-6), torch.full((1, 4), 2.0**-6), 4.0)
    assert fused_weight(weight, pair).item() == 1 + 2.0**-10
    conv = fused_weight(torch.zeros(2, 3, 3, 3), Factors(torch.ones(1, 3, 3, 3), torch.ones(2, 1, 1, 1), 1.0), 0.5)
    assert bool((conv == 0.5).all())


def test_one_checkpoint_file(tmp_path: Path) -> None:
    pipe, adapter = FAMILIES["sd15"].make(), made("sd15", size=0.2)
    before = weights(pipe)
    assert merge(pipe, adapter, tmp_path / "merged.safetensors") == tmp_path / "merged.safetensors"
    merge(pipe, adapter, tmp_path / "folder")
    whole = load_file(tmp_path / "merged.safetensors")
    folder = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    path = next(path for path in adapter.layers["unet"] if path.startswith("mid_block"))
    wanted = folder[f"{path}.weight"]
    name = f"model.diffusion_model.middle_block.1.{path.split('.', 3)[3]}.weight"
    assert torch.equal(whole[name], wanted)
    assert not torch.equal(wanted, before[f"unet.{path}.weight"])
    with pytest.raises(PipelineError):
        merge(FAMILIES["flux"].make(), made("flux"), tmp_path / "flux.safetensors")
    assert not (tmp_path / "flux.safetensors").exists()


def test_the_folder_names_no_place_of_this_machine(tmp_path: Path) -> None:
    pipe = FAMILIES["sd15"].make()
    pipe.register_to_config(_name_or_path=str(tmp_path / "secret" / "model"))
    merge(pipe, made("sd15"), tmp_path / "merged")
    for file in (tmp_path / "merged").rglob("*.json"):
        assert "secret" not in file.read_text()
    public = FAMILIES["sd15"].make()
    public.register_to_config(_name_or_path="me/model")
    merge(public, made("sd15"), tmp_path / "public")
    assert (
        json.loads((tmp_path / "public" / "model_index.json").read_text()).get("_name_or_path", "me/model")
        == "me/model"
    )


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["there", "there.safetensors"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(AdapterError, match="exists already and is not overwritten"):
        merge(FAMILIES["sd15"].make(), made("sd15"), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the folder was filled; the weights of the pipeline are the old ones."""

    def full(folder: Path) -> None:
        assert (folder / "model_index.json").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "_without_places", full)
    pipe = FAMILIES["sd15"].make()
    before = weights(pipe)
    with pytest.raises(RunError, match="No space left"):
        merge(pipe, made("sd15"), tmp_path / "merged", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    after = weights(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)


def _other_model(adapter: Adapter) -> Adapter:
    return made("sdxl")


def _of_some_steps(adapter: Adapter) -> Adapter:
    return Adapter(adapter.layers, adapter.base, {"alignprop.window": "0.0-0.6"})


def _other_component(adapter: Adapter) -> Adapter:
    return Adapter({"prior": adapter.layers["unet"]}, adapter.base)


def _empty(adapter: Adapter) -> Adapter:
    return Adapter({}, adapter.base)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_other_model, "layers do not fit, the first"),
        (_of_some_steps, r"a window of the denoising steps alone \(0\.0-0\.6\)"),
        (_other_component, "does not exist there"),
        (_empty, "it is empty"),
    ],
)
def test_adapters_that_cannot_be_merged(change: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=match):
        merge(FAMILIES["sd15"].make(), change(made("sd15")), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_half_of_an_adapter_is_not_merged_into_the_other_denoiser(tmp_path: Path) -> None:
    """ComfyUI's file of a second denoiser has the names of the first."""
    (file,) = made("wan").save(tmp_path / "a.safetensors", format="comfyui")
    save_file(load_file(file), tmp_path / "half.safetensors", {"alignprop.denoiser": "transformer_2"})
    with pytest.raises(AdapterError, match="the half of an adapter"):
        merge(FAMILIES["wan"].make(), tmp_path / "half.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter file"):
        merge(FAMILIES["sd15"].make(), tmp_path / "gone.safetensors", tmp_path / "merged")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(AdapterError, match="it is a text file"):
        merge(FAMILIES["sd15"].make(), tmp_path / "bad.safetensors", tmp_path / "merged")
    (file,) = made("wan").save(tmp_path / "wan.safetensors", format="comfyui")
    with pytest.raises(AdapterError, match="do not fit|can read"):
        merge(FAMILIES["sd15"].make(), file, tmp_path / "merged")


def _offloaded(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)


def _of_integers(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def _of_eight_bits(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def _of_another_kind(layer: nn.Linear) -> None:
    """A tensor that stands for others, as torchao's and GGUF's do."""
    layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data), requires_grad=False)


def _computed(layer: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_offloaded, "is offloaded"),
        (_of_integers, "is quantised .* is in int8"),
        (_of_eight_bits, "is quantised .* is in float8_e4m3fn"),
        (_of_another_kind, "is quantised .* is a TwoTensor"),
        (_computed, "is parametrized"),
    ],
)
@pytest.mark.parametrize("where", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_weights_that_are_no_plain_numbers(change: Any, said: str, where: str, out: str, tmp_path: Path) -> None:
    """Also in a network that the adapter leaves alone, which is written with the others."""
    pipe = FAMILIES["sd15"].make()
    part = getattr(pipe, where)
    layer = next(module for module in part.modules() if isinstance(module, nn.Linear))
    change(layer)
    with pytest.raises(AdapterError, match=f"{where}.*{said}.*load it without that.*then merge"):
        merge(pipe, made("sd15"), tmp_path / out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_layers_that_are_quantised(tmp_path: Path) -> None:
    """By torch itself, whose layers have a function in the place of the weight; as a storage format, by diffusers."""
    pipe = FAMILIES["sd15"].make()
    torch.ao.quantization.quantize_dynamic(pipe.text_encoder, {nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(AdapterError, match="text_encoder is quantised"):
        merge(pipe, made("sd15"), tmp_path / "merged")
    pipe = FAMILIES["sd15"].make()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(AdapterError, match=r"unet is quantised \(conv_in.weight is in float8_e4m3fn\)"):
        merge(pipe, made("sd15"), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
