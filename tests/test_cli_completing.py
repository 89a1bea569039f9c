"""Tab completion as a shell asks for it, in a folder with runs, a model and files; and that it loads nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignprop_pipe.cli import completing
from alignprop_pipe.prompts import READERS, named_sets

HEAVY = ["diffusers", "huggingface_hub", "numpy", "peft", "torch", "transformers"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("old", "new")):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").touch()
        os.utime(folder, (place, place))
    Path("runs", "broken").mkdir()
    Path("mine").mkdir()
    for name in ("mine/model_index.json", "theirs.safetensors", "foxes.txt", "picture.png", "my.toml", "reward.py"):
        Path(name).touch()


def offered(*words: str) -> list[str]:
    code = (
        "import sys; sys.argv = ['alignprop']; from alignprop_pipe.cli.app import app\n"
        f"try: app()\nfinally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    typed = {"COMP_WORDS": " ".join(("alignprop", *words)), "COMP_CWORD": str(len(words))}
    environment = {**os.environ, "_ALIGNPROP_COMPLETE": "complete_bash", **typed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.strip() == "[]"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("train", "--reward", "emoji_"), {"emoji_judge"}),
        (("train", "--judges", "au"), {"auto"}),
        (("train", "--prompts", "anim"), {"animals"}),
        (("train", "em"), {"emoji"}),
        (("sample", "--adapter", "runs/"), {"runs/new", "runs/old", "runs/broken/"}),
        (("inspect", "the"), {"theirs.safetensors"}),
    ],
)
def test_a_shell_is_offered_what_fits_and_torch_stays_out(words: tuple[str, ...], wanted: set[str]) -> None:
    assert set(offered(*words)) == wanted


def test_every_place_offers_its_kind() -> None:
    def names(function: object, typed: str = "") -> list[str]:
        return [name for name, _ in function(typed)]  # type: ignore[operator]

    assert {"clip", "hpsv2.1", "reward.py"} <= {*names(completing.rewards)}
    assert "clip + 0.1*jpeg" in names(completing.rewards, "clip + 0.1*jp")
    assert names(completing.rewards, "min(clip, hps") == ["min(clip, hpsv2", "min(clip, hpsv2.1"]
    assert {*named_sets(), "foxes.txt", "runs/", "mine"} == {*names(completing.prompt_sets)}
    assert set(completing.PROMPT_FILES) == set(READERS)
    assert {"emoji", "mine", "theirs.safetensors", "runs/"} == {*names(completing.models)}
    assert names(completing.runs)[:2] == ["runs/new", "runs/old"]
    assert "picture.png" not in names(completing.runs)
    assert {"runs/new", "my.toml"} <= {*names(completing.run_files)}
    assert names(completing.runs, "nowhere/x") == names(completing.models, "\0") == []
