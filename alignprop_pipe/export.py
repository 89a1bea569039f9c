"""The adapter to and from disk: what is written is whole or not there, what is read fits or changes nothing.

`save_adapter` writes one file in diffusers' keys and one for ComfyUI and kohya's readers (`export_keys.py`), both
with a header that tells what the adapter is for (`export_header.py`). `load_adapter` checks every key and shape of a
file before it touches the pipeline.
"""

import json
import math
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from alignprop_pipe.errors import AdapterError
from alignprop_pipe.export_header import describe as describe
from alignprop_pipe.export_header import header_for
from alignprop_pipe.export_keys import (
    Adapter,
    Factors,
    adapter_from,
    adapter_in,
    comfyui_keys,
    common_shape,
    diffusers_keys,
    misfit,
    networks,
)
from alignprop_pipe.files import write_whole
from alignprop_pipe.lora import ADAPTER_NAME

Format = Literal["diffusers", "kohya", "both"]


def save_adapter(
    pipe: DiffusionPipeline,
    path: str | Path,
    *,
    format: Format = "both",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write the adapter in `pipe` and return the files: `path` for diffusers, `…-comfyui.safetensors` for the others.

    `format="kohya"` writes the second one alone, at `path`. A pipeline with two denoisers gets a ComfyUI file for each,
    since ComfyUI loads them as two models. The full strength is saved, whatever `set_adapters` says now.

    Args:
        pipe: a pipeline whose denoisers hold our adapter.
        path: ends in .safetensors; folders are made.
        format: which of the two files to write.
        metadata: texts for the header, such as `reward`, `step`, `base_model`; local paths in them are cut to names.
        dtype: precision of the file; default: the adapter's own.

    Raises:
        AdapterError: there is no adapter, or `path` is not usable.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise AdapterError(f"adapters are saved as safetensors: {str(path)!r} has to end in '.safetensors'")
    if format not in ("diffusers", "kohya", "both"):
        raise AdapterError(f"format is {format!r}; it can be 'diffusers', 'kohya' or 'both'")
    adapter = adapter_in(pipe)
    files: dict[Path, bytes] = {}
    if format != "kohya":
        shape = {name: common_shape(layers) for name, layers in adapter.items()}
        header = header_for(pipe, shape, metadata or {}, title=target.stem)
        files[target] = _serialised(diffusers_keys(adapter), header, dtype)
    if format != "diffusers":
        place = target if format == "kohya" else target.with_stem(f"{target.stem}-comfyui")
        for number, (name, layers) in enumerate(adapter.items()):
            beside = place.with_stem(f"{place.stem}-{name}") if number else place
            header = header_for(pipe, {name: common_shape(layers)}, metadata or {}, title=beside.stem, kohya=True)
            files[beside] = _serialised(comfyui_keys(pipe, name, layers), header, dtype)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"the folder of {str(path)!r} cannot be made: {error}; choose another path") from error
    for place, content in files.items():
        write_whole(place, content)
    return list(files)


def adapter_state(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The adapter in `pipe` as tensors in diffusers' keys, not copied. Raises AdapterError if there is none."""
    return diffusers_keys(adapter_in(pipe))


def _serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: torch.dtype | None) -> bytes:
    """The bytes of a safetensors file, the same for the same content: the library alone shuffles the header."""
    ready = {}
    for key, tensor in tensors.items():
        ready[key] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not bool(torch.isfinite(ready[key]).all()):
            raise AdapterError(f"{key} holds NaN or infinity, so that nothing was saved; train with a lower lr")
    content = save(ready, dict(header))
    start = 8 + struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8:start])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[start:]


# --- loading -------------------------------------------------------------------------------------


def load_adapter(pipe: DiffusionPipeline, path: str | Path, scale: float = 1.0) -> None:
    """Put the adapter at `path` on `pipe`, active at `scale`, in place of one that was loaded or trained before.

    Reads our files, and LoRA files of diffusers and kohya for the same base model; alpha is honoured. Other adapters
    stay loaded but are switched off.

    Args:
        pipe: any diffusers pipeline.
        path: a safetensors file, or a run folder.
        scale: strength, 1.0 as trained, 0.0 the base model.

    Raises:
        AdapterError: the file is missing, damaged, a pickle, or made for another model; the pipeline is as it was.
    """
    if not math.isfinite(scale):
        raise AdapterError(f"the scale is {scale}; it has to be a number such as 1.0")
    source = _source(path)
    tensors, header = _read(source)
    adapter = _fitting(pipe, tensors, header, source)
    parts = networks(pipe)
    required = [(parameter, parameter.requires_grad) for name in adapter for parameter in parts[name].parameters()]
    for part in parts.values():
        _remove(part)
    try:
        for name, layers in adapter.items():
            _install(pipe, parts[name], layers)
            set_adapter_layers(parts[name], enabled=True)
            set_weights_and_activate_adapters(parts[name], [ADAPTER_NAME], [scale])
    except Exception as error:
        for part in parts.values():
            _remove(part)
        raise AdapterError(
            f"{source.name} could not be put on {type(pipe).__name__}, which is without adapter now: {error}"
        ) from error
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of an adapter file. Raises AdapterError."""
    return _read(_source(path))[1]


def _source(path: str | Path) -> Path:
    source = Path(path)
    if source.is_dir():
        source = source / "adapter.safetensors"
    if not source.is_file():
        raise AdapterError(f"there is no adapter file {str(source)!r}; a run writes runs/<name>/adapter.safetensors")
    return source


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError) as error:
        if _is_pickle(source):
            raise AdapterError(
                f"{source.name} is a pickle, which can run any program when it is read, and is not opened: "
                "ask for a .safetensors file, or convert it in a place where that does not matter"
            ) from None
        raise AdapterError(
            f"{source.name} cannot be read as safetensors ({error}): it is cut off, damaged or of another kind; "
            "copy or download it again"
        ) from error
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if broken:
        raise AdapterError(f"{source.name} holds NaN or infinity, first in {broken[0]}: it was saved by a failed run")
    return tensors, header


def _is_pickle(source: Path) -> bool:
    try:
        with source.open("rb") as file:
            start = file.read(2)
    except OSError:
        return False
    return start == b"PK" or start[:1] == b"\x80"  # torch's zip, and bare pickles


def _fitting(pipe: DiffusionPipeline, tensors: dict[str, Tensor], header: Mapping[str, str], source: Path) -> Adapter:
    """The adapter in `tensors`, every layer of it found in `pipe` with the right shape, or AdapterError."""
    if header.get("alignprop.denoiser", "").endswith("_2"):
        raise AdapterError(f"{source.name} is the half of an adapter made for ComfyUI; load the file with both halves")
    made_for = " ".join(filter(None, (header.get("alignprop.base_model"), header.get("alignprop.base_class"))))
    way_out = f"load it into {made_for or 'the pipeline that it was made for'}"
    try:
        adapter = adapter_from(pipe, tensors, header)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise AdapterError(
            f"{source.name} holds no LoRA that {type(pipe).__name__} can read ({error}); {way_out}"
        ) from error
    parts = networks(pipe)
    misfits = [
        f"{name}.{path} {problem}"
        for name, layers in adapter.items()
        for path, factors in layers.items()
        if (problem := misfit(parts[name], path, factors))
    ]
    if misfits or not adapter:
        total = sum(len(layers) for layers in adapter.values())
        reason = (
            f"{len(misfits)} of its {total} layers do not fit, the first: {misfits[0]}" if misfits else "it is empty"
        )
        raise AdapterError(f"{source.name} was not made for this {type(pipe).__name__}: {reason}; {way_out}")
    return adapter


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
    with warnings.catch_warnings():
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


def _remove(part: nn.Module) -> None:
    """Take our adapter away; without any other the component is the stock one again."""
    if ADAPTER_NAME not in getattr(part, "peft_config", {}):
        return
    delete_adapter_layers(part, ADAPTER_NAME)
    if not getattr(part, "peft_config", {}):
        recurse_remove_peft_layers(part)
        part._hf_peft_config_loaded = False  # type: ignore[assignment]  # as diffusers does
