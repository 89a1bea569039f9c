"""A run's numbers -> words that claim no more than they show, and one HTML file that opens without a network.

Changes come with the standard error of the paired differences; what `summary` warns of is said at the top.
"""

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from alignprop_pipe.config.choices import loss_from_text
from alignprop_pipe.config.settings import FIELD_PATHS, AlignConfig
from alignprop_pipe.escaping import in_html as escape
from alignprop_pipe.escaping import in_shell
from alignprop_pipe.files import write_whole
from alignprop_pipe.layout import ADAPTER
from alignprop_pipe.records import Change, Cut, Evidence, StepRecord
from alignprop_pipe.runs.summary import warnings_of


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
    warnings = [
        one.text for one in warnings_of(before, after, run.changes, loss=loss, status=run.status, cuts=run.cuts)
    ]
    prompts = about["prompts"]
    where = f"prompts: {prompts}" if isinstance(prompts, str) else f"{len(prompts)} prompts, listed in config.json"
    steps = f"{len(run.records)} step{'s' * (len(run.records) != 1)}"
    page = Template(resources.files("alignprop_pipe.runs").joinpath("report_template.html").read_text(encoding="utf-8"))
    values = {
        "title": escape(f"{about['model'] or 'A pipeline'} aligned to {about['reward']}"),
        "subtitle": escape(f"{steps} · {run.status} · started {about['started']} · {run.folder}"),
        "warnings": "".join(f'<div class="card warn" role="alert"><b>Warning.</b> {escape(w)}</div>' for w in warnings),
        "summary": "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        "numbers": _numbers(run),
        "curve": _curve(run),
        "pairs": _pairs(run),
        "scores": _scores(run),
        "command": escape(about["command"]),
        "prompts": escape(where),
        "usage": _usage(run),
        "settings": _settings(about["config"]),
        "versions": _table(("", ""), [(name, version) for name, version in about["versions"].items()]),
    }
    write_whole(path, page.substitute(values))


def _numbers(run: RunSummary) -> str:
    """The few figures that are looked for first."""
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
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles)


def _curve(run: RunSummary) -> str:
    of = "held-out prompts" if run.before is None or run.before.held_out else "training prompts, with fresh noise"
    looks = "" if run.before is None else f" Dashed: the {of}; the ring marks the adapter that was kept."
    words = f"Scores over the optimizer steps.{looks}"
    return (
        '<figure class="card curve"><picture>'
        f'<source srcset="{_data_uri(run.curve_dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{_data_uri(run.curve)}" alt="{words}"></picture><figcaption>{words}</figcaption></figure>'
    )


def _pairs(run: RunSummary) -> str:
    if not run.pairs:
        return '<p class="soft">No pictures were kept.</p>'
    figures = []
    for pair in run.pairs:
        cells = "".join(
            f'<div><img src="{_data_uri(data)}" alt="{when}: {escape(pair.prompt)}"{" class=small" * pair.small}>'
            f'<span class="soft">{when}<br>{escape(label)}</span></div>'
            for when, data, label in (
                ("before", pair.before, pair.before_label),
                ("after", pair.after, pair.after_label),
            )
        )
        figures.append(f'<figure><h3>{escape(pair.prompt)}</h3><div class="pair">{cells}</div></figure>')
    return f'<p class="soft">{escape(run.pairs_caption)}</p><div class="pairs">{"".join(figures)}</div>'


def _scores(run: RunSummary) -> str:
    """Every score: the first and last tenth of the training steps, and the evidence before and after."""
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
    return f'<div class="tables">{_table(heads, rows, numbers_from=2)}</div><p class="soft">{words}</p>'


def _usage(run: RunSummary) -> str:
    """How the adapter files are used elsewhere."""
    if ADAPTER not in run.adapters:
        return '<p class="soft">No adapter was saved.</p>'
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
    return "".join(f'<p class="soft">{title}</p><pre>{escape(text)}</pre>' for title, text in blocks)


def _settings(config: Mapping[str, Any]) -> str:
    """Every setting by its flat name, with what it means; bold where it is not the default."""
    default = AlignConfig().to_dict()
    rows = []
    for name, (part, spec) in FIELD_PATHS.items():
        inside, usual = (config, default) if part is None else (config.get(part, {}), default[part])
        if name in inside:
            value = inside[name]
            changed = ' class="changed"' if value != usual[name] else ""
            words = "–" if value in (None, "", []) else str(value)
            cells = (name, words, spec.metadata["help"])
            rows.append(f"<tr{changed}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 99) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="number"' if i >= numbers_from else "" for i in range(len(cells)))
        named = (f' data-label="{escape(head)}"' if tag == "td" and head else "" for head in heads)
        marked = zip(kinds, named, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}{name}>{escape(cell)}</{tag}>" for kind, name, cell in marked) + "</tr>"

    head = row("th", heads) if any(heads) else ""
    return f"<table>{head}{''.join(row('td', cells) for cells in rows)}</table>"


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


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
