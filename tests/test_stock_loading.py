"""What `inspect` says of diffusers, against the stock pipelines' own `load_lora_weights` on miniatures.

Every way in which layers are named in files, in every family that there is a miniature of: the loader applies all of
the file, a part of it, nothing, another strength, or raises.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adapters import made
from miniatures import FAMILIES
from peft.tuners.lora import LoraLayer
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file
from sweep.build import build
from torch import Tensor

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.errors import AdapterError

Tensors = dict[str, Tensor]
NATIVE = {
    "attn1.to_": "self_attn.", "attn2.to_": "cross_attn.", ".out.0": ".o", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # fmt: skip
WARNED = "ignore:The following alpha_pattern keys:RuntimeWarning"


def _renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    """With parts of the names replaced, by regular expressions."""
    found = {}
    for key, tensor in tensors.items():
        for old, new in changes:
            key = re.sub(old, new, key)
        found[key] = tensor
    return found


def _down_and_up(tensors: Tensors) -> Tensors:
    return _renamed(tensors, (r"lora_A", "lora_down"), (r"lora_B", "lora_up"))


def _flat(tensors: Tensors, prefix: str) -> Tensors:
    """Dots of paths as underscores, with an alpha: kohya's scripts on names of diffusers, and OneTrainer's."""
    found = {}
    for key, tensor in _down_and_up(tensors).items():
        path, matrix = re.fullmatch(r"(?:unet|transformer)\.(.*)\.(lora_\w+)\.weight", key).groups()  # type: ignore[union-attr]
        found[f"{prefix}{path.replace('.', '_')}.{matrix}.weight"] = tensor
        found[f"{prefix}{path.replace('.', '_')}.alpha"] = torch.tensor(3.0)
    return found


def _of_2023(tensors: Tensors) -> Tensors:
    layers = {key: t for key, t in tensors.items() if re.search(r"attn\d?\.to_(q|k|v|out\.0)\.", key)}
    return _renamed(
        layers, (r"\.to_out\.0\.", ".to_out."), (r"(attn\d?)\.(to_\w+)\.lora_A", r"\1.processor.\2_lora.down"),
        (r"(attn\d?)\.(to_\w+)\.lora_B", r"\1.processor.\2_lora.up"),
    )  # fmt: skip


def _native(prefix: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changes = [(re.escape(ours), theirs) for ours, theirs in NATIVE.items()]
        return _renamed(tensors, (r"^transformer\.", prefix), *changes)

    return change


def _with_alphas(tensors: Tensors) -> Tensors:
    return tensors | {
        key.replace(".lora_A.weight", ".alpha"): torch.tensor(1.5) for key in tensors if key.endswith(".lora_A.weight")
    }


def _beside_each_up(tensors: Tensors, name: str) -> Tensors:
    ups = {key: up for key, up in tensors.items() if key.endswith(".lora_B.weight")}
    return tensors | {key.replace(".lora_B.weight", name): torch.ones(len(up)) for key, up in ups.items()}


FORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "diffusers": lambda t: t,
    "diffusers, alphas": _with_alphas,
    "diffusers, down and up": _down_and_up,
    "diffusers of 2023": _of_2023,
    "bare": lambda t: _renamed(t, (r"^\w+\.", "")),
    "bare, adapter's name": lambda t: _renamed(t, (r"^\w+\.", ""), (r"\.weight$", ".default.weight")),
    "PEFT": lambda t: _renamed(t, (r"^\w+\.", "base_model.model.")),
    "PEFT in a component": lambda t: _renamed(t, (r"^(\w+)\.", r"\1.base_model.model.")),
    "no layer of the model": lambda t: _renamed(t, (r"to_q\.lora", "to_q_.lora")),
    "ComfyUI": lambda t: _renamed(t, (r"^\w+\.", "diffusion_model.")),
    "kohya": lambda t: _flat(t, "lora_unet_"),
    "OneTrainer": lambda t: _flat(t, "lora_transformer_"),
    "LyCORIS": lambda t: _flat(t, "lycoris_"),
    "DoRA by PEFT": lambda t: _beside_each_up(t, ".lora_magnitude_vector"),
    "biases": lambda t: _beside_each_up(t, ".lora_B.bias"),
    "a stray key": lambda t: t | {"extra": torch.ones(1)},
    "half of it bare": lambda t: {
        key.split(".", 1)[1] if n % 4 < 2 else key: tensor for n, (key, tensor) in enumerate(t.items())
    },
}
FAMILIES_HERE = ("sd15", "sdxl", "sd3", "flux", "wan", "ltx")
NATIVES = {"Wan's own": _native("diffusion_model."), "DiffSynth's of Wan": _native("")}
CASES = [(family, form) for family in FAMILIES_HERE for form in FORMS] + [("wan", form) for form in NATIVES]


def applied_by_stock(pipe: Any, file: Path) -> dict[str, Tensor] | str:
    """The change of every layer after `load_lora_weights`, or the error."""
    try:
        pipe.load_lora_weights(str(file), adapter_name="theirs")
    except Exception as error:  # loaders fail in any way
        return f"{type(error).__name__}: {error}"
    found = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        for path, layer in getattr(pipe, name, torch.nn.Module()).named_modules():
            if isinstance(layer, LoraLayer):
                found[f"{name}.{path}"] = layer.get_delta_weight("theirs").detach()
    return found


def assert_verdict(family: Any, file: Path, wanted: dict[str, Tensor]) -> None:
    """`family`: a miniature's name or a pipeline class; `wanted`: the changes that the file is for."""
    said = inspect_adapter(file).programs[0]
    stock = applied_by_stock(FAMILIES[family].make() if isinstance(family, str) else build(family), file)
    if isinstance(stock, str):
        assert said.loads is False, (said, stock)
        assert "raises" in said.reason
        return
    right = sum(path in stock and torch.allclose(stock[path], change, atol=1e-4) for path, change in wanted.items())
    assert said.loads == (right == len(wanted)), (said, right, len(stock))
    if not stock:
        assert "finds none of its names" in said.reason
    elif len(stock) < len(wanted):
        assert f"applies {len(stock)} of {len(wanted)} layers" in said.reason
    elif right < len(wanted):
        assert "another strength" in said.reason


def changes(tensors: Tensors, scale: float = 1.0) -> dict[str, Tensor]:
    ups = {key.removesuffix(".lora_B.weight"): up for key, up in tensors.items() if "lora_B" in key}
    return {path: scale * up.flatten(1) @ tensors[f"{path}.lora_A.weight"].flatten(1) for path, up in ups.items()}


@pytest.mark.filterwarnings(WARNED, "ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("family", "form"), CASES)
def test_the_verdict_is_what_the_stock_loader_does(family: str, form: str, tmp_path: Path) -> None:
    """Of numbers that PEFT would apply in full, so that every form that is read means the same change."""
    plain = {key: tensor.clone() for key, tensor in made(family, alpha=float).items()}
    tensors = {**FORMS, **NATIVES}[form](plain)
    base = made(family).base
    told = {"alignprop.base_class": base.base_class, "alignprop.families": json.dumps(dict(base.families))}
    # LTX is told by its width, which a miniature has not, and nobody writes the last form.
    header = told if family == "ltx" or form == "PEFT in a component" else {}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors", header)
    wanted = changes(plain, 0.5 if form == "diffusers, alphas" else 1.0)
    if form == "diffusers of 2023":
        wanted = {path: change for path, change in wanted.items() if re.search(r"attn\d?\.to_(q|k|v|out\.0)$", path)}
    assert_verdict(family, tmp_path / "a.safetensors", wanted)


@pytest.mark.parametrize(
    "name",
    ["AuraFlow", "Flux2", "HiDreamImage", "HunyuanVideo", "LTX2", "Lumina2", "Mochi", "QwenImage", "Sana", "ZImage"],
)
def test_families_of_the_sweep(name: str, tmp_path: Path) -> None:
    kind = getattr(diffusers, f"{name}Pipeline")
    adapter = random_adapter(build(kind), alpha=3.0)
    plain = {key: tensor.clone() for key, tensor in adapter.items()}
    header = {"alignprop.base_class": kind.__name__, "alignprop.families": json.dumps(dict(adapter.base.families))}
    for form in ("diffusers", "diffusers, alphas", "bare", "PEFT", "ComfyUI", "kohya", "LyCORIS", "half of it bare"):
        tensors = FORMS[form](plain)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors", header)
        assert_verdict(kind, tmp_path / "a.safetensors", changes(plain, 0.5 if form == "diffusers, alphas" else 1.0))


@pytest.mark.filterwarnings(WARNED)
@pytest.mark.parametrize("family", FAMILIES_HERE)
@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_the_verdict_of_what_we_export(family: str, form: Any, tmp_path: Path) -> None:
    """Of several ranks, and text encoders next to where kohya's and ComfyUI's names have them."""
    adapter = made(family, ranks=(2, 4), text=family in ("sd15", "sdxl"))
    try:
        (file,) = adapter.save(tmp_path / "a.safetensors", format=form)
    except AdapterError:  # kohya's scripts have no names for it
        assert form == "kohya"
        return
    wanted = {
        f"{name}.{path if name != 'text_encoder' else path.removeprefix('text_model.')}": f.folded() @ f.down
        for name, layers in adapter.layers.items()
        for path, f in layers.items()
    }
    assert_verdict(family, file, wanted)


@pytest.mark.parametrize(
    "header",
    [
        '{"unet.r": 3, "unet.lora_alpha": 9}',
        '{"unet.r": 2, "unet.lora_alpha": 9}',
        '{"r": 3, "lora_alpha": 9}',
        '{"text_encoder.r": 3}',
        "{",
    ],
)
def test_settings_in_a_header_count_as_the_loader_takes_them(header: str, tmp_path: Path) -> None:
    plain = {key: tensor.clone() for key, tensor in made("sd15", alpha=float).items()}
    save_file(plain, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    try:
        layers = Adapter.load(tmp_path / "a.safetensors").layers["unet"]
    except AdapterError:
        assert inspect_adapter(tmp_path / "a.safetensors").programs[0].loads is False
        return
    wanted = {f"unet.{path}": f.folded() @ f.down for path, f in layers.items()}
    assert_verdict("sd15", tmp_path / "a.safetensors", wanted)


def test_alpha_that_this_package_alone_reads(tmp_path: Path) -> None:
    """PEFT's settings next to the file, or in plain texts of the header."""
    plain = {key: tensor.clone() for key, tensor in made("sd15", alpha=float).items()}
    save_file(plain, tmp_path / "a.safetensors", {"lora_alpha": "6"})
    assert "another strength" in inspect_adapter(tmp_path / "a.safetensors").programs[0].reason
    assert_verdict("sd15", tmp_path / "a.safetensors", changes(plain, 2.0))


def test_nothing_of_a_real_pipeline_is_touched(tmp_path: Path) -> None:
    """A verdict draws no random numbers and leaves the libraries' logs as they were."""
    from diffusers.utils import logging

    (file,) = made("sd15").save(tmp_path / "a.safetensors", format="diffusers")
    state, verbosity = torch.get_rng_state(), logging.get_verbosity()
    assert inspect_adapter(file).programs[0].loads
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.get_verbosity() == verbosity
    assert load_file(file)


def hunyuan_of_musubi() -> Tensors:
    """One block by the names of musubi-tuner, with the alphas that diffusers' converter does not expect."""
    found: Tensors = {}
    for layer, outputs in (("img_attn_qkv", 12), ("img_attn_proj", 4), ("txt_attn_qkv", 12), ("txt_attn_proj", 4)):
        name = f"lora_unet_double_blocks_19_{layer}"
        found |= {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(outputs, 2)}
        found[f"{name}.alpha"] = torch.tensor(1.0)
    return found


def of_two_ranks() -> Tensors:
    """One pair of matrices that cannot be multiplied."""
    tensors = made("sd15").kohya_tensors()
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    return {**tensors, first: torch.ones(len(tensors[first]), 5)}


WORDS: dict[str, tuple[Callable[[], Tensors], dict[str, str], str]] = {
    "fused layers with alphas": (hunyuan_of_musubi, {}, "it splits fused layers .query, key and value.*--to diffusers"),
    "two ranks": (of_two_ranks, {}, "a matrix does not have the shape that its layer needs"),
    "settings without layers": (
        lambda: dict(made("sd15", alpha=float).items()),
        {"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 9}'},
        "the header name no target_modules",
    ),
    "an alpha of no layer": (
        lambda: made("sd15").kohya_tensors() | {"lora_unet_none.alpha": torch.tensor(1.0)},
        {},
        "renamed: lora_unet_none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_an_error_of_the_loader_is_told_in_words(name: str, tmp_path: Path) -> None:
    tensors, header, said = WORDS[name]
    save_file({key: tensor.clone() for key, tensor in tensors().items()}, tmp_path / "a.safetensors", header)
    verdict = inspect_adapter(tmp_path / "a.safetensors").programs[0]
    assert verdict.loads is False
    assert re.search(said, verdict.reason)
