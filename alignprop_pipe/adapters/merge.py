"""A model with an adapter in its weights: a diffusers folder or one checkpoint file, for programs without LoRA."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import adapter_for, check_fits
from alignprop_pipe.adapters.checkpoint import write_checkpoint
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import public_id
from alignprop_pipe.adapters.pipeline_layers import networks
from alignprop_pipe.diffusion import lora
from alignprop_pipe.errors import AdapterError, RunError
from alignprop_pipe.sources import exists

QUANTISERS = ("optimum.", "bitsandbytes.", "torchao.", "torch.ao.", "hqq.", "gguf.", "awq.", "gptqmodel.")
"""Packages whose layers stand for quantised ones."""
PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def merge(
    pipe: DiffusionPipeline,
    adapter: "str | Path | Adapter",
    out: str | Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model of `pipe` with `adapter` added to its weights, and return `out`; `pipe` stays as it is.

    An adapter that `pipe` holds itself is not in the result.

    Args:
        pipe: the model that the adapter is for.
        adapter: a safetensors file, a run folder, or an Adapter.
        out: a folder in diffusers' format; or a file, if it ends in .safetensors, which Stable Diffusion 1.x, 2.x and
            XL can be. It must not exist; the folder round it is made.
        scale: strength, 1.0 as trained.
        dtype: precision of the weights; default: those of `pipe`. The sum is taken in float32 or finer.

    Raises:
        AdapterError: `out` exists; a network of `pipe` is quantised or offloaded; or the adapter is damaged, for
            another model, or for some of the steps alone.
        PipelineError: a checkpoint file of another model, or weights that do not fit `dtype`.
        RunError: the disk does not take it.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, merge
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> adapter = pipe.align("jpeg", ["a fox"], **options).adapter
        >>> merge(AlignPropPipeline.from_pretrained("emoji"), adapter, "merged").name
        'merged'
    """
    target = Path(out)
    if exists(target) or target.is_symlink():
        raise AdapterError(f"{str(out)!r} exists already and is not overwritten; choose another name")
    parts = networks(pipe)
    for name, part in parts.items():
        if reason := _no_plain_weights(part):
            raise AdapterError(
                f"{name} {reason}, so that no model can be written from it: load it without that, in bfloat16 where "
                "memory is short, then merge; its own weights are finer than what is left of them here"
            )
    layers = _fitting(pipe, adapter)
    with lora.taken_out(parts.values()), contextlib.ExitStack() as stack:
        for name, network_layers in layers.items():
            for path, factors in network_layers.items():
                stack.enter_context(_fused(parts[name].get_submodule(path), factors, scale))
        if target.suffix == ".safetensors":
            return write_checkpoint(pipe, target, dtype)
        if dtype is not None:
            for part in parts.values():
                stack.enter_context(_cast(part, dtype))
        with _appearing_folder(target) as beside:
            DiffusionPipeline.save_pretrained(pipe, beside)
            _without_places(beside)
    return target


def _no_plain_weights(part: nn.Module) -> str:
    """What a network computes with where its weights are no plain numbers; empty as a rule.

    A sum with them is rounded away or fails, and what is written of them no freshly loaded model finds.
    """
    for path, layer in part.named_modules():
        if type(layer).__module__.startswith(QUANTISERS) or callable(getattr(layer, "weight", None)):
            return (
                f"is quantised ({path or 'it'} is a {type(layer).__name__} of {type(layer).__module__.split('.')[0]})"
            )
        if is_parametrized(layer):
            return f"has weights that are computed anew in each call ({path} is parametrized)"
        held = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        for name, tensor in held:
            called = f"{path}.{name}" if path else name
            if tensor.is_meta:
                return f"is offloaded ({called} is not in memory)"
            if type(tensor) not in PLAIN:
                return f"is quantised ({called} is a {type(tensor).__name__})"
            is_weight = isinstance(tensor, nn.Parameter)
            if (tensor.is_floating_point() and tensor.itemsize < 2) or (is_weight and not tensor.is_floating_point()):
                return f"is quantised ({called} is in {str(tensor.dtype).removeprefix('torch.')})"
    return ""


def fused_weight(weight: Tensor, factors: Factors, scale: float = 1.0) -> Tensor:
    """`weight` with the change of `factors` added, in its own precision; the sum is taken in float32 or finer."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    up, down = factors.up.to(weight.device, kind).flatten(1), factors.down.to(weight.device, kind).flatten(1)
    change = (up @ down).reshape(weight.shape)
    return (weight.to(kind) + change * (scale * factors.alpha / factors.rank)).to(weight.dtype)


def _fitting(pipe: DiffusionPipeline, adapter: "str | Path | Adapter") -> Layers:
    """The layers by the paths that they have in `pipe`."""
    taken = adapter_for(pipe, adapter)
    if window := taken.window:
        raise AdapterError(
            f"{taken.name} works in a window of the denoising steps alone ({window}), which weights cannot say; "
            "export it as a file of its own"
        )
    check_fits(pipe, taken)
    return taken.layers


@contextlib.contextmanager
def _fused(layer: Any, factors: Factors, scale: float) -> Iterator[None]:
    """The layer with its change inside the block, and as it was afterwards."""
    weight = layer.weight
    kept = weight.data
    weight.data = fused_weight(kept, factors, scale)
    try:
        yield
    finally:
        weight.data = kept


@contextlib.contextmanager
def _cast(part: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The network in another precision inside the block."""
    tensors = [t for t in [*part.parameters(), *part.buffers()] if t.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


@contextlib.contextmanager
def _appearing_folder(target: Path) -> Iterator[Path]:
    """A hidden folder next to `target` to fill, which takes that name at the end; after an error it is gone."""
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.rename(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise RunError(
                f"{str(target)!r} cannot be written: {reason}; free some space or choose another place"
            ) from error
        raise


def _without_places(folder: Path) -> None:
    """Configurations name the folder that they were loaded from, which is of no use to others and may name a person."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config.get("_name_or_path") if isinstance(config, dict) else None
        if isinstance(name, str) and public_id(name) != name:
            config["_name_or_path"] = public_id(name)
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
