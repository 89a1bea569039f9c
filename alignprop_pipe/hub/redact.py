"""What must not leave this machine: places in its file system, its user's name, tokens.

`Private.cleaned` cuts them out of texts; `Private.found_in` looks for them in finished files, whatever wrote these.
"""

import getpass
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignprop_pipe.adapters.header import without_paths
from alignprop_pipe.hub_client import TOKEN

QUOTED_PATH = re.compile(r"""(["'])(?:file://|~|\.{1,2})?/(?:[^"'\n]*/)?([^"'/\n]+)/?\1""")
WHOLE_PATH = re.compile(r"(?:file://|~|\.{1,2})?/.*|[A-Za-z]:[\\/].*", re.DOTALL)
UNTOUCHED = ("prompts", "prompt", "trigger_prompts", "negative_prompt", "alignprop.trigger_prompts")
"""Keys of texts that are meant for the public, word by word: of these only paths and tokens are cut."""

SHORTEST = 6
"""Bytes of a text that is looked for in files; a shorter one would be found in weights by chance."""

ACCOUNTS = frozenset(
    ("root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "home", "nobody", "guest", "dev")
)
"""Names of accounts that say nothing of a person."""


@dataclass(frozen=True, slots=True)
class Private:
    """What is private here. `public` are names, such as the repository's, that may hold a user's name and stay."""

    folders: tuple[str, ...]
    users: tuple[str, ...]
    tokens: tuple[str, ...]
    public: tuple[str, ...] = ()

    @classmethod
    def here(
        cls, folders: Iterable[Path] = (), tokens: Iterable[str | None] = (), public: Iterable[str] = ()
    ) -> "Private":
        """This machine's home, working and temporary folders, its user, and what is given besides."""
        places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders]
        texts = {str(form) for place in places for form in (place.absolute(), place.resolve()) if len(form.parts) > 1}
        names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")} | {Path.home().name, _login()}
        return cls(
            folders=tuple(sorted(texts, key=len, reverse=True)),
            users=tuple(sorted(name for name in names if len(name) > 2 and name.lower() not in ACCOUNTS)),
            tokens=tuple(token for token in (*tokens, os.environ.get("HF_TOKEN")) if token),
            public=tuple(sorted(filter(None, public), key=len, reverse=True)),
        )

    def cleaned(self, text: str, *, typed: bool = False) -> str:
        """`text` with paths cut to their last part and without tokens and the user's name.

        `typed` keeps words that are the user's name by chance: in a prompt, "jack" is somebody else.
        """
        for token in self.tokens:
            text = text.replace(token, "***")
        text = TOKEN.sub("***", text.replace("\0", ""))
        if WHOLE_PATH.fullmatch(text):
            text = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
        for number, name in enumerate(self.public):
            text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", f"\0{number}\0", text)
        for folder in self.folders:
            text = text.replace(f"{folder}/", "/-/").replace(f"{folder}\\", "/-/").replace(folder, "~")
        text = without_paths(QUOTED_PATH.sub(r"\1\2\1", text))
        for name in self.users:
            word = re.escape(name)
            text = re.sub(rf"(?<=[/\\]){word}(?![\w-])|(?<![\w-]){word}(?=[/\\])", "user", text)
            text = text if typed else re.sub(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", "user", text)
        return re.sub("\0(\\d+)\0", lambda match: self.public[int(match[1])], text)

    def cleaned_values(self, value: Any, key: str = "") -> Any:
        """JSON's values, cleaned at every depth."""
        if isinstance(value, dict):
            return {self.cleaned(name): self.cleaned_values(inner, name) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.cleaned_values(inner, key) for inner in value]
        return self.cleaned(value, typed=key in UNTOUCHED) if isinstance(value, str) else value

    def found_in(self, content: bytes) -> str:
        """What stands in a file that must not: a few words, with nothing of it; empty for a clean one."""
        if any(form in content for token in self.tokens for form in _forms(token)):
            return "a token"
        folders = [form for folder in self.folders for form in _forms(f"{folder}{os.sep}")]
        places = [form for name in self.users for text in (f"/{name}/", f"\\{name}\\") for form in _forms(text)]
        if not any(form in content for form in (*folders, *places)):
            return ""
        content = re.sub(rb"https://huggingface\.co/\S+", b"", content)  # a user may be called as an organisation is
        for name in self.public:
            content = content.replace(name.encode(), b"")
        if any(form in content for form in folders):
            return "the path of a folder on this machine"
        return "the user's name in a path" if any(form in content for form in places) else ""


def _forms(text: str) -> list[bytes]:
    """The bytes of a text as it is, and as JSON writes it; none where it is too short to be looked for."""
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    return [form.encode("utf-8", "replace") for form in forms if len(form.encode("utf-8", "replace")) >= SHORTEST]


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no entry for this number in the list of users
        return ""
