"""How a run ends: stopped at any moment, diverged, or with nowhere to write; what was learned is never lost."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import adapter, align, align_until_ctrl_c, aligned, is_stock, same
from torch import Tensor

from alignprop_pipe import Adapter
from alignprop_pipe.errors import PipelineError, RewardValueError, RunError, TrainingDiverged
from alignprop_pipe.records import Images, Rewards, StepRecord, Targets
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.runs import folder as runs
from alignprop_pipe.runs.folder import read_metrics
from alignprop_pipe.training import session

LOOKED: dict[str, Any] = {"eval_prompts": 2, "eval_every": 0}


class Counted(Reward):
    """Brightness, with something done at each call; call 0 is the dry call, call 1 the evaluation before training."""

    name = "counted"

    def __init__(self, at: dict[int, Callable[[Tensor], Tensor]]) -> None:
        self.calls, self.at = -1, at

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        self.calls += 1
        scores = images.mean(dim=(1, 2, 3))
        return self.at.get(self.calls, self.at.get(-1, lambda same: same))(scores)


def press(scores: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return scores


def press_twice(scores: Tensor) -> Tensor:
    return press(press(scores))


def break_off(scores: Tensor) -> Tensor:
    raise KeyboardInterrupt


def nan(scores: Tensor) -> Tensor:
    return scores * math.nan


def raises(error: type[BaseException]) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


def at_step(step: int, act: Callable[[], object]) -> Callable[[StepRecord], None]:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            act()

    return on_step


def status(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["result"]["status"]


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act", [lambda: signal.raise_signal(signal.SIGINT), raises(KeyboardInterrupt), raises(StopIteration)]
)
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_stop_between_two_steps_takes_the_evidence_after(act: Any, keep_best: bool, tmp_path: Path) -> None:
    pipe, seen = aligned(), {}

    def on_step(record: StepRecord) -> None:
        seen[record.step] = adapter(pipe)
        at_step(2, act)(record)

    result = align(pipe, steps=9, keep_best=keep_best, out=tmp_path / "run", on_step=on_step, **LOOKED)
    assert (result.interrupted, result.stopped) == (True, "interrupted after 2 of 9 steps")
    assert [record.step for record in result.history] == [0, 1, 2]
    assert result.after is not None
    assert result.after.images is not None
    assert (result.after.step, result.kept_step) == (2, 2)
    assert same(adapter(pipe), seen[2])
    assert set(result.changes) == {"reward", "brightness"}
    read = read_metrics(tmp_path / "run")
    assert [record.step for record in read] == [0, 1, 2]
    assert read[-1].evidence is not None
    assert read[-1].evidence.reward == pytest.approx(result.after.reward)
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["result"]["steps"] == 2
    assert "reward" in about["result"]["held_out"]
    assert (tmp_path / "run" / "before-after.png").is_file()


def test_a_stop_while_a_record_is_written_takes_the_evidence_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pressed, fsync, metrics = [], runs.os.fsync, tmp_path / "run" / "metrics.jsonl"

    def interrupting(number: int) -> None:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if lines == 3 and not pressed:
            pressed.append(number)
            raise KeyboardInterrupt
        fsync(number)

    monkeypatch.setattr(runs.os, "fsync", interrupting)
    result = align(aligned(), steps=9, out=tmp_path / "run", **LOOKED)
    assert pressed
    assert result.after is not None
    assert (result.after.step, result.stopped) == (2, "interrupted after 2 of 9 steps")
    assert [record.step for record in read_metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("how", [break_off, press])
def test_a_stop_within_a_step_takes_the_evidence_after(how: Any) -> None:
    """In a library the step is broken off; with the handler of the command line it is finished."""
    pipe, seen = aligned(), {}
    reward = Counted({4: how})  # in the third step

    def on_step(record: StepRecord) -> None:
        seen.setdefault(record.step, adapter(pipe))

    run = align if how is break_off else align_until_ctrl_c
    result = run(pipe, reward, steps=9, on_step=on_step, **LOOKED)
    done = 2 if how is break_off else 3
    assert (result.interrupted, result.steps, result.kept_step) == (True, done, done)
    assert result.after is not None
    assert result.after.step == done
    assert same(adapter(pipe), seen[done])


def test_a_stop_within_a_look_keeps_its_step() -> None:
    """The evaluation after step 2 is broken off, and taken again since it is the last one."""
    result = align(aligned(), Counted({4: break_off}), steps=9, **{**LOOKED, "eval_every": 2})
    assert [record.step for record in result.history] == [0, 1, 2]
    assert result.after is not None
    assert (result.after.step, result.steps) == (2, 2)


def test_a_second_stop_during_the_last_look_ends_at_once_with_what_is_there(tmp_path: Path) -> None:
    for keep_best in (True, False):
        out, pipe, seen = tmp_path / str(keep_best), aligned(), []
        reward = Counted({5: press_twice})  # the evaluation after step 3
        result = align(
            pipe,
            reward,
            steps=9,
            keep_best=keep_best,
            out=out,
            on_step=lambda record, seen=seen, pipe=pipe: (
                seen.append(adapter(pipe)) or (record.step == 3 and signal.raise_signal(signal.SIGINT))
            ),
            **LOOKED,
        )
        assert reward.calls == 5
        assert (result.interrupted, result.steps, result.kept_step) == (True, 3, 3)
        assert result.after is None
        assert dict(result.changes) == {}
        assert same(adapter(pipe), seen[3])
        assert Adapter.load(out).keys() == result.adapter.keys()
        assert status(out) == "interrupted after 3 of 9 steps"


@pytest.mark.parametrize("first", [KeyboardInterrupt, ZeroDivisionError])
def test_stops_while_the_end_is_saved_leave_the_adapter_on_the_pipeline(
    first: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first error may come while the end is saved; the second comes while that error's end is saved."""
    pipe, seen, written = aligned(), {}, []

    def interrupted(*_: Any) -> None:
        written.append(1)
        raise first if len(written) == 1 and first is KeyboardInterrupt else KeyboardInterrupt

    def on_step(record: StepRecord) -> None:
        seen[record.step] = adapter(pipe)
        if record.step == 2 and first is ZeroDivisionError:
            raise first

    monkeypatch.setattr(session, "write_down", interrupted)
    with pytest.raises(KeyboardInterrupt) as told:
        align(pipe, steps=2, out=tmp_path / "run", on_step=on_step)
    assert len(written) == (2 if first is KeyboardInterrupt else 1)
    assert same(adapter(pipe), seen[2])
    assert vars(told.value)["result"].adapter == Adapter.of(pipe)


def test_a_look_at_another_adapter_is_not_called_after() -> None:
    """The newest evaluation is that of step 2; the adapter that stays, without `keep_best`, is that of step 3."""
    reward = Counted({6: press_twice})  # the evaluation of step 3; calls: 0 dry, 1 look, 2, 3 steps, 4 look, 5 step
    chosen = {"steps": 9, "keep_best": False, "eval_prompts": 2, "eval_every": 2}
    result = align_until_ctrl_c(
        aligned(), reward, on_step=at_step(3, lambda: signal.raise_signal(signal.SIGINT)), **chosen
    )
    assert (result.steps, result.kept_step, result.after) == (3, 3, None)


@pytest.mark.parametrize("where", ["step", "look", "on_step"])
def test_a_stop_in_the_last_step_is_a_completed_run(where: str, tmp_path: Path) -> None:
    reward = Counted({} if where == "on_step" else {3 if where == "step" else 4: press})
    on_step = at_step(2, lambda: signal.raise_signal(signal.SIGINT)) if where == "on_step" else None
    result = align_until_ctrl_c(aligned(), reward, steps=2, out=tmp_path / "run", on_step=on_step, **LOOKED)
    assert (result.steps, result.interrupted, result.stopped) == (2, False, "")
    assert result.after is not None
    assert status(tmp_path / "run") == "completed"


def test_a_stop_before_the_first_step_trains_nothing() -> None:
    result = align(aligned(), steps=9, on_step=at_step(0, raises(StopIteration)), **LOOKED)
    assert (result.steps, result.stopped, result.after) == (0, "interrupted after 0 of 9 steps", None)


LATE: set[str] = set()
"""What gives NaN from now on."""


def late_judge(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * (math.nan if "judge" in LATE else 1)


# --- diverged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e10, 1e30, 3e38])
@pytest.mark.parametrize("eval_prompts", [0, 2])
def test_absurd_weights_are_undone_and_fail_the_run(lr: float, eval_prompts: int, tmp_path: Path) -> None:
    pipe = aligned()
    with pytest.raises(
        TrainingDiverged, match=r"a step was undone that made weights of .*of step 0\. Try a lower --lr"
    ) as told:
        align(pipe, lr=lr, steps=2, eval_prompts=eval_prompts, out=tmp_path / "run")
    assert is_stock(pipe)
    assert status(tmp_path / "run").startswith("failed: a step was undone")
    saved = Adapter.load(tmp_path / "run")
    assert all(weight.isfinite().all() and weight.abs().max() < 10 for weight in saved.values())
    result = told.value.result
    assert (result.kept_step, result.steps, result.after, result.interrupted) == (0, 1, None, False)
    assert result.stopped.startswith("failed: ")


@pytest.mark.parametrize("kind", ["reward", "judge", "pictures"])
@pytest.mark.parametrize("keep_best", [True, False])
def test_evidence_that_is_not_finite_fails_the_run_with_the_last_good_adapter(
    kind: str, keep_best: bool, tmp_path: Path
) -> None:
    """Steps 1 and 2 are looked at and good; what comes of the evaluation after step 3 is no number."""
    pipe, seen = aligned(), {}

    def turning(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) * (math.nan if "reward" in LATE else 1)

    def on_step(record: StepRecord) -> None:
        seen[record.step] = adapter(pipe)
        if record.step == 2:
            LATE.add(kind)
        if record.step == 2 and kind == "pictures":
            with torch.no_grad():
                pipe.vae.decoder.conv_out.weight.fill_(math.nan)

    chosen = {
        "judges": ("test_endings:late_judge",),
        "keep_best": keep_best and "reward",
        "eval_prompts": 2,
        "eval_every": 1,
    }
    LATE.clear()
    with pytest.raises(TrainingDiverged, match="are no finite numbers") as told:
        align(pipe, turning, steps=5, out=tmp_path / "run", on_step=on_step, **chosen)
    result = told.value.result
    assert result.kept_step in (1, 2)
    assert result.after.step == result.kept_step
    weights = Adapter.load(tmp_path / "run")
    assert all(torch.equal(weight, weights[name]) for name, weight in result.adapter.items())
    assert status(tmp_path / "run").startswith("failed: after step 3 ")
    assert "failed" in repr(result)
    read = read_metrics(tmp_path / "run")
    assert read[-1].step == 3  # what went wrong is on record


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_in_the_decoder_is_noticed_though_its_pictures_are_clamped(value: float) -> None:
    """Infinities become white or black pictures, whose brightness is a finite number."""
    pipe, seen = aligned(), []

    def on_step(record: StepRecord) -> None:
        seen.append(record)
        if record.step == 1:
            with torch.no_grad():
                pipe.vae.decoder.conv_out.bias.fill_(value)

    with pytest.raises(TrainingDiverged, match="after step 2 pictures") as told:
        align(pipe, steps=2, on_step=on_step, **LOOKED)
    assert seen[-1].skipped
    assert told.value.result.kept_step == 0


@pytest.mark.parametrize("looks", [{}, LOOKED], ids=["no evaluations", "looks"])
def test_a_run_that_skipped_every_step_has_failed(looks: dict[str, Any]) -> None:
    bad = dict.fromkeys((2, 3) if looks else (1, 2), nan)
    with pytest.raises(TrainingDiverged, match="none of the 2 steps had a finite loss and gradient"):
        align(aligned(), Counted(bad), steps=2, **looks)


def test_a_reward_that_turns_nan_late_fails_without_looks_too() -> None:
    pipe = aligned()
    with pytest.raises(TrainingDiverged, match=r"the last 3 steps.*of step 2\.") as told:
        align(pipe, Counted({4: nan, 5: nan, 6: nan}), steps=6)
    assert (told.value.result.steps, told.value.result.kept_step) == (6, 2)
    result = align(aligned(), Counted({6: nan}), steps=6)  # one is chance
    assert result.history[-1].skipped


def test_a_run_that_fails_at_its_first_look_says_so_in_its_folder(tmp_path: Path) -> None:
    def breaks(_scores: Tensor) -> Tensor:
        raise RuntimeError("no luck")

    pipe = aligned()
    with pytest.raises(RuntimeError, match="no luck"):
        align(pipe, Counted({1: breaks}), steps=2, out=tmp_path / "run", **LOOKED)
    about = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (about["result"]["status"], about["result"]["steps"]) == ("failed: no luck", 0)
    assert "failed: no luck" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert is_stock(pipe)


def test_a_model_that_draws_no_numbers_is_refused_before_it_trains() -> None:
    pipe = aligned()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(PipelineError, match=r"no finite numbers before any training.*bfloat16"):
        align(pipe, **LOOKED)
    assert is_stock(pipe)
    with pytest.raises(RewardValueError, match=r"before training holds scores that are no finite numbers \(reward nan"):
        align(aligned(), Counted({1: nan}), **LOOKED)


# --- nowhere to write -------------------------------------------------------------------------------------------------


def lose(folder: Path) -> None:
    """The run folder is gone, and a file stands in its place: nothing can be written there again."""
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize("when", [2, 3])
def test_a_folder_that_vanishes_loses_no_adapter(when: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipe, seen = aligned(), {}
    run = tmp_path / "my-run"

    def on_step(record: StepRecord) -> None:
        seen[record.step] = adapter(pipe)
        if record.step == when:
            lose(run)

    with pytest.raises(
        RunError, match=r"cannot be .*The adapter of step 3 is in '.*my-run-adapter-.*the pipeline still holds it"
    ) as told:
        align(pipe, steps=3 if when == 3 else 9, out=run, on_step=on_step)
    (kept,) = (tmp_path / "here").glob("*.safetensors")
    assert str(kept) in str(told.value)
    assert told.value.result.adapter_path == kept
    weights = Adapter.load(kept)
    assert all(torch.equal(weight, weights[name]) for name, weight in told.value.result.adapter.items())
    held = adapter(pipe)
    assert held
    if when == 3:
        assert same(held, seen[3])
    pipe.load_adapter(kept)
    assert same(adapter(pipe), held)


def test_a_full_disk_at_the_end_leaves_the_adapter_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file may grow beyond what the records take: the adapter fits nowhere."""
    resource = pytest.importorskip("resource")  # which Windows has not
    monkeypatch.chdir(tmp_path)
    pipe = aligned()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(record: StepRecord) -> None:
        if record.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    try:
        with pytest.raises(
            RunError, match=r"cannot be written.*The adapter of step 2 is on no disk; in Python the pipeline"
        ) as told:
            align(pipe, steps=2, out=tmp_path / "run", on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result = told.value.result
    assert result.adapter_path is None
    result.adapter.save(tmp_path / "saved.safetensors")
    held = adapter(pipe)
    pipe.load_adapter(tmp_path / "saved.safetensors")
    assert same(adapter(pipe), held)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_report_that_cannot_be_written_does_not_hide_the_adapter(tmp_path: Path) -> None:
    pipe = aligned()

    def on_step(record: StepRecord) -> None:
        if record.step == 2:
            (tmp_path / "run" / "report.html").mkdir()

    with pytest.raises(RunError, match=r"report\.html.*is in '.*run/adapter\.safetensors'") as told:
        align(pipe, steps=2, out=tmp_path / "run", on_step=on_step)
    held = adapter(pipe)
    pipe.load_adapter(told.value.result.adapter_path)
    assert same(adapter(pipe), held)


def test_an_error_of_the_users_own_leaves_the_stock_pipeline_and_the_saved_adapter(tmp_path: Path) -> None:
    pipe = aligned()
    with pytest.raises(ZeroDivisionError) as told:
        align(pipe, steps=5, out=tmp_path / "run", on_step=at_step(2, lambda: 1 / 0))
    assert is_stock(pipe)
    assert vars(told.value)["result"].adapter == Adapter.load(tmp_path / "run")
    assert status(tmp_path / "run") == "failed: division by zero"
    assert len(Adapter.load(tmp_path / "run")) > 0
