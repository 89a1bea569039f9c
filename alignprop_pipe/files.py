"""Files that appear whole: written next to under a hidden name and renamed, so that no reader meets a half of one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from alignprop_pipe.errors import RunError

MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte order marks, the longer first: what a text begins with that is not UTF-8."""

PROMPT_CHUNK, SHEET_CHUNK = "prompt", "sheet"
"""Text chunks of our PNG files: what the picture was drawn from; and that it shows several pictures on one sheet."""


def decoded(data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 where a byte order mark says so; the mark is left out.

    Raises ValueError, which names the line, for bytes that are no such text.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "ignore").count("\n") + 1
        kind = encoding.removesuffix("-sig").upper()
        raise ValueError(f"line {line} is not {kind} text; save the file again as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} holds a zero byte, as no text does; save the file again as UTF-8")
    return text


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) at `path`; what stood there stays until the new file is complete.

    A process killed half-way leaves at most a hidden `.….tmp` next to it. Raises RunError.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with appearing_whole(path) as beside, beside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def appearing_whole(path: str | Path) -> Iterator[Path]:
    """A hidden path next to `path` to write to; at the end of the block that file takes the place of `path`.

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
