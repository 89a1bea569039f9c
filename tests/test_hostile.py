"""Headers, prompts, rewards and names of others, in the card, the report, the result and on the terminal."""

import ast
import dataclasses
import functools
import io
import json
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import hostile
import pytest
import yaml
from command_line import run as command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from test_card import FACTS
from test_result import result
from test_runs import look, new_run, record

from alignprop_pipe.adapters.header import Base
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.cli import console
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import PromptError
from alignprop_pipe.hub.card import model_card
from alignprop_pipe.hub.card_facts import PAPER, Facts
from alignprop_pipe.hub.licences import HUB
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Change

ALL = pytest.mark.parametrize("text", hostile.ALL)
SOME = pytest.mark.parametrize("text", hostile.SOME)
FAMILIES = pytest.mark.parametrize(
    "text", list(map("".join, hostile.FAMILIES)), ids=("markdown", "terminal", "rich", "shell", "python")
)
"""For what takes a second: whole families in one text."""
ANY = st.one_of(st.text(), st.lists(st.sampled_from(hostile.ALL)).map("".join))


def is_seen(text: str) -> bool:
    return not set(text) & set(hostile.UNSEEN)


# --- the card --------------------------------------------------------------------------------------------------------


def facts_of(text: str) -> Facts:
    """Facts whose every text is `text`; a base model has a slash in it, which makes it a link."""
    judges = (text, f"{text}.part")
    changes = {"reward": Change(1.0, 2.0, 1.0, 0.1), text: Change(5.0, 1.0, -4.0, 0.1), judges[1]: Change(1, 1, 0, 0.1)}
    config = AlignConfig().replace(judges=(text,), negative_prompt=text).to_dict()
    return dataclasses.replace(
        FACTS,
        **dict.fromkeys(("source", "status", "device", "size", "window", "command", "base_class"), text),
        **{"base": f"{text}/{text}", "repo_id": f"{text}/{text}", "reward": f"? {text}", "config": config},
        **{"prompts": (text, text), "mixed": (), "changes": changes, "judges": judges},
        **{"widgets": ((text, "images/after-1.png"),), "files": (*FACTS.files, f"{text.replace('/', '')}.safetensors")},
    )


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text below it."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), found[2]


def places(structure: dict[str, Any]) -> list[str]:
    """Where the links lead that are the same whatever the names are."""
    return [place for place in structure["places"] if "huggingface.co" not in place and ".safetensors" not in place]


@functools.cache
def card_of(text: str) -> str:
    return str(model_card(facts_of(text)))


HARMLESS = hostile.structure(parts(card_of("harmless"))[1])


def same_page(card: str) -> None:
    found = hostile.structure(parts(card)[1])
    assert found["kinds"] == HARMLESS["kinds"]
    assert found["headings"] == HARMLESS["headings"]
    assert places(found) == places(HARMLESS)
    assert all(place.startswith((HUB, PAPER)) for place in found["places"] if ":" in place)


@ALL
def test_a_card_of_hostile_texts_is_made_of_what_a_harmless_one_is(text: str) -> None:
    same_page(card_of(text))
    assert is_seen(card_of(text))


@settings(max_examples=20)
@given(ANY)
def test_a_card_of_any_text_is_made_of_what_a_harmless_one_is(text: str) -> None:
    same_page(str(model_card(facts_of(text or "x"))))


@ALL
def test_the_metadata_holds_what_the_facts_say_and_nothing_more(text: str) -> None:
    data, _ = parts(card_of(text))
    harmless, _ = parts(card_of("harmless"))
    assert data.keys() == harmless.keys()
    assert len(data["widget"]) == 1
    assert [len(one["results"]) for one in data["model-index"]] == [
        len(one["results"]) for one in harmless["model-index"]
    ]


@SOME
def test_the_code_of_a_hostile_card_does_what_a_harmless_one_does(text: str) -> None:
    """Python: the same calls, with the texts in them. bash: one command, whose words are the texts."""
    _, body = parts(card_of(text))
    blocks = {token.info: token.content for token in hostile.MarkdownIt().parse(body) if token.type == "fence"}
    tree = ast.parse(blocks["python"])
    named = [
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert named == ["from_pretrained", "load_lora_weights"]
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {text, f"{text}/{text}"} <= literals
    commands = [token.content for token in hostile.MarkdownIt().parse(body) if token.info == "bash"]
    sample = next(command for command in commands if command.startswith("alignprop sample"))
    script = f"alignprop() {{ printf '%s\\0' \"$@\"; }}; {sample}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    model, prompt = f"{text}/{text}", text
    assert done.stdout.decode().split("\0")[:-1] == ["sample", model, prompt, "--adapter", model, "--compare"]
    assert done.stderr == b""


def header_of(text: str) -> dict[str, str]:
    config = AlignConfig().replace(judges=(text,), negative_prompt=text).to_dict() | {text: text}
    return {
        "alignprop.reward": f"? {text}",
        "alignprop.config": json.dumps(config | {"batch_size": text, "lora": text}),
        "alignprop.scores": json.dumps({"reward": [1, 2], text: [5.0, 1.0, 0.1], f"{text}2": [text], "c": [1, text]}),
        "alignprop.step": text,
        "alignprop.prompts": text,
        "alignprop.trigger_prompts": " ".join(text.split("\n")),
        "alignprop.window": text,
        "alignprop.mix.parts": json.dumps([{"weight": text, "adapter": text}, text, 3]),
        "modelspec.title": text,
        text: text,
    }


@functools.cache
def pushed(text: str) -> str:
    """The card of an adapter whose header is all `text`."""
    theirs = adapters.made("sd15")
    base = Base.of_header({"alignprop.base_model": f"models--{text}--{text}", "alignprop.base_class": text})
    adapter = dataclasses.replace(theirs, base=base, metadata=header_of(text))
    with tempfile.TemporaryDirectory() as folder:
        adapter.push_to_hub("me/foxes", dry_run=Path(folder) / "hub")
        return (Path(folder) / "hub" / "README.md").read_text(encoding="utf-8")


@SOME
def test_a_pushed_adapter_with_a_hostile_header(text: str) -> None:
    found, usual = (hostile.structure(parts(pushed(one))[1]) for one in (text, hostile.harmless(text)))
    assert found == usual
    assert is_seen(pushed(text))


@pytest.mark.parametrize(
    "header",
    [
        {"alignprop.base_class": "utils"},  # a module of diffusers, and no class
        {"alignprop.base_class": "DiffusionPipeline"},
        {"alignprop.base_model": "a" * 5000},
        {"alignprop.base_model": "a..b/c--d"},
        {"alignprop.step": "9" * 5000},
        {"alignprop.prompts": "9" * 5000},
        {"alignprop.config": "[" * 100_000},
        {"alignprop.config": '{"batch_size": "abc", "gradient_accumulation_steps": 1000000000000}'},
        {"alignprop.config": '{"sampling": [1], "evaluation": 3, "truncation": {"a": 1}}'},
        {"alignprop.config": '{"sampling": {"num_inference_steps": {"x": 1}, "guidance_scale": 1e999}}'},
        {"alignprop.scores": '{"reward": [1e999, 1], "a": [true, null], "b": [' + "1" * 4000 + ", 2]}"},
        {"alignprop.scores": '{"' + "x" * 100 + '": ' + "[" * 100_000},
        {"alignprop.mix.parts": '{"a": 1}'},
        {"alignprop.reward": "\0" + "5\0 \0me/foxes\0"},
    ],
)
def test_headers_that_would_stop_a_push(header: dict[str, str], tmp_path: Path) -> None:
    theirs = adapters.made("sd15")
    adapter = dataclasses.replace(theirs, base=Base.of_header(header), metadata=header)
    adapter.push_to_hub("me/foxes", dry_run=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "# foxes" in card


@pytest.fixture(scope="module")
def harmless_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_of("harmless", tmp_path_factory.mktemp("runs") / "run").parent
    (folder / "adapter.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {"model": 3, "reward": [1], "calibrated_reward": {"a": 1}, "prompts": [1, None, "a"]},
        {"result": [1], "started": 4, "device": {}, "command": []},
        {"result": {"status": ["x"], "held_out": 3, "warnings": "x"}, "config": {}},
        {"config": {"evaluation": {"judges": 3}, "sampling": [], "batch_size": "x", "loss": {"a": 1}}},
    ],
)
def test_a_run_folder_with_anything_in_it_is_pushed(
    changed: dict[str, Any], harmless_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(harmless_run, tmp_path / "run")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changed))
    adapter = dataclasses.replace(adapters.made("sd15"), run_folder=folder)
    adapter.push_to_hub("me/foxes", dry_run=tmp_path / "hub")
    assert "# foxes" in (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")


# --- the report and the result ---------------------------------------------------------------------------------------


def run_of(text: str, folder: Path) -> Path:
    """A finished run whose every text is `text`; returns the report."""
    run = new_run(folder, reward=text, prompts=text)
    run.about |= {"model": text, "command": text, "versions": {text: text}}
    looks = [
        dataclasses.replace(
            one, prompts=(text,) * len(one.prompts), judges={text: 0.5}, per_prompt={**one.per_prompt, text: (0.5,) * 3}
        )
        for one in (look(0), look(1))
    ]
    run.evidence(looks[0], "before")
    run.append(dataclasses.replace(record(1), parts={text: 0.5}))
    run.evidence(looks[1], "after")
    run.adapter_path.write_bytes(b"")
    changes = {"reward": (1.0, 2.0, 1.0, 0.1), text: (5.0, 1.0, -4.0, 0.1)}
    return run.finish(changes, f"failed: {text}")


@functools.cache
def shown(text: str) -> tuple[hostile.Tags, str]:
    """The report of a run whose every text is `text`, and the card of the same run when it is pushed."""
    with tempfile.TemporaryDirectory() as place:
        report = run_of(text, Path(place) / "run")
        (report.parent / "adapter.safetensors").unlink()
        adapter = dataclasses.replace(adapters.made("sd15"), run_folder=report.parent)
        adapter.push_to_hub("me/foxes", dry_run=Path(place) / "hub")
        card = (Path(place) / "hub" / "README.md").read_text(encoding="utf-8")
        return hostile.Tags(report.read_text(encoding="utf-8")), card


@FAMILIES
def test_a_report_of_hostile_texts_is_made_of_what_a_harmless_one_is(text: str) -> None:
    found, usual = shown(text)[0], shown(hostile.harmless(text))[0]
    assert found.tags == usual.tags
    assert found.comments == usual.comments
    assert is_seen(found.text)


@FAMILIES
def test_a_pushed_run_of_hostile_texts(text: str) -> None:
    found, usual = (hostile.structure(parts(shown(one)[1])[1]) for one in (text, hostile.harmless(text)))
    assert found == usual
    assert is_seen(shown(text)[1])


@ALL
def test_a_result_of_hostile_texts_is_a_line_for_each_fact(text: str) -> None:
    theirs = result(reward=text, stopped=text)
    assert len(repr(theirs).splitlines()) == len(repr(result(reward="x", stopped="x")).splitlines())
    assert is_seen(repr(theirs))
    page = hostile.Tags(theirs._repr_html_())
    assert page.tags == hostile.Tags(result(reward="x", stopped="x")._repr_html_()).tags
    assert is_seen(page.text)


# --- the terminal ----------------------------------------------------------------------------------------------------

OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
"""What rich itself sends to a terminal: colours, and moves of the cursor."""


def terminal() -> tuple[console.Output, io.StringIO]:
    """Talk on a terminal without colours."""
    output, stream = console.Output(), io.StringIO()
    output.console = Console(file=stream, force_terminal=True, width=80, no_color=True, legacy_windows=False)
    return output, stream


@pytest.fixture(autouse=True)
def _libraries_as_before() -> Iterator[None]:
    ours = logging.getLogger("alignprop_pipe")
    kept = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = kept[0], kept[1]
    ours.setLevel(kept[2])


@SOME
def test_nothing_that_is_said_steers_the_terminal(text: str) -> None:
    output, stream = terminal()
    output.say(text)
    output.result(f"adapter: {text}")
    output.table(text, (text, "x"), [(text, text)], footers=(text, ""))
    with console.waiting(output, f"loading {text}"):
        pass
    with console.Progress(output, AlignConfig(), PromptSet((text,) * 16).split(4, 0)) as progress:
        progress.doing(text)
        evidence = dataclasses.replace(look(0), judges={text.replace(".", ""): 0.5})
        progress.on_step(dataclasses.replace(record(0), evidence=evidence))
    printed = OURS.sub("", stream.getvalue())
    assert is_seen(printed)
    lines = printed.split("\n")
    assert "ok: nothing wrong found" not in lines


@ALL
def test_words_are_taken_word_for_word(text: str) -> None:
    output, stream = terminal()
    output.say(text)
    assert OURS.sub("", stream.getvalue()) == f"{console.shown(text)}\n"


@ALL
def test_errors_and_notes_do_not_steer_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (PromptError(text), OSError(text), RuntimeError(text or "x")):
        with pytest.raises(Exception, match="."), console.translated(debug=True):
            raise error
    console._Notes(console.Output()).emit(
        logging.LogRecord("alignprop_pipe", logging.WARNING, "", 1, "%s", (text,), None)
    )
    printed = capsys.readouterr()
    assert is_seen(printed.err)
    assert printed.out == ""
    assert "ok: nothing wrong found" not in printed.err.split("\n")


@FAMILIES
def test_inspect_says_a_hostile_header_line_by_line(text: str, tmp_path: Path) -> None:
    theirs = adapters.made("sd15")
    header = {**header_of(text), "alignprop.base_model": text, "alignprop.base_class": text}
    file = tmp_path / "theirs.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, file, header)
    assert inspect_adapter(file).metadata["alignprop.window"] == text
    done = command("inspect", str(file))
    assert is_seen(done.output)
    assert "ok: nothing wrong found" not in done.output.split("\n")
    line = command("inspect", str(file), "--json").stdout
    assert is_seen(line)
    assert json.loads(line.splitlines()[0])["metadata"]["alignprop.window"] == text


@FAMILIES
def test_a_name_that_is_refused_is_said_and_not_obeyed(text: str) -> None:
    for words in (
        ["sample", "x", "--adapter", f"x{text}.safetensors"],
        ["train", f"x{text}"],
        ["push", f"x{text}", "a/b"],
    ):
        done = command(*words)
        assert done.exit_code == 2
        assert is_seen(OURS.sub("", done.output))


def test_the_parser_sees_what_is_forged() -> None:
    """Without escaping these texts do change the page: the tests above can fail."""
    plain = {"paragraph_open": 1, "paragraph_close": 1}
    raw = [text for text in hostile.MARKDOWN if hostile.structure(f"said: {text} x")["kinds"] != plain]
    assert len(raw) >= 10
    assert not is_seen("".join(hostile.TERMINAL))
