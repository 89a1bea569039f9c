"""Pushing and loading against a Hub on the loopback: one commit, nothing private, and every fault in a sentence."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligning import align, aligned
from hub_server import READ_TOKEN, TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http, close_session
from miniatures import FAMILIES
from PIL import Image
from random_adapters import by_peft, draw
from safetensors.torch import load

from alignprop_pipe import Adapter
from alignprop_pipe.adapters.apply import load_adapter
from alignprop_pipe.adapters.inspect import inspect_adapter
from alignprop_pipe.adapters.mix import mix
from alignprop_pipe.errors import AdapterError, HubError
from alignprop_pipe.hub import push
from alignprop_pipe.layout import HUB_WEIGHTS
from alignprop_pipe.records import Pushed

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of its HTTP

SECRET = "marzipan"
"""The user's name here: in the home folder, the working folder and the names of the model, prompts and reward."""

PROMPTS = ["a red dog", "two cats", "three birds on the snow", "a boat", "one house", "a fish"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("Users") / SECRET


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A short run whose model, prompts and reward are local files, and whose folder is in the user's home."""
    home.mkdir()
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    (home / f"{SECRET}_rewards.py").write_text(f"def {SECRET}(images):\n    return images.mean((1, 2, 3))\n")
    pipe = aligned()
    pipe.register_to_config(_name_or_path=str(home / "my models" / "tiny"))
    reward = f"{home}/{SECRET}_rewards.py:{SECRET} + 0.1*brightness"
    align(pipe, reward, home / "prompts.txt", out=home / "runs" / "glow", eval_prompts=3, judges=("jpeg",))
    return home / "runs" / "glow"


@pytest.fixture
def user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, as `HF_ENDPOINT`, `HF_HUB_DISABLE_XET` and `HF_TOKEN` would name it at the start; no wait is long."""
    with serving() as one:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", one.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", one.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield one
        close_session()


@pytest.fixture
def adapter(run: Path) -> Adapter:
    return Adapter.load(run)


@pytest.fixture
def bare(adapter: Adapter) -> Adapter:
    """Without its run: fewer files."""
    return dataclasses.replace(adapter, run_folder=None)


def files(server: Hub, repo_id: str = "me/glow", revision: str = "main") -> dict[str, bytes]:
    return server.repos[repo_id].branches[revision][-1].files


def commits(server: Hub, repo_id: str = "me/glow", revision: str = "main") -> list[str]:
    """Titles, without that of the first commit, which the Hub makes itself."""
    return [commit.title for commit in server.repos[repo_id].branches[revision][1:]]


# --- pushing ---------------------------------------------------------------------------------------------------------


def test_everything_goes_in_one_commit(server: Hub, adapter: Adapter, run: Path) -> None:
    pushed = adapter.push_to_hub("me/glow")
    held = files(server)
    assert set(held) == {*pushed.files, ".gitattributes"}
    assert {"README.md", HUB_WEIGHTS, "glow-comfyui.safetensors", "config.json", "metrics.jsonl"} <= set(held)
    assert {"curve.png", "before-after.png", "images/after-1.png"} <= set(held)
    assert all(len(held[name]) == size for name, size in pushed.files.items())
    assert commits(server) == [push.TITLE]
    assert pushed.url.startswith(f"{server.url}/me/glow/commit/")
    assert pushed.changed
    assert not server.repos["me/glow"].private
    wanted = load((run / "adapter.safetensors").read_bytes())
    got = load(held[HUB_WEIGHTS])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_pushing_again_makes_no_second_copy(server: Hub, adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    adapter.push_to_hub("me/glow")
    again = adapter.push_to_hub("me/glow")
    assert not again.changed
    assert again.url.endswith(server.repos["me/glow"].branches["main"][-1].oid)
    assert commits(server) == [push.TITLE]
    assert server.log.count("upload") == len(server.large)
    assert "No files have been modified" not in caplog.text


def test_a_changed_file_is_one_more_commit(server: Hub, adapter: Adapter) -> None:
    adapter.push_to_hub("me/glow")
    sent = server.log.count("upload")
    more = dataclasses.replace(adapter, metadata={**adapter.metadata, "note": "once more"})
    assert more.push_to_hub("me/glow").changed
    assert len(commits(server)) == 2
    assert server.log.count("upload") == sent + 2  # the two adapter files alone


def test_a_file_that_changes_while_it_is_sent(server: Hub, adapter: Adapter, run: Path) -> None:
    """What is sent is a copy: it is of one moment, and what comes later is for the next push."""
    before = (run / "metrics.jsonl").read_bytes()
    curve = (run / "curve.png").read_bytes()

    def change() -> None:
        (run / "metrics.jsonl").write_bytes(before + before.split(b"\n")[-2] + b"\n")
        (run / "curve.png").write_bytes(b"half")

    server.before["upload"] = change
    try:
        adapter.push_to_hub("me/glow")
        assert files(server)["metrics.jsonl"].count(b"\n") == before.count(b"\n")
        assert files(server)["curve.png"].startswith(b"\x89PNG")
    finally:
        (run / "metrics.jsonl").write_bytes(before)
        (run / "curve.png").write_bytes(curve)


def test_private_and_a_repository_that_is_there(server: Hub, bare: Adapter) -> None:
    bare.push_to_hub("me/secret", private=True)
    assert server.repos["me/secret"].private
    assert bare.push_to_hub("me/secret").changed is False
    server.add("me/public", {"notes.txt": b"mine"})
    with pytest.raises(HubError, match=r"there already and public.*nothing was sent"):
        bare.push_to_hub("me/public", private=True)
    assert set(files(server, "me/public")) == {"notes.txt"}
    bare.push_to_hub("me/public")
    assert files(server, "me/public")["notes.txt"] == b"mine"


def test_a_branch(server: Hub, bare: Adapter) -> None:
    bare.push_to_hub("me/glow", revision="trial")
    bare.push_to_hub("me/glow", revision="trial")
    assert HUB_WEIGHTS in files(server, revision="trial")
    assert HUB_WEIGHTS not in files(server)
    assert commits(server, revision="trial") == [push.TITLE]


def test_a_pull_request_is_opened_once(server: Hub, bare: Adapter) -> None:
    server.add("team/glow", {})
    first = bare.push_to_hub("team/glow", create_pr=True)
    assert first.url == f"{server.url}/team/glow/discussions/1"
    again = bare.push_to_hub("team/glow", create_pr=True)
    assert (again.url, again.changed) == (first.url, False)
    changed = dataclasses.replace(bare, metadata={**bare.metadata, "note": "better"})
    assert changed.push_to_hub("team/glow", create_pr=True).changed
    assert list(server.repos["team/glow"].requests) == [1]
    assert HUB_WEIGHTS not in files(server, "team/glow")
    assert "create" not in server.log


def test_an_adapter_without_a_run(server: Hub, bare: Adapter) -> None:
    bare.push_to_hub("me/bare")
    assert set(files(server, "me/bare")) == {".gitattributes", "README.md", HUB_WEIGHTS, "bare-comfyui.safetensors"}
    card = ModelCard(files(server, "me/bare")["README.md"].decode())
    assert {"reward", "jpeg"} <= {one.metric_type for one in card.data.eval_results or []}


def test_an_adapter_knows_its_run(run: Path, tmp_path: Path) -> None:
    assert Adapter.load(run).run_folder == Adapter.load(run / "adapter.safetensors").run_folder == run
    (tmp_path / "alone.safetensors").write_bytes((run / "adapter.safetensors").read_bytes())
    assert Adapter.load(tmp_path / "alone.safetensors").run_folder is None


def test_a_run_without_its_pictures(adapter: Adapter, tmp_path: Path, run: Path) -> None:
    lean = tmp_path / "lean"
    lean.mkdir()
    for name in ("adapter.safetensors", "config.json", "metrics.jsonl"):
        (lean / name).write_bytes((run / name).read_bytes())
    pushed = Adapter.load(lean).push_to_hub("me/lean", dry_run=tmp_path / "out")
    assert set(pushed.files) == {"README.md", HUB_WEIGHTS, "lean-comfyui.safetensors", "config.json", "metrics.jsonl"}
    assert "| `reward` |" in (tmp_path / "out" / "README.md").read_text()


# --- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_what_a_push_sends(server: Hub, adapter: Adapter, tmp_path: Path) -> None:
    dry = adapter.push_to_hub("me/glow", dry_run=tmp_path / "hub")
    assert not server.log
    assert dry.folder == tmp_path / "hub"
    adapter.push_to_hub("me/glow")
    written = {str(p.relative_to(tmp_path / "hub")): p.read_bytes() for p in (tmp_path / "hub").rglob("*.*")}
    sent = files(server)
    assert written == {name: content for name, content in sent.items() if name != ".gitattributes"}
    assert {name: len(content) for name, content in written.items()} == dry.files


def test_a_dry_run_never_replaces_a_folder_of_the_users(bare: Adapter, tmp_path: Path) -> None:
    for name in ("config.json", "mine-comfyui.safetensors"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(HubError, match="which no dry run wrote"):
        bare.push_to_hub("me/glow", dry_run=tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HubError, match="cannot be written"):
        bare.push_to_hub("me/glow", dry_run=tmp_path / "file")


def test_evidence_of_other_weights_is_not_pushed(server: Hub, adapter: Adapter) -> None:
    name = next(iter(adapter.layers))
    doubled = {path: type(f)(f.down, 2 * f.up, f.alpha) for path, f in adapter.layers[name].items()}
    with pytest.raises(HubError, match="its evidence does not belong to them"):
        dataclasses.replace(adapter, layers={name: doubled}).push_to_hub("me/glow")
    assert not server.log


def test_a_dry_run_needs_no_network_and_no_token(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    first = adapter.push_to_hub("me/glow", dry_run=tmp_path / "hub")
    assert adapter.push_to_hub("me/glow", dry_run=tmp_path / "hub").files == first.files  # over the first one
    (tmp_path / "hub" / "thesis.docx").write_text("years of work")
    with pytest.raises(HubError, match=r"holds 'thesis\.docx', which no dry run wrote; name an empty folder"):
        adapter.push_to_hub("me/glow", dry_run=tmp_path / "hub")
    assert (tmp_path / "hub" / "thesis.docx").exists()


# --- nothing private -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("argument", [None, TOKEN])
def test_no_byte_is_private(
    server: Hub, run: Path, home: Path, monkeypatch: pytest.MonkeyPatch, argument: str | None
) -> None:
    """In every file that arrives, uncompressed chunks of pictures and headers among them."""
    monkeypatch.chdir(home)
    (run / "config.json").write_text((run / "config.json").read_text().replace('"command": "', f'"command": "{TOKEN} '))
    Adapter.load(run).push_to_hub("me/glow", token=argument)
    held = files(server)
    private = [str(home), str(home.parent), SECRET, TOKEN, TOKEN[3:], "my models", str(Path(*home.parts[-3:-1]))]
    for name, content in held.items():
        text = content + b"".join(_chunks(content, name)) + b"".join(_decoded(content, name))
        for word in private:
            assert word.encode() not in text, f"{name} holds {word}"
    about = json.loads(held["config.json"])
    assert about["prompts"] == "prompts.txt"
    assert about["model"] == "tiny"
    assert about["reward"] == "user_rewards.py:user + 0.1*brightness"
    assert set(server.tokens) == {TOKEN}


def _chunks(content: bytes, name: str) -> Iterator[bytes]:
    """The texts of a picture, which may be compressed in it."""
    if name.endswith(".png"):
        import io

        with Image.open(io.BytesIO(content)) as image:
            yield json.dumps({str(k): str(v) for k, v in image.info.items()}).encode()


def _decoded(content: bytes, name: str) -> Iterator[bytes]:
    """JSON without its escapes."""
    if name.endswith(".json"):
        yield str(json.loads(content)).encode()


@pytest.mark.usefixtures("user")
def test_what_the_cleaning_missed_is_not_sent(
    server: Hub, bare: Adapter, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that stands in a tensor's name, which nobody cleans."""
    monkeypatch.chdir(run.parent)
    name, layers = next(iter(bare.layers.items()))
    odd = {f"{run.parent}/x.{path}": factors for path, factors in layers.items()}
    with pytest.raises(HubError, match=r"nothing was uploaded: .* would hold the path of a folder") as caught:
        dataclasses.replace(bare, layers={name: odd}).push_to_hub("me/glow")
    assert str(run.parent) not in str(caught.value)
    assert not server.log


def test_a_token_is_never_said(
    server: Hub, bare: Adapter, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the Hub's own words, nor the client's warnings, nor a token that cannot be sent bring it out."""
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    server.words = f"the token {TOKEN} is not welcome"
    server.faults["upload"] = [500] * 99
    server.faults["create"] = [0, 403]
    caught = []
    for _ in range(2):
        with pytest.raises(HubError) as one:
            bare.push_to_hub("me/glow")
        caught.append(one.value)
    with pytest.raises(HubError, match="characters that no token has") as broken:
        bare.push_to_hub("me/glow", token=f"{TOKEN}\nX-Evil: 1")
    shown = "".join(map(_traceback, [*caught, broken.value])) + caplog.text + "".join(capfd.readouterr())
    assert "upload" in server.log
    assert TOKEN not in shown
    assert "s3cr3t" not in shown  # the signature in an upload's address


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def test_without_a_token(server: Hub, bare: Adapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no token.*hf auth login"):
        bare.push_to_hub("me/glow")
    assert not server.log


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS: list[tuple[str, list[int], str]] = [
    ("create", [401], r"does not accept the token \(401\).*hf auth login"),
    ("create", [429], r"too many requests \(429\).*in 30 seconds"),
    ("create", [500], r"trouble of its own \(500\).*again later"),
    ("yaml", [500], r"trouble of its own \(500\).*again later"),
    ("preupload", [403], r"may not do this with 'me/glow' \(403\).*write access"),
    ("preupload", [503] * 20, r"trouble of its own \(503\).*again later"),
    ("preupload", [429] * 20, r"too many requests \(429\).*in 30 seconds"),
    ("batch", [500] * 20, r"trouble of its own \(500\).*not sent twice"),
    ("upload", [0] + [500] * 60, r"trouble of its own \(500\).*not sent twice"),
    ("upload", [0] + [403] * 60, r"403"),
    ("commit", [409], r"changed by somebody else.*\(409\).*run it again"),
    ("commit", [412], r"changed by somebody else.*\(412\).*run it again"),
    ("commit", [502], r"trouble of its own \(502\).*again later"),
    ("commit", [413], r"the Hub answered 413, saying 'as the test asked'"),
]


@pytest.mark.parametrize(("kind", "statuses", "said"), FAULTS, ids=[f"{k}-{s[-1]}" for k, s, _ in FAULTS])
def test_a_fault_is_one_sentence_and_running_again_finishes(
    server: Hub, bare: Adapter, kind: str, statuses: list[int], said: str
) -> None:
    server.faults[kind] = list(statuses)
    server.headers_of_faults = {"Retry-After": "30"}
    with pytest.raises(HubError, match=said) as caught:
        bare.push_to_hub("me/glow")
    assert "\n" not in str(caught.value)
    assert "me/glow" not in server.repos or not commits(server)
    server.faults.clear()
    bare.push_to_hub("me/glow")
    assert commits(server) == [push.TITLE]
    assert HUB_WEIGHTS in files(server)


def test_nothing_is_lost_here(server: Hub, adapter: Adapter, run: Path) -> None:
    here = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    server.faults["commit"] = [503]
    with pytest.raises(HubError):
        adapter.push_to_hub("me/glow")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == here


def test_what_was_sent_is_not_sent_twice(server: Hub, bare: Adapter) -> None:
    server.faults["commit"] = [500]
    with pytest.raises(HubError):
        bare.push_to_hub("me/glow")
    sent = server.log.count("upload")
    assert sent == len(server.large) == 2
    bare.push_to_hub("me/glow")
    assert server.log.count("upload") == sent


def test_a_passing_fault_is_waited_out(server: Hub, bare: Adapter) -> None:
    server.faults["upload"] = [500, 503]
    server.faults["preupload"] = [429]
    assert bare.push_to_hub("me/glow").changed


def test_a_commit_whose_answer_was_lost_is_not_made_again(server: Hub, bare: Adapter) -> None:
    server.lost.add("commit")
    with pytest.raises(HubError, match=r"no connection.*run it again"):
        bare.push_to_hub("me/glow")
    assert not bare.push_to_hub("me/glow").changed
    assert commits(server) == [push.TITLE]


def test_a_conflict_when_it_is_made_is_fine(server: Hub, bare: Adapter) -> None:
    server.add("me/glow", {"README.md": b"---\nlicense: mit\n---\n# mine"})
    bare.push_to_hub("me/glow")
    assert b"# glow" in files(server)["README.md"]


def test_tokens_that_may_not(server: Hub, bare: Adapter) -> None:
    with pytest.raises(HubError, match=r"\(403\).*saying \"You don't have the rights.*write access"):
        bare.push_to_hub("me/glow", token=READ_TOKEN)
    with pytest.raises(HubError, match=r"does not accept the token \(401\)"):
        bare.push_to_hub("me/glow", token="hf_" + "wrong" * 8)
    with pytest.raises(HubError, match=r"\(403\)"):
        bare.push_to_hub("team/glow")
    with pytest.raises(HubError, match=r"no model 'team/none' on the Hub \(404\)"):
        bare.push_to_hub("team/none", create_pr=True)


def test_no_network(server: Hub, bare: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(HubError, match=r"no connection to http://127\.0\.0\.1.*look at the network"):
        bare.push_to_hub("me/glow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        bare.push_to_hub("me/glow")


def test_xet_that_refuses(server: Hub, bare: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way of sending large files; what it raises is no HTTP error of the client's."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"may not do this with 'me/glow' \(403\)") as caught:
        bare.push_to_hub("me/glow")
    assert TOKEN not in _traceback(caught.value)
    assert not commits(server)


@pytest.mark.parametrize("name", ["glow", "me/", "/glow", "me/a/b", "me/glow dim", "me/..", "me/" + "x" * 97, ""])
def test_names_that_are_none(adapter: Adapter, name: str) -> None:
    with pytest.raises(HubError, match="'me/name' is needed"):
        adapter.push_to_hub(name, token=TOKEN)


def test_a_request_and_a_branch_do_not_go_together(adapter: Adapter) -> None:
    with pytest.raises(HubError, match="not both"):
        adapter.push_to_hub("me/glow", revision="trial", create_pr=True, token=TOKEN)


def test_a_folder_that_is_no_run(adapter: Adapter, tmp_path: Path, server: Hub) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubError, match="is no run folder"):
        dataclasses.replace(adapter, run_folder=tmp_path).push_to_hub("me/glow")
    with pytest.raises(HubError, match="cannot be read"):
        dataclasses.replace(adapter, run_folder=tmp_path / "gone").push_to_hub("me/glow")
    assert not server.log


# --- loading ---------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back(server: Hub, bare: Adapter) -> None:
    bare.push_to_hub("me/glow")
    got = Adapter.load("me/glow")
    assert all(torch.equal(got[key], bare[key]) for key in bare)
    pipe = aligned()
    pipe.load_adapter("me/glow", scale=0.5)
    assert pipe.get_active_adapters()


def test_a_revision(server: Hub, bare: Adapter) -> None:
    bare.push_to_hub("me/glow")
    old = server.repos["me/glow"].branches["main"][-1].oid
    name = next(iter(bare.layers))
    doubled = {path: type(f)(f.down, 2 * f.up, f.alpha) for path, f in bare.layers[name].items()}
    dataclasses.replace(bare, layers={name: doubled}).push_to_hub("me/glow")
    key = next(key for key in bare if "lora_B" in key)
    assert torch.equal(Adapter.load("me/glow")[key], 2 * bare[key])
    assert torch.equal(Adapter.load("me/glow", revision=old)[key], bare[key])
    pipe = aligned()
    pipe.load_adapter("me/glow", revision=old)
    with pytest.raises(HubError, match="has no revision 'v9'"):
        Adapter.load("me/glow", revision="v9")


def test_the_cache_serves_without_a_network(server: Hub, bare: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.push_to_hub("me/glow")
    first = Adapter.load("me/glow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.log)
    again = Adapter.load("me/glow")
    assert all(torch.equal(again[key], first[key]) for key in first)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the cache does not hold it"):
        Adapter.load("me/other")
    assert len(server.log) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # an open connection would be answered still
    server.shutdown()
    server.server_close()
    assert len(Adapter.load("me/glow")) == len(first)
    with pytest.raises(HubError, match="cannot be reached and the cache does not hold it"):
        Adapter.load("me/other")


def test_a_path_here_goes_first(
    server: Hub, adapter: Adapter, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "glow").mkdir(parents=True)
    (tmp_path / "me" / "glow" / "adapter.safetensors").write_bytes((run / "adapter.safetensors").read_bytes())
    assert len(Adapter.load("me/glow")) == len(adapter)
    assert not server.log
    with pytest.raises(HubError, match="revision='v1' belongs to a name on the Hub"):
        Adapter.load("me/glow", revision="v1")


def test_hf_names_are_on_the_hub_whatever_is_here(
    server: Hub, bare: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "glow").mkdir(parents=True)
    bare.push_to_hub("hf://me/glow")
    bare.push_to_hub("hf://me/glow@v1")
    pipe = aligned()
    pipe.load_adapter("hf://me/glow@v1")
    for loaded in (
        Adapter.load("hf://me/glow"),
        Adapter.load(Path("hf://me/glow@v1")),
        Adapter.load("hf://me/glow", revision="v1"),
        mix([("hf://me/glow", 1.0)]),
        Adapter.of(pipe),
    ):
        assert len(loaded) == len(bare)
    assert inspect_adapter("hf://me/glow").layers == inspect_adapter(Path("hf://me/glow@v1")).layers
    with pytest.raises(HubError, match="two revisions"):
        Adapter.load("hf://me/glow@v1", revision="v2")
    with pytest.raises(HubError, match="no revision 'v9'"):
        Adapter.load("hf://me/glow@v9")


def test_what_is_not_there(server: Hub) -> None:
    with pytest.raises(HubError, match=r"'me/none' is no file or folder here.*no model 'me/none' on the Hub"):
        Adapter.load("me/none")
    server.add("me/hidden", {HUB_WEIGHTS: b""}, private=True)
    server.add("me/empty", {"README.md": b"# nothing"})
    with pytest.raises(HubError, match=r"'me/empty' holds no adapter"):
        Adapter.load("me/empty")


@pytest.mark.parametrize(("status", "said"), [(500, "cannot be reached|trouble"), (429, "429"), (403, "403")])
def test_faults_while_loading(server: Hub, status: int, said: str) -> None:
    server.add("me/glow", {HUB_WEIGHTS: b"x"})
    server.faults["file"] = [status] * 20
    with pytest.raises(HubError, match=said):
        Adapter.load("me/glow")


def test_files_of_others(server: Hub, adapter: Adapter, run: Path) -> None:
    """A repository with one file of any name is read; with several it is asked which one."""
    content = (run / "adapter.safetensors").read_bytes()
    server.add("you/style", {"style.safetensors": content, "old/x.safetensors": content})
    assert len(Adapter.load("you/style")) == len(adapter)
    server.add("you/many", {"a.safetensors": content, "b.safetensors": content})
    with pytest.raises(
        HubError, match=r"2 \.safetensors files \(a\.safetensors, b\.safetensors\).*hf download you/many"
    ):
        Adapter.load("you/many")


def test_a_repository_of_peft(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its strength stands in a file of its own; also from the cache, where the Hub cannot be asked."""
    settings = {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"to_q": 8}}
    picture = by_peft(tmp_path / "theirs", settings)
    server.add("you/peft", {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()})
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        pipe = FAMILIES["sd15"].make()
        load_adapter(pipe, "you/peft")
        torch.testing.assert_close(draw(pipe, **FAMILIES["sd15"].call(1)), picture, atol=1e-5, rtol=0)
    assert inspect_adapter("you/peft").alphas == inspect_adapter(tmp_path / "theirs").alphas


def test_a_file_that_is_damaged_there(server: Hub) -> None:
    server.add("you/bad", {HUB_WEIGHTS: b"<html>"})
    with pytest.raises(AdapterError):
        Adapter.load("you/bad")


def test_another_base_model_is_said(adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    pipe = aligned()
    pipe.register_to_config(_name_or_path="you/theirs")
    made_for = dataclasses.replace(adapter.base, base_model="me/mine")
    load_adapter(pipe, dataclasses.replace(adapter, base=made_for))
    assert "made for me/mine and is on you/theirs now" in caplog.text
    caplog.clear()
    load_adapter(pipe, dataclasses.replace(adapter, base=dataclasses.replace(made_for, base_model="you/theirs")))
    load_adapter(pipe, adapter)  # whose base is a local one
    assert not caplog.text


# --- as a user has it ------------------------------------------------------------------------------------------------


COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
from alignprop_pipe.cli.app import app
app(["push", sys.argv[2], "me/glow", "--private"], standalone_mode=False)
import miniatures
pipe = miniatures.sd15()
pipe.load_lora_weights("me/glow")
print("stock diffusers:", pipe.get_active_adapters(), len(pipe.unet.peft_config))
"""


def test_the_command_and_stock_diffusers(run: Path, tmp_path: Path) -> None:
    """Through HF_ENDPOINT alone: pushed by the command, then loaded by diffusers without a file's name."""
    with serving() as server:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "COV_", "TRANSFORMERS"))}
        env |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        words = [sys.executable, "-c", COMMAND, str(Path(__file__).parent), str(run)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert server.repos["me/glow"].private
    assert f"pushed: {server.url}/me/glow/commit/" in done.stdout
    assert re.search(rf"{re.escape(HUB_WEIGHTS)} +[\d,]+", done.stdout)
    assert "stock diffusers: ['default_0'] 1" in done.stdout
    assert "more than one weights file" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_pushed_says_what_it_is() -> None:
    shown: Any = Pushed("me/x", {"README.md": 1234}, url="https://there")
    assert str(shown) == "https://there"
    assert repr(shown) == "https://there\n         1,234  README.md"
