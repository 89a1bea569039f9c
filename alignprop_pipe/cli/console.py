"""Everything the commands say, and the one table from an exception to advice and exit code.

`Output` knows where talk, records and results go; `Progress` is the live line of a run; `translated` turns errors
into a sentence and an exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by a
terminal that was closed (SIGHUP). Nothing that is printed here can steer the terminal: texts out of files, prompts and
names are written out by `escaping.visible`, and rich's markup is off.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import stat
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import AlignError, ConfigError, PromptError, RewardError
from alignprop_pipe.escaping import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from alignprop_pipe.prompts import Split
    from alignprop_pipe.runs.summary import RunWarning

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
USUAL_WIDTH = 80
"""Columns of a terminal; in a narrower one, tables go without the blanks at their edge."""
BESIDE, ROOM = 3, 12
"""Columns of a terminal between two columns of a table, and those that a column of texts has at least."""
BETWEEN_LINES = 10.0
"""Seconds without a line after which one says how far an evaluation is, where nothing is drawn over."""
PATIENCE_AFTER_SIGNAL = 5
"""Seconds for the current step to end after SIGTERM or SIGHUP; then the run is stopped within the step."""


class Output:
    """Where words go. Talk: stdout, or stderr next to `--json`; nothing of it with `--quiet`. Errors: stderr.

    `stderr` sends all talk there, for a command that writes data of its own to stdout.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, stderr: bool = False) -> None:
        self.quiet = quiet
        self.json = json
        self.console = _rich_console(stderr=json or stderr)

    @property
    def live(self) -> bool:
        """Whether lines may be drawn over: talk is on, and goes to a terminal."""
        return not self.quiet and self.console.is_terminal

    def say(self, text: str) -> None:
        """A line of talk."""
        if not self.quiet:
            self._line(text)

    def result(self, text: str) -> None:
        """A line that stays under `--quiet`."""
        self._line(text)

    def warn(self, warnings: "Sequence[RunWarning]", when: str = "") -> None:
        """A line for each warning, which stays under `--quiet`."""
        for warning in warnings:
            self._line(f"warning: {when}{warning.text}", style="bold yellow")

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """One JSON line on stdout, under `--json` only."""
        if self.json:
            typer.echo(json.dumps({"type": kind, **plain(values)}, allow_nan=False))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        numbers: bool | range = False,
        footers: Sequence[str] = (),
    ) -> None:
        """A table of talk; `numbers` sets these columns, or all but the first, flush right."""
        if not self.quiet:
            made: Any = table(title, columns, rows, numbers=numbers, footers=footers)
            made.show_edge = self.console.width >= USUAL_WIDTH
            _keep_numbers_whole(made, self.console)
            self.console.print(made)

    def _line(self, text: str, style: str | None = None) -> None:
        self.console.print(shown(text), style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def shown(text: str) -> str:
    """What is printed for `text`: nothing in it steers the terminal, and no line of it passes for one of ours."""
    return visible(text).replace("\n", "\n  ")


def complain(text: str) -> None:
    """A line on stderr."""
    typer.echo(shown(text), err=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: bool | range = False,
    footers: Sequence[str] = (),
) -> "RenderableType":
    """A table without vertical lines; texts are taken word for word."""
    from rich import box
    from rich.table import Table
    from rich.text import Text as Raw

    def text(words: str) -> Raw:
        return Raw(visible(words))

    right = numbers if isinstance(numbers, range) else range(1, len(columns) * numbers)
    made = Table(
        title=text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        show_footer=bool(footers),
    )
    for place, name in enumerate(columns):
        foot = text(footers[place] if footers else "")
        made.add_column(text(name), foot, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(text, row))
    return made


def _keep_numbers_whole(made: Any, console: "Console") -> None:
    """Where a table is too wide, texts are wrapped and numbers are not, as long as that leaves room for the texts."""
    right = [column for column in made.columns if column.justify == "right"]
    fixed = sum(max(console.measure(cell).maximum for cell in (c.header, *c.cells, c.footer)) for c in right)
    others = len(made.columns) - len(right)
    if fixed + BESIDE * (len(made.columns) - 1) + ROOM * others <= console.width:
        for column in right:
            column.no_wrap = True


def _rich_console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


def plain(value: Any) -> Any:
    """What JSON can hold: records as dicts without pictures, numbers that are not finite as None, paths as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "images"}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def counted(number: int, word: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """The line of a run: a bar that is drawn over on a terminal, else one plain line for each step.

    `on_step` takes every StepRecord of the run; step 0 is the evaluation of the held-out prompts before the training.
    """

    def __init__(self, output: Output, config: AlignConfig, split: "Split") -> None:
        from alignprop_pipe.runs.summary import Watch

        self.output = output
        self.steps = config.steps
        self.every = config.evaluation.eval_every
        self.pictures = len(split.evidence)
        self.of = "held-out" if split.held_out else "training prompts"
        self.held_out = ""
        drawn = counted(self.pictures, "held-out picture" if split.held_out else "picture")
        self._first = f"rendering {drawn}" + " of training prompts" * (not split.held_out)
        self.seconds: list[float] = []
        self.watch = Watch(config.loss)
        self._bar: Any = _bar(output.console) if output.live else None
        self._task: Any = None
        self._record = self._look = None
        self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None, words="")
        self.doing(self._first if self.pictures else "training")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def doing(self, text: str) -> None:
        """Say what is going on now."""
        if self._bar is not None:
            self._bar.update(self._task, description=one_line(text), refresh=True)
        else:
            self.output.say(text)

    def on_pictures(self, done: int, total: int) -> None:
        """So many pictures of an evaluation are drawn."""
        if self._bar is None:
            if time.monotonic() - self._said > BETWEEN_LINES and done < total:
                self._say(f"{done} of {counted(total, 'picture')} drawn")
        elif self._record is None:
            self._draw("baseline", done, total)
        else:
            self._draw(f"eval {done}/{total}, step", self._record.step, self.steps)

    def on_step(self, record: Any) -> None:
        """Show one StepRecord, and what its evaluation warns of where it did not before."""
        end_of_patience(None)  # the step ended in time
        fresh = self.watch.first_at(record)
        warned = {} if record.evidence is None else {"warnings": plain(self.watch.holding)}
        self.output.record("step", {**plain(record), **warned})
        if record.evidence is not None:
            self.held_out = held_out_text(record.evidence)
        if record.step:
            self.seconds.append(record.seconds)
        self._show(record)
        if fresh and record.step < self.steps and not self.output.quiet:  # after the last step the summary follows
            self.output.warn(fresh, f"step {record.step}: ")

    def _show(self, record: Any) -> None:
        self._record, self._look = record, record.evidence or self._look
        if self._bar is None:
            self._say(self._plain_line(record))
            return
        if record.evidence is not None:
            self.output.say(f"step {record.step}: {self.of} {self.held_out}")
        if record.skipped:
            self.output.say(f"step {record.step}: skipped, {record.skipped_because}")
        self._draw("step", record.step, self.steps)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self.output.say(text)

    def _draw(self, what: str, done: int, total: int) -> None:
        from alignprop_pipe.training.progress import fitted

        width = self.output.console.width
        named, words = fitted(what, f"{done}/{total}", self._record, self._look, width)
        if self._bar.tasks[0].total != total:
            self._bar.reset(self._task, total=total)
        self._bar.update(
            self._task, description=f"{named}{done}/{total}", completed=done, words=words.strip(), refresh=True
        )

    def _plain_line(self, record: Any) -> str:
        if record.step == 0:
            return f"before: {self.of} {self.held_out}"
        left = sum(self.seconds) / len(self.seconds) * (self.steps - record.step)
        words = [f"step {record.step}/{self.steps}", f"reward {_known(record.reward)}"]
        words += [f"loss {_known(record.loss)}"]
        words += [f"{self.of} {self.held_out}"] if record.evidence is not None else []
        words += [f"{record.seconds:.2f} s", f"{record.memory_mb:.0f} MB", f"ETA {duration(left)}"]
        return "  ".join(words) + (f"  SKIPPED: {record.skipped_because}" if record.skipped else "")


def held_out_text(evidence: Any) -> str:
    """`0.231, emoji_judge 0.55, diversity 0.30`; a judge's score or a diversity that is not known is left out."""
    scores = {name: evidence.judges[name] for name in evidence.main_judges} | {"diversity": evidence.diversity}
    known = [f"{name} {value:.3g}" for name, value in scores.items() if math.isfinite(value)]
    return ", ".join([_known(evidence.reward), *known])


def _known(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _bar(console: "Console") -> Any:
    from rich import progress
    from rich.table import Column

    def text(template: str) -> Any:
        # Where it is narrow, the bar alone gives way.
        return progress.TextColumn(template, markup=False, table_column=Column(no_wrap=True))

    times = progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True))
    columns = (text("{task.description}"), progress.BarColumn(bar_width=10), text("ETA"), times)
    return progress.Progress(*columns, text("{task.fields[words]}"), console=console)


def counting_bar() -> Any:
    """A bar on stderr that counts to its total and is wiped away at the end; where no terminal is, none is drawn."""
    from rich import progress

    console = _rich_console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
    )
    times = (progress.TextColumn("ETA"), progress.TimeRemainingColumn())
    return progress.Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def waiting(output: Output, text: str) -> Iterator[None]:
    """A spinner on a terminal, else a plain line, while something takes its time."""
    if output.live:
        from rich.text import Text

        with output.console.status(Text(one_line(text))):
            yield
    else:
        output.say(text)
        yield


# --- stopping --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C ends the run after the current step; a second one raises KeyboardInterrupt at once.

    Only where Python's own handler is in place, so that a notebook or a program with its own handler keeps it.
    """
    stop = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()
        complain("stopping after this step and saving everything; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP do what Ctrl-C does: the run ends after the current step and saves everything.

    What sent them will kill soon, so a step that takes longer than `PATIENCE_AFTER_SIGNAL` is broken off. A signal that
    is ignored, as SIGHUP is under nohup, stays ignored. Yields the signals that came.
    """
    came: list[int] = []
    alarm = getattr(signal, "SIGALRM", None)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number != alarm:
            came.append(number)
            end_of_patience(PATIENCE_AFTER_SIGNAL)
            if number != signal.SIGTERM:
                let_go_of_terminal()
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(on_ctrl_c):  # a shell starts background jobs with Ctrl-C ignored
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield came
    finally:
        end_of_patience(None)
        for number, handler in before.items():
            signal.signal(number, handler)


def let_go_of_terminal() -> None:
    """Talk to nobody from here on where the terminal is gone: writing to it would fail and end the saving."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for place in (1, 2):
            if stat.S_ISCHR(os.fstat(place).st_mode):
                os.dup2(nowhere, place)
        os.close(nowhere)


def end_of_patience(seconds: int | None) -> None:
    """Send SIGALRM after so many seconds; None takes that back. Windows has no such signal."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds or 0)


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Problems:
    """What is wrong with a command, a sentence each: all of it is told at once, before anything is loaded."""

    found: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Keep an error of what stands inside."""
        try:
            yield
        except AlignError as error:
            self.found.append(str(error))
        except typer.BadParameter as error:
            hint = error.param_hint if isinstance(error.param_hint, str) else ""
            self.found.append(f"{hint}: {error.message}" if hint else error.message)

    def tell(self) -> None:
        """Raises ConfigError with all of them, where there are any."""
        if self.found:
            raise ConfigError(*self.found)


MEMORY_ADVICE = (
    "out of memory: make fewer pictures at once (--batch-size 1, with a larger --gradient-accumulation-steps), keep "
    "--checkpointing all, make them smaller (--height, --width), or use --dtype bfloat16; 'alignprop train --dry-run' "
    "forecasts the memory"
)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return type(error).__name__ == "OutOfMemoryError" or any(word in text for word in words)


ADVICE: tuple[tuple[Callable[[BaseException], bool], int, Callable[[BaseException], str]], ...] = (
    (lambda e: isinstance(e, ConfigError | PromptError) or type(e) is RewardError, WRONG_USE, str),
    (lambda e: isinstance(e, AlignError), FAILED, str),
    (lambda e: isinstance(e, MemoryError) or _is_out_of_memory(e), FAILED, lambda _: MEMORY_ADVICE),
    (lambda e: isinstance(e, OSError), FAILED, str),
    (
        lambda _: True,
        FAILED,
        lambda e: f"unexpected {type(e).__name__}: {_first_line(e)}; run it again with --debug to see where",
    ),
)
"""The first row whose test holds: exit code and what is said."""


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the sentence for it."""
    return next((code, say(error)) for test, code, say in ADVICE if test(error))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


@contextlib.contextmanager
def translated(*, debug: bool = False) -> Iterator[None]:
    """Turn what escapes a command into a line on stderr and an exit code; the traceback only where asked for."""
    came: list[int] = []
    try:
        with signals_as_interrupt() as came:
            yield
    except typer.Exit as leaving:
        if leaving.exit_code == INTERRUPTED and came:
            raise typer.Exit(128 + came[0]) from None
        raise
    except typer.BadParameter as error:
        error.message = visible(error.message)
        raise
    except (typer.Abort, typer.TyperException, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        complain("interrupted")
        raise typer.Exit(128 + came[0] if came else INTERRUPTED) from None
    except Exception as error:
        if debug or os.environ.get("ALIGNPROP_DEBUG", "0") not in ("", "0"):
            complain(traceback.format_exc())
        code, text = verdict(error)
        several = isinstance(error, ConfigError) and len(error.args) > 1
        for one in error.args if several else [text]:
            complain(f"error: {one}")
        raise typer.Exit(code) from error


# --- other people's noise --------------------------------------------------------------------------------------------


def quiet_libraries(output: Output) -> None:
    """Let the libraries speak of errors only, and pass our own warnings on as notes on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if not output.live:
        disable_progress_bars()
    logging.getLogger("torch").setLevel(logging.ERROR)
    home = str(Path(__file__).parents[1])

    def note(message: Warning | str, _category: type, filename: str, *_: Any, **__: Any) -> None:
        if filename.startswith(home):
            complain(f"note: {message}")

    warnings.showwarning = note
    if output.quiet:
        warnings.simplefilter("ignore")
    ours = logging.getLogger("alignprop_pipe")
    ours.handlers = [_Notes(output)]
    ours.setLevel(logging.ERROR if output.quiet else logging.WARNING)
    ours.propagate = False


class _Notes(logging.Handler):
    """What the package logs, as notes on stderr; of a setting without effect, a record too."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "run_warning"):  # `Progress` says these
            complain(f"note: {record.getMessage()}")
        if setting := getattr(record, "setting", ""):
            self._output.record("note", {"setting": setting, "text": record.getMessage()})
