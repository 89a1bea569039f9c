"""The model card: what a run knows about its adapter -> the README.md of its repository, with the evidence in it.

The card claims what was measured and no more: held-out scores come with the standard error of their paired
differences, judges are named as such, and what fell is said at the top. The facts come from headers and folders that
anybody may have written: every text of theirs goes through `escaping`.
"""

import math
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alignprop_pipe.config.choices import Maximize, loss_from_text
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.escaping import cell, code, fenced, in_markdown, in_python, in_shell, link, visible
from alignprop_pipe.hub.card_facts import PAPER, PROJECT, Facts
from alignprop_pipe.hub.licences import HUB, overall
from alignprop_pipe.layout import CONFIG, CURVE, HUB_WEIGHTS, METRICS, SHEET
from alignprop_pipe.records import Change, part_of
from alignprop_pipe.runs.summary import RunWarning, warnings_of


def model_card(facts: Facts) -> ModelCard:
    """The card, metadata and text; the same facts give the same card."""
    sections = (
        _opening(facts),
        _warnings(facts),
        _usage(facts),
        _results(facts),
        _making(facts),
        _limits(facts),
        _licences(facts),
        _files(facts),
    )
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n")


def warnings_in(facts: Facts) -> tuple[RunWarning, ...]:
    """What a visitor should know before the numbers."""
    try:
        loss = loss_from_text(str(facts.config.get("loss", "maximize")))
    except ConfigError:
        loss = Maximize()
    return warnings_of(
        facts.before, facts.after, facts.changes, loss=loss, status=facts.status, judges=facts.judges,
        diversity=facts.diversity,
    )  # fmt: skip


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(facts: Facts) -> ModelCardData:
    rewards = re.findall(r"[A-Za-z_][\w.]*(?=\s*(?:\(|$|[-+*,)]))", re.sub(r"""(["']).*?\1""", "", facts.reward))
    tags = ["lora", "alignprop", facts.task, "diffusers", "template:diffusion-lora"]
    tags += [f"reward:{name}" for name in dict.fromkeys(rewards) if name not in ("py",)]
    licence = overall(facts.licences)
    if licence["license"] == "other":
        licence["license_link"] = visible(f"{HUB}{facts.repo_id}#licences")
    more: dict[str, Any] = (
        {"widget": [{"text": visible(text), "output": {"url": url}} for text, url in facts.widgets]}
        if facts.widgets
        else {}
    )
    return ModelCardData(
        base_model=visible(facts.base) if "/" in facts.base else None,
        library_name="diffusers",
        pipeline_tag=facts.task,
        tags=tags,
        eval_results=_eval_results(facts) or None,
        model_name=visible(facts.name) if facts.changes else None,
        **licence,
        **more,
    )


def _eval_results(facts: Facts) -> list[EvalResult]:
    """One for each held-out score: the value after, with the value before and the standard error beside it."""
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type="custom",
            dataset_name=visible(_of_prompts(facts)),
            metric_type=visible(name),
            metric_name=visible(f"{name} ({_kind(facts, name)})" if _kind(facts, name) not in ("", name) else name),
            metric_value=_plain(change.after),
            metric_args={"before": _plain(change.before), "standard_error_of_change": _plain(change.standard_error)},
        )
        for name, change in facts.scores.items()
        if math.isfinite(change.after)
    ]


# --- sections --------------------------------------------------------------------------------------------------------


def _opening(facts: Facts) -> str:
    base = link(facts.base, f"{HUB}{facts.base}") if "/" in facts.base else code(facts.base) if facts.base else ""
    if facts.bundled:
        base = f"the small model {base} (it ships inside {PROJECT} and is not on the Hub)"
    made = f"that was mixed by {PROJECT} of {' and '.join(map(in_markdown, facts.mixed))}."
    if not facts.mixed:
        reward = f"raise the reward {code(facts.reward)}" if facts.reward else "raise a reward"
        made = (
            f"that was trained to {reward}: the reward's gradient flows back through the denoising chain "
            f"([AlignProp]({PAPER})), by {PROJECT}."
        )
    gallery = "<Gallery />\n\n" if facts.widgets else ""
    caption = (
        f"\n\nThe pictures above are of {_kind_of_prompts(facts)} prompts, evenly spaced and not chosen by score."
        if gallery
        else ""
    )
    words = f"A LoRA for {base or 'a local model'} {made} No trigger word is needed.{caption}"
    return f"# {in_markdown(facts.name)}\n\n{gallery}{words}"


def _warnings(facts: Facts) -> str:
    lines = []
    for one in warnings_in(facts):
        said, name, more = one.text.partition(one.score) if one.score in facts.judges else (one.text, "", "")
        lines.append(f"> {in_markdown(said)}" + (f" {code(name)}{in_markdown(more)}" if name else ""))
    return "> [!WARNING]\n" + "\n>\n".join(lines) if lines else ""


def _usage(facts: Facts) -> str:
    comfy = [name for name in facts.files if name.endswith(".safetensors") and name != HUB_WEIGHTS]
    model = facts.base or "MODEL"
    words = f"alignprop sample {in_shell(model)} {in_shell(_example(facts))} --adapter {in_shell(facts.repo_id)}"
    blocks = [
        f"## Use it\n\nIn diffusers:\n\n{fenced('python', _code_for_diffusers(facts))}",
        f'Without a network (the file in the cache, `HF_HUB_OFFLINE=1`), add `weight_name="{HUB_WEIGHTS}"`.',
    ]
    if comfy:
        each = "; it takes one such node for each of the two models" if len(comfy) > 1 else ""
        blocks.append(
            f"In ComfyUI: put {' and '.join(map(code, comfy))} into `models/loras` and a *Load LoRA* node behind the "
            f"one that loads the base model, strength 1.0{each}."
        )
    blocks += [
        f"With {PROJECT}, base and adapter side by side from the same noise:",
        fenced("bash", f"{words} --compare"),
        "A strength below 1 (`--scale 0.6`, or `pipe.set_adapters` in diffusers) stays nearer to the base model.",
    ]
    return "\n\n".join(blocks)


def _code_for_diffusers(facts: Facts) -> str:
    lines = ["from diffusers import DiffusionPipeline"]
    how = f"pipe = DiffusionPipeline.from_pretrained({in_python(facts.base)})"
    if facts.bundled:
        lines = [f"from alignprop_pipe import AlignPropPipeline  # the base model is part of {PROJECT}"]
        how = f"pipe = AlignPropPipeline.from_pretrained({in_python(facts.base)})"
    elif not facts.base:
        how = 'pipe = DiffusionPipeline.from_pretrained("BASE_MODEL")  # a local model: put yours of the same kind here'
    given = [in_python(_example(facts))]
    if "image" in facts.parameters:
        lines.append("from diffusers.utils import load_image")
        given.append('image=load_image("picture.png")')
    for name in ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt"):
        value = facts.config.get("sampling", {}).get(name)
        if value not in (None, "") and name in facts.parameters:
            given.append(f"{name}={in_python(value) if isinstance(value, str) else value}")
    result = "frames[0]" if facts.task == "text-to-video" else "images[0]"
    call = f"pipe({', '.join(given)}).{result}"
    shown = "frames" if facts.task == "text-to-video" else "image"
    return "\n".join([*lines, "", how, f"pipe.load_lora_weights({in_python(facts.repo_id)})", f"{shown} = {call}"])


def _results(facts: Facts) -> str:
    if not facts.changes:
        return ""
    head = "| score | what it is | before | after | change |\n|---|---|---:|---:|---:|"
    rows = [_row(facts, name, change) for name, change in facts.scores.items()]
    kind = _kind_of_prompts(facts)
    parts = [
        f"## Results on {kind} prompts",
        f"{in_markdown(_of_prompts(facts))}, with the same noise before and after.",
    ]
    if facts.choice:
        parts.append(f"Kept: {in_markdown(facts.choice)}.")
    parts.append("\n".join([head, *rows]))
    if any(math.isfinite(change.standard_error) for change in facts.changes.values()):
        parts.append("± is the standard error of the mean paired difference; below two of them a change may be chance.")
    if not facts.judges:
        parts.append("No judge watched this run: all of these scores are the trained reward's own.")
    if SHEET in facts.files:
        words = f"{kind.capitalize()} prompts before and after, from the same noise, not chosen by score"
        parts.append(f"![{words}]({SHEET})")
    if CURVE in facts.files:
        parts.append(f"![The reward during training, and the scores of the evidence]({CURVE})")
    return "\n\n".join(parts)


def _row(facts: Facts, name: str, change: Change) -> str:
    error = f" ± {change.standard_error:.2g}" if math.isfinite(change.standard_error) else ""
    moved = f"{change.difference:+.3g}{error}" if math.isfinite(change.difference) else "–"
    return f"| {cell(name)} | {_kind(facts, name)} | {_text(change.before)} | {_text(change.after)} | {moved} |"


def _kind(facts: Facts, name: str) -> str:
    if name == "reward":
        return "the trained reward"
    if name == "diversity":
        return "mean distance of two pictures"
    if name in facts.judges:
        is_part = name not in facts.after.main_judges if facts.after else part_of(name, facts.judges)
        return "part of a judge" if is_part else "judge, never trained on"
    return "part of the reward"


def _making(facts: Facts) -> str:
    config = facts.config
    batch = config.get("batch_size", 0) * config.get("gradient_accumulation_steps", 1)
    rows = [
        ("reward", cell(facts.reward) if facts.reward else ""),
        ("prompts", in_markdown(_prompts_text(facts))),
        ("adapter", in_markdown(facts.size)),
        (
            "optimizer steps",
            f"{facts.steps or ''}" + (f", of which that of step {facts.kept_step} was kept" * _earlier(facts)),
        ),
        ("pictures trained on", f"{facts.steps * batch} ({batch} a step)" if batch and facts.steps else ""),
        ("time", _duration(facts.seconds)),
        ("device", in_markdown(facts.device)),
        ("gradient", f"through denoising steps {cell(config['truncation'])}" if config.get("truncation") else ""),
        ("seed", str(config.get("seed", ""))),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows if text)
    parts = [f"## How it was made\n\n| | |\n|---|---|\n{table}"]
    if CONFIG in facts.files:
        parts.append(
            f"All settings are in [{CONFIG}]({CONFIG}), every step's numbers in [{METRICS}]({METRICS}). The run again:"
            f"\n\n{fenced('bash', facts.command)}"
        )
    if facts.prompts:
        some = f"The first {len(facts.prompts)} prompts" if facts.num_prompts > len(facts.prompts) else "The prompts"
        listed = "\n".join(f"- {code(prompt)}" for prompt in facts.prompts)
        parts.append(f"<details><summary>{some}</summary>\n\n{listed}\n\n</details>")
    return "\n\n".join(parts)


def _limits(facts: Facts) -> str:
    lines = [
        "A reward is a stand-in for what is wanted. One that rises can be met in ways nobody asked for, and more "
        "strength or more training makes that likelier.",
        "What was measured holds for prompts and settings like those above; other prompts, sizes, step numbers and "
        "guidance were not tried.",
        "What the base model and the reward's network cannot do or get wrong, their biases among it, is still there.",
    ]
    if facts.window:
        lines.insert(
            0,
            f"It was made for a part of the denoising steps, {code(facts.window)} of them, and {PROJECT} keeps it to "
            "that part; diffusers and ComfyUI's own loader use it in all of them.",
        )
    if 0 < facts.held_out < 50:
        count = facts.after.what if facts.after else f"{facts.held_out} held-out prompt{'s' * (facts.held_out != 1)}"
        lines.insert(1, f"{count} can show a large change and not a small one.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(facts: Facts) -> str:
    lines = []
    for one in facts.licences:
        text = link(one.text, one.link) if one.link else in_markdown(one.text)
        lines.append(f"- {in_markdown(one.of)}: {text}" + ("" if one.binds else " (only watched)"))
    words = "The adapter comes under the licence of the model it was made from; what it was trained with is listed too."
    return f"## Licences\n\n{words}\n\n" + "\n".join(lines)


def _files(facts: Facts) -> str:
    about = {
        HUB_WEIGHTS: "the adapter, for diffusers and PEFT",
        CONFIG: "all settings, the versions of the libraries, the result",
        METRICS: "a line for each optimizer step, with every score of the evidence",
        CURVE: "reward and the scores of the evidence over the steps",
        SHEET: f"{_kind_of_prompts(facts)} prompts before and after",
    }
    rows = [
        f"| {link(name, name)} | {about.get(name, 'the adapter, for ComfyUI')} |"
        for name in facts.files
        if "/" not in name
    ]
    return "## Files\n\n| | |\n|---|---|\n" + "\n".join(rows)


# --- words -----------------------------------------------------------------------------------------------------------


def _of_prompts(facts: Facts) -> str:
    count = f"{facts.held_out} held-out prompt{'s' * (facts.held_out != 1)}" if facts.held_out else "Held-out prompts"
    count = facts.after.what if facts.after else count
    comma = "," * (_kind_of_prompts(facts) == "training")
    return f"{count}{comma} of {facts.source}" if facts.source else count


def _kind_of_prompts(facts: Facts) -> str:
    return "held-out" if facts.after is None or facts.after.held_out else "training"


def _prompts_text(facts: Facts) -> str:
    count = f"{facts.num_prompts}" if facts.num_prompts else ""
    return f"{count} of {facts.source}" if facts.source and count else count or facts.source


def _earlier(facts: Facts) -> bool:
    return 0 < facts.kept_step < facts.steps


def _example(facts: Facts) -> str:
    return facts.widgets[0][0] if facts.widgets else facts.prompts[0] if facts.prompts else "a photo of a dog"


def _text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
