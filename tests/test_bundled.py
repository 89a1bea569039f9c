"""The bundled models: found by name, listed without torch, and an incomplete installation is told."""

import json
import subprocess
import sys

import pytest

from alignprop_pipe import bundled
from alignprop_pipe.config.settings import PRESETS
from alignprop_pipe.errors import AlignError


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A whole set of folders, as an installation has them."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    files = {
        "emoji/model_index.json": json.dumps(index),
        "emoji/unet/config.json": "{}",
        "emoji/unet/diffusion_pytorch_model.safetensors": "x" * 500_000,
        "emoji/scheduler/scheduler_config.json": "{}",
        "emoji-scorer/config.json": "{}",
        "emoji-scorer/model.safetensors": "x",
        "emoji-detector/config.json": "{}",
        "emoji-detector/model.safetensors": "x",
        "emoji-answerer/config.json": "{}",
        "emoji-answerer/model.safetensors": "x",
        "emoji-judge/config.json": "{}",
        "emoji-judge/model.safetensors": "x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bundled, "MODELS_DIR", tmp_path)
    return tmp_path


def test_names_lead_to_folders(models):
    assert bundled.resolve_model("emoji") == str(models / "emoji")
    assert bundled.bundled_path("emoji-judge") == models / "emoji-judge"
    for other in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "./emoji", "emoji/unet", ""):
        assert bundled.resolve_model(other) == other


def test_preset_of_the_bundled_model():
    assert bundled.preset_for("emoji") in PRESETS
    for other in ("emoji-judge", "stable-diffusion-v1-5/stable-diffusion-v1-5", None):
        assert bundled.preset_for(other) == "fast"


def test_list_of_models(models):
    assert all(model.path.parent == models for model in bundled.MODELS)
    names = ["emoji", "emoji-scorer", "emoji-detector", "emoji-answerer", "emoji-judge"]
    assert [model.name for model in bundled.MODELS] == names
    assert all(model.summary and "OFL" in model.licence and model.missing is None for model in bundled.MODELS)
    assert bundled.MODELS[0].size_mb == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "lost", "told"),
    [
        ("emoji", "model_index.json", "its configuration"),
        ("emoji", "unet/diffusion_pytorch_model.safetensors", "unet"),
        ("emoji", "scheduler/scheduler_config.json", "scheduler"),
        ("emoji-scorer", "model.safetensors", "safetensors"),
        ("emoji-judge", "config.json", "its configuration"),
    ],
)
def test_an_incomplete_installation_is_told_how_to_mend(models, name, lost, told):
    (models / name / lost).unlink()
    with pytest.raises(AlignError, match=f"incomplete: .*{told}.*pip install --force-reinstall.*git checkout"):
        bundled.bundled_path(name)


def test_damaged_files_are_told(models):
    (models / "emoji-judge" / "model.safetensors").write_text("")
    with pytest.raises(AlignError, match="incomplete"):
        bundled.bundled_path("emoji-judge")
    (models / "emoji" / "model_index.json").write_text("{")
    with pytest.raises(AlignError, match="readable model_index"):
        bundled.resolve_model("emoji")


def test_no_folder_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "MODELS_DIR", tmp_path / "none")
    assert [model.size_mb for model in bundled.MODELS] == [0, 0, 0, 0, 0]
    with pytest.raises(AlignError, match="incomplete"):
        bundled.resolve_model("emoji")


def test_listing_loads_no_torch():
    code = "import sys; from alignprop_pipe.bundled import MODELS; print(len(MODELS), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "5 False"


def test_the_shipped_models_are_small_and_whole():
    there = [model for model in bundled.MODELS if model.path.is_dir()]
    if not there:
        pytest.skip("the bundled models are not trained yet")
    for model in there:
        assert model.missing is None
    assert sum(model.size_mb for model in there) < 16
