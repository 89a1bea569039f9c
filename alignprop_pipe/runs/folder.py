"""The run folder: what a run leaves behind, written so that a kill at any moment leaves only whole files.

`config.json` (all that is needed to repeat the run), `metrics.jsonl` (a line for each optimizer step),
`adapter.safetensors` and `adapter-comfyui.safetensors`, `curve.png`, `before-after.png`, `samples/`, `checkpoints/`,
`report.html`.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from alignprop_pipe.config.choices import loss_from_text
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import RunError
from alignprop_pipe.files import PROMPT_CHUNK, write_whole
from alignprop_pipe.images import png_bytes, to_pil
from alignprop_pipe.layout import ADAPTER, CONFIG, CURVE, METRICS, REPORT, SHEET
from alignprop_pipe.records import Change, Cut, Evidence, StepRecord
from alignprop_pipe.runs import drawings, report
from alignprop_pipe.runs.pairs import caption as pairs_caption
from alignprop_pipe.runs.pairs import is_right, label, shown_pairs
from alignprop_pipe.runs.summary import best_of, warnings_of
from alignprop_pipe.sources import exists, is_folder

When = Literal["before", "during", "after"]

PACKAGES = (
    "alignprop-pipe",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "kornia",
    "numpy",
    "Pillow",
)


class RunFolder:
    """One run on disk. `create` makes the folder; `append`, `evidence` and `finish` fill it."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.records: list[StepRecord] = []
        self._before: Evidence | None = None
        self._during: dict[int, Evidence] = {}
        self._newest: Evidence | None = None
        self._after: Evidence | None = None

    @classmethod
    def create(
        cls,
        out: str | Path | None,
        *,
        command: str = "",
        config: AlignConfig,
        model: str,
        reward: str,
        prompts: str | Sequence[str],
        calibrated: str | None = None,
    ) -> "RunFolder":
        """Make the folder and write `config.json` into it; no two runs ever get the same one.

        Args:
            out: the folder; None: `runs/<date>-<time>-<reward>`, with -2, -3 and so on where that is taken.
            command: what to type to repeat the run.
            config: the settings.
            model: id or folder, as typed.
            reward: the reward's expression.
            prompts: where the prompts came from, or the prompts themselves.
            calibrated: the reward's expression with every number that was measured for it, to repeat the run without
                measuring anew; None: there is nothing to measure in `reward`.

        Raises:
            RunError: `out` holds files already, or the folder cannot be made.
        """
        about = {
            "started": _now(),
            "command": command,
            "model": model,
            "reward": reward,
            "calibrated_reward": reward if calibrated is None else calibrated,
            "prompts": prompts if isinstance(prompts, str) else list(prompts),
            "config": config.to_dict(),
            "versions": versions(),
        }
        path = _default_folder(reward) if out is None else _given_folder(out)
        run = cls(path, about)
        run._write_config()
        return run

    def tell(self, **facts: Any) -> None:
        """Write more into `config.json`, as plain values. Raises RunError."""
        self.about |= facts
        self._write_config()

    @property
    def adapter_path(self) -> Path:
        """Where the adapter goes; its ComfyUI form stands next to it."""
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def append(self, record: StepRecord) -> None:
        """Add a line to `metrics.jsonl`, on disk when this returns; with evidence, draw the curve anew.

        Raises RunError.
        """
        look = record.evidence
        # Without the pictures: a long run would fill the memory with them.
        kept = None if look is None else _without_images(look)
        if self.records and self.records[-1].step == record.step:  # the same step, with its evidence now
            self.records.pop()
        self.records.append(dataclasses.replace(record, evidence=kept, images=None))
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        try:
            with (self.path / METRICS).open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"'{self.path}/metrics.jsonl' cannot be written: {error.strerror or error}") from error
        if look is not None:
            self.evidence(look, "during" if look.step else "before")

    def evidence(self, evidence: Evidence, when: When) -> None:
        """Keep an evaluation; before and after write their pictures, before and during the curve."""
        if when == "before":
            self._before = evidence
        elif when == "after":
            self._after = evidence
        else:
            self._newest = evidence
            self._during[evidence.step] = _without_images(evidence)
        if when != "during":
            self._write_samples(evidence, when)
        if when != "after":
            self._draw_curve()

    @property
    def steps(self) -> list[StepRecord]:
        """The optimizer steps: the records without number 0, which holds the evaluation before training."""
        return [record for record in self.records if record.step > 0]

    @property
    def before(self) -> Evidence | None:
        return self._before

    @property
    def after(self) -> Evidence | None:
        """The evaluation of the adapter that was kept; while the run lasts, the newest evaluation."""
        return self._after or self._newest

    @property
    def kept(self) -> Evidence | None:
        """The evaluation of the adapter that is kept; while the run lasts, the best one so far, or the newest."""
        kept_step = self.about.get("result", {}).get("kept_step")
        if self._after is not None or kept_step is not None:
            return self._after
        return best_of(list(self._during.values()), self.about["config"]["evaluation"]["keep_best"])

    @property
    def looks(self) -> list[Evidence]:
        """Every evaluation in the order it was taken: before, during, after."""
        return [look for look in (self._before, *self._during.values(), self._after) if look is not None]

    def finish(
        self,
        changes: Mapping[str, tuple[float, float, float, float]] | None = None,
        status: str = "completed",
        facts: Mapping[str, Any] | None = None,
        cuts: Sequence[Cut] = (),
    ) -> Path:
        """Write the curve, the pictures, the report and the result in `config.json`; returns the report's path.

        Args:
            changes: name of a held-out score ("reward", a part, a judge) -> its mean before, after, their difference
                and the standard error of the paired differences, as `records.Change`.
            status: how the run ended, in a few words, such as "interrupted after 12 of 60 steps".
            facts: what else the result in `config.json` holds, such as `kept_step`: without an evaluation of the
            adapter of
                that step there are no pictures of after.
            cuts: prompts that a reward or a judge could not read to their end.

        Raises:
            RunError: a file cannot be written.
        """
        named = {name: Change(*numbers) for name, numbers in (changes or {}).items()}
        kept_step = (facts or {}).get("kept_step")
        if self._newest is not None and kept_step not in (None, self._newest.step):
            self._newest = None  # it is of another adapter
        before, after = self.before, self.after
        loss = loss_from_text(self.about["config"]["loss"])
        warnings = warnings_of(before, after, named, loss=loss, status=status, cuts=cuts)
        self.about["result"] = {
            "status": status,
            "ended": _now(),
            "steps": len(self.steps),
            "skipped": sum(record.skipped for record in self.steps),
            "held_out": {name: _plain(change._asdict()) for name, change in named.items()},
            "warnings": [dataclasses.asdict(warning) for warning in warnings],
            **(facts or {}),
        }
        self._write_config()
        if before is not None and after is not None and before.images is not None and after.images is not None:
            if self._after is None:
                self._write_samples(after, "after")
            drawings.draw_before_after(before, after, self.path / SHEET)
        self._draw_curve()
        path = self.path / REPORT
        report.write_report_html(self._summary(named, status, cuts), path)
        _point_latest(self.path)
        return path

    def _summary(self, changes: Mapping[str, Change], status: str, cuts: Sequence[Cut]) -> report.RunSummary:
        before, after = self.before, self.after
        pairs: list[report.Pair] = []
        caption = ""
        if before is not None and after is not None:
            pairs, caption = _pairs(before, after), pairs_caption(before, after)
        return report.RunSummary(
            folder=str(self.path),
            about=self.about,
            records=self.steps,
            curve=(self.path / CURVE).read_bytes(),
            curve_dark=drawings.curve_png(self.steps, self.looks, drawings.DARK, self.kept),
            before=before,
            after=after,
            changes=changes,
            pairs=pairs,
            pairs_caption=caption,
            status=status,
            cuts=cuts,
            adapters=tuple(sorted(file.name for file in self.path.glob("adapter*.safetensors"))),
        )

    def _draw_curve(self) -> None:
        drawings.draw_curve(self.steps, self.looks, self.path / CURVE, self.kept)

    def _write_config(self) -> None:
        write_whole(self.path / CONFIG, json.dumps(self.about, indent=2, allow_nan=False) + "\n")

    def _write_samples(self, evidence: Evidence, when: When) -> None:
        """`samples/before/003-two-dogs.png` and, with the same name, `samples/after/…`; scores next to them."""
        folder = self.path / "samples" / when
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{str(folder)!r} cannot be made: {error.strerror or error}") from error
        write_whole(folder / "scores.json", json.dumps(_plain(evidence), indent=1, allow_nan=False) + "\n")
        if evidence.images is None:
            return
        for number, (prompt, image) in enumerate(zip(evidence.prompts, evidence.images, strict=True)):
            picture = png_bytes(to_pil(image), {PROMPT_CHUNK: prompt})
            write_whole(folder / f"{number:03d}-{slug(prompt, 'prompt')}.png", picture)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, {len(self.steps)} steps)"


def check_place(out: str | Path) -> None:
    """Raises RunError where no run folder can be made, and leaves nothing behind."""
    missing = [folder for folder in (Path(out), *Path(out).parents) if not exists(folder)]
    try:
        (_given_folder(out) / "checkpoints").rmdir()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError, ValueError):  # it was never made, or somebody has put something there
                folder.rmdir()


def read_metrics(path: str | Path) -> list[StepRecord]:
    """The records in a run folder's `metrics.jsonl` (or in that file itself), pictures left out.

    Record 0 holds the evaluation before training. A last line that a kill cut short is left out;
    numbers that were not finite come back as NaN. Of a step that was written twice, the later record counts.
    Raises RunError where the file is missing or another line is damaged.
    """
    path = Path(path)
    if is_folder(path):
        path /= METRICS
    try:
        *lines, unfinished = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{str(path)!r} cannot be read: {reason}; a run folder is needed") from error
    del unfinished  # empty, or what a kill left of the last line
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _record(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{str(path)!r}, line {number} is not a step's record: {error}") from error
        if records and records[-1].step == record.step:  # the same step, with its evidence now
            records.pop()
        records.append(record)
    return records


def slug(text: str, otherwise: str, length: int = 40) -> str:
    """A short name for a file from any text: a-z, 0-9 and dashes; `otherwise` where nothing is left."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:length].strip("-") or otherwise


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that decide a run's numbers, as far as installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- inside ----------------------------------------------------------------------------------------------------------


def _default_folder(reward: str) -> Path:
    name = f"{datetime.now():%Y-%m-%d-%H%M}-{slug(reward, 'run')}"
    try:
        Path("runs").mkdir(exist_ok=True)
        number = 1
        while True:
            path = Path("runs", name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            (path / "checkpoints").mkdir()
            return path
    except OSError as error:
        raise RunError(f"no run folder can be made under 'runs' here: {error.strerror}; name one with --out") from error


def _given_folder(out: str | Path) -> Path:
    way_out = "name another folder with --out (out= in Python)"
    try:
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise RunError(f"run folder {str(out)!r} holds files already and is left as it is; {way_out}")
        # Making this folder is the claim: of two runs that start in one empty folder, one fails here.
        (path / "checkpoints").mkdir()
    except FileExistsError as error:
        raise RunError(f"run folder {str(out)!r} is taken by a file or by another run; {way_out}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"run folder {str(out)!r} cannot be made: {error}; {way_out}") from error
    return path


def _point_latest(run: Path) -> None:
    """`runs/latest` is a link to the newest run in there; no such link where the system makes none."""
    link = run.absolute().parent / "latest"
    if link.parent.name != "runs" or link.name == run.name or (link.exists() and not link.is_symlink()):
        return
    fresh = link.with_name(f".latest-{os.getpid()}")
    with contextlib.suppress(OSError):
        fresh.symlink_to(run.name, target_is_directory=True)
        fresh.replace(link)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _without_images(evidence: Evidence) -> Evidence:
    return dataclasses.replace(evidence, images=None)


def _pairs(before: Evidence, after: Evidence) -> list[report.Pair]:
    if before.images is None or after.images is None:
        return []
    return [
        report.Pair(
            prompt=before.prompts[number],
            before=drawings.thumbnail(before.images[number]),
            after=drawings.thumbnail(after.images[number]),
            before_label=_marked(before, number),
            after_label=_marked(after, number),
            small=max(before.images.shape[-2:]) <= drawings.SMALL,
        )
        for number in shown_pairs(before, after)
    ]


def _marked(look: Evidence, number: int) -> str:
    right = is_right(look, number)
    mark = "" if right is None else "✓ " if right else "✗ "
    return mark + label(look, number)


def _plain(value: Any) -> Any:
    """What JSON can hold: records as dicts without their pictures, numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Evidence | StepRecord):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "images"}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: _number(value) for name, value in values.items()}


def _evidence(data: Mapping[str, Any]) -> Evidence:
    return Evidence(
        step=int(data["step"]),
        prompts=tuple(data["prompts"]),
        reward=_number(data["reward"]),
        parts=_numbers(data["parts"]),
        judges=_numbers(data["judges"]),
        diversity=_number(data["diversity"]),
        per_prompt={name: tuple(map(_number, values)) for name, values in data["per_prompt"].items()},
        measures={name: tuple(map(_number, values)) for name, values in data.get("measures", {}).items()},
        judge_names=tuple(data.get("judge_names", ())),
        held_out=bool(data.get("held_out", True)),
        merit=tuple(map(_number, data.get("merit", ()))),
    )


def _record(data: Mapping[str, Any]) -> StepRecord:
    return StepRecord(
        step=int(data["step"]),
        loss=_number(data["loss"]),
        reward=_number(data["reward"]),
        parts=_numbers(data["parts"]),
        grad_norm=_number(data["grad_norm"]),
        distance=None if data["distance"] is None else float(data["distance"]),
        graded=tuple(map(int, data["graded"])),
        seconds=_number(data["seconds"]),
        memory_mb=_number(data["memory_mb"]),
        skipped=bool(data["skipped"]),
        evidence=None if data["evidence"] is None else _evidence(data["evidence"]),
    )
