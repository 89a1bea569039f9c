"""The adapter out of a pipeline and onto it; what is read fits or changes nothing.

`Adapter` (adapter.py) is the value in between; `load_adapter` checks every key and shape before it touches the
pipeline.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from alignprop_pipe.adapters.adapter import Adapter, Format
from alignprop_pipe.adapters.factors import Factors, Layers, common_shape
from alignprop_pipe.adapters.header import Base, base_of
from alignprop_pipe.adapters.header import describe as describe
from alignprop_pipe.adapters.pipeline_layers import named_for, networks, shape_mismatch
from alignprop_pipe.adapters.reading import open_adapter, way_out
from alignprop_pipe.config.choices import Window, window_from_text
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion import window as windows
from alignprop_pipe.errors import AdapterError, ConfigError

logger = logging.getLogger(__name__)


def save_adapter(
    pipe: DiffusionPipeline,
    path: str | Path,
    *,
    format: Format = "both",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write the adapter in `pipe` and return the files: see `Adapter.save`.

    The full strength is saved, whatever `set_adapters` says now; a window of steps stands in the header, as
    `alignprop.window`.

    Args:
        pipe: a pipeline whose denoisers hold our adapter.
        path: ends in .safetensors; folders are made.
        format: which of the two files to write.
        metadata: texts for the header, such as `reward`, `step`, `base_model`; local paths in them are cut to names.
        dtype: precision of the file; default: the adapter's own.

    Raises:
        AdapterError: there is no adapter, or `path` is not usable.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, save_adapter
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> result = pipe.align("jpeg", ["a fox"], **options)
        >>> [file.name for file in save_adapter(pipe, "fox.safetensors", format="diffusers")]
        ['fox.safetensors']
    """
    return Adapter.of(pipe, metadata).save(path, format=format, dtype=dtype)


# --- loading -------------------------------------------------------------------------------------


def load_adapter(
    pipe: DiffusionPipeline,
    source: "str | Path | Adapter",
    scale: float = 1.0,
    window: Window | str | Sequence[Any] | None = None,
    revision: str | None = None,
) -> None:
    """Put an adapter on `pipe`, active at `scale`, in place of one that was loaded or trained before.

    Reads our files, and LoRA files of diffusers and kohya for the same base model; alpha is honoured. Other adapters
    stay loaded but are switched off, as `pipe.set_adapters` does; which is told.

    Args:
        pipe: any diffusers pipeline.
        source: a safetensors file, a run folder, a name on the Hub ("me/name"), or an Adapter.
        scale: strength, 1.0 as trained, 0.0 the base model.
        window: the share of the denoising steps in which it works, (0.0, 0.6) or "0.0-0.6", in every later call of the
            pipeline; default: the one that the file names, else all of them.
        revision: branch, tag or commit of a name on the Hub.

    Raises:
        AdapterError: the file is missing, damaged, a pickle, or made for another model; or `pipe` is in a state in
            which an adapter has no effect (fused LoRAs or projections). The pipeline is as it was.
        ConfigError: `window` is none.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, load_adapter
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> files = pipe.align("jpeg", ["a fox"], **options).adapter.save("fox.safetensors")
        >>> load_adapter(AlignPropPipeline.from_pretrained("emoji"), "fox.safetensors", scale=0.5)
    """
    if not math.isfinite(scale):
        raise AdapterError(f"the scale is {scale}; it has to be a number such as 1.0")
    chosen = None if window is None else windows.as_window(window)
    taken = adapter_for(pipe, source, revision)
    if reason := lora.obstacle(networks(pipe), taken.layers):
        raise AdapterError(reason)
    check_fits(pipe, taken)
    chosen = _window_in(taken) if chosen is None else chosen
    if not chosen.is_whole:
        _check_window(pipe, taken, chosen)
    others = [other for other in lora.active_others(pipe) if not other.is_fused]
    _put_on(pipe, taken, scale, chosen)
    _tell_of_another_base(pipe, taken)
    if others:
        logger.warning("switched off for %s: LoRA %s; pipe.set_adapters([...]) uses several together", taken.name,
                       ", ".join(map(str, others)))  # fmt: skip
    trained_with = taken.header.get("alignprop.trained_with") or taken.header.get("trained_with")
    if trained_with:
        logger.warning("%s was trained on top of other LoRAs and belongs with them: %.400r", taken.name, trained_with)


@dataclass(frozen=True, slots=True)
class ForPipeline:
    """An adapter whose layers have the paths of one pipeline, and what is known of it; `name` is for messages."""

    name: str
    layers: Layers
    base: Base
    header: Mapping[str, str]

    @property
    def window(self) -> str:
        """The window of the denoising steps that its header names; empty where it works in all of them."""
        return self.header.get("alignprop.window") or self.header.get("window") or ""


def adapter_for(pipe: DiffusionPipeline, source: "str | Path | Adapter", revision: str | None = None) -> ForPipeline:
    """Read an adapter for `pipe`; whether its layers have the right shapes is for `check_fits`.

    Raises AdapterError: the file is missing, damaged, or names layers that `pipe` does not have.
    """
    if isinstance(source, Adapter):
        return ForPipeline("the adapter", named_for(pipe, source.layers), source.base, source.metadata)
    file = open_adapter(source, revision)
    if file.header.get("alignprop.denoiser", "").endswith("_2"):
        raise AdapterError(f"{file.name} is the half of an adapter made for ComfyUI; load the file with both halves")
    return ForPipeline(file.name, file.layers(pipe), file.base, file.header)


def check_fits(pipe: DiffusionPipeline, adapter: ForPipeline) -> None:
    """Raises AdapterError unless every layer is found in `pipe` with the right shape."""
    parts = networks(pipe)
    wrong = [
        f"{name}.{path} {problem}"
        for name, layers in adapter.layers.items()
        for path, factors in layers.items()
        if (problem := shape_mismatch(parts[name], path, factors) if name in parts else "does not exist there")
    ]
    if wrong or not adapter.layers:
        total = sum(len(layers) for layers in adapter.layers.values())
        reason = f"{len(wrong)} of its {total} layers do not fit, the first: {wrong[0]}" if wrong else "it is empty"
        raise AdapterError(
            f"{adapter.name} was not made for this {type(pipe).__name__}: {reason}; {way_out(adapter.base)}"
        )


def _tell_of_another_base(pipe: DiffusionPipeline, adapter: ForPipeline) -> None:
    """Layers that fit say nothing of the model that they were trained on."""
    here, made_for = base_of(pipe).base_model, adapter.base.base_model
    if here and made_for and here != made_for:
        logger.warning(
            "%s was made for %s and is on %s now: its layers fit, but pictures may not be what it was trained for",
            adapter.name,
            made_for,
            here,
        )


def _window_in(adapter: ForPipeline) -> Window:
    try:
        return window_from_text(adapter.window) if adapter.window else Window()
    except ConfigError as error:
        raise AdapterError(f"the header of {adapter.name} is damaged: {error}; or give window=(0.0, 1.0)") from error


def _check_window(pipe: DiffusionPipeline, adapter: ForPipeline, chosen: Window) -> None:
    """Raises AdapterError for layers that no denoising step calls, and PipelineError for a missing scheduler."""
    parts = networks(pipe)
    outside = [name for name in adapter.layers if not isinstance(parts[name], ModelMixin)]
    if outside:
        raise AdapterError(
            f"{adapter.name} changes {outside[0]}, which has done its work before the first denoising step: it cannot "
            f"be kept to the window {chosen}; load it with window=(0.0, 1.0)"
        )
    pipeline_parts.scheduler(pipe)


def _put_on(pipe: DiffusionPipeline, adapter: ForPipeline, scale: float, chosen: Window) -> None:
    parts = networks(pipe)
    try:
        weights = {name: _weights(layers) for name, layers in adapter.layers.items()}
        lora.attach_weights(pipe, parts, weights, scale, adapter.name)
        if not chosen.is_whole:
            windows.put_on(pipe, {name: parts[name] for name in adapter.layers}, chosen)
    except Exception as error:
        lora.detach(parts)
        raise AdapterError(
            f"{adapter.name} could not be put on {type(pipe).__name__}, which is without adapter now: {error}"
        ) from error


def _weights(layers: Mapping[str, Factors]) -> lora.Weights:
    """The layers of one network as PEFT takes them; the rank and alpha that most have are the settings' own."""
    rank, alpha = common_shape(layers)
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "rank_pattern": {f"^{path}": f.rank for path, f in layers.items() if f.rank != rank},
        "alpha_pattern": {f"^{path}": f.alpha for path, f in layers.items() if f.alpha != alpha},
    }
    tensors = {}
    for path, factors in layers.items():
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = factors.down, factors.up
    return lora.Weights(settings, tensors)


def remove_adapter(pipe: DiffusionPipeline) -> None:
    """Take our adapter off every network of `pipe`; other adapters stay."""
    lora.detach(networks(pipe))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of an adapter file. Raises AdapterError."""
    return dict(open_adapter(path).header)
