"""Adapter files as they lie on disk: tensors and a header of texts, read whole or not at all."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alignprop_pipe.errors import AdapterError


def serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: torch.dtype | None) -> bytes:
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


def located(path: str | Path) -> Path:
    """The adapter's file, where a run folder may stand for it. Raises AdapterError."""
    source = Path(path)
    if source.is_dir():
        source = source / "adapter.safetensors"
    if not source.is_file():
        raise AdapterError(f"there is no adapter file {str(source)!r}; a run writes runs/<name>/adapter.safetensors")
    return source


def read_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts of the header. Raises AdapterError: damaged, a pickle, or not finite."""
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
