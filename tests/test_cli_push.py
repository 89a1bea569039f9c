"""`alignprop push`, and `--adapter me/name`: what is said, where it goes, and exit codes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import miniatures
import pytest
from aligning import align, aligned
from command_line import run as command
from hub_server import TOKEN, Hub, serving
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from PIL import Image
from typer.testing import Result

from alignprop_pipe.layout import HUB_WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of its HTTP


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    align(aligned(), out=folder, eval_prompts=2)
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as one:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", one.url)
        template = one.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield one
        close_session()


def push(*arguments: object) -> Result:
    return command("push", *arguments)


def test_a_dry_run_lists_and_writes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    done = push(run, "me/first", "--dry-run")
    assert done.exit_code == 0, done.output
    for path in (run / "hub").rglob("*.*"):
        assert f"{path.relative_to(run / 'hub')}" in done.stdout
        assert f"{path.stat().st_size:,}" in done.stdout
    assert f"nothing was sent; all of it is in {run / 'hub'}" in done.stdout.replace("\n", "")
    assert push(run, "me/first", "--dry-run").exit_code == 0  # over the first one


def test_it_is_pushed_and_pushed_again(server: Hub, run: Path) -> None:
    first = push(run, "me/first", "--private", "--quiet")
    assert first.exit_code == 0, first.output
    assert first.stdout.strip().startswith(f"pushed: {server.url}/me/first/commit/")
    assert server.repos["me/first"].private
    again = push(run, "me/first", "--json")
    (line,) = map(json.loads, again.stdout.splitlines())
    assert (line["type"], line["changed"], line["repo_id"]) == ("push", False, "me/first")
    assert line["files"][HUB_WEIGHTS] > 1000
    assert "holds all of it already" in again.stderr
    assert TOKEN not in first.output + again.output


def test_branch_and_request(server: Hub, run: Path) -> None:
    server.add("me/first", {})
    assert push(run / "adapter.safetensors", "me/first", "--revision", "trial").exit_code == 0
    assert HUB_WEIGHTS in server.repos["me/first"].branches["trial"][-1].files
    asked = push(run, "me/first", "--create-pr")
    assert f"pushed: {server.url}/me/first/discussions/1" in asked.stdout


def test_what_is_wrong_is_a_sentence_and_a_code(server: Hub, run: Path, tmp_path: Path) -> None:
    for arguments, code, words in (
        ((tmp_path / "none", "me/x"), 2, "there is no run folder"),
        ((run, "first"), 1, "'me/name' is needed"),
        ((run, "team/x"), 1, "write access"),
        ((tmp_path, "me/x"), 1, "adapter"),
    ):
        done = push(*arguments)
        assert done.exit_code == code, done.output
        assert words in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.output
    server.faults["commit"] = [503]
    failed = push(run, "me/x")
    assert failed.exit_code == 1
    assert failed.stderr.count("\n") == 1
    assert "error: pushing to 'me/x' failed: the Hub has trouble of its own (503): run it again later" in failed.stderr


def test_the_token_is_no_flag() -> None:
    assert "--token" not in command("push", "--help").stdout


def test_sample_takes_an_adapter_from_the_hub(
    server: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    miniatures.sd15().save_pretrained(tmp_path / "tiny")
    assert push(run / "adapter.safetensors", "me/first").exit_code == 0
    words = ["sample", "./tiny", "a dog", "--num-inference-steps", "2", "--height", "16", "--width", "16"]
    done = command(*words, "--adapter", "me/first", "--compare", "--device", "cpu")
    assert done.exit_code == 0, done.output
    with Image.open("samples/001-a-dog.png") as shown:
        assert shown.info["adapter"] == "me/first"
    missing = command(*words, "--adapter", "me/none")
    assert missing.exit_code == 2
    assert "'me/none' is no file or folder here" in missing.stderr
    typed = command(*words, "--adapter", "./none/x")
    assert typed.exit_code == 2 or "no file or folder here" in typed.stderr
