"""The strength of files whose layers do not say it, against PEFT's own pictures; and doubts that are told."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import made
from miniatures import FAMILIES
from random_adapters import by_peft, draw
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_pipe.adapters import merge, mix
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.adapters.reading import open_adapter
from alignprop_pipe.errors import AdapterError

Q, V = ".*attn1\\.to_q", "attn2.to_v"
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 10},
    "rooted": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7, "to_out.0": 1}},
    "expressions": {"r": 3, "lora_alpha": 2, "alpha_pattern": {Q: 9, V: 5, "(to_k|to_v)": 1, "to_[kv]": 8}},
    "all of it": {
        "r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 8},
    },
}  # fmt: skip


def drawn_with(adapter: Any, family: str = "sd15") -> Tensor:
    pipe = FAMILIES[family].make()
    if adapter is not None:
        load_adapter(pipe, adapter)
    return draw(pipe, **FAMILIES[family].call(1))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_picture_is_that_of_peft(name: str, tmp_path: Path) -> None:
    """By every way that a folder comes in: the folder, its file, an Adapter, another format, a mix, a merge."""
    picture = by_peft(tmp_path / "theirs", SETTINGS[name])
    assert float((picture - drawn_with(None)).abs().max()) > 1e-3
    adapter = Adapter.load(tmp_path / "theirs")
    ways: list[Any] = [tmp_path / "theirs", tmp_path / "theirs/adapter_model.safetensors", adapter]
    ways += adapter.save(tmp_path / "a.safetensors", format="both")
    ways += [mix.mix([(tmp_path / "theirs", 1.0)])]
    for way in ways:
        torch.testing.assert_close(drawn_with(way), picture, atol=1e-5, rtol=0)
    pipe = FAMILIES["sd15"].make()
    merge.merge(pipe, tmp_path / "theirs", tmp_path / "merged")
    merged = type(pipe).from_pretrained(tmp_path / "merged", safety_checker=None)
    torch.testing.assert_close(draw(merged, **FAMILIES["sd15"].call(1)), picture, atol=1e-5, rtol=0)
    found = inspect_adapter(tmp_path / "theirs")
    assert found.change == pytest.approx(sum(f.norm() ** 2 for f in adapter.layers["unet"].values()) ** 0.5)
    of_comfyui = inspect_adapter(ways[4]).alphas  # whose file carries them, in float32
    assert {round(alpha, 4): n for alpha, n in found.alphas.items()} == {round(a, 4): n for a, n in of_comfyui.items()}
    assert "alpha stands in adapter_config.json alone" in " ".join(found.problems)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan", "ltx", "pixart"])
def test_peft_folders_of_other_families(family: str, tmp_path: Path) -> None:
    name = "unet" if family == "sdxl" else "transformer"
    settings = {"r": 2, "lora_alpha": 5, "alpha_pattern": {"to_q": 3}}
    picture = by_peft(tmp_path / "theirs", settings, family, name)
    torch.testing.assert_close(drawn_with(tmp_path / "theirs", family), picture, atol=1e-5, rtol=0)
    assert Adapter.load(tmp_path / "theirs").base.families == made(family).base.families


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's question to transformers
def test_a_text_encoder_of_peft(tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 9, "alpha_pattern": {"fc1": 30}}
    picture = by_peft(tmp_path / "theirs", settings, name="text_encoder")
    torch.testing.assert_close(drawn_with(tmp_path / "theirs"), picture, atol=1e-5, rtol=0)
    assert set(Adapter.load(tmp_path / "theirs").layers) == {"text_encoder"}


def test_a_folder_with_a_named_adapter_in_it(tmp_path: Path) -> None:
    by_peft(tmp_path / "theirs", SETTINGS["alpha"])
    (tmp_path / "theirs").rename(tmp_path / "style")
    assert set(inspect_adapter(tmp_path).alphas) == {10.0}
    by_peft(tmp_path / "other", SETTINGS["alpha"])
    with pytest.raises(AdapterError, match="several adapters of PEFT: other, style"):
        Adapter.load(tmp_path)


def test_a_pickle_of_peft_has_its_settings_too(tmp_path: Path) -> None:
    by_peft(tmp_path, SETTINGS["alpha"])
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is a pickle"):
        Adapter.load(tmp_path)
    assert Adapter.load(tmp_path, allow_pickle=True).shapes["unet"] == (4, 10.0)


# --- texts of a header -----------------------------------------------------------------------------------------------


def bare(prefix: str = "unet.") -> dict[str, Tensor]:
    """Layers without alphas, of rank 3."""
    return {key.replace("unet.", prefix): tensor.clone() for key, tensor in made("sd15", alpha=float).items()}


HEADERS: dict[str, tuple[dict[str, str], float, str]] = {
    "lora_alpha": ({"lora_alpha": "6"}, 6.0, "alpha stands in its header alone"),
    "of a component": ({"unet.lora_alpha": "6", "unet.r": "3"}, 6.0, "alpha stands in its header alone"),
    "of another component": ({"text_encoder.lora_alpha": "6"}, 3.0, "alpha stands in its header alone"),
    "rooted": ({"lora_alpha": "6", "use_rslora": "True"}, 6 * 3**0.5, "alpha stands in its header alone"),
    "of kohya": ({"ss_network_alpha": "6", "ss_network_dim": "12"}, 3.0, "alpha 6 for rank 12.*the scale 0.5"),
    "without a rank": ({"network_alpha": "1.5"}, 3.0, "alpha 1.5 for rank 3.*the scale 0.5"),
    "of kohya for a component": ({"unet.ss_network_alpha": "1"}, 3.0, "alpha 1 for rank 3"),
    "of diffusers": ({"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 6}'}, 6.0, "only diffusers reads"),
    "by another name": ({"alpha": "6", "rank": "12"}, 3.0, "alpha 6 for rank 12.*the scale 0.5"),
    "in a table": ({"lora_config": '{"lora_alpha": 6, "lora_rank": 12}'}, 3.0, "alpha 6 for rank 12.*the scale 0.5"),
    "in a table in a table": ({"config": '{"network": {"alpha": 1}, "lr": 1}'}, 3.0, "alpha 1 for rank 3"),
    "in full by another name": ({"alpha": "3"}, 3.0, ""),
    "in full": ({"ss_network_alpha": "3", "ss_network_dim": "3"}, 3.0, ""),
    "nothing": ({}, 3.0, ""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_alpha_in_a_header_is_applied_or_the_doubt_is_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, alpha, told = HEADERS[name]
    save_file(bare(), tmp_path / "a.safetensors", header)
    found = inspect_adapter(tmp_path / "a.safetensors")
    assert list(found.alphas) == [pytest.approx(alpha)]
    assert not told or re.search(told, " ".join(found.problems))
    assert bool(told) == any("alpha" in problem for problem in found.problems)
    if told and name != "of diffusers":
        for use in (Adapter.load, lambda path: load_adapter(FAMILIES["sd15"].make(), path)):
            caplog.clear()
            use(tmp_path / "a.safetensors")
            assert "strength is in doubt" in caplog.text
    saved = Adapter.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors", format="diffusers")
    again = Adapter.load(saved[0])
    assert again.keys() == made("sd15").keys()
    assert all(torch.allclose(again[key], Adapter.load(tmp_path / "a.safetensors")[key]) for key in again)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_peft_without_its_settings(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(bare(prefix), tmp_path / "adapter_model.safetensors")
    found = inspect_adapter(tmp_path / "adapter_model.safetensors")
    assert "PEFT keeps alpha in adapter_config.json, which is not next to it" in " ".join(found.problems)
    with caplog.at_level(logging.WARNING):
        merge.merge(FAMILIES["sd15"].make(), tmp_path / "adapter_model.safetensors", tmp_path / "merged")
    assert "strength is in doubt" in caplog.text


def test_alphas_of_the_layers_go_first(tmp_path: Path) -> None:
    layers = bare()
    layers |= {key.replace(".lora_A.weight", ".alpha"): torch.tensor(2.0) for key in layers if "lora_A" in key}
    save_file(layers, tmp_path / "a.safetensors", {"lora_alpha": "12"})
    found = inspect_adapter(tmp_path / "a.safetensors")
    assert set(found.alphas) == {2.0}
    assert "lora_alpha 12, and its layers hold alpha 2" in " ".join(found.problems)


def test_our_own_files_are_in_no_doubt(tmp_path: Path) -> None:
    forms: tuple[Any, ...] = ("diffusers", "comfyui", "kohya")
    for form in forms:
        (file,) = made("flux").save(tmp_path / f"{form}.safetensors", format=form)
        assert open_adapter(file).doubts == ()


# --- what is no plain LoRA, and settings that lie --------------------------------------------------------------------

GOOD = {"peft_type": "LORA", "r": 3, "lora_alpha": 3}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({"peft_type": "LOHA"}, "type 'LOHA'"),
    "DoRA": ({"use_dora": True}, "a DoRA"),
    "biases": ({"bias": "all"}, "with biases"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "changes the model's own weights"),
    "whole layers": ({"modules_to_save": ["conv_in"]}, "whole weights next to"),
    "activated": ({"alora_invocation_tokens": [1]}, "aLoRA"),
    "a text": ({"lora_alpha": "much"}, "'much', where a number is needed"),
    "infinite": ({"lora_alpha": float("inf")}, "where a number is needed"),
    "huge": ({"lora_alpha": 1e30}, "none in use is beyond"),
    "a list": ({"alpha_pattern": [1]}, "no table of names and numbers"),
    "no pattern": ({"alpha_pattern": {"(to_q": 1}}, "no pattern of names"),
    "a slow pattern": ({"alpha_pattern": {"((a|o|t|_)+)+x": 1}}, "no pattern of names"),
    "too many stars": ({"alpha_pattern": {".*.*.*.*.*.*.*.*x": 1}}, "no pattern of names"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_and_lies_are_refused_in_words(name: str, tmp_path: Path) -> None:
    settings, said = OTHERS[name]
    save_file(bare("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, **settings}))
    started = time.monotonic()
    with pytest.raises(AdapterError, match=said):
        Adapter.load(tmp_path)
    with pytest.raises(AdapterError, match=said):
        load_adapter(FAMILIES["sd15"].make(), tmp_path)
    assert said.split("'")[0] in " ".join(inspect_adapter(tmp_path).problems)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 50_000, "\xff"])
def test_settings_that_are_damaged(text: str, tmp_path: Path) -> None:
    save_file(bare("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"its strength in adapter_config\.json next to it, which cannot be read"):
        Adapter.load(tmp_path)


def test_settings_beside_another_file_are_not_its_own(tmp_path: Path) -> None:
    by_peft(tmp_path, SETTINGS["alpha"])
    made("sd15").save(tmp_path / "mine.safetensors", format="kohya")
    assert set(inspect_adapter(tmp_path / "mine.safetensors").alphas) == {5.0}
    assert set(inspect_adapter(tmp_path / "adapter_model.safetensors").alphas) == {10.0}
    (tmp_path / "mine.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    assert set(inspect_adapter(tmp_path / "style.safetensors").alphas) == {10.0}
    (tmp_path / "style.safetensors").unlink()
    save_file(bare(), tmp_path / "pytorch_lora_weights.safetensors")
    assert set(inspect_adapter(tmp_path).alphas) == {3.0}


def test_patterns_by_names_that_a_converter_changes(tmp_path: Path) -> None:
    """PEFT on a model with its own names, as Wan's authors have it: the change is that of each name in the file."""
    (file,) = made("wan", alpha=float).save(tmp_path / "wan.safetensors", format="comfyui")
    tensors = load_file(file)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    file.unlink()
    settings = {**GOOD, "alpha_pattern": {"self_attn.q": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    got, plain = Adapter.load(tmp_path).layers["transformer"], made("wan", alpha=float).layers["transformer"]
    for path, factors in plain.items():
        wanted = factors.norm() * (4 if path.endswith("attn1.to_q") else 1)
        assert got[path].norm() == pytest.approx(wanted, rel=1e-6)
    assert got.keys() == plain.keys()


@pytest.mark.parametrize(
    ("settings", "said"), [({"bias": "all"}, "a LoRA with biases"), ({"modules_to_save": ["conv_in"]}, "whole weights")]
)
def test_what_peft_trained_beside_the_lora_is_named(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    """PEFT's own folder: the settings say what its other keys are."""
    by_peft(tmp_path, {"r": 2, "lora_alpha": 2, **settings})
    for use in (Adapter.load, lambda path: load_adapter(FAMILIES["sd15"].make(), path)):
        with pytest.raises(AdapterError, match=said):
            use(tmp_path)
