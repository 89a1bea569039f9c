"""Adapters to the Hugging Face Hub and from it, by huggingface_hub's own client.

Every failure becomes one HubError: what happened, and what to do. A push is one commit, so a failure leaves the
repository as it was; running it again sends what is missing, and nothing where nothing changed. A token comes from
where huggingface_hub looks for it, or as an argument, and is never said.
"""

import contextlib
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from alignprop_pipe.card_facts import CONFIG, METRICS, WEIGHTS
from alignprop_pipe.errors import HubError
from alignprop_pipe.hub_folder import Source, write_folder
from alignprop_pipe.privacy import TOKEN, Private
from alignprop_pipe.sources import HUB_ID, on_hub
from alignprop_pipe.strength import CONFIG_FILE

OURS = re.compile(
    rf"README\.md|{re.escape(WEIGHTS)}|.+-comfyui(-\w+)?\.safetensors|config\.json|metrics\.jsonl|curve\.png"
    r"|before-after\.png|images"
)
"""What a dry run writes, and may write over."""

CLIENTS = ("httpx", "httpcore")
"""Modules whose errors are those of the connection; their names carry a number in some versions."""

XET_REFUSAL = re.compile(r"status (?:client|server) error \((\d{3})")
"""How the other way of sending large files, hf_xet, says that it was refused: in the words of a lost connection."""

TITLE = "Adapter, card and evidence by alignprop-pipe"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: the files and their sizes in bytes, and where they are now.

    `url` is that of the commit or pull request; empty after a dry run, whose files are in `folder`. `changed` is
    false where the repository held all of it already.
    """

    repo_id: str
    files: Mapping[str, int]
    url: str = ""
    folder: Path | None = None
    changed: bool = True

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def __repr__(self) -> str:
        files = "\n".join(f"  {size:>12,}  {name}" for name, size in self.files.items())
        return f"{self}\n{files}"


def push(
    source: Source,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: str | Path | None = None,
) -> Pushed:
    """Put an adapter, its card and its run's evidence into the repository `repo_id` ("me/name"), in one commit.

    Files of these names are replaced there, the card among them, and the others stay.

    Args:
        source: an `Adapter`; one that knows its run folder brings the evidence along.
        repo_id: made if it is not there yet; also with hf:// before it and @revision behind it.
        private: whether a new repository is private; None: as your account's settings say.
        token: default: that of `hf auth login`, or HF_TOKEN.
        revision: branch to commit to; made if it is not there. Default: the main one.
        create_pr: open a pull request instead; one of yours that is open already gets the commit.
        dry_run: write the files to this folder, and send nothing and ask nothing of anybody.

    Raises:
        HubError: with what to do; the run folder is as it was.
    """
    if repo_id.startswith("hf:/") and (there := on_hub(repo_id)) is not None:
        repo_id, revision = there.repo_id, _one_revision(there.revision, revision)
    _check(repo_id, revision, create_pr)
    token = _token(token, needed=dry_run is None)
    folders = [] if source.run_folder is None else [source.run_folder, source.run_folder.absolute().parent]
    hidden = Private.here(folders, [token], [repo_id, source.base.base_model])
    with tempfile.TemporaryDirectory(prefix="alignprop-push-") as stage:
        folder = Path(stage) / "hub"
        folder.mkdir()
        files = write_folder(folder, repo_id, source, hidden)
        if dry_run is not None:
            return Pushed(repo_id, files, folder=_kept(folder, Path(dry_run)))
        with _faults(f"pushing to {repo_id!r}", repo_id, token):
            url, changed = _commit(HfApi(token=token), folder, files, repo_id, private, revision, create_pr)
    return Pushed(repo_id, files, url, changed=changed)


def local(source: str | Path, revision: str | None = None) -> Path:
    """The path of an adapter: one here goes first, and a name on the Hub is fetched. Raises HubError."""
    there = on_hub(source)
    if there is None and revision is not None:
        raise HubError(f"revision={revision!r} belongs to a name on the Hub, 'me/name', and {str(source)!r} is none")
    if there is None:
        return Path(source)
    return fetch(there.repo_id, _one_revision(there.revision, revision))


def run_of(file: Path) -> Path | None:
    """The run folder that an adapter's file lies in, if it does."""
    beside = (file.with_name(name).is_file() for name in (CONFIG, METRICS))
    return file.parent if file.name.startswith("adapter") and all(beside) else None


def fetch(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The adapter file of a repository, from the cache where that holds it and the Hub cannot be asked.

    Raises HubError: it is not there, several may be meant, or the Hub cannot be reached.
    """
    token = _token(token, needed=False)
    with _faults(f"{repo_id!r} is no file or folder here, and loading it from the Hub", repo_id, token, revision):
        try:
            return Path(hf_hub_download(repo_id, WEIGHTS, revision=revision, token=token))
        except LocalEntryNotFoundError:
            if (cached := _cached_of_peft(repo_id, revision)) is None:
                raise
            return cached
        except EntryNotFoundError:
            names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        name = _only_file(names, repo_id)
        if CONFIG_FILE in names:  # which says how strong a file of PEFT's is, and is read beside it
            hf_hub_download(repo_id, CONFIG_FILE, revision=revision, token=token)
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))


def _cached_of_peft(repo_id: str, revision: str | None) -> Path | None:
    """An adapter of PEFT's in the cache, with its settings."""
    names = (CONFIG_FILE, "adapter_model.safetensors")
    found = [try_to_load_from_cache(repo_id, name, revision=revision) for name in names]
    return Path(found[1]) if all(isinstance(path, str) for path in found) else None  # type: ignore[arg-type]


# --- pushing ---------------------------------------------------------------------------------------------------------


def _commit(
    api: HfApi,
    folder: Path,
    files: Mapping[str, int],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
) -> tuple[str, bool]:
    """Make what is missing and commit; returns the address and whether anything changed."""
    if not create_pr:
        api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.repo_info(repo_id)
    if private and not info.private:
        raise HubError(
            f"{repo_id!r} is there already and public, so nothing was sent: make it private in its settings on the "
            "Hub first, or choose another name"
        )
    if revision not in (None, "main") and not str(revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    number = _open_request(api, repo_id) if create_pr else None
    if number is not None:
        revision, create_pr = f"refs/pr/{number}", False
    before = info.sha if revision is None else api.repo_info(repo_id, revision=revision).sha
    operations = [CommitOperationAdd(name, folder / name) for name in files]
    done = api.create_commit(repo_id, operations, commit_message=TITLE, revision=revision, create_pr=create_pr)
    url = f"{api.endpoint}/{repo_id}/discussions/{number}" if number is not None else done.pr_url or done.commit_url
    return str(url), done.oid != before


def _open_request(api: HfApi, repo_id: str) -> int | None:
    """The number of an open pull request that an earlier push of ours made: a second one would be a copy of it."""
    me = api.whoami()["name"]
    found = api.get_repo_discussions(repo_id, author=me, discussion_type="pull_request", discussion_status="open")
    return next((one.num for one in found if one.title == TITLE and one.author == me), None)


def _kept(stage: Path, target: Path) -> Path:
    """Put the finished folder at `target`, in place of an earlier one. Raises HubError."""
    try:
        held = sorted(path.name for path in target.iterdir()) if target.exists() else []
        foreign = [name for name in held if not OURS.fullmatch(name)] or (
            [] if {"README.md", WEIGHTS} <= set(held) else held
        )
        if foreign:
            raise HubError(f"{str(target)!r} holds {foreign[0]!r}, which no dry run wrote; name an empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
        shutil.copytree(stage, beside)
        if target.exists():
            shutil.rmtree(target)
        beside.replace(target)
    except OSError as error:
        raise HubError(f"{str(target)!r} cannot be written: {error.strerror or error}; name another folder") from error
    return target


def _one_revision(named: str | None, given: str | None) -> str | None:
    if named and given and named != given:
        raise HubError(f"two revisions were given, {named!r} in the name and {given!r} beside it; keep one")
    return named or given


def _check(repo_id: str, revision: str | None, create_pr: bool) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = HUB_ID.fullmatch(repo_id) is not None
    if not valid:
        raise HubError(
            f"{repo_id!r} is no name for a repository: 'me/name' is needed, your name on the Hub and letters, digits, "
            "'-', '_' and '.', at most 96 characters"
        )
    if create_pr and revision not in (None, "main"):
        raise HubError("a pull request goes to the main branch: give revision or create_pr, not both")


def _token(given: str | None, *, needed: bool) -> str | None:
    """The token, checked before anything prints it: a line break in it would come back in the client's own error."""
    token = (given or huggingface_hub.get_token() or "").strip()
    if not token:
        if needed:
            raise HubError(
                "no token for the Hub was found: run 'hf auth login', or set HF_TOKEN to one with write access"
            )
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise HubError("the token for the Hub holds characters that no token has; copy it again")
    return token


def _only_file(names: list[str], repo_id: str) -> str:
    """The file that must be meant in a repository of somebody else's. Raises HubError."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    for usual in ("adapter.safetensors", "adapter_model.safetensors"):
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


# --- faults ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _faults(doing: str, repo_id: str, token: str | None, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into a HubError, and keep secrets out of what it logs.

    Without the cause: it may hold addresses with signatures, and headers.
    """
    client = logging.getLogger("huggingface_hub.utils._http")
    quiet = logging.getLogger("huggingface_hub.hf_api")

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = _without_secrets(record.getMessage(), token), ()
        return True

    def news(record: logging.LogRecord) -> bool:
        return "No files have been modified" not in record.getMessage()  # said by `Pushed.changed`

    client.addFilter(clean)
    quiet.addFilter(news)
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        reason = _without_secrets(_reason(error, repo_id, revision), token)
        raise HubError(f"{doing} failed: {reason}") from None
    finally:
        client.removeFilter(clean)
        quiet.removeFilter(news)


def _reason(error: BaseException, repo_id: str, revision: str | None) -> str:
    """What happened and what to do, in one sentence."""
    chain = list(_chain(error))
    answer = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache does not hold it; unset it to ask the Hub"
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r}; see its branches and commits on the Hub"
    if answer is not None:
        return _answer(answer, repo_id)
    if isinstance(error, LocalEntryNotFoundError):
        return "the Hub cannot be reached and the cache does not hold it; look at the network, and run it again"
    if refused := XET_REFUSAL.search(str(error)):
        return _by_status(int(refused[1]), repo_id)
    if any(isinstance(one, ConnectionError) or type(one).__module__.startswith(CLIENTS) for one in chain):
        return (
            f"no connection to {constants.ENDPOINT} ({type(error).__name__}); look at the network, and run it again: "
            "what was sent already is not sent twice"
        )
    text = next(iter(str(error).strip().splitlines()), "no reason was given")
    return f"{text} ({type(error).__name__}); run it again, and with a newer huggingface_hub if it stays"


def _answer(error: HfHubHTTPError, repo_id: str) -> str:
    """The Hub's refusal."""
    status = error.response.status_code
    if isinstance(error, RepositoryNotFoundError) and status in (401, 404):
        login = "log in with 'hf auth login' if it is private" if status == 401 else "or your token may not see it"
        return f"there is no model {repo_id!r} on the Hub ({status}), {login}"
    said = (error.server_message or "").strip().splitlines()
    words = f", saying {said[0]!r}" if said else ""
    return _by_status(status, repo_id, words, error.response.headers.get("retry-after", ""))


def _by_status(status: int, repo_id: str, words: str = "", wait: str = "") -> str:
    match status:
        case 401:
            return "the Hub does not accept the token (401): run 'hf auth login', or set HF_TOKEN to a valid one"
        case 403:
            return f"the token may not do this with {repo_id!r} (403){words}: it needs write access to that name"
        case 404:
            return f"{repo_id!r} has no such file or branch (404){words}"
        case 409 | 412:
            return f"{repo_id!r} was changed by somebody else at the same time ({status}){words}: run it again"
        case 429:
            when = f"in {wait} seconds" if wait.isdecimal() else "in some minutes"
            return f"the Hub got too many requests (429): run it again {when}"
        case _ if status >= 500:
            return (
                f"the Hub has trouble of its own ({status}): run it again later; the repository is as it was, and "
                "what was sent already is not sent twice"
            )
    return f"the Hub answered {status}{words}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _without_secrets(text: str, token: str | None) -> str:
    """Text without the token, and without what stands behind the ? of an address: signatures, as a rule."""
    text = TOKEN.sub("***", text.replace(token, "***") if token else text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
