"""The command line in this process, as tests call it; `conftest.py` puts back what a command sets for its process."""

import json
from collections.abc import Mapping
from typing import Any

from typer.testing import CliRunner, Result

from alignprop_pipe.cli.app import app


def run(*words: object, env: Mapping[str, str] | None = None) -> Result:
    """`alignprop WORDS`."""
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def json_lines(text: str) -> list[dict[str, Any]]:
    """What `--json` wrote: one object a line."""
    return [json.loads(line) for line in text.splitlines()]
