"""From what was typed to a pipeline or a reward: the model's id, the device, the number format, the expression."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_pipe.cli.console import Output, quiet_libraries, waiting
from alignprop_pipe.cli.options import BUNDLED, CheckRequest, Common, ScoreRequest, TrainRequest
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.sources import exists, expanded, is_file, is_folder

if TYPE_CHECKING:
    import torch

    from alignprop_pipe.pipeline import AlignPropPipeline
    from alignprop_pipe.rewards.base import Reward

SINGLE_FILES = (".safetensors", ".ckpt")
A_PATH = re.compile(r"(~|\.{0,2})/\S+")


def is_model(word: str) -> bool:
    """Whether a word on the command line names a model: 'emoji', org/name, a path, a diffusers folder or a file."""
    return (
        word == BUNDLED
        or word.endswith(SINGLE_FILES)
        or re.fullmatch(r"(hf:/{1,2})?[\w.-]+/[\w.-]+(@\S+)?", word) is not None
        or A_PATH.fullmatch(word) is not None
        or (word.strip() != "" and is_file(expanded(word) / "model_index.json"))
    )


def open_pipeline(model: str, request: Common, output: Output, **options: Any) -> "AlignPropPipeline":
    """Load `model`, on the device and in the number format that were asked for; `options` go to the loader.

    Raises PipelineError.
    """
    with waiting(output, f"loading {model}"):
        quiet_libraries(output)
        device = find_device(request.device)
        pipe = _load(model, dtype=find_dtype(request.dtype, device), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def check_model(model: str) -> None:
    """Raises PipelineError for a model that is not here, as far as that can be known without asking the Hub."""
    from huggingface_hub import constants, try_to_load_from_cache

    from alignprop_pipe.diffusion.loading import MODEL_NEEDED, model_source

    name, there = model_source(expanded(model) if model.startswith("~") else model)
    if there and constants.HF_HUB_OFFLINE:
        if not isinstance(try_to_load_from_cache(name, "model_index.json", revision=there.get("revision")), str):
            raise PipelineError(f"the model {name!r} is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it")
    if not there and is_folder(name) and not is_file(Path(name) / "model_index.json"):
        raise PipelineError(f"the folder {model!r} holds no model_index.json; {MODEL_NEEDED}")


def open_reward(
    text: str,
    request: TrainRequest | ScoreRequest | CheckRequest,
    output: Output,
    *,
    allow_code: bool = True,
    model: str = BUNDLED,
) -> "Reward":
    """Run what `--import` names, then read the expression, for pictures of `model`. Raises RewardError."""
    quiet_libraries(output)
    from alignprop_pipe.rewards.networks.network import check_fits, check_sources
    from alignprop_pipe.rewards.registry import parse_reward

    import_rewards(request.imports)
    reward = parse_reward(text, accept_license=request.accept_license, allow_code=allow_code)
    return check_fits(check_sources(reward), model)


def import_rewards(places: Sequence[str] | None) -> None:
    """Run the files and import the modules that `--import` names, each once. Raises RewardError."""
    from alignprop_pipe.config.code import imported

    for place in places or []:
        if imported(place) is None:
            from alignprop_pipe.rewards.scorers.python import load_module

            load_module(place)


def find_device(text: str) -> "torch.device":
    """`auto`, or a device of torch that is there. Raises typer.BadParameter."""
    import torch

    present = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    if text == "auto":
        return torch.device(present[0])
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count() if device is not None and device.type == "cuda" else 1
    if device is None or device.type not in present or (device.index or 0) >= count:
        raise typer.BadParameter(f"there is no device {text!r} here; use one of: auto, {', '.join(present)}")
    return device


def find_dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """The number format that was asked for; else float16 on cuda, and float32 elsewhere."""
    import torch

    return getattr(torch, name or ("float16" if device.type == "cuda" else "float32"))


def _load(model: str, **options: Any) -> "AlignPropPipeline":
    from alignprop_pipe.pipeline import AlignPropPipeline

    source = str(expanded(model)) if model.startswith("~") else model
    load: Any = AlignPropPipeline.from_pretrained
    if source.endswith(SINGLE_FILES) and exists(source):
        load = AlignPropPipeline.from_single_file
    try:
        return load(source, **options)
    except (OSError, ValueError) as error:
        raise PipelineError(_not_loaded(model, error)) from error


def _not_loaded(model: str, error: Exception) -> str:
    from alignprop_pipe.diffusion.loading import MODEL_NEEDED

    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    where = "folder" if is_folder(model) else "file" if is_file(model) else "model id"
    return f"{where} {model!r} could not be loaded as a diffusers pipeline; {MODEL_NEEDED}. The reason: {reason}"
