"""Prompts: a list, a file or a named set becomes a `PromptSet`, which is split and drawn from by seed alone.

Files are UTF-8, or UTF-16 with a byte order mark. `.txt`: one prompt a line; blank lines and lines that start with #
are left out. `.jsonl`: one object a line with the key "prompt". `.csv`, and `.tsv` with tabs: a first line of names,
one of them "prompt". All other columns are targets: they travel with their prompt to the reward. An empty cell is
None, as JSON's null is.
"""

import csv
import difflib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from alignprop_pipe.errors import PromptError
from alignprop_pipe.files import decoded
from alignprop_pipe.records import PromptBatch
from alignprop_pipe.seeds import generator_for
from alignprop_pipe.sources import exists, expanded

SETS_DIR = Path(__file__).parent / "prompt_sets"
FEWEST_TO_HOLD_OUT = 8
"""Different prompts that are enough to hold some out. Half of fewer would be three at most: a mean of three is known
to 4.3 standard errors only (Student's t, 95 %), and the training would lack a good part of what it is meant for."""
PROMPT = "prompt"
FORMATS = ".txt (one prompt a line), .jsonl, .csv or .tsv (with a column 'prompt')"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts and what is known about them: `targets` maps a column name to one value per prompt.

    `source` is the file or the named set that they were read from, as it was given; empty for a list.

    Raises PromptError for a prompt that is blank or no text, and for a column of another length.

    Examples:
        >>> from alignprop_pipe import PromptSet
        >>> prompts = PromptSet(("a fox", "two cats"), {"count": (1, 2)})
        >>> prompts.take([1]).targets
        {'count': [2]}
        >>> PromptSet.load("animals").source
        'animals'
    """

    prompts: tuple[str, ...]
    targets: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    source: str = field(default="", compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_prompts(self.prompts)
        for name, column in self.targets.items():
            if len(column) != len(self.prompts):
                raise PromptError(
                    f"target {name!r} has {len(column)} values for {len(self.prompts)} prompts; "
                    "one value per prompt is needed (None where nothing is known)"
                )
            check_whole((name, column), f"target {name!r}")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(cls, source: object) -> "PromptSet":
        """Read a list of prompts, a file (.txt, .jsonl, .csv, .tsv), or a named set (see `named_sets`).

        A list is taken word for word and gets no targets. A name of a set goes before a file of the same name:
        write "./emoji" for the file. Raises PromptError, which says what is wrong and where.
        """
        if isinstance(source, cls):
            loaded = source
        elif isinstance(source, list | tuple):
            _check_prompts(source)
            loaded = cls(tuple(source))
        elif isinstance(source, str) and source in named_sets():
            loaded = named_sets()[source]
        elif isinstance(source, str | os.PathLike):
            loaded = replace(_from_file(os.fspath(source)), source=os.fspath(source))
        else:
            raise PromptError(
                f"prompts are given as {type(source).__name__}; a list of texts is needed, or a file "
                f"{FORMATS}, or a named set: {', '.join(named_sets())}"
            )
        if not loaded.prompts:
            raise PromptError(
                "there are no prompts; at least one is needed: give a list like ['a dog'], or the set 'animals'"
            )
        return loaded

    def split(self, held_out: int, seed: int) -> "Split":
        """Divide into training and held-out prompts, by seed alone.

        Held out are at most half of the different prompts, each once; no text is on both sides, also where a
        prompt is listed twice. More `held_out` keeps the first ones in their places, so they keep their noise. With
        `held_out=0` there is no evidence. With fewer than `FEWEST_TO_HOLD_OUT` different prompts none is kept out of
        the training: the evidence is of the training prompts, each drawn as often as it takes for `held_out` pictures.
        """
        if held_out < 0:
            raise PromptError(f"held_out = {held_out}: 0 or more prompts can be held out")
        places = list({prompt: place for place, prompt in reversed(list(enumerate(self.prompts)))}.values())[::-1]
        order = torch.randperm(len(places), generator=generator_for("split", seed)).tolist()
        if len(places) < FEWEST_TO_HOLD_OUT:
            return Split(
                self, self._only([places[order[i % len(order)]] for i in range(held_out if order else 0)]), False
            )
        held = [places[i] for i in order[: min(held_out, len(places) // 2)]]
        texts = {self.prompts[i] for i in held}
        train = self._only([i for i in range(len(self)) if self.prompts[i] not in texts])
        return Split(train, self._only(held), True)

    def batch(self, seed: int, step: int, size: int) -> PromptBatch:
        """Draw the prompts of one batch; `step` counts batches from 0.

        No prompt comes twice in a batch that the set can fill, and after any number of batches no prompt was seen
        more than once more than another: one permutation is read round and round until its end meets a batch's
        end, then the next is drawn.
        """
        if size < 1 or step < 0 or not self.prompts:
            raise PromptError(f"a batch of {size} prompts at step {step} cannot be drawn from {len(self)} prompts")
        steps_a_round = len(self) // math.gcd(len(self), size)
        turn, place = divmod(step, steps_a_round)
        order = torch.randperm(len(self), generator=generator_for("prompts", seed, turn)).tolist()
        return self.take([order[(place * size + i) % len(self)] for i in range(size)])

    def take(self, places: Sequence[int]) -> PromptBatch:
        """The prompts at these places, with their targets."""
        columns = {name: [column[i] for i in places] for name, column in self.targets.items()}
        return PromptBatch([self.prompts[i] for i in places], columns)

    def _only(self, places: Sequence[int]) -> "PromptSet":
        taken = self.take(places)
        return PromptSet(tuple(taken.prompts), {name: tuple(column) for name, column in taken.targets.items()})


class Split(NamedTuple):
    """Prompts to train on, and prompts for the evidence.

    `held_out` is False where these are the training prompts themselves, since there are too few to keep any out.
    """

    train: PromptSet
    evidence: PromptSet
    held_out: bool

    @property
    def words(self) -> str:
        """`training on 29 prompts, 16 held out`, or what else there is to know."""
        count, looked_at, listed = len(set(self.train.prompts)), len(self.evidence), len(self.train)
        trained = f"training on {count} prompt{'s' * (count != 1)}"
        trained += f" ({listed} with repetitions)" if listed > count else ""
        if not looked_at:
            return f"{trained}, no evidence is taken"
        if self.held_out:
            return f"{trained}, {looked_at} held out"
        pictures = f"{looked_at} picture{'s' * (looked_at != 1)}"
        return f"{trained}, too few to hold any out: the evidence is {pictures} of the same prompts with fresh noise"


@cache
def named_sets() -> Mapping[str, PromptSet]:
    """The prompt sets that ship inside, by name: every file in `prompt_sets/`."""
    files = [path for path in sorted(SETS_DIR.glob("*.*")) if path.suffix in READERS]
    return MappingProxyType({path.stem: replace(_read(path), source=path.stem) for path in files})


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a prompt file: its number, for error messages, and its columns."""

    line: int
    columns: Mapping[str, Any]


def _check_prompts(prompts: Sequence[object]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        _check_prompt(prompt, f"prompt {number}")


def _check_prompt(prompt: object, where: str) -> None:
    if not isinstance(prompt, str):
        raise PromptError(f"{where} is {prompt!r}, which is {type(prompt).__name__}; text is needed")
    if not prompt.strip():
        raise PromptError(f"{where} is empty; write what the picture should show, or leave it out")
    check_whole(prompt, where)


def check_whole(value: object, where: str) -> None:
    """Raises PromptError for half a character in a text, or in one inside a list or a table: no tokenizer takes it."""
    if isinstance(value, str):
        half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
        if half is not None:
            raise PromptError(f"{where} holds half a character ({half!r} in {value!r}); write the whole one")
    elif isinstance(value, Mapping):
        check_whole([*value, *value.values()], where)
    elif isinstance(value, list | tuple):
        for one in value:
            check_whole(one, where)


def _from_file(source: str) -> PromptSet:
    path = expanded(source)
    if path.suffix.lower() not in READERS:
        raise PromptError(_not_a_source(source))
    return _read(path)


def _read(path: Path) -> PromptSet:
    try:
        text = decoded(path.read_bytes())
    except FileNotFoundError as error:
        close = difflib.get_close_matches(path.stem.lower(), named_sets(), n=1)
        hint = f"; did you mean the named set {close[0]!r}?" if close else "; check the path"
        raise PromptError(f"prompt file {str(path)!r} does not exist in {str(Path.cwd())!r}{hint}") from error
    except OSError as error:
        raise PromptError(f"prompt file {str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PromptError(f"prompt file {str(path)!r} cannot be read: {error}") from error
    return _from_rows(list(READERS[path.suffix.lower()](text, str(path))), str(path))


def _not_a_source(source: str) -> str:
    """What to say of a text that is neither a named set nor a prompt file."""
    if source and exists(source):
        return f"{source!r} is not a prompt file by its name; a file {FORMATS} is needed"
    close = difflib.get_close_matches(source.lower(), named_sets(), n=1)
    source = source if len(source) < 100 else f"{source[:99]}…"
    hint = f"did you mean {close[0]!r}? Named" if close else "named"
    return (
        f"prompts {source!r} are no named set and no prompt file; {hint} sets: {', '.join(named_sets())}; "
        f"files: {FORMATS}. Put a single prompt into a list (in Python) or a .txt file"
    )


def _from_rows(rows: Sequence[Row], name: str) -> PromptSet:
    if not rows:
        raise PromptError(f"prompt file {name!r} holds no prompts; at least one is needed")
    rows = [Row(row.line, _with_prompt(row.columns, f"{name}, line {row.line}")) for row in rows]
    first = rows[0]
    for row in rows:
        where = f"{name}, line {row.line}"
        check_whole(row.columns, where)
        _check_prompt("" if row.columns[PROMPT] is None else row.columns[PROMPT], f"{where}: the prompt")
        odd = sorted(row.columns.keys() ^ first.columns.keys())
        if odd:
            lacking, having = (row, first) if odd[0] in first.columns else (first, row)
            raise PromptError(
                f"{name}, line {lacking.line} has no {odd[0]!r}, which line {having.line} has; "
                "give every line the same columns, with null where nothing is known"
            )
    names = [column for column in first.columns if column != PROMPT]
    targets = {column: tuple(row.columns[column] for row in rows) for column in names}
    return PromptSet(tuple(row.columns[PROMPT] for row in rows), targets)


def _with_prompt(columns: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The columns with that of the prompts called `prompt`, however its capitals were written."""
    named = [name for name in columns if name.strip().lower() == PROMPT]
    if PROMPT in columns:
        return columns
    if len(named) == 1:
        return {PROMPT if name == named[0] else name: value for name, value in columns.items()}
    found = ", ".join(map(repr, columns)) or "nothing"
    wrong = f"{' and '.join(map(repr, named))} may all be meant" if named else f"there is no 'prompt', only {found}"
    raise PromptError(f"{where}: {wrong}; name the column of prompts 'prompt'")


def _txt_rows(text: str, name: str) -> Iterator[Row]:
    del name
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield Row(number, {PROMPT: prompt})


def _jsonl_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{name}, line {number} is not JSON: {error}; write one object a line") from error
        if not isinstance(columns, dict):
            raise PromptError(f'{name}, line {number} is no object; write {{"prompt": "a dog"}} on every line')
        yield Row(number, columns)


def _csv_rows(text: str, name: str, delimiter: str = ",") -> Iterator[Row]:
    # strict: a quote that is never closed would otherwise swallow the rest of the file without a word.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True, delimiter=delimiter)
    between = "commas" if delimiter == "," else "tabs"
    header: list[str] = []
    try:
        for cells in ([cell.strip() for cell in line] for line in reader):
            if not any(cells):
                continue
            if not header:
                header = _csv_header(cells, name, between)
            elif len(cells) != len(header):
                raise PromptError(
                    f"{name}, line {reader.line_num} has {len(cells)} cells for {len(header)} columns; "
                    f"put a text that contains {between} in double quotes"
                )
            else:
                yield Row(reader.line_num, dict(zip(header, (cell or None for cell in cells), strict=True)))
    except csv.Error as error:
        raise PromptError(f"{name}, line {reader.line_num} is not CSV: {error}; check the double quotes") from error


def _csv_header(cells: list[str], name: str, between: str) -> list[str]:
    if PROMPT not in map(str.lower, cells):
        raise PromptError(
            f"{name}: there is no column 'prompt' in the first line, only {', '.join(map(repr, cells))}; the first "
            f"line names the columns, with {between} between them"
        )
    if "" in cells or len(set(cells)) < len(cells):
        raise PromptError(f"{name}: a column has no name, or two have the same, in {cells}; give each its own")
    return cells


READERS: Mapping[str, Callable[[str, str], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".jsonl": _jsonl_rows,
    ".txt": _txt_rows,
}
