"""Checkpoint files that hold a whole model -> a stock pipeline, without the Hub where the package knows the model.

A file of Stable Diffusion 1.x, 2.x or XL lacks its configuration, which lies in `single_file_configs` by diffusers'
names for the kinds, and the vocabulary of its tokenizer, which is looked for on this machine before the Hub is asked.
Files of other models, and calls that name a configuration, go to diffusers as they are.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    VALID_URL_PREFIXES,
    fetch_diffusers_config,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from alignprop_pipe.errors import PipelineError
from alignprop_pipe.sources import is_file

CONFIGS = Path(__file__).parent / "single_file_configs"
"""A folder for each kind in diffusers' format, without weights and vocabularies."""

VOCABULARY_REPO = "openai/clip-vit-large-patch14"
"""Every text encoder of these models reads the words of this one."""
VOCABULARY = ("vocab.json", "merges.txt")

PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""How the keys of each network begin in the original layout."""
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
LAST_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

OWN_CONFIG = ("config", "original_config", "original_config_file")
DOWNLOAD = ("cache_dir", "disable_mmap", "force_download", "local_files_only", "proxies", "revision", "token")


class Weights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; `header` holds its texts."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self._names = dict.fromkeys(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise PipelineError(
                f"{str(path)!r} cannot be read as safetensors ({error}): it is cut off, damaged or of another kind; "
                "copy or download it again"
            ) from error
        self.header: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_single_file(
    path: str, pipeline_class: type | None = None, *, tokenizer_folder: str | Path | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """The stock pipeline in a checkpoint file.

    Without `config=`, a file of Stable Diffusion 1.x, 2.x or XL is loaded with the configuration that ships inside;
    with it, and for other models, this is the stock `from_single_file`.

    Args:
        path: a .safetensors or .ckpt file in the original layout, or a link to one on the Hub.
        pipeline_class: a class of diffusers in place of the one that the configuration names.
        tokenizer_folder: a folder with the CLIP tokenizer's vocab.json and merges.txt. `tokenizer=` and `tokenizer_2=`
            (each a CLIPTokenizer or a folder) come before it; without any, the Hub's cache is searched, and the Hub.
        kwargs: those of the stock `from_single_file`.

    Raises:
        PipelineError: there is no such file, it is damaged, it holds no model or only a part of one, or there is no
            tokenizer.
    """
    if any(kwargs.get(name) is not None for name in OWN_CONFIG):
        return (pipeline_class or single_file_class(path, kwargs)).from_single_file(path, **kwargs)
    weights = opened(path, kwargs)
    folder = shipped_config(weights)
    if folder is None:
        if pipeline_class is None:
            _check_known(path, weights)
        return (pipeline_class or single_file_class(path, kwargs)).from_single_file(path, **kwargs)
    listed = _read_json(folder / "model_index.json")
    _check_complete(path, [name for name in PREFIXES if name in listed and name not in kwargs], weights)
    parts: dict[str, Any] = _tokenizers(path, folder, kwargs, tokenizer_folder)
    scheduler = kwargs.get("scheduler") or _marked_scheduler(folder, weights)
    if scheduler is not None:
        parts["scheduler"] = scheduler
    kind: Any = pipeline_class or _class_in(folder)
    pipe = kind.from_single_file(path, **{**kwargs, **parts, "config": str(folder)})
    _check_loaded(path, pipe)
    return pipe


def single_file_class(path: str, kwargs: Mapping[str, Any]) -> type:
    """The stock class named by the configuration for a checkpoint file; `kwargs` are those of `from_single_file`."""
    config = kwargs.get("config")
    if config is None:
        weights = opened(path, kwargs)
        config = shipped_config(weights) or fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    try:
        return _class_in(config)
    except OSError as error:
        raise PipelineError(
            f"the pipeline configuration {config!r} for {path!r} is not on this machine: go online once, or give "
            "config= a folder in diffusers' format of the same model, or pipeline_class= a class of diffusers"
        ) from error


def _class_in(config: str | Path) -> type:
    return getattr(diffusers, cast(dict[str, Any], DiffusionPipeline.load_config(str(config)))["_class_name"])


# --- what a file holds ---


def opened(path: str, kwargs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The file's tensors by key. Of a safetensors file on this machine only what is asked for is read.

    `kwargs` are those of `from_single_file`; of them, those count that say how a link is downloaded.
    """
    if Path(path).suffix == ".safetensors" and is_file(path):
        return Weights(Path(path))
    if not is_file(path) and not path.startswith((*VALID_URL_PREFIXES, "http://", "https://")):
        raise PipelineError(f"there is no file {path!r}; give the path of a checkpoint, or a link to one on the Hub")
    return cast(
        dict[str, Tensor],
        load_single_file_checkpoint(path, **{name: kwargs[name] for name in DOWNLOAD if name in kwargs}),
    )


def shipped_config(weights: Mapping[str, Tensor]) -> Path | None:
    """The folder in `CONFIGS` for a file's kind, by its keys and a few shapes; None for the kinds that have none."""
    kind = infer_diffusers_model_type(weights)
    if kind == "v1" and FIRST_LAYER not in weights:  # what diffusers says of every file that it does not know
        return None
    if kind == "v2" and not _predicts_velocity(weights):
        kind = "v2_base"
    folder = CONFIGS / kind
    return folder if folder.is_dir() else None


def _predicts_velocity(weights: Mapping[str, Tensor]) -> bool:
    """Whether a file of Stable Diffusion 2.x predicts the velocity; without it, the noise. Their keys are the same.

    Where the header does not say it, a bias does: its spread is over 0.09 in the 768-pixel models alone (ComfyUI tells
    them apart by this figure).
    """
    said = _header(weights).get("modelspec.prediction_type")
    if said is not None or LAST_NORM not in weights:
        return said != "epsilon"
    return float(weights[LAST_NORM].float().std(correction=0)) > 0.09


def _marked_scheduler(folder: Path, weights: Mapping[str, Tensor]) -> Any:
    """The configuration's scheduler for the velocity, where a file is marked so; None: as the configuration says.

    The marks are a key `v_pred`, with `ztsnr` for a noise schedule that ends in pure noise, or the header.
    """
    said = _header(weights).get("modelspec.prediction_type")
    if said != "v" and "v_pred" not in weights:
        return None
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in weights:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = _read_json(folder / "scheduler" / "scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config({**config, **changes})


def _header(weights: Mapping[str, Tensor]) -> Mapping[str, str]:
    return weights.header if isinstance(weights, Weights) else {}


def _check_known(path: str, weights: Mapping[str, Tensor]) -> None:
    if infer_diffusers_model_type(weights) == "v1":
        raise PipelineError(
            f"{path!r} holds no model that diffusers knows (its first key is {next(iter(weights), '')!r}); a whole "
            "checkpoint is needed: an adapter goes to load_adapter, a folder to from_pretrained. If it is a model, "
            "give config= a folder in diffusers' format of the same model"
        )


def _check_complete(path: str, parts: list[str], weights: Mapping[str, Tensor]) -> None:
    missing = [name for name in parts if not any(key.startswith(PREFIXES[name]) for key in weights)]
    if missing:
        raise PipelineError(
            f"{path!r} is only a part of a checkpoint: it has no {' and no '.join(missing)}; take the whole file, or "
            f"give what is missing: from_single_file(..., {missing[0]}=...)"
        )


def _check_loaded(path: str, pipe: DiffusionPipeline) -> None:
    """The weights of a text encoder that the file lacks would be left without values, and without a word."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        empty = [key for key, weight in network.named_parameters() if weight.is_meta]
        if empty:
            raise PipelineError(
                f"{path!r} is incomplete: {name} has no {empty[0]} ({len(empty)} tensors are missing); copy or "
                f"download it again, or give {name}=..."
            )


# --- the tokenizer ---


def _tokenizers(
    path: str, configs: Path, given: Mapping[str, Any], folder: str | Path | None
) -> dict[str, CLIPTokenizer | None]:
    """The kind's tokenizers, with its own length and padding; one that was given as an object stays as it is."""
    made: dict[str, CLIPTokenizer | None] = {}
    for name in ("tokenizer", "tokenizer_2"):
        file = configs / name / "tokenizer_config.json"
        if not file.is_file():
            continue
        settings, first, chosen = _read_json(file), made.get("tokenizer"), given.get(name)
        if isinstance(chosen, str | Path):
            made[name] = _tokenizer(Path(chosen), settings)
        elif name in given:
            made[name] = chosen
        elif first is not None:  # all have the same words and differ in how they pad
            made[name] = other = copy.deepcopy(first)
            other.add_special_tokens({"pad_token": settings["pad_token"]})
        else:
            made[name] = _tokenizer(Path(folder) if folder else _vocabulary(path, configs.name, given), settings)
    return made


def _tokenizer(folder: Path, settings: Mapping[str, Any]) -> CLIPTokenizer:
    """`settings` win over the folder's own: ComfyUI's says 8192 tokens, and the text encoders take 77."""
    whole = all((folder / name).is_file() for name in VOCABULARY) or (folder / "tokenizer.json").is_file()
    if not whole:
        raise PipelineError(
            f"there is no CLIP tokenizer in {str(folder)!r}; the folder has to hold {' and '.join(VOCABULARY)} "
            f"of {VOCABULARY_REPO}"
        )
    wanted = {key: value for key, value in settings.items() if key != "tokenizer_class"}
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **wanted)


def _vocabulary(path: str, kind: str, kwargs: Mapping[str, Any]) -> Path:
    """A folder with the two files: in the Hub's cache, of CLIP or of the kind's own model; else from the Hub."""
    cache = {"cache_dir": kwargs["cache_dir"]} if kwargs.get("cache_dir") else {}
    own = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {}).get("pretrained_model_name_or_path", VOCABULARY_REPO)
    for repo, inside in ((VOCABULARY_REPO, ""), (own, "tokenizer/")):
        cached = [try_to_load_from_cache(repo, inside + name, **cache) for name in VOCABULARY]
        if all(isinstance(file, str) for file in cached):
            return Path(str(cached[0])).parent
    local = bool(kwargs.get("local_files_only"))
    try:
        download = {**cache, "token": kwargs.get("token"), "local_files_only": local}
        files = [hf_hub_download(VOCABULARY_REPO, name, **download) for name in VOCABULARY]
    except OSError as error:
        raise PipelineError(
            f"{path!r} holds no tokenizer, and there is none on this machine: put {' and '.join(VOCABULARY)} of "
            f"{VOCABULARY_REPO} in a folder and give it as tokenizer_folder= (a ComfyUI has one in "
            "comfy/sd1_tokenizer), or go online once"
        ) from error
    return Path(files[0]).parent


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
