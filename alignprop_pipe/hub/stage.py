"""The folder that goes to the Hub: both adapter files, the card, and a run's evidence, with nothing private in it.

The same adapter and run give the same bytes, so that pushing again changes nothing.
"""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from alignprop_pipe.adapters import files as adapter_files
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.header import PROMPTS_SHOWN, public_id
from alignprop_pipe.config.fields import check
from alignprop_pipe.config.settings import FIELD_PATHS, value_from
from alignprop_pipe.errors import AlignError, ConfigError, HubError, RunError
from alignprop_pipe.escaping import in_shell
from alignprop_pipe.files import PROMPT_CHUNK, SHEET_CHUNK, write_whole
from alignprop_pipe.hub.card import model_card
from alignprop_pipe.hub.card_facts import Facts
from alignprop_pipe.hub.redact import Private
from alignprop_pipe.images import png_bytes
from alignprop_pipe.layout import ADAPTER, CONFIG, CURVE, HUB_WEIGHTS, METRICS, SHEET
from alignprop_pipe.prompts import named_sets
from alignprop_pipe.records import Change, Evidence, StepRecord, part_of
from alignprop_pipe.runs.drawings import SMALL
from alignprop_pipe.runs.folder import read_metrics
from alignprop_pipe.runs.summary import best_of, diversity_change, paired_change

WIDGETS = 4
LARGEST = 768
"""Pixels of the longer side of a widget's picture."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds, cleaned of what is private."""

    folder: Path
    about: Mapping[str, Any]
    records: Sequence[StepRecord]
    lines: str

    @classmethod
    def read(cls, folder: Path, private: Private) -> "Run":
        """Raises HubError for a folder that is no run's, RunError for one that cannot be read."""
        try:
            about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            metrics = (folder / METRICS).read_text(encoding="utf-8") if (folder / METRICS).exists() else ""
        except (OSError, ValueError) as error:
            raise HubError(f"{CONFIG} of the run folder {folder.name!r} cannot be read: {error}") from error
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise HubError(
                f"{folder.name!r} is no run folder: its {CONFIG} holds no settings; give one that a run made"
            )
        whole = [line for line in metrics.split("\n")[:-1] if line]  # a kill may have cut the last one short
        lines = (json.dumps(private.cleaned_values(json.loads(line)), ensure_ascii=False) for line in whole)
        records = read_metrics(folder) if metrics else []
        return cls(folder, private.cleaned_values(about), records, "".join(f"{line}\n" for line in lines))

    @property
    def before(self) -> Evidence | None:
        first = self.records[0] if self.records else None
        return first.evidence if first is not None and first.step == 0 else None

    @property
    def after(self) -> Evidence | None:
        """The evaluation of the adapter that was kept, found as the run found it."""
        looks = [one.evidence for one in self.records if one.step > 0 and one.evidence is not None]
        kept = _table(self.about, "result").get("kept_step")
        if kept is not None:
            return next((look for look in looks if look.step == kept), None)
        return best_of(looks, _table(self.about["config"], "evaluation").get("keep_best", True))

    @property
    def steps(self) -> int:
        return self.records[-1].step if self.records else 0

    @property
    def seconds(self) -> float:
        """From start to end; of a run that says neither, the time in its steps."""
        try:
            ended, started = self.about["result"]["ended"], self.about["started"]
            return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
        except (KeyError, TypeError, ValueError):
            return sum(one.seconds for one in self.records) or math.nan

    def pictures(self, when: str) -> list[Path]:
        """The held-out pictures in the order of their prompts."""
        return sorted((self.folder / "samples" / when).glob("*.png"))


def write_folder(target: Path, repo_id: str, source: Adapter, private: Private) -> dict[str, int]:
    """Fill the empty folder `target`; returns the names of the files and their sizes in bytes.

    Raises AdapterError; HubError: the run folder is none, or a file would still hold something private.
    """
    name = repo_id.rpartition("/")[2]
    run = None if source.run_folder is None else Run.read(source.run_folder, private)
    _write_adapters(target, name, source, private)
    widgets: list[tuple[str, str]] = []
    if run is not None:
        _check_weights(target / HUB_WEIGHTS, run.folder / ADAPTER)
        run = replace(run, about=public_about(run, source))
        write_whole(target / CONFIG, json.dumps(run.about, indent=2, ensure_ascii=False) + "\n")
        if run.lines:
            write_whole(target / METRICS, run.lines)
        for drawing, chunk in ((CURVE, "curve"), (SHEET, "before and after")):
            if (run.folder / drawing).is_file():
                write_whole(target / drawing, _redone(run.folder / drawing, {SHEET_CHUNK: chunk}))
        widgets = list(_write_widgets(target / "images", run, private))
    names = {path.name for path in target.iterdir() if path.is_file()}
    files = [HUB_WEIGHTS, *sorted(names - {HUB_WEIGHTS})]
    facts = facts_of(repo_id, source, run, private)
    card = model_card(replace(facts, files=tuple(files), widgets=tuple(widgets)))
    write_whole(target / "README.md", str(card))
    written = {path.relative_to(target).as_posix(): path for path in sorted(target.rglob("*")) if path.is_file()}
    for file, path in written.items():
        if found := private.found_in(path.read_bytes()):
            raise HubError(f"nothing was uploaded: {file} would hold {found}; rename what holds it, and push again")
    return {file: path.stat().st_size for file, path in written.items()}


def facts_of(repo_id: str, source: Adapter, run: Run | None, private: Private) -> Facts:
    """The card's facts from the adapter's header, and from its run where there is one."""
    header = {key.removeprefix("alignprop."): text for key, text in source.metadata.items()}
    header = {key: private.cleaned(text, typed=key == "trigger_prompts") for key, text in header.items()}
    config = _settings(_json(header.get("config", "")))
    facts = Facts(
        repo_id=repo_id,
        base=public_id(source.base.base_model),
        base_class=source.base.base_class,
        reward=header.get("reward", ""),
        prompts=tuple(filter(None, header.get("trigger_prompts", "").split("\n"))),
        num_prompts=_whole(header.get("prompts", "")),
        config=config,
        changes=_changes_of_header(header),
        judges=_judges_of_header(header, config),
        steps=_whole(header.get("step", "")),
        window=header.get("window", ""),
        mixed=_mixed(header.get("mix.parts", "")),
        size=_size(source),
    )
    facts = facts if run is None else _with_run(facts, run)
    changes = {private.cleaned(name): change for name, change in facts.changes.items()}
    before, after = (_with_names_of(private, look) for look in (facts.before, facts.after))
    judges = tuple(map(private.cleaned, facts.judges))
    return replace(facts, changes=changes, judges=judges, before=before, after=after)


def public_about(run: Run, source: Adapter) -> dict[str, Any]:
    """What `config.json` says, with a command for others in place of what was typed, and times without a time zone."""
    about = dict(run.about)
    about["model"] = public_id(source.base.base_model) or about.get("model", "")
    prompts = about.get("prompts", "")
    shown = prompts if isinstance(prompts, str) else "PROMPTS"
    reward = about.get("calibrated_reward", about.get("reward", ""))
    words = [
        "alignprop",
        "train",
        about["model"] or "MODEL",
        "--reward",
        reward,
        "--prompts",
        shown,
        "--config",
        CONFIG,
    ]
    about["command"] = " ".join(in_shell(str(word)) for word in words)
    about.pop("working_folder", None)
    if isinstance(prompts, str):
        about.pop("prompt_set", None)  # the author's file stays theirs
    about["started"] = _utc(about.get("started"))
    if isinstance(about.get("result"), dict):
        about["result"] = {**about["result"], "ended": _utc(about["result"].get("ended"))}
    return about


# --- inside ----------------------------------------------------------------------------------------------------------


def _write_adapters(target: Path, name: str, source: Adapter, private: Private) -> None:
    about = {key: private.cleaned(text, typed=key.endswith("trigger_prompts")) for key, text in source.metadata.items()}
    titles = {"modelspec.title": name, "ss_output_name": f"{name}-comfyui"}
    clean: Adapter = replace(source, metadata={**about, **titles})
    clean.save(target / HUB_WEIGHTS, format="diffusers")
    clean.save(target / f"{name}-comfyui.safetensors", format="comfyui")


def _check_weights(staged: Path, of_run: Path) -> None:
    """Evidence belongs to the weights that it was taken of. Raises HubError."""
    if not of_run.is_file():
        return
    here, there = adapter_files.read_file(staged)[0], adapter_files.read_file(of_run)[0]
    if here.keys() != there.keys() or not all(torch.equal(here[key], there[key]) for key in here):
        raise HubError(
            f"the run in {of_run.parent.name!r} made other weights than these, and its evidence does not belong to "
            "them; push the adapter without it: dataclasses.replace(adapter, run_folder=None).push_to_hub(...)"
        )


def _write_widgets(folder: Path, run: Run, private: Private) -> Iterator[tuple[str, str]]:
    """A few pictures after the training, at even distances: their prompts, and their paths in the repository."""
    paths, look = run.pictures("after"), run.after
    if look is None or len(paths) != len(look.prompts):
        return
    shown = min(WIDGETS, len(paths))
    folder.mkdir()
    for number in range(shown):
        place = number * len(paths) // shown
        prompt = private.cleaned(look.prompts[place], typed=True)
        file = folder / f"after-{number + 1}.png"
        write_whole(file, _redone(paths[place], {PROMPT_CHUNK: prompt}, widget=True))
        yield prompt, f"images/{file.name}"


def _redone(path: Path, chunks: Mapping[str, str], *, widget: bool = False) -> bytes:
    """The picture anew, so that no chunk of another program's comes along; a widget's in a size that pages show."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise RunError(f"{path.name!r} of the run folder cannot be read: {error}") from error
    if widget and max(image.size) <= SMALL:
        factor = max(1, 256 // max(image.size))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    elif widget:
        image.thumbnail((LARGEST, LARGEST))
    return png_bytes(image, chunks)


def _with_run(facts: Facts, run: Run) -> Facts:
    before, after = run.before, run.after
    prompts = run.about.get("prompts", "")
    listed = tuple(map(str, prompts)) if isinstance(prompts, list) else ()
    facts = replace(
        facts,
        reward=str(run.about.get("calibrated_reward") or run.about.get("reward") or facts.reward),
        source=_source_of(prompts) if isinstance(prompts, str) else "",
        prompts=facts.prompts or listed[:PROMPTS_SHOWN],
        num_prompts=facts.num_prompts or len(listed),
        config=_settings(run.about["config"]),
        command=str(run.about.get("command", "")),
        status=str(_table(run.about, "result").get("status", "it was still running, or was stopped from outside")),
        steps=run.steps or facts.steps,
        seconds=run.seconds,
        device=str(run.about.get("device", "")),
    )
    if before is None or after is None:
        return facts
    try:
        changes = paired_change(before, after)
    except AlignError:
        return facts
    return replace(
        facts,
        held_out=len(after.prompts),
        changes=changes,
        judges=tuple(after.judges),
        kept_step=after.step,
        choice=str(_table(run.about, "result").get("choice") or ""),
        diversity=diversity_change(before, after),
        before=before,
        after=after,
    )


def _with_names_of(private: Private, look: Evidence | None) -> Evidence | None:
    """The evaluation with the names of its scores cleaned."""
    if look is None:
        return None
    per_prompt = {private.cleaned(name): values for name, values in look.per_prompt.items()}
    judges = {private.cleaned(name): value for name, value in look.judges.items()}
    return replace(
        look, per_prompt=per_prompt, judges=judges, judge_names=tuple(map(private.cleaned, look.judge_names))
    )


def _source_of(prompts: str) -> str:
    return (
        f"the set '{prompts}' that ships with alignprop-pipe"
        if prompts in named_sets()
        else f"the author's file {prompts}"
    )


def _changes_of_header(header: Mapping[str, str]) -> dict[str, Change]:
    """Means before and after, and the standard error where the header holds it."""
    changes = {}
    for name, given in _json(header.get("scores", "")).items():
        if not isinstance(given, list) or len(given) not in (2, 3):
            continue
        try:
            before, after, error = map(float, [*given, math.nan][:3])
        except (TypeError, ValueError, OverflowError):
            continue
        changes[name] = Change(before, after, after - before, error)
    return changes


def _judges_of_header(header: Mapping[str, str], config: Mapping[str, Any]) -> tuple[str, ...]:
    judges = [judge.partition("(")[0] for judge in _table(config, "evaluation").get("judges", ())]
    return tuple(name for name in _json(header.get("scores", "")) if name in judges or part_of(name, judges))


def _size(source: Adapter) -> str:
    """`LoRA of rank 16, alpha 16, on 32 layers of the unet`."""
    parts = [
        f"rank {rank}, alpha {alpha:g}, on {len(source.layers[name])} layers of the {name}"
        for name, (rank, alpha) in source.shapes.items()
    ]
    return "LoRA of " + "; ".join(parts)


def _mixed(text: str) -> tuple[str, ...]:
    """`0.6 of a`, for every adapter of a mix."""
    parts = _json(f'{{"parts": {text}}}').get("parts") if text else None
    listed = parts if isinstance(parts, list) else []
    return tuple(f"{one.get('weight')} of {one.get('adapter')}" for one in listed if isinstance(one, dict))


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration that anybody may have written, the settings that this version knows and takes."""
    found: dict[str, Any] = {}
    for name, (part, spec) in FIELD_PATHS.items():
        inside = given if part is None else _table(given, part)
        if name not in inside:
            continue
        with contextlib.suppress(ConfigError):
            value = value_from(name, spec, inside[name])
            check(name, spec, value)
            home = found if part is None else found.setdefault(part, {})
            home[name] = str(value) if spec.metadata["parse"] else value
    return found


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _utc(text: Any) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc).isoformat(timespec="seconds")
    except (TypeError, ValueError):
        return ""
