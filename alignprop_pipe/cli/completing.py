"""What Tab offers: rewards, prompt sets, models and runs, and the files that could stand there. Loads no torch."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from alignprop_pipe.sources import adapter_in, expanded, is_file

RUNS = Path("runs")
SETS = Path(__file__).parents[1] / "prompt_sets"
PROMPT_FILES = (".csv", ".jsonl", ".tsv", ".txt")
"""As in `prompts`, which loads torch."""
Offered = list[tuple[str, str]]
"""What could stand there, each with a word of explanation."""


def rewards(incomplete: str) -> Offered:
    """Names of rewards; in an expression, for its last term."""
    from alignprop_pipe.rewards.registry import REGISTRY

    begun = incomplete[: re.search(r"[\w.]*$", incomplete).start()]  # type: ignore[union-attr]  # it may be empty
    names = [(f"{begun}{name}", entry.summary) for name, entry in REGISTRY.items()]
    return _starting(incomplete, names) + _files(incomplete, (".py",))


def judges(incomplete: str) -> Offered:
    """Rewards, one that is chosen, and none."""
    words = [("auto", "a free one that differs from the reward in kind"), ("none", "no judge")]
    return _starting(incomplete, words) + rewards(incomplete)


def prompt_sets(incomplete: str) -> Offered:
    """Named sets, and files of prompts."""
    names = [(path.stem, "a set") for path in sorted(SETS.iterdir()) if path.suffix in PROMPT_FILES]
    return _starting(incomplete, names) + _files(incomplete, PROMPT_FILES)


def models(incomplete: str) -> Offered:
    """The bundled text-to-image model, folders of diffusers, and files."""
    from alignprop_pipe.bundled import MODELS

    names = [(model.name, model.summary) for model in MODELS if model.preset]
    return _starting(incomplete, names) + _files(incomplete, (".safetensors",))


def runs(incomplete: str) -> Offered:
    """Run folders that hold an adapter, the newest first, and files of adapters."""
    folders = sorted(RUNS.glob("*"), key=os.path.getmtime, reverse=True) if RUNS.is_dir() else []
    names = [(str(folder), "a run") for folder in folders if adapter_in(folder)]
    offered = _starting(incomplete, names)
    return offered + [one for one in _files(incomplete, (".safetensors",)) if one[0].rstrip("/") not in dict(offered)]


def run_files(incomplete: str) -> Offered:
    """What --config takes: runs, and files of settings."""
    return [one for one in runs(incomplete) if one[1] != "a file"] + _files(
        incomplete, (".toml", ".json"), folders=False
    )


def _starting(incomplete: str, names: Iterable[tuple[str, str]]) -> Offered:
    return [one for one in names if one[0].startswith(incomplete)]


def _files(incomplete: str, endings: tuple[str, ...], *, folders: bool = True) -> Offered:
    """Files with such an ending, and folders to go on with, in the one folder that is being typed."""
    typed, _, start = incomplete.rpartition("/")
    place = f"{typed}/" if "/" in incomplete else ""
    found = []
    try:
        with os.scandir(expanded(place or ".")) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
                    continue
                if entry.name.lower().endswith(endings):
                    found.append((place + entry.name, "a file"))
                elif folders and entry.is_dir():
                    kind = "a model" if is_file(f"{entry.path}/model_index.json") else "a folder"
                    found.append((f"{place}{entry.name}{'/' * (kind == 'a folder')}", kind))
    except (OSError, ValueError):  # there is nothing to offer
        pass
    return found
