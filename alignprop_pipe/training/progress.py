"""The line that `align` shows while it runs, drawn by tqdm in a terminal, a log or a notebook; previews in a notebook.

It is an edge: it is told of the pictures of an evaluation and of every record, and decides nothing.
"""

import logging
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import auto
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from alignprop_pipe.errors import ConfigError
from alignprop_pipe.escaping import one_line
from alignprop_pipe.images import enlarged, make_grid, to_pil
from alignprop_pipe.records import Evidence, StepRecord

logger = logging.getLogger(__name__)

PREVIEWS = "previews"
"""`progress` that shows the newest pictures too."""

BETWEEN_LINES = 10.0
"""Seconds from line to line where nothing can be drawn over, as in a log file."""
LEAST_BAR, TIMES = 3, len("ETA 00:00")
"""Columns that are left for the bar, and for the time that is left."""


@runtime_checkable
class Display(Protocol):
    """What shows a run."""

    def on_pictures(self, done: int, total: int) -> object:
        """So many pictures of an evaluation are drawn; 0 when it begins."""

    def on_step(self, record: StepRecord) -> object:
        """A step has been taken; step 0 is the evaluation before the training."""


class Bar:
    """One line: over the pictures of the evaluation before the training, then over the steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.record: StepRecord | None = None
        self.look: Evidence | None = None
        self._bar: Any = None
        self._drawn_over = in_notebook() or sys.stderr.isatty()

    def on_pictures(self, done: int, total: int) -> None:
        if self.record is None:
            self._show("baseline", total, done)
        else:  # the steps stand still
            self._show(f"eval {done}/{total}, step", self.steps, self.record.step)

    def on_step(self, record: StepRecord) -> None:
        self.record, self.look = record, record.evidence or self.look
        self._show("step", self.steps, record.step)

    def say(self, text: str) -> None:
        """A line above."""
        auto.tqdm.write(one_line(text), file=sys.stderr)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def _show(self, what: str, total: int, done: int) -> None:
        width = columns()
        named, words = fitted(what, f"{done}/{total}", self.record, self.look, width)
        words = words.replace("{", "{{").replace("}", "}}")
        form = f"{named}{{n_fmt}}/{{total_fmt}} {{bar}} ETA {{remaining}}{words}"
        if self._bar is None:
            between = 0 if self._drawn_over else BETWEEN_LINES
            self._bar = auto.tqdm(total=total, ncols=width, bar_format=form, mininterval=between, miniters=1)
        self._bar.bar_format = form
        self._bar.ncols = self._bar.ncols if in_notebook() else width
        if (self._bar.total, self._bar.n > done) != (total, False):
            self._bar.reset(total=total)
        if not self._bar.update(done - self._bar.n) and self._drawn_over:
            self._bar.refresh()


class Previews:
    """The newest pictures of the training, in one place of a notebook."""

    def __init__(self) -> None:
        self._place: Any = None
        if not in_notebook():
            logger.warning("previews are shown in notebooks; elsewhere on_step gets the pictures, as record.images")

    def on_pictures(self, done: int, total: int) -> None:
        """They are of the evaluations, and shown in the result."""

    def on_step(self, record: StepRecord) -> None:
        if record.images is None or not in_notebook():
            return
        from IPython.display import display  # pyright: ignore[reportMissingImports]  # there is one in a notebook

        sheet = make_grid([enlarged(to_pil(image)) for image in record.images])
        if self._place is None:
            self._place = display(sheet, display_id=True)
        else:
            self._place.update(sheet)


class Displays:
    """All that show a run, or none."""

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def on_pictures(self, done: int, total: int) -> None:
        for display in self._displays:
            display.on_pictures(done, total)

    def on_step(self, record: StepRecord) -> None:
        for display in self._displays:
            display.on_step(record)

    def say(self, text: str) -> None:
        """A line for a person, which a display of another kind does not get."""
        for display in self._displays:
            if isinstance(display, Bar):
                display.say(text)


@contextmanager
def shown(pipe: DiffusionPipeline, steps: int, progress: bool | str | Display) -> Iterator[Displays]:
    """What shows a run that takes place inside; what is logged meanwhile goes above the bar."""
    if isinstance(progress, str) and progress != PREVIEWS:
        raise ConfigError(f"progress={progress!r}: True, False, {PREVIEWS!r} or an object with on_step is needed")
    others = [Previews()] if progress == PREVIEWS else []
    if not isinstance(progress, bool | str):
        yield Displays(progress, *others)
    elif not progress or switched_off(pipe):
        yield Displays(*others)
    else:
        bar = Bar(steps)
        with logs_above():
            try:
                yield Displays(bar, *others)
            finally:
                bar.close()


def fitted(what: str, count: str, record: StepRecord | None, look: Evidence | None, width: int) -> tuple[str, str]:
    """What stands before the count, and the numbers behind the time that is left.

    What counts, which is the count, the time, the reward, the newest evaluation and the memory, fits into 60 columns;
    the judges are there where they fit too. `what` is going on is told where there is room.
    """
    reward = [] if record is None or record.step == 0 else [("reward", record.reward)]
    held_out = [] if look is None else [("held-out" if look.held_out else "fresh noise", look.reward)]
    judges = [] if look is None else [(one_line(name), look.judges[name]) for name in look.main_judges]
    memory = "" if record is None else size(record.memory_mb)
    named = words = ""
    for digits, blank, scores, named in (
        (4, "  ", [*reward, *held_out, *judges], what),
        (4, "  ", [*reward, *held_out, *judges[:1]], what),
        (4, "  ", [*reward, *held_out], what),
        (3, " ", [*reward, *held_out], what),
        (3, " ", [*reward, *held_out], ""),
        (3, " ", [*reward, *(("look", value) for _, value in held_out)], ""),
    ):
        numbers = [f"{name} {known(value, digits)}" for name, value in scores]
        words = "".join(f"{blank}{word}" for word in (*numbers, memory) if word)
        if len(f"{named} {count}  {words}") + LEAST_BAR + TIMES <= width:
            break
    return named and f"{named} ", words


def known(value: float, digits: int = 4) -> str:
    """A score, or that it is none."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not finite"


def size(megabytes: float) -> str:
    """`812 MB`, `12.3 GB`."""
    return f"{megabytes:.0f} MB" if megabytes < 9999.5 else f"{megabytes / 1024:.1f} GB"


def columns() -> int:
    """Of the terminal; the last one stays free, since some of them break the line there."""
    return shutil.get_terminal_size().columns - 1


def in_notebook() -> bool:
    """Whether tqdm draws with a notebook's own elements."""
    return auto.tqdm.__mro__[1].__module__ == "tqdm.notebook"


def switched_off(pipe: DiffusionPipeline) -> bool:
    """Whether somebody wants no bars: of this pipeline, or of a library that has its own switch."""
    own = vars(pipe).get("_progress_bar_config") or {}
    libraries = (diffusers_logging, transformers_logging)
    every = all(library.is_progress_bar_enabled() for library in libraries)
    return bool(own.get("disable")) or are_progress_bars_disabled() or not every


def logs_above() -> Any:
    """Lines that go to the terminal by `logging` are put above a bar inside."""
    ours, root = logging.getLogger("alignprop_pipe"), logging.getLogger()
    if not ours.hasHandlers():
        return logging_redirect_tqdm([ours])
    talking = [one for one in (ours, root) if any(map(_is_console, one.handlers))]
    return logging_redirect_tqdm(talking) if talking else nullcontext()


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
