"""Weight files by Hub id, folder or path: tensors and nothing else, whole or not at all.

Pickle files are read by torch's weights-only reader, which runs no code, and kept as safetensors from then on.
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignprop_pipe.errors import HubError, RewardError
from alignprop_pipe.rewards.entries import ENTRIES
from alignprop_pipe.sources import exists, expanded, hub_hint, is_file, is_folder, on_hub

OURS = frozenset(name for entry in ENTRIES for name, _ in entry.weights)
"""Repositories that the rewards name themselves: no folder here was meant, whatever it is called."""


def place_of(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """A folder or file here, or a repository on the Hub and the revision there: `hf://me/name@v1` is ("me/name", "v1").

    Raises RewardError for what is neither, without asking the Hub.
    """
    if source.startswith("~"):
        source = str(expanded(source))
    if exists(source) or source in OURS:
        return source, revision
    try:
        there = on_hub(source)
    except HubError as error:
        raise RewardError(str(error)) from error
    if there is None:
        raise RewardError(f"there is no file or folder {source!r} here{hub_hint(source)}")
    if revision and there.revision and revision != there.revision:
        raise RewardError(f"{source!r} and revision={revision!r} name two revisions: leave one of them out")
    return there.repo_id, revision or there.revision


def locate(source: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The first of the files `names` that `source` has: a folder, a Hub id, or one such file itself.

    Raises RewardError that lists the files and where to put them.
    """
    source, revision = place_of(source, revision)
    path = Path(source)
    if is_file(path):
        return path
    if is_folder(path):
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            held = ", ".join(sorted(inside.name for inside in path.iterdir())) or "nothing"
            raise RewardError(f"the folder {source!r} lacks {_either(names)}; it holds: {held}")
        return found
    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(source, name, revision=revision))
        except Exception as error:
            reason = error
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                break  # no network, no such repository, no right to read it: asking for other files is of no use
    for name in names:
        if isinstance(kept := try_to_load_from_cache(source, name, revision=revision), str):
            return Path(kept)
    first = str(reason).strip().split("\n")[0]
    at = f" --revision {revision}" if revision else ""
    raise RewardError(
        f"{source!r} is no file or folder here, and {_either(names)} could not be had from the Hugging Face Hub. Check "
        f"the spelling; or, on a machine with a network, run `hf download {source} {names[0]}{at} --local-dir FOLDER`, "
        f"bring FOLDER here and give its path as model. ({first})"
    ) from reason


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or pickle file, on the CPU. Raises RewardError for a damaged or unsafe file."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    kept = _converted(path)
    if not kept.is_file():
        tensors = _read_pickle(path)
        beside = kept.with_suffix(".part")
        save_file(tensors, beside)
        beside.replace(kept)
    return _read_safetensors(kept)


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], source: str, ignored: Sequence[str] = ()) -> None:
    """Copy `tensors` into all weights of `network`, or none. Names that start with one of `ignored` may be left over.

    Raises RewardError that names what is missing, left over or of another shape.
    """
    check_fit(network, tensors, source, ignored)
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})


def check_fit(network: nn.Module, tensors: Mapping[str, Tensor], source: str, ignored: Sequence[str] = ()) -> None:
    """Raise RewardError, as `load_into` does, unless `tensors` fit; `network` may be on the meta device."""
    wanted = network.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is not known" for name in tensors if name not in wanted and not name.startswith(tuple(ignored))]
    shared = [name for name in wanted if name in tensors]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in shared
        if tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RewardError(
            f"the weights in {source!r} do not fit {type(network).__name__}: {', '.join(wrong[:3])}{more}"
        )
    bad = next((name for name in shared if not tensors[name].isfinite().all()), None)
    if bad is not None:
        raise RewardError(f"the weights in {source!r} are damaged: {bad} holds numbers that are not finite")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Out of the mapped file into aligned memory, where sums come out the same, bit for bit, in every run.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise RewardError(f"{str(path)!r} is damaged or cut short: get it again ({error})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RewardError(
            f"{str(path)!r} is no file of tensors alone, and a pickle that holds more can run code: it was not opened. "
            "Get the weights as .safetensors"
        ) from error
    except Exception as error:
        raise RewardError(f"{str(path)!r} is damaged or cut short: get it again ({error})") from error
    return _tensors_in(held, path)


def _tensors_in(held: Any, path: Path) -> dict[str, Tensor]:
    """The state itself, or the one under "state_dict" or "model"."""
    if isinstance(held, Mapping):
        held = next((held[key] for key in ("state_dict", "model") if isinstance(held.get(key), Mapping)), held)
    tensors = (
        {k: v.contiguous().clone() for k, v in held.items() if isinstance(v, Tensor)}
        if isinstance(held, Mapping)
        else {}
    )
    if not tensors:
        raise RewardError(f"{str(path)!r} holds no weights: a file that maps names to tensors is needed")
    return tensors


def _converted(path: Path) -> Path:
    """Where the safetensors form of a pickle is kept; another size or time of change is another file."""
    status = path.resolve().stat()
    key = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    folder = cached_assets_path("alignprop_pipe", "weights", "converted")
    return Path(folder) / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
