"""One call of `align` as it goes on: its records, its run folder, and what becomes of it in the end."""

import logging
import math
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from alignprop_pipe.adapters import apply
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.errors import AdapterError, AlignError, RunError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Change, StepRecord
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.networks.network import cuts_in
from alignprop_pipe.runs.folder import RunFolder
from alignprop_pipe.runs.summary import Watch
from alignprop_pipe.training.loop import Training
from alignprop_pipe.training.result import AlignResult, changes_between, kept_evidence, looks_in

logger = logging.getLogger(__name__)


SLOWER, LEAST_SLOW = 10, 5.0
"""Times as long as the fastest step, and seconds, from which on a step is slow."""


@dataclass(slots=True)
class Session:
    """One call of `align`: the training (its reward is the calibrated one), and what has come of it so far."""

    pipe: DiffusionPipeline
    state: Training
    prompts: PromptSet
    run: RunFolder | None = None
    history: list[StepRecord] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    watch: Watch = field(init=False)
    fastest: float = math.inf
    is_slow: bool = False

    def __post_init__(self) -> None:
        self.watch = Watch(self.config.loss)

    @property
    def reward(self) -> Reward:
        return self.state.reward

    @property
    def config(self) -> AlignConfig:
        return self.state.config

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.history[-1].step if self.history else 0

    def remember(self, record: StepRecord) -> None:
        """Append a record; of the evaluations, only the first and the kept one hold on to their pictures.

        What its evaluation warns of is told at once, so that a run that goes wrong can be ended.
        """
        record = replace(record, images=None)
        if self.history and self.steps == record.step:  # the same step, with its evidence now
            self.history.pop()
        for warning in self.watch.first_at(record):
            logger.warning("step %d: %s", record.step, warning.text, extra={"run_warning": warning.kind})
        self.tell_if_slow(record)
        self.history.append(record)
        kept = kept_evidence(self.history, self.config)
        for number, old in enumerate(self.history[1:], start=1):
            look = old.evidence
            if look is not None and look is not kept and look.images is not None:
                self.history[number] = replace(old, evidence=replace(look, images=None))
        if self.run is not None:
            self.run.append(record)

    def tell_if_slow(self, record: StepRecord) -> None:
        """Say once that the steps have become very slow, and why that may be."""
        if not record.step:
            return
        slow = not self.is_slow and record.seconds > max(SLOWER * self.fastest, LEAST_SLOW)
        self.fastest = min(self.fastest, record.seconds)
        if slow and self.pipe.device.type == "cpu":
            self.is_slow = True
            threads = torch.get_num_threads()
            logger.warning(
                "step %d took %.0f s, far more than the steps before: other programs may need the same cores. With "
                "fewer CPU threads, of which there are %d, a run waits less: OMP_NUM_THREADS=1",
                record.step,
                record.seconds,
                threads,
            )


def drain(
    steps: Iterator[StepRecord],
    session: Session,
    on_step: Callable[[StepRecord], object],
    stop: threading.Event,
) -> None:
    """Run the loop to its end, or to the evaluation after the step in which `stop` was set; a second one ends at once.

    KeyboardInterrupt between two steps, and StopIteration from `on_step`, set it too.
    """
    try:
        for record in steps:
            try:
                session.remember(record)
                on_step(record)
            except (KeyboardInterrupt, StopIteration):
                if stop.is_set():
                    return
                stop.set()
    except KeyboardInterrupt:
        stop.set()


def conclude(session: Session, interrupted: bool) -> AlignResult:
    """Save what there is and say how the run ended."""
    done, planned, patience = session.steps, session.config.steps, session.config.evaluation.patience
    status = ""
    if done < planned:
        status = f"interrupted after {done} of {planned} steps"
        if not interrupted:
            followed = session.state.followed
            status = f"no better evaluation by {followed} for {patience} evaluations: ended after {done} steps"
    result = result_of(session, status, interrupted=interrupted and done < planned)
    if session.run is not None:
        write_down(session.run, result)
    return result


def result_of(session: Session, status: str, *, interrupted: bool) -> AlignResult:
    """What came of the run so far. The loop must have ended, so that the adapter on the pipeline is the kept one."""
    state, run, config = session.state, session.run, session.config
    looks = looks_in(session.history)
    before = session.history[0].evidence if session.history else None
    after = next((look for look in looks if look.step == state.kept_step), None)
    changes = changes_between(before, after)
    with autograd_on():  # in inference mode the copies would be of no use outside it
        adapter = Adapter.of(session.pipe, adapter_metadata(session, changes))
        adapter = adapter if run is None else replace(adapter, run_folder=run.path)
    return AlignResult(
        reward=str(session.reward),
        config=config,
        adapter=adapter,
        history=tuple(session.history),
        before=before,
        after=after,
        seconds=time.monotonic() - session.began,
        run_folder=None if run is None else run.path,
        adapter_path=None if run is None else run.adapter_path,
        interrupted=interrupted,
        stopped=status,
        changes=changes,
        kept_step=state.kept_step,
        chosen_from=len(looks) if config.evaluation.keep_best and after is not None else 0,
        followed=state.followed,
        trained_on=state.prompts.words,
        cuts=cuts_in((state.reward, *state.judges), (*state.prompts.train.prompts, *state.prompts.evidence.prompts)),
    )


def write_down(run: RunFolder, result: AlignResult) -> None:
    """Fill the run folder, the adapter first. Raises RunError."""
    try:
        result.adapter.save(run.adapter_path)
    except AdapterError as error:
        raise RunError(str(error)) from error
    if result.after is not None:
        run.evidence(result.after, "after")
    facts = {"kept_step": result.kept_step, "followed": result.followed, "chosen_from": result.chosen_from}
    facts |= {"trained_on": result.trained_on, "choice": result.choice}
    facts |= {} if result.after is None else {"evidence_of": result.after.what}
    run.finish(result.changes, result.stopped or "completed", facts, result.cuts)


def give_up(session: Session, error: BaseException) -> None:
    """After an error: save what was learned, put it on the error, and take the adapter off the pipeline.

    An error of writing leaves the adapter on, and it is written to another place where need be. An interrupt leaves it
    on too: it comes when the end is being saved, here or before, which may so be on no disk.
    """
    is_writing = isinstance(error, RunError) and session.steps > 0
    stays_on = session.steps > 0 and isinstance(error, RunError | KeyboardInterrupt)
    try:
        interrupted = isinstance(error, KeyboardInterrupt)
        how = f"failed: {str(error) or type(error).__name__}"
        if not session.steps:
            if session.run is not None and not isinstance(error, RunError):
                session.run.finish(status="interrupted before the first step" if interrupted else how)
            return
        how = "interrupted while it was saved" if interrupted else how
        result = vars(error)["result"] = result_of(session, how, interrupted=interrupted)
        if session.run is not None:
            try:
                write_down(session.run, result)
            except RunError:
                result = vars(error)["result"] = rescued(result)
        if is_writing:
            error.args = (f"{error}. {where_it_is(result)}",)
    except KeyboardInterrupt as again:
        stays_on = session.steps > 0
        vars(again)["result"] = vars(error).get("result")
        raise
    finally:
        if not stays_on:
            lora.detach(pipeline_parts.denoisers(session.pipe))


def rescued(result: AlignResult) -> AlignResult:
    """The result with its adapter on disk: where it was meant to be, or in the first other place that takes it."""
    wanted = result.adapter_path
    if wanted is None or wanted.is_file():
        return result
    for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        path = folder / f"{wanted.absolute().parent.name}-adapter-{secrets.token_hex(4)}.safetensors"
        try:
            result.adapter.save(path, format="diffusers")
        except (AlignError, OSError):
            continue
        logger.error("the adapter could not be written to %s; it is in %s", wanted, path)
        return replace(result, adapter_path=path)
    return replace(result, adapter_path=None)


def where_it_is(result: AlignResult) -> str:
    """Where the adapter of a run is that could not be written down."""
    held = "the pipeline still holds it, and so does the error, as error.result.adapter"
    if result.adapter_path is None:
        return f"The adapter of step {result.kept_step} is on no disk; in Python {held}"
    return f"The adapter of step {result.kept_step} is in {str(result.adapter_path)!r}; in Python {held}"


def adapter_metadata(session: Session, changes: Mapping[str, Change]) -> dict[str, str]:
    """What the adapter's header says of the run."""
    scores = {
        name: [float(f"{number:.5g}") for number in (before, after, error) if not math.isnan(number)]
        for name, (before, after, _, error) in changes.items()
    }
    others = "; ".join(map(str, lora.active_others(session.pipe)))
    trained_with = {"trained_with": others} if others else {}
    return trained_with | apply.describe(
        session.pipe,
        reward=str(session.reward),
        config=session.config.to_json(),
        step=session.state.kept_step,
        prompts=session.prompts.prompts,
        scores=scores,
    )
