"""Adapter files: read back by stock diffusers, recomputed by hand, and refused when they do not fit."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import FAMILIES, sd15, sdxl, wan
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save_file
from torch import Tensor

from alignprop_pipe.adapters import apply
from alignprop_pipe.adapters import files as adapter_files
from alignprop_pipe.adapters import header as export_header
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter, read_metadata, save_adapter
from alignprop_pipe.adapters.export_keys import comfyui_keys, diffusers_keys
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.adapters.reading import layers_from
from alignprop_pipe.diffusion import lora
from alignprop_pipe.diffusion.lora import ADAPTER_NAME, TRAINED, attention_linears, mark
from alignprop_pipe.errors import AdapterError, RunError

BASE = sd15()
"""Never written to: `fresh` shares all of it but the denoiser."""

DENOISERS = ("unet", "transformer", "transformer_2")
LOADABLE = [family for family in FAMILIES if family not in ("pixart", "sd15_img2img")]


def fresh() -> StableDiffusionPipeline:
    parts = {**BASE.components, "unet": copy.deepcopy(BASE.unet)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPE = fresh()
"""For hypothesis, which takes no function-scoped fixtures."""


def trained(pipe: Any, rank: int = 3, alpha: Any = 5.0, name: str = ADAPTER_NAME) -> Any:
    """A LoRA with B that is not zero, as training leaves it, put on by peft alone."""
    generator = torch.Generator().manual_seed(rank)
    for part in (pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=attention_linears(part))
        with warnings.catch_warnings():  # peft's, about a second adapter
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, part, name)
        part._hf_peft_config_loaded = True
        if name == ADAPTER_NAME:
            mark(part, TRAINED)
        for path, parameter in part.named_parameters():
            if f".{name}." in path:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipe


def pictures(pipe: Any, family: str) -> Tensor:
    with torch.no_grad(), by_hand.same_hidden_draws():
        return pipe(
            prompt=["a red dog"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            return_dict=False,
            **FAMILIES[family].call(1),
        )[0]


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors in memory: the library's own `load_file` maps the file, which tests write over."""
    return load(path.read_bytes())


def lora_layers(part: torch.nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in part.named_modules() if isinstance(layer, LoraLayer)}


def deltas(part: torch.nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        layers = lora_layers(part).items()
        return {path: layer.get_delta_weight(ADAPTER_NAME) for path, layer in layers if ADAPTER_NAME in layer.lora_A}


def assert_same_deltas(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert wanted
    for path in wanted:
        torch.testing.assert_close(got[path], wanted[path], atol=1e-6, rtol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter for the SD 1.5 miniature; its ComfyUI form lies next to."""
    save_adapter(trained(fresh()), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "alpha"), [("sd15", 3.0), *((family, 5.0) for family in LOADABLE)])
def test_stock_pipelines_read_both_files(family: str, alpha: float, tmp_path: Path) -> None:
    source = trained(FAMILIES[family].make(), rank=3, alpha=alpha)
    files = save_adapter(source, tmp_path / "adapter.safetensors")
    assert [file.name for file in files] == ["adapter.safetensors", "adapter-comfyui.safetensors"]
    stock = [FAMILIES[family].make() for _ in files]
    for pipe, file in zip(stock, files, strict=True):
        pipe.load_lora_weights(str(file), adapter_name="mine")
    base = pictures(FAMILIES[family].make(), family)
    for scale in (0.0, 0.5, 1.0):
        source.set_adapters([ADAPTER_NAME], [scale])
        wanted = pictures(source, family)
        assert scale == 0.0 or (wanted - base).abs().max() > 1e-3
        for pipe in stock:
            pipe.set_adapters(["mine"], [scale])
            torch.testing.assert_close(pictures(pipe, family), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd15", "sd15_img2img", "pixart", "flux"])
def test_load_adapter_gives_the_trained_pictures(family: str, tmp_path: Path) -> None:
    source = trained(FAMILIES[family].make())
    wanted = pictures(source, family)
    base = pictures(FAMILIES[family].make(), family)
    for file in save_adapter(source, tmp_path / "adapter.safetensors"):
        pipe = FAMILIES[family].make()
        load_adapter(pipe, file)
        torch.testing.assert_close(pictures(pipe, family), wanted, atol=1e-5, rtol=0)
        load_adapter(pipe, file, scale=0.0)
        torch.testing.assert_close(pictures(pipe, family), base, atol=1e-6, rtol=0)


def test_kohya_file_by_hand(adapter: Path) -> None:
    """up @ down * alpha / rank, from the raw tensors, is what PEFT adds to each layer."""
    tensors = load_file(adapter.with_name("adapter-comfyui.safetensors"))
    wanted = deltas(trained(fresh()).unet)
    assert len(tensors) == 3 * len(wanted)
    for path, delta in wanted.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha.item() == 5.0
        assert down.dtype == up.dtype == torch.float32
        torch.testing.assert_close(up @ down * (alpha.item() / down.shape[0]), delta, atol=1e-6, rtol=1e-5)


def test_diffusers_file_by_hand(adapter: Path) -> None:
    """B @ A alone is the change: readers of this form know no alpha."""
    tensors = load_file(adapter)
    for path, delta in deltas(trained(fresh()).unet).items():
        change = tensors[f"unet.{path}.lora_B.weight"] @ tensors[f"unet.{path}.lora_A.weight"]
        torch.testing.assert_close(change, delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", ["conv1 time_emb_proj conv_shortcut", "proj_in ff.net.0.proj ff.net.2"])
def test_other_layers_than_attention(layers: str, tmp_path: Path) -> None:
    source = fresh()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=layers.split(), init_lora_weights=False)
    source.unet.add_adapter(config, ADAPTER_NAME)
    wanted = pictures(source, "sd15")
    for file in save_adapter(source, tmp_path / "adapter.safetensors"):
        pipe = fresh()
        load_adapter(pipe, file)
        assert_same_deltas(deltas(pipe.unet), deltas(source.unet))
        torch.testing.assert_close(pictures(pipe, "sd15"), wanted, atol=1e-5, rtol=0)


def test_saving_again_loses_nothing(adapter: Path, tmp_path: Path) -> None:
    pipe = fresh()
    load_adapter(pipe, adapter.with_name("adapter-comfyui.safetensors"), scale=0.5)
    save_adapter(pipe, tmp_path / "again" / "adapter.safetensors")
    for name in ("adapter.safetensors", "adapter-comfyui.safetensors"):
        first, second = load_file(tmp_path / name), load_file(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_denoisers(tmp_path: Path) -> None:
    def pair() -> DiffusionPipeline:
        pipe = wan()
        second = copy.deepcopy(pipe.transformer)
        return type(pipe)(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.5)

    source = trained(pair())
    files = save_adapter(source, tmp_path / "adapter.safetensors")
    names = ["adapter.safetensors", "adapter-comfyui.safetensors", "adapter-comfyui-transformer_2.safetensors"]
    assert [file.name for file in files] == names
    assert {key.split(".")[0] for key in load_file(files[0])} == {"transformer", "transformer_2"}
    pipe = pair()
    load_adapter(pipe, files[0])
    assert_same_deltas(deltas(pipe.transformer), deltas(source.transformer))
    assert_same_deltas(deltas(pipe.transformer_2), deltas(source.transformer_2))
    with pytest.raises(AdapterError, match="both halves"):
        load_adapter(pipe, files[2])


@given(
    layers=st.lists(st.tuples(st.integers(1, 6), st.floats(1 / 8, 64, width=16)), min_size=3, max_size=3),
    form=st.sampled_from(["kohya", "diffusers"]),
)
@settings(max_examples=30)
def test_any_ranks_and_alphas(layers: list[tuple[int, float]], form: str) -> None:
    """Each layer with its own rank and alpha comes back with the same change, through diffusers' key converter."""
    pipe = PIPE
    paths = attention_linears(pipe.unet)[:3]
    wanted = {}
    for path, (rank, alpha) in zip(paths, layers, strict=True):
        linear = pipe.unet.get_submodule(path)
        shape = linear.out_features, linear.in_features
        wanted[path] = Factors(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), alpha)
    tensors = comfyui_keys("v1", "unet", wanted) if form == "kohya" else diffusers_keys({"unet": wanted})
    got = layers_from(pipe, tensors, {})["unet"]
    assert got.keys() == wanted.keys()
    for path, factors in wanted.items():
        if form == "kohya":
            assert got[path].alpha == factors.alpha
            assert torch.equal(got[path].up, factors.up)
        torch.testing.assert_close(got[path].folded() @ got[path].down, factors.folded() @ factors.down)


def test_kohya_file_of_others(tmp_path: Path) -> None:
    """Mixed ranks and alphas, and both text encoders, as kohya's scripts write them for SDXL."""
    pipe = sdxl()
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    places = [("unet", "lora_unet_", path) for path in attention_linears(pipe.unet)[:4]]
    for name, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        places += [
            (name, prefix, path)
            for path, layer in pipe.components[name].named_modules()
            if path.endswith(("q_proj", "fc1"))
        ]
    for number, (name, prefix, path) in enumerate(places):
        linear = pipe.components[name].get_submodule(path)
        rank, alpha = 1 + number % 3, 1.0 + number % 2
        text_level = "" if name == "unet" or path.startswith("text_model") else "text_model."
        key = prefix + (text_level + path).replace(".", "_")
        down, up = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        wanted[f"{name}.{path}"] = up @ down * alpha / rank
    save_file(tensors, tmp_path / "theirs.safetensors")
    load_adapter(pipe, tmp_path / "theirs.safetensors")
    got = {
        f"{name}.{p}": d
        for name in ("unet", "text_encoder", "text_encoder_2")
        for p, d in deltas(pipe.components[name]).items()
    }
    assert_same_deltas(got, wanted)
    assert lora_layers(pipe.text_encoder)
    load_adapter(pipe, save_adapter(trained(sdxl()), tmp_path / "adapter.safetensors")[0])
    assert not lora_layers(pipe.text_encoder)


def test_diffusers_files_with_alpha_in_the_header(tmp_path: Path) -> None:
    """`save_lora_adapter` writes A and B unscaled and alpha into the header, without the component's name."""
    source = trained(fresh())
    source.unet.save_lora_adapter(tmp_path, adapter_name=ADAPTER_NAME)
    pipe = fresh()
    load_adapter(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same_deltas(deltas(pipe.unet), deltas(source.unet))


# --- what loading does to a pipeline -----------------------------------------------------------------------------


def test_an_older_adapter_is_replaced_and_others_stay(adapter: Path) -> None:
    pipe = trained(fresh(), rank=2, alpha=1.0)
    trained(pipe, rank=4, name="style")
    load_adapter(pipe, adapter)
    assert pipe.get_list_adapters() == {"unet": ["style", ADAPTER_NAME]}
    assert pipe.get_active_adapters() == [ADAPTER_NAME]
    assert_same_deltas(deltas(pipe.unet), deltas(trained(fresh()).unet))


def test_loading_leaves_the_base_as_it_was(adapter: Path) -> None:
    pipe = fresh()
    pipe.unet.conv_in.requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in pipe.unet.named_parameters()}
    load_adapter(pipe, adapter)
    after = {name.replace(".base_layer", ""): p for name, p in pipe.unet.named_parameters() if "lora_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], b) and after[n].requires_grad == grad for n, (b, grad) in before.items())
    assert not any(module.training for module in pipe.unet.modules())


def test_loading_switches_a_disabled_pipeline_on(adapter: Path) -> None:
    pipe = trained(fresh(), rank=1)
    pipe.disable_lora()
    load_adapter(pipe, adapter)
    torch.testing.assert_close(pictures(pipe, "sd15"), pictures(trained(fresh()), "sd15"), atol=1e-5, rtol=0)


def test_a_run_folder_names_its_adapter(adapter: Path) -> None:
    pipe = fresh()
    load_adapter(pipe, adapter.parent)
    assert_same_deltas(deltas(pipe.unet), deltas(trained(fresh()).unet))


# --- files that do not fit ---------------------------------------------------------------------------------------


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("<html>404</html>")


def _pickle(path: Path) -> None:
    torch.save(load_file(path), path)


def _other_model(path: Path) -> None:
    save_adapter(trained(sdxl()), path)


def _no_layers(path: Path) -> None:
    save_file({}, path)


def _not_a_lora(path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(4, 4)}, path)


def _one_half(path: Path) -> None:
    save_file({key: tensor for key, tensor in load_file(path).items() if "lora_A" in key}, path)


def _nan(path: Path) -> None:
    save_file({key: tensor * torch.nan for key, tensor in load_file(path).items()}, path)


def _unknown_layer(path: Path) -> None:
    tensors = load_file(path)
    down = next(iter(tensors.values()))
    save_file(
        {**tensors, "unet.extra.lora_A.weight": down.clone(), "unet.extra.lora_B.weight": down.T.contiguous()}, path
    )


def _norm_layer(path: Path) -> None:
    pair = {
        "unet.conv_norm_out.lora_A.weight": torch.zeros(2, 16),
        "unet.conv_norm_out.lora_B.weight": torch.zeros(16, 2),
    }
    save_file(pair, path)


def _bad_header(path: Path) -> None:
    save_file(load_file(path), path, {"lora_adapter_metadata": "{"})


def _scalars(path: Path) -> None:
    save_file({key: torch.tensor(1.0) for key in load_file(path)}, path)


DAMAGES = {
    _missing: "no adapter file",
    _truncated: "copy or download it again",
    _empty: "it has no bytes",
    _text: "it is a web page",
    _pickle: "safetensors",
    _other_model: "load it into StableDiffusionXLPipeline",
    _no_layers: "is empty: it holds no LoRA",
    _not_a_lora: "holds no LoRA",
    _one_half: "load it into",
    _nan: "NaN",
    _unknown_layer: "1 of .* layers do not fit, the first: 'unet.extra' is no layer of",
    _norm_layer: "GroupNorm and takes no LoRA",
    _bad_header: "load it into",
    _scalars: "load it into",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_bad_file_is_one_error_and_changes_nothing(damage, adapter: Path) -> None:
    pipe = trained(fresh(), rank=2)
    pipe.set_adapters([ADAPTER_NAME], [0.5])
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    scales = [dict(layer.scaling) for layer in lora_layers(pipe.unet).values()]
    damage(adapter)
    with pytest.raises(AdapterError, match=DAMAGES[damage]):
        load_adapter(pipe, adapter)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [dict(layer.scaling) for layer in lora_layers(pipe.unet).values()] == scales
    stock = fresh()
    with pytest.raises(AdapterError):
        load_adapter(stock, adapter)
    assert not lora_layers(stock.unet)


def test_a_pipeline_without_converter_refuses_what_it_cannot_name(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="StableDiffusionPipeline"):
        load_adapter(FAMILIES["pixart"].make(), adapter)


@given(position=st.integers(0, 4000), bit=st.integers(0, 7))
@settings(max_examples=40)
def test_a_flipped_bit_is_an_error_or_a_value(
    position: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(CONTENT)
    content[position % len(content)] ^= 1 << bit
    file = tmp_path_factory.mktemp("flipped") / "adapter.safetensors"
    file.write_bytes(content)
    try:
        load_adapter(PIPE, file)
    except AdapterError:
        pass
    else:
        assert len(deltas(PIPE.unet)) == len(attention_linears(PIPE.unet))


CONTENT = adapter_files.serialised(Adapter.of(trained(fresh())), {}, None)


@given(place=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_numbers_is_always_told(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(CONTENT)
    data = 8 + int.from_bytes(content[:8], "little")
    content[data + place % (len(content) - data)] ^= 1 << bit
    file = tmp_path_factory.mktemp("damaged") / "adapter.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match="damaged"):
        Adapter.load(file)


def test_a_program_that_casts_and_keeps_the_header_is_no_damage(adapter: Path, tmp_path: Path) -> None:
    halves = {key: tensor.half() for key, tensor in load_file(adapter).items()}
    save_file(halves, tmp_path / "half.safetensors", read_metadata(adapter))
    assert Adapter.load(tmp_path / "half.safetensors").layers.keys() == {"unet"}


def test_a_failure_while_loading_leaves_the_base(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing known can fail after the checks; running out of memory can."""

    def fails(part, names, weights) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(lora, "set_weights_and_activate_adapters", fails)
    pipe = fresh()
    with pytest.raises(AdapterError, match="none left"):
        load_adapter(pipe, adapter)
    assert not lora_layers(pipe.unet)


def test_scale_has_to_be_a_number(adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"such as 1\.0"):
        load_adapter(fresh(), adapter, scale=float("nan"))


# --- files that are written --------------------------------------------------------------------------------------


def test_saving_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="train one"):
        save_adapter(fresh(), tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "way_out"),
    [
        ("adapter.bin", {}, r"\.safetensors"),
        ("adapter.safetensors", {"format": "gguf"}, "'both'"),
        ("adapter.safetensors", {"metadata": {"step": 3}}, r"json\.dumps"),
    ],
)
def test_wrong_arguments(name: str, options: dict, way_out: str, tmp_path: Path) -> None:
    pipe = trained(fresh())
    with pytest.raises(Exception, match=".") as caught:
        save_adapter(pipe, tmp_path / name, **options)
    if isinstance(caught.value, AdapterError):  # the type checker of the tests may be first
        assert caught.match(way_out)
    assert not list(tmp_path.iterdir())


def test_nan_is_not_saved(tmp_path: Path) -> None:
    pipe = trained(fresh())
    next(iter(lora_layers(pipe.unet).values())).lora_B[ADAPTER_NAME].weight.data[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="nothing was saved"):
        save_adapter(pipe, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_one_format_alone_goes_to_the_path(form, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.safetensors"
    assert save_adapter(trained(fresh()), path, format=form, dtype=torch.float16) == [path]
    assert all(key.startswith("lora_unet_" if form == "kohya" else "unet.") for key in load_file(path))
    assert load_file(path).popitem()[1].dtype == torch.float16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """The library writes the header in another order each time."""
    for name in ("a", "b"):
        save_adapter(
            trained(fresh()), tmp_path / name / "adapter.safetensors", metadata={"reward": "clip", "step": "3"}
        )
    for name in ("adapter.safetensors", "adapter-comfyui.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_full_disk_keeps_the_old_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {file.name: file.read_bytes() for file in adapter.parent.iterdir()}

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignprop_pipe.files.os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_adapter(trained(fresh(), rank=2), adapter)
    assert {file.name: file.read_bytes() for file in adapter.parent.iterdir()} == old


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(AdapterError, match="another path"):
        save_adapter(trained(fresh()), tmp_path / "run" / "adapter.safetensors")


# --- the header --------------------------------------------------------------------------------------------------


def test_header_says_what_the_adapter_is(tmp_path: Path) -> None:
    pipe = trained(fresh())
    known = apply.describe(
        pipe,
        reward="clip - tv",
        config='{"steps": 60}',
        step=60,
        prompts=["a dog", "a cat"],
        scores={"clip": [0.2, 0.4]},
    )
    files = save_adapter(pipe, tmp_path / "adapter.safetensors", metadata={**known, "base_model": "me/model"})
    for header in map(read_metadata, files):
        assert header["alignprop.format"] == "1"
        assert header["alignprop.base_model"] == "me/model"
        assert header["alignprop.base_class"] == "StableDiffusionPipeline"
        assert header["alignprop.reward"] == "clip - tv"
        assert json.loads(header["alignprop.config"]) == {"steps": 60}
        assert json.loads(header["alignprop.scores"]) == {"clip": [0.2, 0.4]}
        assert header["alignprop.step"] == "60"
        assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert header["modelspec.trigger_phrase"] == "a dog\na cat"
    kohya = read_metadata(files[1])
    assert kohya["ss_network_module"] == "networks.lora"
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("3", "5")
    assert (kohya["ss_base_model_version"], kohya["ss_v2"]) == ("sd_v1", "False")


def test_sdxl_is_named_so_that_other_programs_show_the_file(tmp_path: Path) -> None:
    header = read_metadata(save_adapter(trained(sdxl()), tmp_path / "adapter.safetensors")[1])
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_metadata_keeps_the_names_of_other_standards(tmp_path: Path) -> None:
    given = {"ss_output_name": "fox", "modelspec.author": "me", "trained_words": "fox", "note": "mine"}
    header = read_metadata(save_adapter(trained(fresh()), tmp_path / "a.safetensors", metadata=given)[1])
    assert given.items() <= {**header, "note": header["alignprop.note"]}.items()


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that exists here alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    return tmp_path / "models" / "mine"


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("me/model", "me/model"),
        ("emoji", "emoji"),
        ("", ""),
        ("models/mine", ""),
        ("/srv/secret/model", ""),
        ("C:\\Users\\me\\model", ""),
        ("../model", ""),
        ("model.safetensors", ""),
        ("/cache/hub/models--me--model/snapshots/0a1b", "me/model"),
        (str(Path(export_header.__file__).parents[1] / "models" / "emoji"), "emoji"),
    ],
)
def test_base_model_is_a_public_id_or_nothing(model: str, public: str, local: Path) -> None:
    assert export_header.public_id(model) == public
    assert export_header.public_id(str(local)) == ""


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("0.5*/home/jane/work/score.py:blue + clip", "0.5*score.py:blue + clip"),
        ('{"prompts": "/home/jane/list.txt"}', '{"prompts": "list.txt"}'),
        ("~/rewards/score.py:blue", "score.py:blue"),
        ("file:///home/jane/list.txt", "list.txt"),
        ("C:\\Users\\jane\\score.py:blue", "score.py:blue"),
        ('"C:\\\\Users\\\\jane\\\\score.py"', '"score.py"'),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("black and/or white, 1/2, km / h", "black and/or white, 1/2, km / h"),
        ('"a \\u00e9 \\n b"', '"a \\u00e9 \\n b"'),
        ("module:function / 2", "module:function / 2"),
        (f"{Path.home()}/x y/score.py", None),
    ],
)
def test_no_local_path_goes_out(text: str, public: str | None) -> None:
    cleaned = export_header.without_paths(text)
    if public is None:
        assert str(Path.home()) not in cleaned
    else:
        assert cleaned == public


def test_header_of_a_local_model_names_no_folder(local: Path, tmp_path: Path) -> None:
    pipe = trained(fresh())
    pipe.register_to_config(_name_or_path=str(local))
    (file, _) = save_adapter(pipe, tmp_path / "adapter.safetensors", metadata={"reward": f"{local}/score.py:blue"})
    assert str(tmp_path) not in json.dumps(read_metadata(file))


def test_an_adapter_has_diffusers_names(adapter: Path) -> None:
    state, written = Adapter.of(trained(fresh())), load_file(adapter)
    assert state.keys() == written.keys()
    assert all(torch.equal(state[key], written[key]) for key in written)


def test_an_autoencoder_is_no_place_for_an_adapter(tmp_path: Path) -> None:
    pipe = fresh()
    assert isinstance(pipe.vae, AutoencoderKL)
    save_file({"conv_in.lora_A.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(AdapterError, match="two matrices"):
        load_adapter(pipe, tmp_path / "vae.safetensors")
