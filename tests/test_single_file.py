"""Checkpoint files of Stable Diffusion load with what ships in the package, and no connection is tried."""

import json
import shutil
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import diffusers
import huggingface_hub
import miniatures
import pytest
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LTXPipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.adapters.checkpoint import original_checkpoint, write_checkpoint
from alignprop_pipe.diffusion import single_file
from alignprop_pipe.diffusion.single_file import CONFIGS, Weights, shipped_config, single_file_class
from alignprop_pipe.errors import PipelineError

TEXT = "a red fox, \u00e4nd 2 dogs!"


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Online as far as the libraries know, but no name is found and nothing answers; every attempt is in the list."""
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache in place of this machine's."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


# --- the configurations that ship -------------------------------------------------------------------------------------

VAE, CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G = 83_653_863, 123_060_480, 340_387_840, 694_659_840
SIZES = {
    "v1": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "inpainting": {"unet": 859_535_364, "vae": VAE, "text_encoder": CLIP_L},
    "v2": {"unet": 865_910_724, "vae": VAE, "text_encoder": OPEN_CLIP_H},
    "v2_base": {"unet": 865_910_724, "vae": VAE, "text_encoder": OPEN_CLIP_H},
    "inpainting_v2": {"unet": 865_925_124, "vae": VAE, "text_encoder": OPEN_CLIP_H},
    "xl_base": {"unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
    "xl_inpaint": {"unet": 2_567_478_084, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G},
}


def listed(kind: str) -> dict[str, Any]:
    return json.loads((CONFIGS / kind / "model_index.json").read_text(encoding="utf-8"))


def on_meta(kind: str, name: str) -> Any:
    """A network of the shipped size without memory for its weights."""
    library, class_name = listed(kind)[name]
    made = getattr(diffusers if library == "diffusers" else transformers, class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return made.from_config(made.load_config(CONFIGS / kind, subfolder=name))
        return made(made.config_class.from_pretrained(CONFIGS / kind, subfolder=name))


def test_a_folder_for_every_kind() -> None:
    assert {folder.name for folder in CONFIGS.iterdir()} == set(SIZES)


@pytest.mark.parametrize("kind", SIZES)
def test_the_networks_have_the_published_sizes(kind: str, connections: list[Any]) -> None:
    built = {name: sum(weight.numel() for weight in on_meta(kind, name).parameters()) for name in SIZES[kind]}
    assert built == SIZES[kind]
    assert connections == []


def test_the_first_stage_sees_as_many_heads_as_published() -> None:
    """No shape tells the number of heads, so that a wrong one would only be seen in the pictures."""
    heads = {}
    for kind in ("v1", "v2", "xl_base"):
        unet = on_meta(kind, "unet")
        found = {name: module.heads for name, module in unet.named_modules() if name.endswith("attn1")}
        heads[kind] = [found[key] for key in sorted(found) if key.endswith("attentions.0.transformer_blocks.0.attn1")]
    assert heads["v1"] == [8, 8, 8, 8, 8, 8, 8]
    assert heads["v2"] == [5, 10, 20, 20, 20, 10, 5]
    assert heads["xl_base"] == [10, 20, 20, 20, 10]


@pytest.mark.parametrize("kind", SIZES)
def test_the_scheduler_is_known_by_name_and_the_schedule_is_the_published_one(kind: str) -> None:
    name = listed(kind)["scheduler"][1]
    scheduler = getattr(diffusers, name).from_pretrained(CONFIGS / kind, subfolder="scheduler")
    assert type(scheduler).__name__ == name
    assert float(scheduler.alphas_cumprod[0]) == pytest.approx(0.99915)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.0046604, rel=1e-4)
    assert scheduler.config.prediction_type == ("v_prediction" if kind == "v2" else "epsilon")


def test_the_configurations_name_no_machine_and_hold_no_vocabulary() -> None:
    files = [file for file in CONFIGS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 50_000
    assert {file.suffix for file in files} == {".json"}


# --- files ------------------------------------------------------------------------------------------------------------

MADE: dict[str, tuple[Callable[..., Any], dict[str, Any], type]] = {
    "v1": (checkpoints.sd1, {}, StableDiffusionPipeline),
    "inpainting": (checkpoints.sd1, {"in_channels": 9}, StableDiffusionInpaintPipeline),
    "v2": (checkpoints.sd2, {}, StableDiffusionPipeline),
    "inpainting_v2": (checkpoints.sd2, {"in_channels": 9}, StableDiffusionInpaintPipeline),
    "xl_base": (checkpoints.sdxl, {}, StableDiffusionXLPipeline),
    "xl_inpaint": (checkpoints.sdxl, {"in_channels": 9}, StableDiffusionXLInpaintPipeline),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A miniature of a kind, and the folder with its file and its configuration; made when it is first asked for."""

    @cache
    def take(kind: str) -> tuple[Any, Path]:
        build, changed, _ = MADE[kind]
        pipe, folder = build(**changed), tmp_path_factory.mktemp(kind)
        checkpoints.shrunk_config(folder / "configs", kind, pipe)
        write_checkpoint(pipe, folder / "model.safetensors")
        return pipe, folder

    return take


@pytest.fixture
def made(
    shelf: Callable[[str], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Any, Path]]:
    """A miniature of a kind and its file; the configuration that ships for the kind has shrunk to its size."""

    def make(kind: str) -> tuple[Any, Path]:
        pipe, folder = shelf(kind)
        monkeypatch.setattr(single_file, "CONFIGS", folder / "configs")
        return pipe, Path(shutil.copy(folder / "model.safetensors", tmp_path / "model.safetensors"))

    return make


def networks(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def without_header(file: Path, **changed: Tensor) -> Path:
    """The file as others write it: no texts about the model."""
    save_file({**load_file(file), **changed}, file)
    return file


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(TEXT, height=16, width=16, num_inference_steps=2, output_type="pt", generator=generator).images


@pytest.mark.parametrize("kind", MADE)
def test_a_file_loads_without_the_network(
    kind: str, made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any], no_cache: Path
) -> None:
    pipe, file = made(kind)
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    loaded = AlignPropPipeline.from_single_file(without_header(file), tokenizer_folder=folder)
    assert connections == []
    assert isinstance(loaded, MADE[kind][2])
    before, after = checkpoints.weights(pipe), checkpoints.weights(loaded)
    assert before.keys() == after.keys()
    assert [key for key, weight in before.items() if not torch.equal(weight, after[key])] == []
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = getattr(loaded, name, None), getattr(pipe, name, None)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.model_max_length == 77
            padded = [words(TEXT, padding="max_length", truncation=True).input_ids for words in (ours, theirs)]
            assert padded[0] == padded[1]
    assert getattr(loaded, "safety_checker", None) is None


@pytest.mark.parametrize("kind", ["v1", "xl_base"])
def test_it_draws_what_the_pipeline_draws(kind: str, made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, file = made(kind)
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    loaded = AlignPropPipeline.from_single_file(file, tokenizer_folder=folder, scheduler=pipe.scheduler)
    assert torch.equal(picture(loaded), picture(pipe))


def test_it_can_be_trained_when_loaded_in_inference_mode(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    _, file = made("v1")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    with torch.inference_mode():
        loaded = AlignPropPipeline.from_single_file(file, tokenizer_folder=folder)
    assert not any(weight.is_inference() for weight in checkpoints.weights(loaded).values())
    assert not loaded.scheduler.alphas_cumprod.is_inference()


def test_dtype_class_and_name(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    _, file = made("v1")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    loaded = AlignPropPipeline.from_single_file(
        file, StableDiffusionImg2ImgPipeline, tokenizer_folder=folder, dtype=torch.float16
    )
    assert isinstance(loaded, StableDiffusionImg2ImgPipeline)
    assert {weight.dtype for weight in loaded.unet.parameters()} == {torch.float16}
    assert loaded.name_or_path == str(file)
    assert str(tmp_path) not in json.dumps(dict(loaded.unet.config), default=str)


def test_only_what_tells_the_kind_is_read(
    made: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made("v2")
    weights = Weights(without_header(file))
    read = []
    monkeypatch.setattr(weights, "_file", Recorder(weights._file, read))
    assert shipped_config(weights) == single_file.CONFIGS / "v2"
    assert 0 < len(set(read)) < 4


class Recorder:
    def __init__(self, file: Any, read: list[str]) -> None:
        self.file, self.read = file, read

    def get_tensor(self, key: str) -> Tensor:
        self.read.append(key)
        return self.file.get_tensor(key)


# --- velocity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "kind"), [(0.2, "v2"), (0.05, "v2_base")])
def test_the_two_kinds_of_stable_diffusion_2(spread: float, kind: str) -> None:
    """Without a header the spread of one bias tells them apart, with one the header does."""
    noise = torch.randn(320, generator=torch.Generator().manual_seed(0))
    state = {
        single_file.FIRST_LAYER: torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
        single_file.LAST_NORM: spread * noise,
    }
    assert shipped_config(state) == CONFIGS / kind


@pytest.mark.parametrize(("said", "kind"), [("epsilon", "v2_base"), ("v", "v2")])
def test_the_header_comes_first(said: str, kind: str, tmp_path: Path) -> None:
    state = {
        single_file.FIRST_LAYER: torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
        single_file.LAST_NORM: torch.tensor([0.0, 0.1 if said == "v" else 0.5]),
    }
    save_file(state, tmp_path / "model.safetensors", {"modelspec.prediction_type": said})
    assert shipped_config(Weights(tmp_path / "model.safetensors")) == CONFIGS / kind


def test_marked_files_predict_the_velocity(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, file = made("xl_base")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")

    def scheduler(**given: Any) -> Any:
        return AlignPropPipeline.from_single_file(file, tokenizer_folder=folder, **networks(pipe), **given).scheduler

    assert isinstance(scheduler(), EulerDiscreteScheduler)
    assert scheduler().config.prediction_type == "epsilon"
    without_header(file, v_pred=torch.tensor([]))
    assert scheduler().config.prediction_type == "v_prediction"
    assert not scheduler().config.rescale_betas_zero_snr
    without_header(file, v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    assert scheduler().config.rescale_betas_zero_snr
    assert scheduler().config.timestep_spacing == "trailing"
    own = DDIMScheduler()
    assert scheduler(scheduler=own) is own


def test_a_header_alone_marks_stable_diffusion_1(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    _, file = made("v1")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    save_file(load_file(file), file, {"modelspec.prediction_type": "v"})
    scheduler = AlignPropPipeline.from_single_file(file, tokenizer_folder=folder).scheduler
    assert isinstance(scheduler, PNDMScheduler)
    assert scheduler.config.prediction_type == "v_prediction"


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_given_comes_first(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any]
) -> None:
    pipe, file = made("xl_base")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    first, second = miniatures.clip_tokenizer(), miniatures.clip_tokenizer()

    def load(**given: Any) -> Any:
        return AlignPropPipeline.from_single_file(file, **networks(pipe), **given)

    both = load(tokenizer=first, tokenizer_2=second, tokenizer_folder=tmp_path / "not there")
    assert (both.tokenizer, both.tokenizer_2) == (first, second)
    one = load(tokenizer=first)
    assert one.tokenizer is first
    assert (first.pad_token, one.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    folders = load(tokenizer=str(folder), tokenizer_2=folder)
    assert folders.tokenizer(TEXT).input_ids == pipe.tokenizer(TEXT).input_ids
    assert folders.tokenizer_2.pad_token == "!"
    assert connections == []


def test_a_folder_that_diffusers_wrote_is_a_tokenizer_too(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    pipe, file = made("v2")
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AlignPropPipeline.from_single_file(file, tokenizer_folder=tmp_path / "tokenizer")
    assert loaded.tokenizer(TEXT).input_ids == pipe.tokenizer(TEXT).input_ids
    assert loaded.tokenizer.pad_token == "!"


@pytest.mark.parametrize(
    ("repository", "inside"),
    [
        ("models--openai--clip-vit-large-patch14", ""),
        ("models--stable-diffusion-v1-5--stable-diffusion-v1-5", "tokenizer"),
    ],
)
def test_the_cache_of_the_hub_is_searched(
    repository: str, inside: str, made: Callable[..., tuple[Any, Path]], connections: list[Any], no_cache: Path
) -> None:
    pipe, file = made("v1")
    commit = "0" * 40
    checkpoints.tokenizer_folder(no_cache / repository / "snapshots" / commit / inside)
    (no_cache / repository / "refs").mkdir()
    (no_cache / repository / "refs" / "main").write_text(commit)
    loaded = AlignPropPipeline.from_single_file(file, cache_dir=str(no_cache))
    assert loaded.tokenizer(TEXT).input_ids == pipe.tokenizer(TEXT).input_ids
    assert loaded.tokenizer.model_max_length == 77
    assert connections == []


NO_TOKENIZER = r"no tokenizer.*vocab\.json and merges\.txt.*openai/clip-vit-large-patch14.*tokenizer_folder="


def test_without_a_tokenizer_the_error_says_which_files_go_where(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any], no_cache: Path
) -> None:
    _, file = made("v1")
    with pytest.raises(PipelineError, match=NO_TOKENIZER):
        AlignPropPipeline.from_single_file(file, local_files_only=True, cache_dir=str(no_cache))
    assert connections == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=r"no CLIP tokenizer in .*empty.*vocab\.json and merges\.txt"):
        AlignPropPipeline.from_single_file(file, tokenizer_folder=tmp_path / "empty")
    assert connections == []


def test_the_hub_is_asked_last(
    made: Callable[..., tuple[Any, Path]], connections: list[Any], no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it tries again, later and later
    _, file = made("v1")
    with pytest.raises(PipelineError, match=NO_TOKENIZER):
        AlignPropPipeline.from_single_file(file, cache_dir=str(no_cache))
    assert connections, "without local_files_only the Hub is asked"


# --- other files, and files with faults -------------------------------------------------------------------------------


def ltx_checkpoint(pipe: LTXPipeline, path: Path) -> Path:
    """The transformer in one file, by the names of the model's first release."""
    names = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    weights = {}
    for key, weight in pipe.transformer.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        weights[f"model.diffusion_model.{key}"] = weight.contiguous()
    save_file(weights, path)
    return path


def test_other_models_are_left_to_diffusers(tmp_path: Path) -> None:
    pipe = miniatures.ltx()
    path = ltx_checkpoint(pipe, tmp_path / "model.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    parts = {"vae": pipe.vae, "text_encoder": pipe.text_encoder}
    made = AlignPropPipeline.from_single_file(path, config=str(tmp_path / "folder"), **parts)
    assert isinstance(made, LTXPipeline)
    weights = pipe.transformer.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in made.transformer.state_dict().items())
    assert made.vae is pipe.vae


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_the_class_for_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = ltx_checkpoint(miniatures.ltx(), tmp_path / "model.safetensors")
    miniatures.sdxl().save_pretrained(tmp_path / "folder")
    assert single_file_class(str(path), {"config": str(tmp_path / "folder")}) is StableDiffusionXLPipeline
    with pytest.raises(PipelineError, match=r"LTX.*not on this machine.*config= a folder.*pipeline_class="):
        AlignPropPipeline.from_single_file(path)
    save_file(original_checkpoint(checkpoints.sd1()), path)
    assert single_file_class(str(path), {}) is StableDiffusionPipeline


def test_a_configuration_that_is_given_is_the_one_that_counts(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any]
) -> None:
    _, file = made("v1")
    pipe = checkpoints.sd1()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "folder")
    loaded = AlignPropPipeline.from_single_file(file, config=str(tmp_path / "folder"), tokenizer_folder=tmp_path)
    assert isinstance(loaded.scheduler, EulerDiscreteScheduler)
    assert loaded.tokenizer.model_max_length == 77
    assert connections == []


def test_a_pickle_of_the_first_days_loads(
    made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any]
) -> None:
    pipe, file = made("v1")
    torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "model.ckpt")
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    loaded = AlignPropPipeline.from_single_file(tmp_path / "model.ckpt", tokenizer_folder=folder)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert connections == []


@pytest.mark.parametrize(("prefix", "missing"), [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_a_part_of_a_checkpoint(
    prefix: str, missing: str, made: Callable[..., tuple[Any, Path]], tmp_path: Path, connections: list[Any]
) -> None:
    pipe, file = made("v1")
    save_file({key: weight for key, weight in load_file(file).items() if not key.startswith(prefix)}, file)
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    with pytest.raises(
        PipelineError, match=rf"only a part.* no {missing};.*from_single_file\(\.\.\., {missing}=\.\.\.\)"
    ):
        AlignPropPipeline.from_single_file(file, tokenizer_folder=folder)
    whole = AlignPropPipeline.from_single_file(file, tokenizer_folder=folder, **{missing: getattr(pipe, missing)})
    assert getattr(whole, missing) is getattr(pipe, missing)
    assert connections == []


def test_a_weight_that_is_missing(made: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    _, file = made("v1")
    lost = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    save_file({key: weight for key, weight in load_file(file).items() if key != lost}, file)
    folder = checkpoints.tokenizer_folder(tmp_path / "tokenizer")
    with pytest.raises(PipelineError, match=r"incomplete: text_encoder has no final_layer_norm\.weight"):
        AlignPropPipeline.from_single_file(file, tokenizer_folder=folder)


def test_files_that_are_no_model(tmp_path: Path, connections: list[Any]) -> None:
    with pytest.raises(PipelineError, match=r"there is no file .*nowhere\.safetensors"):
        AlignPropPipeline.from_single_file(tmp_path / "nowhere.safetensors")
    save_file({"unet.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(PipelineError, match=r"no model that diffusers knows.*unet\.lora_A\.weight.*load_adapter"):
        AlignPropPipeline.from_single_file(tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes()[:-3])
    with pytest.raises(PipelineError, match="cannot be read as safetensors"):
        AlignPropPipeline.from_single_file(tmp_path / "cut.safetensors")
    assert connections == []
