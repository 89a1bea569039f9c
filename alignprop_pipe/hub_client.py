"""Asking the Hugging Face Hub: the token, and what a refusal means; no secret is said or logged."""

import contextlib
import logging
import re
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from alignprop_pipe.errors import HubError

TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{16,}")

CLIENTS = ("httpx", "httpcore")
"""Modules whose errors are those of the connection; their names carry a number in some versions."""

XET_REFUSAL = re.compile(r"status (?:client|server) error \((\d{3})")
"""How the other way of sending large files, hf_xet, says that it was refused: in the words of a lost connection."""


def token_for(given: str | None, *, needed: bool) -> str | None:
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


def one_revision(named: str | None, given: str | None) -> str | None:
    """The one that is meant. Raises HubError for two."""
    if named and given and named != given:
        raise HubError(f"two revisions were given, {named!r} in the name and {given!r} next to it; keep one")
    return named or given


@contextlib.contextmanager
def faults_told(doing: str, repo_id: str, token: str | None, revision: str | None = None) -> Iterator[None]:
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
