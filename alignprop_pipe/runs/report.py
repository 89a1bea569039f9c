"""A run's numbers -> words that claim no more than they show, and one HTML file that opens without a network.

Changes come with the standard error of the paired differences; what `summary` warns of is said at the top.
"""

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alignprop_pipe.config.choices import loss_from_text
from alignprop_pipe.config.settings import FIELD_PATHS, AlignConfig
from alignprop_pipe.escaping import in_shell, visible
from alignprop_pipe.files import write_whole
from alignprop_pipe.layout import ADAPTER
from alignprop_pipe.records import Change, Cut, Evidence, StepRecord
from alignprop_pipe.runs.summary import warnings_of


def data_uri(picture: bytes) -> str:
    """A PNG or JPEG file as an address that holds the file."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# Every value is escaped, and what nobody would see of it is written out; a name that is missing is an error.
TEMPLATES = Environment(
    loader=PackageLoader("alignprop_pipe.runs", "."),
    autoescape=True,
    finalize=lambda value: visible(value) if type(value) is str else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["data_uri"] = data_uri


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out prompt: PNG or JPEG files before and after, and what is said under each."""

    prompt: str
    before: bytes
    after: bytes
    before_label: str
    after_label: str
    small: bool


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What the report is made of.

    `about` is what `config.json` holds; `changes` is keyed by the names of the scores ("reward", parts, judges);
    `curve` and `curve_dark` are PNG files; `adapters` the names of the adapter files in `folder`.
    """

    folder: str
    about: Mapping[str, Any]
    records: Sequence[StepRecord]
    curve: bytes
    curve_dark: bytes
    before: Evidence | None = None
    after: Evidence | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()
    pairs_caption: str = ""
    status: str = "completed"
    adapters: Sequence[str] = ()
    cuts: Sequence[Cut] = ()


# --- words -----------------------------------------------------------------------------------------------------------


def summary_sentences(before: Evidence, after: Evidence, changes: Mapping[str, Change]) -> list[str]:
    """What the evidence says, one sentence for each score, as plain text."""
    sentences = [f"Measured on {after.what}{', with the same noise' * after.held_out} before and after."]
    if "reward" in changes:
        sentences.append(f"The reward {_moved(changes['reward'])}.")
    for name in after.main_judges:  # what they log besides stands in the table
        if name in changes:
            sentences.append(f"The judge {name}, never trained on, {_moved(changes[name])}.")
    if math.isfinite(before.diversity) and math.isfinite(after.diversity):
        share = f" ({after.diversity / before.diversity - 1:+.0%})" if before.diversity > 0 else ""
        sentences.append(f"Diversity went from {_text(before.diversity)} to {_text(after.diversity)}{share}.")
    if any(math.isfinite(change.standard_error) for change in changes.values()):
        sentences.append("± is the standard error of the mean paired difference.")
    return sentences


def _moved(change: Change) -> str:
    """'rose from 0.58 to 0.71 (+0.13 ± 0.04)'; a difference under two standard errors is called what it is."""
    numbers = f"from {_text(change.before)} to {_text(change.after)}"
    if not math.isfinite(change.difference):
        return f"went {numbers}"
    error = change.standard_error
    spread = f" ± {error:.2g}" if math.isfinite(error) else ""
    verb = "rose" if change.difference > 0 else "fell" if change.difference < 0 else "stayed"
    doubt = ", which may be chance" if change.difference and abs(change.difference) < 2 * _or_zero(error) else ""
    return f"{verb} {numbers} ({change.difference:+.3g}{spread}{doubt})"


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _text(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


# --- the page --------------------------------------------------------------------------------------------------------


def write_report_html(run: RunSummary, path: str | Path) -> None:
    """Write one self-contained file: no script, nothing loaded from elsewhere, light and dark. Raises RunError."""
    about, before, after = run.about, run.before, run.after
    sentences = ["No held-out evidence was taken in this run."]
    if before is not None and after is not None:
        sentences = summary_sentences(before, after, run.changes)
    if choice := about.get("result", {}).get("choice"):
        sentences.append(f"Kept: {choice}.")
    loss = loss_from_text(about["config"]["loss"])
    warnings = warnings_of(before, after, run.changes, loss=loss, status=run.status, cuts=run.cuts)
    prompts, steps = about["prompts"], f"{len(run.records)} step{'s' * (len(run.records) != 1)}"
    heads, scores, scores_caption = _scores(run)
    page = TEMPLATES.get_template("report.html.jinja").render(
        title=f"{about['model'] or 'A pipeline'} aligned to {about['reward']}",
        subtitle=f"{steps} · {run.status} · started {about['started']} · {run.folder}",
        warnings=[warning.text for warning in warnings],
        sentences=sentences,
        numbers=_numbers(run),
        curve=run.curve,
        curve_dark=run.curve_dark,
        curve_caption=_curve_caption(run),
        pairs=run.pairs,
        pairs_caption=run.pairs_caption,
        score_heads=heads,
        scores=scores,
        scores_caption=scores_caption,
        command=about["command"],
        prompts=f"prompts: {prompts}" if isinstance(prompts, str) else f"{len(prompts)} prompts, listed in config.json",
        usage=_usage(run),
        settings=_settings(about["config"]),
        versions=list(about["versions"].items()),
    )
    write_whole(path, page)


def _numbers(run: RunSummary) -> list[tuple[str, str]]:
    """The few figures that are looked for first: value and label."""
    records = run.records
    seconds = [record.seconds for record in records if math.isfinite(record.seconds)]
    tiles = []
    if "reward" in run.changes:
        tiles.append(
            (_signed(run.changes["reward"].difference), run.after.named("reward") if run.after else "held-out reward")
        )
    tiles += [
        (_signed(run.changes[name].difference), f"{name} (judge)")
        for name in (run.after.main_judges if run.after else ())
        if name in run.changes
    ]
    if seconds:
        tiles.append((_duration(sum(seconds)), f"training time, {statistics.median(seconds):.3g} s a step"))
        tiles.append((f"{statistics.fmean(len(r.graded) for r in records):.3g}", "denoising steps with gradient, mean"))
    memory = max((record.memory_mb for record in records if math.isfinite(record.memory_mb)), default=0)
    if memory > 0:
        tiles.append((f"{memory:,.0f} MB", "most memory"))
    reasons = [record.skipped_because for record in records if record.skipped]
    if reasons:
        said = "; ".join(dict.fromkeys(reasons))
        tiles.append((str(len(reasons)), f"step{'s' * (len(reasons) != 1)} skipped: {said}"))
    return tiles


def _curve_caption(run: RunSummary) -> str:
    of = "held-out prompts" if run.before is None or run.before.held_out else "training prompts, with fresh noise"
    looks = "" if run.before is None else f" Dashed: the {of}; the ring marks the adapter that was kept."
    return f"Scores over the optimizer steps.{looks}"


def _scores(run: RunSummary) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Every score: the first and last tenth of the training steps, and the evidence before and after.

    Heads, rows and caption of the table.
    """
    kept = [record for record in run.records if not record.skipped]
    tenth = max(1, len(kept) // 10)
    parts = {"reward": [record.reward for record in kept]}
    for name in dict.fromkeys(name for record in kept for name in record.parts):
        parts[name] = [record.parts.get(name, math.nan) for record in kept]
    judges = run.after.judges if run.after else {}
    rows = []
    for name in dict.fromkeys([*parts, *run.changes]):
        kind = "reward" if name == "reward" else "judge" if name in judges else "part"
        change = run.changes.get(name)
        values = parts.get(name, [])
        start, end = (_mean(values[:tenth]), _mean(values[-tenth:])) if values else (None, None)
        held_out = [_text(v) for v in change[:2]] if change else ["–", "–"]
        moved = _signed(change.difference, change.standard_error) if change else "–"
        rows.append((name, kind, _text(start), _text(end), *held_out, moved))
    if run.before is not None and run.after is not None:
        before, after = run.before.diversity, run.after.diversity
        rows.append(("diversity", "", "–", "–", _text(before), _text(after), _signed(after - before)))
    of = "held-out" if run.after is None or run.after.held_out else "fresh noise"
    heads = ("score", "", "training, first", "training, last", f"{of} before", f"{of} after", "change")
    words = f"Training: means over the first and the last {tenth} step{'s' * (tenth != 1)}, on other prompts each time."
    return heads, rows, words


def _usage(run: RunSummary) -> list[tuple[str, str]]:
    """How the adapter files are used elsewhere: where, and what to type there."""
    if ADAPTER not in run.adapters:
        return []
    # Copied into a terminal that may be anywhere.
    model, folder = run.about["model"] or "MODEL", str(Path(run.folder).absolute())
    prompt = run.after.prompts[0] if run.after and run.after.prompts else "a prompt"
    file = f"{folder}/adapter.safetensors"
    shell = f"alignprop sample {in_shell(model)} {in_shell(prompt)} --adapter {in_shell(file)} --compare"
    name, imported = repr(model), ""
    if "/" not in model:  # the name of a bundled model, whose folder only the package knows
        imported, name = "from alignprop_pipe.bundled import resolve_model\n", f"resolve_model({model!r})"
    code = (
        f"from diffusers import DiffusionPipeline\n{imported}\npipe = DiffusionPipeline.from_pretrained({name})\n"
        f'pipe.load_lora_weights({folder!r}, weight_name="adapter.safetensors")\npipe({prompt!r}).images[0]'
    )
    blocks = [("On the command line", shell), ("In diffusers", code)]
    if "adapter-comfyui.safetensors" in run.adapters:
        comfy = (
            f"copy {in_shell(f'{folder}/adapter-comfyui.safetensors')} to ComfyUI/models/loras/\n"
            "add a Load LoRA node after Load Checkpoint, strength 1.0"
        )
        blocks.append(("In ComfyUI", comfy))
    return blocks


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every setting by its flat name, with what it means and whether it differs from the default."""
    default = AlignConfig().to_dict()
    rows = []
    for name, (part, spec) in FIELD_PATHS.items():
        inside, usual = (config, default) if part is None else (config.get(part, {}), default[part])
        if name in inside:
            value = inside[name]
            words = "–" if value in (None, "", []) else str(value)
            changed = value != usual[name]
            rows.append({"name": name, "value": words, "help": spec.metadata["help"], "changed": changed})
    return rows


def _signed(difference: float, error: float = math.nan) -> str:
    """`+0.13 ± 0.04`, without what is not known."""
    if not math.isfinite(difference):
        return "–"
    return f"{difference:+.3g}" + (f" ± {error:.2g}" if math.isfinite(error) else "")


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
