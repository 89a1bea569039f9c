"""A path, or a name on the Hugging Face Hub -> the adapter's file on this machine."""

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from alignprop_pipe.adapters.strength import CONFIG_FILE
from alignprop_pipe.errors import HubError
from alignprop_pipe.hub_client import faults_told, one_revision, token_for
from alignprop_pipe.layout import ADAPTER, HUB_WEIGHTS
from alignprop_pipe.sources import on_hub


def local_file(source: str | Path, revision: str | None = None) -> Path:
    """The path of an adapter: one here goes first, and a name on the Hub is fetched. Raises HubError."""
    there = on_hub(source)
    if there is None and revision is not None:
        raise HubError(f"revision={revision!r} belongs to a name on the Hub, 'me/name', and {str(source)!r} is none")
    if there is None:
        return Path(source)
    return fetch(there.repo_id, one_revision(there.revision, revision))


def fetch(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The adapter file of a repository, from the cache where that holds it and the Hub cannot be asked.

    Raises HubError: it is not there, several may be meant, or the Hub cannot be reached.
    """
    token = token_for(token, needed=False)
    with faults_told(f"{repo_id!r} is no file or folder here, and loading it from the Hub", repo_id, token, revision):
        try:
            return Path(hf_hub_download(repo_id, HUB_WEIGHTS, revision=revision, token=token))
        except LocalEntryNotFoundError:
            if (cached := _cached_of_peft(repo_id, revision)) is None:
                raise
            return cached
        except EntryNotFoundError:
            names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        name = _only_file(names, repo_id)
        if CONFIG_FILE in names:  # which says how strong a file of PEFT's is, and is read next to it
            hf_hub_download(repo_id, CONFIG_FILE, revision=revision, token=token)
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))


def _cached_of_peft(repo_id: str, revision: str | None) -> Path | None:
    """An adapter of PEFT's in the cache, with its settings."""
    names = (CONFIG_FILE, "adapter_model.safetensors")
    found = [try_to_load_from_cache(repo_id, name, revision=revision) for name in names]
    return Path(found[1]) if all(isinstance(path, str) for path in found) else None  # type: ignore[arg-type]


def _only_file(names: list[str], repo_id: str) -> str:
    """The file that must be meant in a repository of somebody else's. Raises HubError."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for usual in (ADAPTER, "adapter_model.safetensors"):
        found = [name for name in found if name == usual] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise HubError(f"{repo_id!r} holds no adapter: there is no .safetensors file at its top; choose another one")
    some = ", ".join(found[:5])
    raise HubError(
        f"{repo_id!r} holds {len(found)} .safetensors files ({some}), and it cannot be told which is meant: download "
        f"one with 'hf download {repo_id} {found[0]}' and give its path"
    )
