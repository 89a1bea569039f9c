"""The model card: what a run knows about its adapter -> the README.md of its repository, with the evidence in it.

The card claims what was measured and no more: held-out scores come with the standard error of their paired
differences, judges are named as such, and what fell is said at the top.
"""

import json
import math
import re
import shlex
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alignprop_pipe.card_facts import CONFIG, CURVE, METRICS, PAPER, PROJECT, SHEET, WEIGHTS, Facts
from alignprop_pipe.licences import HUB, overall
from alignprop_pipe.records import Change


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


def warning_sentences(facts: Facts) -> list[str]:
    """What a visitor should know before the numbers: every held-out score that fell by its standard error or more."""
    if not facts.changes:
        return ["Nothing was measured on held-out prompts: there is no evidence that this adapter improves pictures."]
    found = []
    for name, change in facts.changes.items():
        if name == "reward" and _fell(change):
            found.append(f"The trained reward itself fell on held-out prompts, {_numbers(change)}.")
        # A judge's single attributes are several: at one standard error one of them falls by chance in every other run.
        elif name in facts.judges and _fell(change, errors=2 if "." in name else 1):
            found.append(f"The judge {_code(name)}, which was never trained on, fell, {_numbers(change)}.")
    if facts.diversity is not None and _fell(facts.diversity):
        found.append(
            f"Diversity fell, {_numbers(facts.diversity)}: pictures of different prompts have become more alike."
        )
    if found and "reward" in facts.changes and facts.changes["reward"].difference > 0:
        found.append(
            "The reward rose meanwhile, so the adapter may please the reward without making better pictures. Look at "
            "the pictures before you use it."
        )
    return found


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(facts: Facts) -> ModelCardData:
    rewards = re.findall(r"[A-Za-z_][\w.]*(?=\s*(?:\(|$|[-+*,)]))", re.sub(r"""(["']).*?\1""", "", facts.reward))
    tags = ["lora", "alignprop", facts.task, "diffusers", "template:diffusion-lora"]
    tags += [f"reward:{name}" for name in dict.fromkeys(rewards) if name not in ("py",)]
    licence = overall(facts.licences)
    if licence["license"] == "other":
        licence["license_link"] = f"{HUB}{facts.repo_id}#licences"
    more: dict[str, Any] = (
        {"widget": [{"text": text, "output": {"url": url}} for text, url in facts.widgets]} if facts.widgets else {}
    )
    return ModelCardData(
        base_model=facts.base if "/" in facts.base else None,
        library_name="diffusers",
        pipeline_tag=facts.task,
        tags=tags,
        eval_results=_eval_results(facts) or None,
        model_name=facts.name if facts.changes else None,
        **licence,
        **more,
    )


def _eval_results(facts: Facts) -> list[EvalResult]:
    """One for each held-out score: the value after, with the value before and the standard error beside it."""
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type="custom",
            dataset_name=_of_prompts(facts),
            metric_type=name,
            metric_name=f"{name} ({_kind(facts, name)})" if _kind(facts, name) not in ("", name) else name,
            metric_value=_plain(change.after),
            metric_args={"before": _plain(change.before), "standard_error_of_change": _plain(change.standard_error)},
        )
        for name, change in facts.scores.items()
        if math.isfinite(change.after)
    ]


# --- sections --------------------------------------------------------------------------------------------------------


def _opening(facts: Facts) -> str:
    base = f"[{facts.base}]({HUB}{facts.base})" if "/" in facts.base else _code(facts.base) if facts.base else ""
    if facts.bundled:
        base = f"the small model {base} (it ships inside {PROJECT} and is not on the Hub)"
    made = f"that was mixed by {PROJECT} of {' and '.join(facts.mixed)}."
    if not facts.mixed:
        reward = f"raise the reward {_code(facts.reward)}" if facts.reward else "raise a reward"
        made = (
            f"that was trained to {reward}: the reward's gradient flows back through the denoising chain "
            f"([AlignProp]({PAPER})), by {PROJECT}."
        )
    gallery = "<Gallery />\n\n" if facts.widgets else ""
    caption = (
        "\n\nThe pictures above are of held-out prompts, evenly spaced and not chosen by score." if gallery else ""
    )
    return f"# {facts.name}\n\n{gallery}A LoRA for {base or 'a local model'} {made} No trigger word is needed.{caption}"


def _warnings(facts: Facts) -> str:
    found = warning_sentences(facts)
    if facts.status not in ("", "completed"):
        found.append(f"The run did not go to its end: {facts.status}.")
    return "> [!WARNING]\n" + "\n".join(f"> {sentence}" for sentence in found) if found else ""


def _usage(facts: Facts) -> str:
    comfy = [name for name in facts.files if name.endswith(".safetensors") and name != WEIGHTS]
    model = facts.base or "MODEL"
    words = f"alignprop sample {model} {shlex.quote(_example(facts))} --adapter {facts.repo_id} --compare"
    blocks = [
        f"## Use it\n\nIn diffusers:\n\n```python\n{_code_for_diffusers(facts)}\n```\n\nWithout a network (the file in "
        f'the cache, `HF_HUB_OFFLINE=1`), add `weight_name="{WEIGHTS}"`.'
    ]
    if comfy:
        each = "; it takes one such node for each of the two models" if len(comfy) > 1 else ""
        blocks.append(
            f"In ComfyUI: put {' and '.join(map(_code, comfy))} into `models/loras` and a *Load LoRA* node behind the "
            f"one that loads the base model, strength 1.0{each}."
        )
    blocks.append(
        f"With {PROJECT}, base and adapter side by side from the same noise:\n\n```bash\n{words}\n```\n\nA strength "
        f"below 1 (`--scale 0.6`, or `pipe.set_adapters` in diffusers) stays nearer to the base model."
    )
    return "\n\n".join(blocks)


def _code_for_diffusers(facts: Facts) -> str:
    lines = ["from diffusers import DiffusionPipeline"]
    how = f'pipe = DiffusionPipeline.from_pretrained("{facts.base}")'
    if facts.bundled:
        lines = [f"from alignprop_pipe import AlignPropPipeline  # the base model is part of {PROJECT}"]
        how = f'pipe = AlignPropPipeline.from_pretrained("{facts.base}")'
    elif not facts.base:
        how = 'pipe = DiffusionPipeline.from_pretrained("BASE_MODEL")  # a local model: put yours of the same kind here'
    given = [_quoted(_example(facts))]
    if "image" in facts.parameters:
        lines.append("from diffusers.utils import load_image")
        given.append('image=load_image("picture.png")')
    for name in ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt"):
        value = facts.config.get("sampling", {}).get(name)
        if value not in (None, "") and name in facts.parameters:
            given.append(f"{name}={_quoted(value) if isinstance(value, str) else value}")
    result = "frames[0]" if facts.task == "text-to-video" else "images[0]"
    call = f"pipe({', '.join(given)}).{result}"
    shown = "frames" if facts.task == "text-to-video" else "image"
    return "\n".join([*lines, "", how, f'pipe.load_lora_weights("{facts.repo_id}")', f"{shown} = {call}"])


def _results(facts: Facts) -> str:
    if not facts.changes:
        return ""
    head = "| score | what it is | before | after | change |\n|---|---|---:|---:|---:|"
    rows = [_row(facts, name, change) for name, change in facts.scores.items()]
    parts = [f"## Results on held-out prompts\n\n{_of_prompts(facts)}, with the same noise before and after."]
    parts.append("\n".join([head, *rows]))
    if any(math.isfinite(change.standard_error) for change in facts.changes.values()):
        parts.append("± is the standard error of the mean paired difference; below two of them a change may be chance.")
    if not facts.judges:
        parts.append("No judge watched this run: all of these scores are the trained reward's own.")
    if SHEET in facts.files:
        parts.append(f"![Held-out prompts before and after, from the same noise, not chosen by score]({SHEET})")
    if CURVE in facts.files:
        parts.append(f"![The reward during training, and the held-out scores]({CURVE})")
    return "\n\n".join(parts)


def _row(facts: Facts, name: str, change: Change) -> str:
    error = f" ± {change.standard_error:.2g}" if math.isfinite(change.standard_error) else ""
    moved = f"{change.difference:+.3g}{error}" if math.isfinite(change.difference) else "–"
    return f"| {_cell(name)} | {_kind(facts, name)} | {_text(change.before)} | {_text(change.after)} | {moved} |"


def _kind(facts: Facts, name: str) -> str:
    if name == "reward":
        return "the trained reward"
    if name == "diversity":
        return "mean distance of two pictures"
    if name in facts.judges:
        return "part of a judge" if "." in name else "judge, never trained on"
    return "part of the reward"


def _making(facts: Facts) -> str:
    config = facts.config
    batch = config.get("batch_size", 0) * config.get("gradient_accumulation_steps", 1)
    rows = [
        ("reward", _code(facts.reward) if facts.reward else ""),
        ("prompts", _prompts_text(facts)),
        ("adapter", facts.size),
        (
            "optimizer steps",
            f"{facts.steps or ''}" + (f", of which that of step {facts.kept_step} was kept" * _earlier(facts)),
        ),
        ("pictures trained on", f"{facts.steps * batch} ({batch} a step)" if batch and facts.steps else ""),
        ("time", _duration(facts.seconds)),
        ("device", facts.device),
        ("gradient", f"through denoising steps {_code(config['truncation'])}" if config.get("truncation") else ""),
        ("seed", str(config.get("seed", ""))),
    ]
    table = "\n".join(f"| {name} | {_line(text)} |" for name, text in rows if text)
    parts = [f"## How it was made\n\n| | |\n|---|---|\n{table}"]
    if CONFIG in facts.files:
        parts.append(
            f"All settings are in [{CONFIG}]({CONFIG}), every step's numbers in [{METRICS}]({METRICS}). The run again:"
            f"\n\n```bash\n{facts.command}\n```"
        )
    if facts.prompts:
        some = f"The first {len(facts.prompts)} prompts" if facts.num_prompts > len(facts.prompts) else "The prompts"
        listed = "\n".join(f"- {_code(prompt)}" for prompt in facts.prompts)
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
            f"It was made for a part of the denoising steps, {_code(facts.window)} of them, and {PROJECT} keeps it to "
            "that part; diffusers and ComfyUI's own loader use it in all of them.",
        )
    if 0 < facts.held_out < 50:
        count = f"{facts.held_out} held-out prompt{'s' * (facts.held_out != 1)}"
        lines.insert(1, f"{count} can show a large change and not a small one.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(facts: Facts) -> str:
    lines = []
    for one in facts.licences:
        text = f"[{one.text}]({one.link})" if one.link else one.text
        lines.append(f"- {one.of}: {text}" + ("" if one.binds else " (only watched)"))
    words = "The adapter comes under the licence of the model it was made from; what it was trained with is listed too."
    return f"## Licences\n\n{words}\n\n" + "\n".join(lines)


def _files(facts: Facts) -> str:
    about = {
        WEIGHTS: "the adapter, for diffusers and PEFT",
        CONFIG: "all settings, the versions of the libraries, the result",
        METRICS: "a line for each optimizer step, with every score of every held-out prompt",
        CURVE: "reward and held-out scores over the steps",
        SHEET: "held-out prompts before and after",
    }
    rows = [
        f"| [{name}]({name}) | {about.get(name, 'the adapter, for ComfyUI')} |"
        for name in facts.files
        if "/" not in name
    ]
    return "## Files\n\n| | |\n|---|---|\n" + "\n".join(rows)


# --- words -----------------------------------------------------------------------------------------------------------


def _of_prompts(facts: Facts) -> str:
    count = f"{facts.held_out} held-out prompt{'s' * (facts.held_out != 1)}" if facts.held_out else "Held-out prompts"
    return f"{count} of {facts.source}" if facts.source else count


def _prompts_text(facts: Facts) -> str:
    count = f"{facts.num_prompts}" if facts.num_prompts else ""
    return f"{count} of {facts.source}" if facts.source and count else count or facts.source


def _earlier(facts: Facts) -> bool:
    return 0 < facts.kept_step < facts.steps


def _example(facts: Facts) -> str:
    return facts.widgets[0][0] if facts.widgets else facts.prompts[0] if facts.prompts else "a photo of a dog"


def _fell(change: Change, errors: int = 1) -> bool:
    spread = change.standard_error if math.isfinite(change.standard_error) else 0.0
    # Of a score that is 0 or 1, one picture of any number is a change of exactly one standard error, but for rounding.
    return change.difference < 0 and change.difference <= -errors * spread * (1 - 1e-6)


def _numbers(change: Change) -> str:
    error = f" ± {change.standard_error:.2g}" if math.isfinite(change.standard_error) else ""
    return f"from {_text(change.before)} to {_text(change.after)} ({change.difference:+.3g}{error})"


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


def _line(text: str) -> str:
    """Text that stays in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _cell(text: str) -> str:
    return _line(_code(text))


def _code(text: str) -> str:
    """Text as code, so that nothing in it is read as Markdown or HTML."""
    text = " ".join(text.encode("utf-8", "replace").decode().split()) or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _quoted(text: str) -> str:
    """Text as a literal of Python's, in double quotes."""
    return json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False)
