"""Adapters to the Hugging Face Hub and from it, by huggingface_hub's own client.

Every failure becomes one HubError: what happened, and what to do. A push is one commit, so a failure leaves the
repository as it was; running it again sends what is missing, and nothing where nothing changed. A token comes from
where huggingface_hub looks for it, or as an argument, and is never said.
"""

import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HFValidationError,
)
from huggingface_hub.utils import validate_repo_id

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.errors import HubError
from alignprop_pipe.hub.redact import Private
from alignprop_pipe.hub.stage import write_folder
from alignprop_pipe.hub_client import faults_told, one_revision, token_for
from alignprop_pipe.layout import HUB_WEIGHTS
from alignprop_pipe.records import Pushed
from alignprop_pipe.sources import HUB_ID, on_hub

OURS = re.compile(
    rf"README\.md|{re.escape(HUB_WEIGHTS)}|.+-comfyui(-\w+)?\.safetensors|config\.json|metrics\.jsonl|curve\.png"
    r"|before-after\.png|images"
)
"""What a dry run writes, and may write over."""

TITLE = "Adapter, card and evidence by alignprop-pipe"


def push(
    source: Adapter,
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
        repo_id, revision = there.repo_id, one_revision(there.revision, revision)
    _check(repo_id, revision, create_pr)
    token = token_for(token, needed=dry_run is None)
    folders = [] if source.run_folder is None else [source.run_folder, source.run_folder.absolute().parent]
    hidden = Private.here(folders, [token], [repo_id, source.base.base_model])
    with tempfile.TemporaryDirectory(prefix="alignprop-push-") as stage:
        folder = Path(stage) / "hub"
        folder.mkdir()
        files = write_folder(folder, repo_id, source, hidden)
        if dry_run is not None:
            return Pushed(repo_id, files, folder=_kept(folder, Path(dry_run)))
        with faults_told(f"pushing to {repo_id!r}", repo_id, token):
            url, changed = _commit(HfApi(token=token), folder, files, repo_id, private, revision, create_pr)
    return Pushed(repo_id, files, url, changed=changed)


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
            [] if {"README.md", HUB_WEIGHTS} <= set(held) else held
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
