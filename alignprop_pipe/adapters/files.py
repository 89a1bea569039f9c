"""Adapter files as they lie on disk: tensors and a header of texts, read whole or not at all.

A file that comes in is data that may lie. What its header claims is checked against its size before anything is
allocated, and the data is read once, so that it cannot change between check and use.
"""

import hashlib
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from alignprop_pipe.adapters import file_kinds, strength
from alignprop_pipe.adapters.keys import split_key
from alignprop_pipe.errors import AdapterError
from alignprop_pipe.layout import ADAPTER
from alignprop_pipe.sources import adapter_in, hub_hint, is_file, is_folder

MOST_HEADER = 100_000_000
"""Bytes, as the safetensors library has it; kohya's headers with all tags of a data set take a few million."""
MOST_TENSORS = 200_000
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes an element takes, by the names of number formats in safetensors."""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
CHECKSUM = "alignprop.checksum"
"""In the header of our files: what they hold, and the numbers, so that a damaged file is told from a whole one."""


def serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: torch.dtype | None) -> bytes:
    """The bytes of a safetensors file, the same for the same content: the library alone shuffles the header."""
    ready, memory = {}, set()
    for key, tensor in tensors.items():
        ready[key] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if ready[key].untyped_storage().data_ptr() in memory:  # a matrix that several layers share
            ready[key] = ready[key].clone()
        memory.add(ready[key].untyped_storage().data_ptr())
        if bool(torch.isfinite(ready[key]).all()):
            continue
        if bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key} does not fit into {dtype}, so that nothing was saved; use bfloat16 or float32")
        raise AdapterError(f"{key} holds NaN or infinity, so that nothing was saved; train with a lower lr")
    content = save(ready, {**header, CHECKSUM: checksum(ready)})
    start = 8 + struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8:start])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[start:]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """`DESCRIPTION:NUMBERS`, two SHA-256: of names, number formats and shapes, and of the bytes, in order of the names.

    A program that casts or renames the tensors and keeps the header changes the first, and then nothing can be said.
    """
    described, numbers = hashlib.sha256(), hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        described.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        numbers.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{described.hexdigest()}:{numbers.hexdigest()}"


def _check_whole(tensors: Mapping[str, Tensor], header: Mapping[str, str], name: str) -> None:
    described, _, numbers = header.get(CHECKSUM, "").partition(":")
    found, _, now = checksum(tensors).partition(":") if numbers else ("", "", "")
    if numbers and found == described and now != numbers:
        raise AdapterError(
            f"{name} is damaged: its numbers are not those that were saved (the checksum differs); copy or download it "
            "again"
        )


def located(path: str | Path) -> Path:
    """The adapter's file, for which its folder may stand: a run's, PEFT's or diffusers'. Raises AdapterError."""
    source = Path(path)
    if is_folder(source):
        folder, source = source, _in_folder(source)
        if not source.exists():
            raise AdapterError(
                f"there is no adapter file {str(source)!r}: the folder is {file_kinds.kind_of_folder(folder)}"
            )
    if not is_file(source):
        raise AdapterError(
            f"there is no adapter file {str(source)!r}; a run writes runs/<name>/adapter.safetensors{hub_hint(path)}"
        )
    return source


def _in_folder(folder: Path) -> Path:
    """The file that is meant; PEFT puts an adapter with a name of its own into a folder of that name."""
    named = [folder / config.parent.name for config in sorted(folder.glob(f"*/{strength.CONFIG_FILE}"))]
    for place in [folder, *(named if len(named) == 1 else [])]:
        if (found := adapter_in(place)) is not None:
            return found
    if len(named) > 1:
        raise AdapterError(
            f"{str(folder)!r} holds several adapters of PEFT: {', '.join(place.name for place in named[:5])}; name one "
            f"of these folders, such as {str(named[0])!r}"
        )
    return folder / ADAPTER


def read_file(
    source: Path, *, allow_pickle: bool = False, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts of the header, to which PEFT's settings come where they stand next to the file.

    Args:
        source: a safetensors file.
        allow_pickle: read a pickle as well, of which torch takes weights alone and runs nothing.
        finite: refuse NaN and infinity.

    Raises:
        AdapterError: missing, damaged, no LoRA, a pickle, or not finite.
    """
    try:
        tensors, header = _read(source, allow_pickle)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{source.name} cannot be read as safetensors ({error}): it is cut off, damaged or of another kind; "
            "copy or download it again"
        ) from error
    _check_whole(tensors, header, source.name)
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())] if finite else []
    if broken:
        raise AdapterError(f"{source.name} holds NaN or infinity, first in {broken[0]!r}: it was saved by a failed run")
    try:
        return tensors, {**header, **strength.beside(source)}
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{source.name} has its strength in {strength.CONFIG_FILE} next to it, which cannot be read ({error}); "
            "copy or download it again"
        ) from error


def _read(source: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    with source.open("rb") as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        if _is_pickle(start) and not _opens_header(file, start, size):
            _check_not_archive(file, source.name)
            if not allow_pickle:
                raise AdapterError(
                    f"{source.name} is a pickle, which can run any program when it is read, and is not opened: ask "
                    "for a .safetensors file, or make one of it with Adapter.load(..., allow_pickle=True).save(...) or "
                    "'alignprop export --allow-pickle': torch then reads weights from it and runs nothing"
                )
            return _read_pickle(file, source.name), {}
        if kind := file_kinds.kind_of_bytes(start + file.read(200), size) if not _may_be_header(start, size) else "":
            raise AdapterError(f"{source.name} holds no LoRA: it is {kind}")
        file.seek(len(start))
        text = _header_text(file, start, size)
        described = _described(text, size - 8 - len(text), source.name)
        header = described.pop("__metadata__", {})
        file.seek(0)
        content = file.read()
    if len(content) != size or not content.startswith(start + text):
        raise ValueError("it changed while it was read")
    tensors = load(content)
    return {key: _usable(tensors[key]) for key in described}, header  # the library's own order changes with each call


# --- safetensors -----------------------------------------------------------------------------------------------------


def _opens_header(file: BinaryIO, start: bytes, size: int) -> bool:
    """Whether what looks like a pickle is the length of a header, which begins with a brace."""
    first = file.read(1)
    file.seek(len(start))
    return first == b"{" and int.from_bytes(start, "little") <= size - 8


def _may_be_header(start: bytes, size: int) -> bool:
    return len(start) == 8 and int.from_bytes(start, "little") <= size - 8


def _header_text(file: BinaryIO, start: bytes, size: int) -> bytes:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"its {size} bytes are less than its header claims")
    if length > MOST_HEADER:
        raise ValueError(f"its header claims {length} bytes")
    return file.read(length)


def _described(text: bytes, data_size: int, called: str) -> dict[str, Any]:
    """The header: the metadata, and each tensor's number format, shape and place, which fill the data exactly.

    Raises AdapterError where its names are none of a LoRA, and ValueError where it is damaged.
    """
    described = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_number)
    if not isinstance(described, dict):
        raise ValueError("its header is no JSON object")
    metadata = described.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata holds something else than texts")
    if len(described) > MOST_TENSORS:
        raise ValueError(f"it claims {len(described)} tensors")
    _check_is_lora((key for key in described if key != "__metadata__"), called)
    places = sorted(_place(key, entry) for key, entry in described.items() if key != "__metadata__")
    end = 0
    for begin, stop in places:
        if begin != end:
            raise ValueError("its tensors overlap, or leave bytes between them")
        end = stop
    if end != data_size:
        raise ValueError(f"its tensors take {end} bytes, and it holds {data_size}")
    return described


def _place(key: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, if that is what its shape needs."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} is not described by dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    size = {**FLOATS, **INTEGERS}.get(name) if isinstance(name, str) else None
    if size is None or (name in INTEGERS and not _may_hold_integers(key)):
        raise ValueError(f"{key!r} has the number format {name!r}, which no adapter has")
    if not _are_sizes(shape) or len(shape) > 8:
        raise ValueError(f"{key!r} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * size:
        raise ValueError(f"{key!r} takes other bytes than its shape needs")
    return offsets[0], offsets[1]


def _may_hold_integers(key: str) -> bool:
    """Alpha, and whatever is no matrix of a plain LoRA, which is refused by its name and not as damaged."""
    found = split_key(key)
    return found is None or found[1] == "alpha"


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in its header twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"its header holds {text}")


def _check_is_lora(keys: Iterable[str], called: str) -> None:
    """Before the data is read: a whole model may be larger than the memory. Raises AdapterError."""
    keys = list(keys)
    parts = [split for key in keys if (split := split_key(key))]
    if any(matrix != "alpha" for _, matrix in parts):
        return
    if kind := file_kinds.kind_of(keys):
        raise AdapterError(f"{called} holds no plain LoRA: it is {kind}")
    if keys and not parts:
        raise AdapterError(
            f"{called} holds no LoRA: its first key is {keys[0]!r}, which is of no kind that is known here; a whole "
            "model goes to from_single_file"
        )


def _usable(tensor: Tensor) -> Tensor:
    """In a number format that torch computes with; 8-bit floats fit into float16 as they are."""
    if tensor.dtype in EIGHT_BITS:
        return tensor.to(torch.float16)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


# --- pickles ---------------------------------------------------------------------------------------------------------


def _is_pickle(start: bytes) -> bool:
    """Whether a file begins as torch's zip does, or as a bare pickle of the protocols 2 to 5."""
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")


def _check_not_archive(file: BinaryIO, called: str) -> None:
    """Torch's files are zip archives too, with a pickle in them. Raises AdapterError."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise AdapterError(f"{called} holds no LoRA: it is a zip archive ({', '.join(names[:3])}); unpack it first")


def _read_pickle(file: BinaryIO, called: str) -> dict[str, Tensor]:
    """The tensors of a pickle, by torch's reader for weights alone. Raises AdapterError."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        _check_zip(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle that it refuses or reads right after
            found = torch.load(file, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found) if isinstance(found, dict) else found
        if isinstance(found, dict) and (kind := _kind_in_pickle(found)):
            raise AdapterError(f"{called} holds no plain LoRA: it is {kind}")
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError(f"it holds a {type(found).__name__} where named tensors are needed")
        _check_tensors(found, size)
    except AdapterError:
        raise
    except Exception as error:  # an unpickler may fail in any way
        reason = _reason_of_torch(error)
        raise AdapterError(
            f"{called} is a pickle that holds more than weights, or is damaged, and was not read ({reason}); ask for "
            "a .safetensors file"
        ) from error
    _check_is_lora(found, called)
    return {key: _usable(tensor.detach().clone()) for key, tensor in found.items()}


def _kind_in_pickle(found: Mapping[Any, Any]) -> str:
    """What a dictionary is by its keys, where it is no LoRA."""
    if {320, 640, 768, 1280} & {key for key in found if type(key) is int}:
        return "a hypernetwork (AUTOMATIC1111 reads it)"
    keys = [key for key in found if isinstance(key, str)]
    return "" if any(map(split_key, keys)) else file_kinds.kind_of(keys)


def _reason_of_torch(error: Exception) -> str:
    """Why, without torch's advice to read the pickle as a program."""
    if isinstance(error, pickle.UnpicklingError):
        return "torch finds other things in it than weights"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_zip(file: BinaryIO) -> None:
    """Torch stores without compression; a compressed entry may unfold to any size."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch's files are not")
    file.seek(0)


def _check_tensors(found: Mapping[str, Any], size: int) -> None:
    """A tensor can claim more elements than there are bytes, by strides of zero."""
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{key!r} is no plain tensor")
        if not (tensor.is_floating_point() or _may_hold_integers(key)):
            raise ValueError(f"{key!r} has the number format {tensor.dtype}, which no adapter has")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{key!r} claims more bytes than the file has")
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > size:
        raise ValueError("its tensors claim more bytes than it has")
