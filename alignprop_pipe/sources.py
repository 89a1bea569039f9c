"""A word that names a model or an adapter: something on this machine, or a repository on the Hugging Face Hub.

A mistyped path is never looked for on the Hub, where its name may belong to anybody. `hf://me/name` is always a name
on the Hub; plain `me/name` is one where it cannot be a path that was meant. No network, no torch.
"""

import os
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from alignprop_pipe.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LONGEST_ID = 96
"""Letters of a name on the Hub, with its owner."""
PREFIXED = re.compile(r"hf:/{1,2}(?P<name>[^@/\s]+/[^@/\s]+)(?:@(?P<revision>\S+))?/?")
"""One slash too, since a `Path` makes one of two."""

FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx"),
    *(".json", ".jsonl", ".toml", ".yaml", ".yml", ".txt", ".csv", ".tsv", ".png", ".zip"),
)
FOLDERS = (
    *("run", "sample", "output", "out", "result", "model", "lora", "adapter", "checkpoint", "ckpt", "weight"),
    *("experiment", "exp", "log", "tmp", "temp", "cache", "backup", "data", "comfyui", "custom_node"),
    *("saved", "save", "train", "trained", "training", "pretrained", "finetune", "finetuned", "test", "snapshot"),
    *("artifact", "export", "download", "desktop", "document", "image", "picture", "asset", "project", "work"),
    *("workspace", "home", "mnt", "content", "unet", "transformer"),
)
"""Without the s of many, and without numbers: how people and programs call the folders that such files lie in.

Who means a user of the Hub with such a name writes hf://.
"""

OF_A_RUN = re.compile(r"\d{4}-\d\d-\d\d(-\d{4})?(-.*)?|(checkpoint|ckpt|epoch|step)s?[-_]?\d+", re.IGNORECASE)
"""How a run folder is called by default, 2026-11-30-2016-clip, and what trainers keep in theirs, checkpoint-500."""

ADAPTER_FILES = (
    *("adapter.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    *("adapter_model.bin", "pytorch_lora_weights.bin"),
)
"""What the adapter in a folder is called by a run of ours, by PEFT and by diffusers; what is a pickle comes last."""

NUMBER = re.compile(r"[-_]?v?\d+$")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub, and the branch, tag or commit that was asked for."""

    repo_id: str
    revision: str | None = None


def on_hub(source: str | os.PathLike) -> HubName | None:
    """The repository that `source` names; None where it is a path, or may have been meant as one.

    Raises HubError for an hf:// that names none.
    """
    text = _text(source)
    if text.startswith("hf:/"):
        found = PREFIXED.fullmatch(text)
        if found is None or not HUB_ID.fullmatch(found["name"]) or len(found["name"]) > LONGEST_ID:
            raise HubError(f"{text!r} is no name on the Hub: hf://me/name is needed, or hf://me/name@revision")
        return HubName(found["name"], found["revision"])
    return None if exists(text) or may_be_path(text) else HubName(text)


def may_be_path(text: str) -> bool:
    """Whether a word that is neither file nor folder here may have been meant as one."""
    if not HUB_ID.fullmatch(text) or len(text) > LONGEST_ID:
        return True
    first, name = text.split("/")
    return (
        Path(name).suffix.lower() in FILES
        or NUMBER.sub("", first.lower().removeprefix("my-").removeprefix("my_")).removesuffix("s") in FOLDERS
        or OF_A_RUN.fullmatch(name) is not None
        or any(_alike(first, folder) for folder in _folders_here())
    )


# The functions of os.path answer for any text at all; those of pathlib raise for one that is too long, holds a NUL or
# half a character, or begins with the home of somebody who is not known here.


def expanded(source: str | os.PathLike) -> Path:
    """The path, with `~` as the home folder; the home of somebody who is not known here stays as it was written."""
    return Path(os.path.expanduser(source))  # noqa: PTH111


def adapter_in(folder: Path) -> Path | None:
    """The adapter's file in a folder of a run, of PEFT or of diffusers; None where there is none of their names."""
    return next((folder / name for name in ADAPTER_FILES if is_file(folder / name)), None)


def exists(source: str | os.PathLike) -> bool:
    """Whether there is such a file or folder here; any text may be asked about."""
    return os.path.exists(source)  # noqa: PTH110


def is_file(source: str | os.PathLike) -> bool:
    """Whether there is such a file here; any text may be asked about."""
    return os.path.isfile(source)  # noqa: PTH113


def is_folder(source: str | os.PathLike) -> bool:
    """Whether there is such a folder here; any text may be asked about."""
    return os.path.isdir(source)  # noqa: PTH112


def hub_hint(source: str | os.PathLike) -> str:
    """`; to fetch it from the Hub, write hf://me/name`, for a path that could be a name there; else nothing."""
    text = _text(source)
    return f"; to fetch it from the Hub, write hf://{text}" if HUB_ID.fullmatch(text) else ""


# --- inside ----------------------------------------------------------------------------------------------------------


def _text(source: str | os.PathLike) -> str:
    return source.as_posix() if isinstance(source, Path) else os.fspath(source)


def _folders_here() -> list[str]:
    try:
        return [entry.name for entry in os.scandir() if entry.is_dir()]
    except OSError:  # the folder is gone, or may not be read
        return []


def _alike(word: str, folder: str) -> bool:
    """The folder's name, or one slip of the keys from it: `rnus` for `runs`, but not `modelscope` for `models`."""
    word, folder = word.lower(), folder.lower()
    near = abs(len(word) - len(folder)) < 2 and len(folder) > 2
    return word == folder or (near and SequenceMatcher(None, word, folder).ratio() > 0.7)
