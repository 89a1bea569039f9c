"""The run folder: whole files only, never one run in another's place, and metrics that read back as they were."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from alignprop_pipe import files
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import RunError
from alignprop_pipe.files import write_whole
from alignprop_pipe.records import Evidence, StepRecord
from alignprop_pipe.runs.folder import RunFolder, read_metrics, slug

PROMPTS = ("two dogs on a blue background", "一只狐狸 <b>🦊</b>", "../../etc/passwd")


def look(step: int, reward: float = 1.0, judge: float = 0.5, images: bool = True) -> Evidence:
    values = tuple(reward + 0.1 * i for i in range(len(PROMPTS)))
    return Evidence(
        step=step,
        prompts=PROMPTS,
        reward=reward,
        parts={"clip": reward},
        judges={"emoji_judge": judge, "emoji_judge.count": judge},
        diversity=0.3,
        per_prompt={"reward": values, "clip": values, "emoji_judge": (0.0, 1.0, judge)},
        images=torch.rand(len(PROMPTS), 3, 16, 24, generator=torch.Generator().manual_seed(step)) if images else None,
    )


def record(step: int = 1, **changed) -> StepRecord:
    usual = StepRecord(
        step=step,
        loss=-0.1 * step,
        reward=0.1 * step,
        parts={"clip": 0.1 * step},
        grad_norm=0.7,
        distance=None,
        graded=(3, 4),
        seconds=0.25,
        memory_mb=512.5,
    )
    return dataclasses.replace(usual, **changed)


def new_run(out, reward: str = "clip", prompts: str | tuple[str, ...] = "emoji") -> RunFolder:
    return RunFolder.create(
        out,
        command="alignprop train",
        config=AlignConfig.preset("emoji"),
        model="emoji",
        reward=reward,
        prompts=prompts,
    )


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"\x00\xff", "ein Fuchs 🦊", ""])
def test_a_file_appears_with_its_content_and_nothing_beside_it(tmp_path, content):
    write_whole(tmp_path / "file", "old")
    write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "new")
    assert not list(tmp_path.iterdir())


def test_a_surrogate_does_not_stop_the_writing(tmp_path):
    write_whole(tmp_path / "file", "a\udcffb")  # what Python makes of a command line that is not UTF-8
    assert (tmp_path / "file").read_text() == "a?b"


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "missing" / "file", "new")


# --- making the folder -----------------------------------------------------------------------------------------------


def test_default_folders_never_clash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(new_run(None, "clip + 0.1*jpeg").path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert all(path.parent == Path("runs") and "-clip-0-1-jpeg" in path.name for path in made)
    assert any(path.name.endswith("-8") for path in made)


def test_one_of_two_runs_gets_a_given_folder(tmp_path):
    taken: list[str] = []

    def start() -> None:
        try:
            new_run(tmp_path / "run")
        except RunError as error:
            taken.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 7
    assert all("--out" in message for message in taken)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files already.*--out"):
        new_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "nul\0l", "x" * 300])
def test_a_place_where_no_folder_can_be_is_said(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(RunError, match="--out"):
        new_run(out)


def test_no_place_for_the_default_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    with pytest.raises(RunError, match="--out"):
        new_run(None)


def test_an_empty_folder_is_used(tmp_path):
    run = new_run(tmp_path, prompts=PROMPTS)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.json"]
    about = json.loads((run.path / "config.json").read_text())
    assert AlignConfig.from_dict(about["config"]) == AlignConfig.preset("emoji")
    assert about["prompts"] == list(PROMPTS)
    assert about["command"] == "alignprop train"
    assert about["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_the_reward_is_kept_as_typed_and_with_its_numbers(tmp_path):
    def about(name, **more):
        config = AlignConfig()
        run = RunFolder.create(
            tmp_path / name, command="", config=config, model="emoji", reward="zscore(clip)", prompts="emoji", **more
        )
        return json.loads((run.path / "config.json").read_text())

    typed = about("one", calibrated="zscore(clip, mean=0.7, std=0.1)")
    assert (typed["reward"], typed["calibrated_reward"]) == ("zscore(clip)", "zscore(clip, mean=0.7, std=0.1)")
    assert about("two")["calibrated_reward"] == "zscore(clip)"


@given(st.text(max_size=80))
def test_a_slug_is_a_harmless_file_name(text):
    made = slug(text, "prompt")
    assert made == Path(made).name
    assert 0 < len(made) <= 40
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_read_back_as_they_were(tmp_path):
    run = new_run(tmp_path / "run")
    written = [record(1), record(2, distance=0.1 + 0.2, evidence=look(2, images=False)), record(3, graded=())]
    for one in written:
        run.append(one)
    assert read_metrics(run.path) == written
    assert read_metrics(run.path / "metrics.jsonl") == written


def test_pictures_stay_out_of_the_metrics(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1, evidence=look(1)))
    (read,) = read_metrics(run.path)
    assert read.evidence == dataclasses.replace(look(1), images=None)


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1, loss=math.nan, reward=math.inf, parts={"clip": -math.inf}, grad_norm=math.nan, skipped=True))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is line["reward"] is line["parts"]["clip"] is line["grad_norm"] is None
    (read,) = read_metrics(run.path)
    assert read.skipped
    assert all(math.isnan(number) for number in (read.loss, read.reward, read.parts["clip"], read.grad_norm))


def test_an_unfinished_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1))
    run.append(record(2))
    metrics = run.path / "metrics.jsonl"
    whole = metrics.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in range(first_line, len(whole), 7):
        metrics.write_bytes(whole[:cut])
        assert read_metrics(run.path) == [record(1)]
    metrics.write_bytes(b'{"step": 1\n' + whole)
    with pytest.raises(RunError, match="line 1"):
        read_metrics(run.path)
    with pytest.raises(RunError, match="cannot be read"):
        read_metrics(tmp_path / "elsewhere")


def test_a_run_without_steps_has_no_metrics_and_still_a_report(tmp_path):
    run = new_run(tmp_path / "run")
    path = run.finish(status="interrupted before the first step")
    assert "interrupted before the first step" in path.read_text()
    assert "No held-out evidence" in path.read_text()
    Image.open(run.path / "curve.png").verify()


WRITER = """
import sys
from test_runs import look, new_run, record
run = new_run(sys.argv[1])
run.evidence(look(0), "before")
print("ready", flush=True)
step = 0
while True:
    step += 1
    run.append(record(step, evidence=look(step) if step % 5 == 0 else None))
    if step % 5 == 0:
        run.finish()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("moment", [0.0, 0.21, 0.87])
def test_a_killed_run_leaves_only_whole_files(tmp_path, moment):
    out = tmp_path / "run"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, env=_with_package()
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(moment)
    writer.kill()
    writer.communicate()
    steps = [one.step for one in read_metrics(out)] if (out / "metrics.jsonl").exists() else []
    assert steps == list(range(1, len(steps) + 1))
    for path in out.rglob("[!.]*"):
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


def _with_package() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


# --- pictures and the end --------------------------------------------------------------------------------------------


def test_a_finished_run_has_every_file(tmp_path):
    run = new_run(tmp_path / "run")
    before, after = look(0), look(2, 1.4, 0.6)
    run.evidence(before, "before")
    run.append(record(1))
    run.append(record(2, evidence=after))
    run.evidence(after, "after")
    run.adapter_path.write_bytes(b"")
    report = run.finish({"reward": (1.0, 1.4, 0.4, 0.1), "emoji_judge": (0.5, 0.6, 0.1, math.nan)})
    assert report == run.path / "report.html"
    for name in ("config.json", "metrics.jsonl", "curve.png", "before-after.png", "samples", "checkpoints"):
        assert (run.path / name).exists()
    assert not list(run.path.rglob(".*"))
    result = json.loads((run.path / "config.json").read_text())["result"]
    assert result["held_out"]["emoji_judge"] == {"before": 0.5, "after": 0.6, "difference": 0.1, "standard_error": None}
    assert (result["status"], result["steps"], result["skipped"]) == ("completed", 2, 0)


def test_samples_are_named_after_their_prompts_and_stay_in_their_folder(tmp_path):
    run = new_run(tmp_path / "run")
    run.evidence(look(0), "before")
    run.evidence(look(2), "after")
    names = ["000-two-dogs-on-a-blue-background.png", "001-b-b.png", "002-etc-passwd.png"]
    for when in ("before", "after"):
        folder = run.path / "samples" / when
        assert sorted(path.name for path in folder.glob("*.png")) == names
        assert json.loads((folder / "scores.json").read_text())["prompts"] == list(PROMPTS)
    shown = Image.open(run.path / "samples" / "before" / names[0])
    images = look(0).images
    assert images is not None
    expected = images[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    assert (torch.tensor(list(shown.tobytes())).reshape(16, 24, 3).numpy() == expected).all()


def test_the_record_before_training_is_no_step(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(0, reward=math.nan, loss=math.nan, graded=(), evidence=look(0)))
    run.append(record(1, evidence=look(1)))
    assert [one.step for one in run.steps] == [1]
    assert run.before is not None
    assert run.before.step == 0
    assert "1 step ·" in run.finish().read_text()
    assert [one.step for one in read_metrics(run.path)] == [0, 1]


def test_without_a_look_at_the_end_the_newest_one_counts(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1, evidence=look(0)))  # step 0: before
    run.append(record(2, evidence=look(2)))
    run.append(record(3, evidence=look(3)))
    assert [one.step for one in run.looks] == [0, 2, 3]
    run.finish()
    assert (run.path / "before-after.png").exists()
    assert (run.path / "samples" / "after" / "scores.json").exists()


def test_metrics_of_an_earlier_version_are_read(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1, evidence=look(1)))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("held_out", "merit"):
            del line["evidence"][name]
    (run.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (read,) = read_metrics(run.path)
    assert read.evidence.held_out
    assert read.evidence.merit == ()


def test_of_a_step_that_was_written_twice_the_later_record_counts(tmp_path):
    run = new_run(tmp_path / "run")
    run.append(record(1))
    run.append(record(2))
    run.append(record(2, evidence=dataclasses.replace(look(2), held_out=False, merit=(0.5, math.inf))))
    assert [one.step for one in run.steps] == [1, 2]
    first, second = read_metrics(run.path)
    assert first.evidence is None
    assert second.evidence is not None
    assert not second.evidence.held_out
    assert second.evidence.merit[0] == 0.5
    assert math.isnan(second.evidence.merit[1])


def test_a_folder_that_vanished_is_said(tmp_path):
    run = new_run(tmp_path / "run")
    shutil.rmtree(run.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        run.append(record(1))
    with pytest.raises(RunError):
        run.finish()


def test_latest_points_to_the_last_run_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (new_run(tmp_path / "runs" / name) for name in ("first", "second"))
    for run in (first, second, first):
        run.finish()
        assert (tmp_path / "runs" / "latest").resolve() == run.path.resolve()
    assert not (tmp_path / "runs" / "latest").readlink().is_absolute()  # the folder may be moved
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"first", "second", "latest"}


def test_latest_is_a_link_of_ours_or_left_alone(tmp_path):
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    new_run(tmp_path / "runs" / "run").finish()
    assert not (tmp_path / "runs" / "latest").is_symlink()
    new_run(tmp_path / "elsewhere").finish()
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "elsewhere"}
