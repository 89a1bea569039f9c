"""The commands `score`, `rewards` and `rewards check`: pictures to scores, and what each reward is and costs."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.cells import cell_len, set_cell_size

from alignprop_pipe.cli import console
from alignprop_pipe.cli.opening import find_device, import_rewards, open_reward
from alignprop_pipe.cli.options import CheckRequest, RewardsRequest, ScoreRequest, options_from
from alignprop_pipe.escaping import one_line
from alignprop_pipe.files import write_whole
from alignprop_pipe.sources import expanded, is_folder

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.rewards.entries import RewardEntry
    from alignprop_pipe.scoring.picture_files import Found, Skipped
    from alignprop_pipe.scoring.score import Scored, Task, Trial

SCORE_EXAMPLES = """[bold]Examples[/]

alignprop score samples --reward clip               [dim]# prompts: from the files that 'alignprop sample' wrote[/]

alignprop score *.jpg --reward "hpsv2.1 + 0.1*jpeg" --prompt "a fox in the snow" --csv scores.csv

alignprop score samples --reward emoji_judge --prompts emoji

alignprop score pictures --reward warmth --import my_rewards.py --json"""

CHECK_EXAMPLES = """[bold]Examples[/]

alignprop rewards check "clip + 0.1*jpeg"

alignprop rewards check my_reward.py:score --size 1024 --batch-size 4"""

STDOUT = "-"
DEVIATION = "standard deviation"
EDGES, GAP = 2, 3
"""Blanks at the edges of a table, and between two of its columns."""
NARROWEST = 24
"""Characters of a path, and of a prompt, that a table shows at least where it shows any of them and more are there."""


# --- score -----------------------------------------------------------------------------------------------------------


@options_from(ScoreRequest)
def score(request: ScoreRequest) -> None:
    """Score picture files by a reward: the best first, with mean and standard deviation.

    The prompt of a picture is read from its file where none is given.
    Pictures are turned as their EXIF says, transparent ones are laid over white, and of animations
    the first frame is taken. A damaged file is named and left out; the exit code is then 1.
    """
    output = console.Output(quiet=request.quiet, json=request.json, stderr=request.csv == STDOUT)
    problems, heads, reward = console.Problems(), [], None
    with problems.noted():
        device = find_device(request.device)
    with problems.noted():
        _check(request)
    with console.waiting(output, f"loading reward {request.reward or ''}"):
        with problems.noted():
            reward = open_reward(request.reward, request, output) if request.reward else None
        from alignprop_pipe.prompts import PromptSet
        from alignprop_pipe.rewards.networks.network import doubt_about
        from alignprop_pipe.scoring.picture_files import Found, find_pictures

        with problems.noted():
            heads = find_pictures(request.images)
        with problems.noted():
            PromptSet.load(request.prompts or [request.prompt or "any"])
    problems.tell()
    reward = cast("Reward", reward)
    found = [head for head in heads if isinstance(head, Found)]
    if doubt := doubt_about(reward, [picture.size for picture in found]):
        console.complain(f"warning: {doubt}")
    tasks = _tasks(found, reward, request)
    outcome = Outcome(skipped=[head for head in heads if not isinstance(head, Found)])
    for one in outcome.skipped:
        _say_skipped(one, output)
    with _Bar(output, len(tasks)) as bar:
        _score_all(outcome, reward, tasks, device, request.batch_size, bar, output)
    outcome.scored.sort(key=lambda one: -one.score)
    _tell(outcome, reward, request, output)
    if outcome.interrupted:
        scored = len(outcome.scored)
        console.complain(f"interrupted after {scored} of {console.counted(len(tasks), 'picture')}")
        raise typer.Exit(console.INTERRUPTED)
    if outcome.failed:
        raise typer.Exit(console.FAILED)


@dataclass(slots=True)
class Outcome:
    """What became of the files so far."""

    skipped: "list[Skipped]"
    scored: "list[Scored]" = field(default_factory=list)
    interrupted: bool = False

    @property
    def failed(self) -> int:
        return sum(one.failed for one in self.skipped)


def _score_all(
    outcome: Outcome,
    reward: "Reward",
    tasks: "Sequence[Task]",
    device: Any,
    batch_size: int,
    bar: "_Bar",
    output: console.Output,
) -> None:
    """Fill `outcome`; Ctrl-C ends it early, and what is scored by then is kept."""
    from alignprop_pipe.scoring.score import Scored, score_files

    try:
        for result in score_files(reward, tasks, device=device, batch_size=batch_size):
            bar.advance()
            if isinstance(result, Scored):
                outcome.scored.append(result)
            else:
                outcome.skipped.append(result)
                _say_skipped(result, output)
    except KeyboardInterrupt:
        outcome.interrupted = True


def _check(request: ScoreRequest) -> None:
    """Raises typer.BadParameter for flags that lack or do not go together."""
    wrong = typer.BadParameter
    if not request.reward:
        raise wrong(
            "what should the pictures be scored by? For example --reward hpsv2.1 (list: alignprop rewards)",
            param_hint="--reward",
        )
    if request.prompt is not None and request.prompts is not None:
        raise wrong("give --prompts or --prompt, not both", param_hint="--prompt")
    if request.csv == STDOUT and request.json:
        raise wrong("CSV and JSON cannot both go to stdout: give --csv a file", param_hint="--csv")
    if request.csv and request.csv != STDOUT:
        path = expanded(request.csv)
        if is_folder(path) or not is_folder(path.parent):
            raise wrong(f"{request.csv!r} cannot be a file: its folder has to be there", param_hint="--csv")


def _tasks(found: "Sequence[Found]", reward: "Reward", request: ScoreRequest) -> "list[Task]":
    from alignprop_pipe.prompts import PromptSet
    from alignprop_pipe.scoring.score import Task, assign, assign_own

    if request.prompt is not None:
        return [Task(picture.path, request.prompt) for picture in found]
    if request.prompts is not None:
        return assign(found, PromptSet.load(request.prompts))
    return assign_own(found, reward)


class _Bar:
    """A progress bar on stderr, where that is a terminal, and nothing otherwise."""

    def __init__(self, output: console.Output, total: int) -> None:
        self._bar = console.counting_bar() if total and not output.quiet else None
        self._total, self._task = total, None

    def __enter__(self) -> "_Bar":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("scoring", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)


def _say_skipped(one: "Skipped", output: console.Output) -> None:
    if one.failed:
        console.complain(f"skipped: {_shown(one.path)}: {one.reason}")
    else:
        output.say(f"left out: {_shown(one.path)}: {one.reason}")


# --- what is said of scores ------------------------------------------------------------------------------------------


def _tell(outcome: Outcome, reward: "Reward", request: ScoreRequest, output: console.Output) -> None:
    """The table, the files that were asked for, and the line that stays under --quiet."""
    from alignprop_pipe.rewards.networks.network import cuts_in
    from alignprop_pipe.runs.summary import cut_warnings
    from alignprop_pipe.scoring.score import mean_and_deviation

    scored, failed = outcome.scored, outcome.failed
    columns = _columns(scored)
    spreads = {name: mean_and_deviation(value(one) for one in scored) for name, value in columns.items()}
    for one in scored[: request.top]:
        about = {"file": _utf8(one.path), "prompt": one.prompt, "score": one.score, "parts": one.parts}
        output.record("score", about)
    if scored:
        _say_title(scored, reward, request, output)
        _table(scored, columns, spreads, request, output)
    if request.csv:
        _write_csv(scored, columns, request.csv)
    mean, deviation = spreads["score"]
    facts = {name: {"mean": mean, "deviation": deviation} for name, (mean, deviation) in spreads.items()}
    warnings = list(cut_warnings(cuts_in([reward], [one.prompt for one in scored])))
    output.warn(warnings)
    told = {"pictures": len(scored), "skipped": failed, "columns": facts, "warnings": warnings}
    output.record("summary", {"reward": str(reward), **told})
    words = [f"{console.counted(len(scored), 'picture')} scored"] + [f"{failed} skipped"] * bool(failed)
    if scored:
        words += [f"mean {mean:.4g}"] + [f"standard deviation {deviation:.2g}"] * math.isfinite(deviation)
    output.result(", ".join(words))


def _columns(scored: "Sequence[Scored]") -> "dict[str, Callable[[Scored], float]]":
    """Every column of numbers: the score, then each part in the order in which it came; NaN where one lacks it."""
    parts = dict.fromkeys(name for one in scored for name in one.parts)

    def part(name: str) -> "Callable[[Scored], float]":
        return lambda one: one.parts.get(name, math.nan)

    return {"score": lambda one: one.score, **{name if name != "score" else "part_score": part(name) for name in parts}}


def _table(
    scored: "Sequence[Scored]",
    columns: "dict[str, Callable[[Scored], float]]",
    spreads: dict[str, tuple[float, float]],
    request: ScoreRequest,
    output: console.Output,
) -> None:
    """A line a picture: the path, the score, and of the parts and prompts what fits.

    Parts that repeat the score are left out, and so is the prompt where it is the same for all.
    """
    score_of, best = columns["score"], scored[: request.top]
    parts = [name for name in columns if name != "score" and any(columns[name](o) != score_of(o) for o in scored)]
    differ = len({one.prompt for one in scored}) > 1
    texts = {
        name: [name, *(_number(columns[name](one)) for one in best), *map(_number, spreads[name])]
        for name in ("score", *parts)
    }
    paths = [_shown(one.path) for one in best]
    prompts = [one_line(one.prompt) for one in best]
    widths = [max(map(len, column)) for column in texts.values()]
    for_path, count, for_prompt = _room(
        output.console.width,
        max(map(cell_len, (*paths, DEVIATION))),
        max(cell_len(f"…/{Path(path).name}") for path in paths),
        widths,
        max(map(cell_len, prompts)) if differ else 0,
    )
    shown = ["score", *parts][:count]
    rows = [
        [_end_of(path, for_path), *(texts[name][place] for name in shown), _start_of(prompt, for_prompt)]
        for place, (path, prompt) in enumerate(zip(paths, prompts, strict=True), start=1)
    ]
    foot = [f"mean\n{DEVIATION}", *("\n".join(texts[name][-2:]) for name in shown), ""]
    many = len(shown) + 1 + (for_prompt > 0)
    names = ["file", *shown, "prompt"][:many]
    cut = [row[:many] for row in rows]
    output.table("", names, cut, numbers=range(1, len(shown) + 1), footers=foot[:many])
    if hidden := parts[count - 1 :] + ["prompt"] * (differ and not for_prompt):
        _say_wrapped(f"no room for {', '.join(hidden)}: see --csv or --json", output)


def _room(width: int, path: int, name: int, numbers: "Sequence[int]", prompt: int) -> tuple[int, int, int]:
    """The width of paths, how many columns of numbers stand next to them, the width of prompts, which is 0 for none.

    `path`, `name` (of the file alone), `numbers` and `prompt` are the widths that they would like to have.
    """
    least, left, count = min(path, max(name, NARROWEST)), width - EDGES - GAP - numbers[0], 1
    for number in numbers[1:]:
        if left - GAP - number < least:
            break
        left, count = left - GAP - number, count + 1
    wanted = min(prompt, NARROWEST)
    if not prompt or left - GAP - wanted < least:
        return max(1, min(path, left)), count, 0
    path = min(path, left - GAP - wanted)
    return path, count, left - GAP - path


def _end_of(path: str, most: int) -> str:
    """A path without its first folders, and where its name alone is too long, without the start of that."""
    if cell_len(path) <= most:
        return path
    folders = Path(path).parts
    for place in range(1, len(folders)):
        if cell_len(end := str(Path("…", *folders[place:]))) <= most:
            return end
    end = folders[-1]
    while end and cell_len(end) >= most:
        end = end[1:]
    return f"…{end}"


def _start_of(text: str, most: int) -> str:
    return text if cell_len(text) <= most else f"{set_cell_size(text, max(0, most - 1)).rstrip()}…"


def _say_title(scored: "Sequence[Scored]", reward: "Reward", request: ScoreRequest, output: console.Output) -> None:
    title = (
        f"{reward}, best first"
        if len(scored) <= (request.top or len(scored))
        else (f"{reward}, the best {request.top} of {len(scored)}")
    )
    if len({one.prompt for one in scored}) == 1 and scored[0].prompt:
        title += f"; prompt: {one_line(scored[0].prompt)}"
    _say_wrapped(title, output)


def _say_wrapped(text: str, output: console.Output) -> None:
    for line in textwrap.wrap(text, output.console.width, break_on_hyphens=False):
        output.say(line)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def _shown(path: Path) -> str:
    """A path as text that any terminal takes, on one line: names of files need not be UTF-8."""
    return _utf8(path).replace("\n", "\\n")


def _utf8(path: Path) -> str:
    return str(path).encode("utf-8", "replace").decode()


def _write_csv(scored: "Sequence[Scored]", columns: "dict[str, Callable[[Scored], float]]", place: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "prompt", *columns])
    for one in scored:
        numbers = (value(one) for value in columns.values())
        writer.writerow([_utf8(one.path), one.prompt, *("" if math.isnan(number) else number for number in numbers)])
    if place == STDOUT:
        typer.echo(text.getvalue(), nl=False)
    else:
        write_whole(expanded(place), text.getvalue())


# --- rewards ---------------------------------------------------------------------------------------------------------

rewards = typer.Typer(rich_markup_mode="rich")


@rewards.callback(invoke_without_command=True)
@options_from(RewardsRequest)
def listed(request: RewardsRequest) -> None:
    """List the rewards that --reward takes by name; `rewards check EXPR` tries one."""
    if request.subcommand is not None:
        return
    from alignprop_pipe.rewards.registry import REGISTRY, register_installed

    register_installed()

    import_rewards(request.imports)
    output = console.Output(quiet=request.json, json=request.json)
    for entry in REGISTRY.values():
        output.record("entry", _entry_record(entry))
    titles = ("name", "what it measures, and its range", "default weights, their licence", "here")
    output.table("", titles, [_entry_row(entry) for entry in REGISTRY.values()])
    output.say("here: whether the weights are on this machine. memory: what they fill there, in float32")
    output.say("add, scale and negate them: 'clip + 0.1*jpeg'; or your own: file.py:function, or --import FILE")


def _entry_record(entry: "RewardEntry") -> dict[str, Any]:
    return {
        "name": entry.name,
        "summary": entry.summary,
        "range": entry.range_text,
        "licence": entry.licence,
        "weights": [{"repository": source, "file": file} for source, file in entry.weights],
        "bundled": entry.bundled,
        "size_mb": entry.size_mb,
        "memory_mb": entry.memory_mb,
        "here": entry.here,
        "judge": entry.judge,
    }


def _entry_row(entry: "RewardEntry") -> list[str]:
    sources = ", ".join(dict.fromkeys(source for source, _ in entry.weights))
    weights = f"bundled: {entry.bundled}" if entry.bundled else sources
    sizes = [f"{_size(entry.size_mb)} to download"] * (entry.size_mb > 0)
    sizes += [f"{_size(entry.memory_mb)} of memory"] * (entry.memory_mb > 0)
    about = "\n".join(text for text in (weights, ", ".join(sizes), entry.licence) if text)
    measures = entry.summary + (f"\nrange: {entry.range_text}" if entry.range_text else "")
    return [entry.name, measures, about, {True: "yes", False: "no", None: "-"}[entry.here]]


def _size(mb: float) -> str:
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB" if mb >= 10 else f"{mb:.1f} MB"


# --- rewards check ---------------------------------------------------------------------------------------------------


@rewards.command(epilog=CHECK_EXAMPLES)
@options_from(CheckRequest)
def check(request: CheckRequest) -> None:
    """Try a reward on one random batch, as training does before it starts: score, gradient, time, memory.

    A reward that cannot train is refused, in words that say what and where; the command then ends with exit code 1.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    device = find_device(request.device)
    with console.waiting(output, f"trying {request.reward} on {device}"):
        reward = open_reward(request.reward, request, output)
        from alignprop_pipe.rewards.networks.network import cuts_in
        from alignprop_pipe.runs.summary import cut_warnings
        from alignprop_pipe.scoring.score import on_trial, random_batch, try_reward

        images, batch = random_batch(request.batch_size, request.size, request.prompt, device)
        trials = [try_reward(one, images, batch) for one in on_trial(reward)]
    output.warn(list(cut_warnings(cuts_in([reward], batch.prompts))))
    for trial in trials:
        output.record("check", {**console.plain(trial), "ok": not trial.refusal})
    titles = ("reward", "score", "gradient", "seconds", "weights MB", "batch MB", "")
    title = f"{console.counted(request.batch_size, 'random picture')} of {request.size}x{request.size} on {device}"
    output.table(title, titles, [_trial_row(trial) for trial in trials], numbers=range(1, len(titles) - 1))
    refused = [trial for trial in trials if trial.refusal]
    if not refused:
        return output.result(f"ok: {reward} can train")
    for text in dict.fromkeys(trial.refusal for trial in refused):
        console.complain(f"refused: {text}")
    raise typer.Exit(console.FAILED)


def _trial_row(trial: "Trial") -> list[str]:
    if trial.refusal:
        return [trial.reward, "", "", "", "", "", "refused"]
    numbers = (trial.gradient_norm, trial.seconds, trial.weights_mb, trial.activations_mb)
    spread = f"{trial.lowest:.4g} to {trial.highest:.4g}"
    return [trial.reward, spread, *(f"{value:.3g}" for value in numbers), "ok"]
