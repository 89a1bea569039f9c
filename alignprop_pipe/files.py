"""Files that appear whole: written beside under a hidden name and renamed, so that no reader meets a half of one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from alignprop_pipe.errors import RunError

PROMPT_CHUNK, SHEET_CHUNK = "prompt", "sheet"
"""Text chunks of our PNG files: what the picture was drawn from; and that it shows several pictures on one sheet."""


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) at `path`; what stood there stays until the new file is complete.

    A process killed half-way leaves at most a hidden `.….tmp` beside it. Raises RunError.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with appearing_whole(path) as beside, beside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def appearing_whole(path: str | Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; at the end of the block that file takes the place of `path`.

    After an error it is gone, and what stood at `path` still stands there. Raises RunError.
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise RunError(
                f"{str(path)!r} cannot be written: {reason}; free some space or choose another place"
            ) from error
        raise
