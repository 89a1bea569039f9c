"""The adapter out of a pipeline and onto it; what is read fits or changes nothing.

`Adapter` (adapter.py) is the value in between; `load_adapter` checks every key and shape before it touches the
pipeline.
"""

import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from alignprop_pipe.adapters import files, strength
from alignprop_pipe.adapters.adapter import Adapter, Format
from alignprop_pipe.adapters.export_keys import Factors, Layers, common_shape, layers_from, misfit, named_for, networks
from alignprop_pipe.adapters.header import Base, base_of
from alignprop_pipe.adapters.header import describe as describe
from alignprop_pipe.adapters.keys import layers_of
from alignprop_pipe.adapters.naming import UnknownLayerError
from alignprop_pipe.adapters.resolve import local_file
from alignprop_pipe.config.choices import Window, window_from_text
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion import window as windows
from alignprop_pipe.diffusion.lora import ADAPTER_NAME
from alignprop_pipe.errors import AdapterError, ConfigError
from alignprop_pipe.seeds import SeededDraws

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
    """
    if not math.isfinite(scale):
        raise AdapterError(f"the scale is {scale}; it has to be a number such as 1.0")
    chosen = None if window is None else windows.as_window(window)
    if isinstance(source, Adapter):
        layers, base, header, called = named_for(pipe, source.layers), source.base, source.metadata, "the adapter"
    else:
        layers, base, header, called = _read(pipe, files.located(local_file(source, revision)))
    if reason := lora.obstacle(networks(pipe), layers):
        raise AdapterError(reason)
    _fitting(pipe, layers, base, called)
    chosen = _window_in(header, called) if chosen is None else chosen
    if not chosen.is_whole:
        _check_window(pipe, layers, chosen, called)
    others = [other for other in lora.active_others(pipe) if not other.is_fused]
    _put_on(pipe, layers, scale, chosen, called)
    _tell_of_another_base(pipe, base, called)
    if others:
        logger.warning("switched off for %s: LoRA %s; pipe.set_adapters([...]) uses several together", called,
                       ", ".join(map(str, others)))  # fmt: skip
    trained_with = header.get("alignprop.trained_with") or header.get("trained_with")
    if trained_with:
        logger.warning("%s was trained on top of other LoRAs and belongs with them: %.400r", called, trained_with)


def _tell_of_another_base(pipe: DiffusionPipeline, made_for: Base, called: str) -> None:
    """Layers that fit say nothing of the model that they were trained on."""
    here = base_of(pipe).base_model
    if here and made_for.base_model and here != made_for.base_model:
        logger.warning(
            "%s was made for %s and is on %s now: its layers fit, but pictures may not be what it was trained for",
            called,
            made_for.base_model,
            here,
        )


def _read(pipe: DiffusionPipeline, file: Path) -> tuple[Layers, Base, Mapping[str, str], str]:
    """What is in the file, and its name."""
    tensors, header = files.read_file(file)
    if header.get("alignprop.denoiser", "").endswith("_2"):
        raise AdapterError(f"{file.name} is the half of an adapter made for ComfyUI; load the file with both halves")
    base = Base.of_header(header)
    try:
        layers = layers_from(pipe, tensors, header)
    except UnknownLayerError as error:
        total = len(layers_of(tensors).layers)
        raise AdapterError(
            f"{file.name} was not made for this {type(pipe).__name__}: {len(error.names)} of its {total} layers do not "
            f"fit, the first: {error}; {_way_out(base)}"
        ) from error
    except Exception as error:  # diffusers' converters fail in any way on keys that they do not expect
        raise AdapterError(
            f"{file.name} holds no LoRA that {type(pipe).__name__} can read ({error}); {_way_out(base)}"
        ) from error
    strength.tell_doubts(file.name, tensors, header)
    return layers, base, header, file.name


def _window_in(header: Mapping[str, str], called: str) -> Window:
    text = header.get("alignprop.window") or header.get("window") or ""
    try:
        return window_from_text(text) if text else Window()
    except ConfigError as error:
        raise AdapterError(f"the header of {called} is damaged: {error}; or give window=(0.0, 1.0)") from error


def _check_window(pipe: DiffusionPipeline, layers: Collection[str], chosen: Window, called: str) -> None:
    """Raises AdapterError for layers that no denoising step calls, and PipelineError for a missing scheduler."""
    parts = networks(pipe)
    outside = [name for name in layers if not isinstance(parts[name], ModelMixin)]
    if outside:
        raise AdapterError(
            f"{called} changes {outside[0]}, which has done its work before the first denoising step: it cannot be "
            f"kept to the window {chosen}; load it with window=(0.0, 1.0)"
        )
    pipeline_parts.scheduler(pipe)


def _put_on(pipe: DiffusionPipeline, adapter: Layers, scale: float, chosen: Window, called: str) -> None:
    parts = networks(pipe)
    required = [(parameter, parameter.requires_grad) for part in parts.values() for parameter in part.parameters()]
    lora.detach(parts)
    try:
        for name, layers in adapter.items():
            _install(pipe, parts[name], layers)
            lora.mark(parts[name], called)
            set_adapter_layers(parts[name], enabled=True)
        for part in parts.values():
            set_weights_and_activate_adapters(part, [ADAPTER_NAME], [scale])
        if not chosen.is_whole:
            windows.put_on(pipe, {name: parts[name] for name in adapter}, chosen)
    except Exception as error:
        lora.detach(parts)
        raise AdapterError(
            f"{called} could not be put on {type(pipe).__name__}, which is without adapter now: {error}"
        ) from error
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)


def remove_adapter(pipe: DiffusionPipeline) -> None:
    """Take our adapter off every network of `pipe`; other adapters stay."""
    lora.detach(networks(pipe))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of an adapter file. Raises AdapterError."""
    return files.read_file(files.located(path))[1]


def _way_out(base: Base) -> str:
    made_for = " ".join(filter(None, (base.base_model, base.base_class)))
    return f"load it into {made_for or 'the pipeline that it was made for'}"


def _fitting(pipe: DiffusionPipeline, adapter: Layers, base: Base, called: str) -> None:
    """Raises AdapterError unless every layer is found in `pipe` with the right shape."""
    parts = networks(pipe)
    misfits = [
        f"{name}.{path} {problem}"
        for name, layers in adapter.items()
        for path, factors in layers.items()
        if (problem := misfit(parts[name], path, factors) if name in parts else "does not exist there")
    ]
    if misfits or not adapter:
        total = sum(len(layers) for layers in adapter.values())
        reason = (
            f"{len(misfits)} of its {total} layers do not fit, the first: {misfits[0]}" if misfits else "it is empty"
        )
        raise AdapterError(f"{called} was not made for this {type(pipe).__name__}: {reason}; {_way_out(base)}")


def _install(pipe: DiffusionPipeline, part: nn.Module, layers: Mapping[str, Factors]) -> None:
    rank, alpha = common_shape(layers)
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "rank_pattern": {f"^{path}": f.rank for path, f in layers.items() if f.rank != rank},
        "alpha_pattern": {f"^{path}": f.alpha for path, f in layers.items() if f.alpha != alpha},
    }
    state = {}
    for path, factors in layers.items():
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = factors.down, factors.up
    # New layers draw weights that are overwritten: not from the random numbers of the process.
    with warnings.catch_warnings(), SeededDraws(0):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # other adapters may stay
        if isinstance(part, PeftAdapterMixin):
            load: Any = part.load_lora_adapter  # whose prefix may be None, against its annotation
            load(state, prefix=None, adapter_name=ADAPTER_NAME, metadata=config, _pipeline=pipe)
        else:  # a text encoder, or a denoiser to which diffusers gives no such method
            inject_adapter_in_model(LoraConfig(**config), part, ADAPTER_NAME, state_dict=state)
            set_peft_model_state_dict(part, state, ADAPTER_NAME)
            part._hf_peft_config_loaded = True  # type: ignore[assignment]  # as diffusers and transformers mark it
    for layer in part.modules():
        if isinstance(layer, LoraLayer):
            layer.train(part.training)
