"""A run that games its reward says so wherever one looks: at the evaluation where that begins, and at the end."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import miniatures
import pytest
from aligning import align, aligned
from command_line import run

from alignprop_pipe.runs.summary import Watch
from alignprop_pipe.training.result import AlignResult

PROMPTS = ["a dog", "two cats", "a red fox", "the sea", "a house", "a boat", "a tree", "a cup"]
GAMED = "The judge -brightness, which was never trained on, fell"
SETTINGS = {"eval_prompts": 4, "eval_every": 2, "steps": 6, "lr": 0.02, "keep_best": False}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AlignResult, list[str]]]:
    """A run whose judge wants the opposite of its reward, and what it logged."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("alignprop_pipe.training.session"), Kept()
    logger.addHandler(handler)
    out = tmp_path_factory.mktemp("runs") / "gamed"
    yield align(aligned(), prompts=PROMPTS, out=out, judges=("-brightness",), **SETTINGS), said
    logger.removeHandler(handler)


def test_python_is_told_at_the_look_where_it_first_holds(ended: tuple[AlignResult, list[str]]) -> None:
    result, said = ended
    (told,) = (line for line in said if GAMED in line)
    step = int(told.removeprefix("step ").partition(":")[0])
    watch = Watch(result.config.loss)
    holding = [record.step for record in result.history if any(GAMED in one.text for one in watch.first_at(record))]
    assert [step] == holding
    assert step < result.steps


def test_result_report_and_config_say_the_same(ended: tuple[AlignResult, list[str]]) -> None:
    result, _ = ended
    texts = [one.text for one in result.warnings]
    assert result.run_folder is not None
    about = json.loads((result.run_folder / "config.json").read_text())
    report = (result.run_folder / "report.html").read_text(encoding="utf-8")
    assert any(GAMED in text for text in texts)
    assert [one["text"] for one in about["result"]["warnings"]] == texts
    for text in texts:
        assert f"warning: {text}" in repr(result)
        assert report.count(text.replace("'", "&#x27;")) == 1


def test_the_card_says_the_same(ended: tuple[AlignResult, list[str]], tmp_path: Path) -> None:
    result, _ = ended
    result.adapter.push_to_hub("me/gamed", dry_run=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    warned = card[card.index("[!WARNING]") : card.index("## Use it")]
    assert warned.count("\n> ") == len(result.warnings)
    assert "The judge `-brightness`, which was never trained on, fell" in warned


def test_an_adapter_without_its_run_says_what_its_header_knows(
    ended: tuple[AlignResult, list[str]], tmp_path: Path
) -> None:
    import dataclasses

    from alignprop_pipe.adapters.adapter import Adapter

    file = ended[0].adapter.save(tmp_path / "a.safetensors", format="diffusers")[0]
    alone = dataclasses.replace(Adapter.load(file), run_folder=None)
    alone.push_to_hub("me/gamed", dry_run=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "The judge `-brightness`, which was never trained on, fell" in card


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    miniatures.sd15().save_pretrained(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _libraries_as_before() -> Iterator[None]:
    """What `quiet_libraries` sets for the process of a command belongs to other tests here."""
    import warnings

    shown, ours = warnings.showwarning, logging.getLogger("alignprop_pipe")
    handlers, propagate, level = ours.handlers, ours.propagate, ours.level
    yield
    warnings.showwarning = shown
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)


def train(place: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[list[str], str]:
    """The lines of stdout, and stderr."""
    monkeypatch.chdir(place)
    words = ["train", "./tiny", "--reward", "brightness", "--judges", "-brightness", "--prompts", "prompts.txt"]
    words += ["--num-inference-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--steps", "6"]
    words += ["--eval-prompts", "4", "--eval-every", "2", "--lr", "0.02", "--height", "16", "--width", "16"]
    done = run(*words, "--device", "cpu", "--no-keep-best", *more)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines(), done.stderr


def test_the_terminal_says_it_at_once_and_at_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, stderr = train(place, monkeypatch)
    early, last = (number for number, line in enumerate(lines) if GAMED in line)
    assert lines[early].startswith("warning: step ")
    assert any(line.startswith("step 6/6") for line in lines[early:])
    ended = next(number for number, line in enumerate(lines) if line.startswith("done"))
    assert lines[ended].startswith("done, with warnings")
    assert ended < last < next(number for number, line in enumerate(lines) if line.startswith("adapter:"))
    assert GAMED not in stderr


def test_quiet_says_it_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _ = train(place, monkeypatch, "--quiet")
    assert sum(GAMED in line for line in lines) == 1
    assert lines[0].startswith("warning: ")


def test_json_has_it_in_the_step_and_in_the_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, stderr = train(place, monkeypatch, "--json")
    records = [json.loads(line) for line in lines]
    steps, result = [one for one in records if one["type"] == "step"], records[-1]
    looks = [one for one in steps if one["evidence"] is not None]
    assert all(("warnings" in one) is (one in looks) for one in steps)
    assert looks[0]["warnings"] == []
    for one in (looks[-1], result):
        assert {"reward-gamed"} <= {warning["kind"] for warning in one["warnings"]}
        assert any(GAMED in warning["text"] for warning in one["warnings"])
    assert result["type"] == "result"
    assert GAMED in stderr
