"""The model card: what a run knows about its adapter -> the README.md of its repository, with the evidence in it.

The card claims what was measured and no more: held-out scores come with the standard error of their paired
differences, judges are named as such, and what fell is said at the top. The facts come from headers and folders that
anybody may have written: every text of theirs goes through `escaping`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from alignprop_pipe.config.choices import Maximize, loss_from_text
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.escaping import cell, code, fenced, in_markdown, in_python, in_shell, link, visible
from alignprop_pipe.hub.card_facts import PAPER, PROJECT, Facts
from alignprop_pipe.hub.licences import HUB, overall
from alignprop_pipe.layout import CONFIG, CURVE, HUB_WEIGHTS, METRICS, SHEET
from alignprop_pipe.records import Change, part_of
from alignprop_pipe.runs.summary import RunWarning, warnings_of


class Markdown(str):
    """Text that is Markdown already, and goes into a page as it is."""


def _marked(render: Callable[..., str]) -> Callable[..., Markdown]:
    return lambda text, *more: Markdown(render(text, *more))


# Every value is shown as the text that it is, unless a filter has made Markdown of it; a missing name is an error.
TEMPLATES = Environment(
    loader=PackageLoader("alignprop_pipe.hub", "."),
    autoescape=False,
    finalize=lambda value: in_markdown(value) if isinstance(value, str) and not isinstance(value, Markdown) else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {
    "code": _marked(code),
    "cell": _marked(cell),
    "fenced": _marked(lambda text, language: fenced(language, text)),
    "link": _marked(link),
    "literal": Markdown,  # for names of our own
}


def model_card(facts: Facts) -> ModelCard:
    """The card, metadata and text; the same facts give the same card.

    Examples:
        >>> model_card(Facts(repo_id="me/foxes", reward="clip")).text.strip().splitlines()[0]
        '# foxes'
    """
    kind = facts.kind_of_prompts
    about_files = {
        HUB_WEIGHTS: "the adapter, for diffusers and PEFT",
        CONFIG: "all settings, the versions of the libraries, the result",
        METRICS: "a line for each optimizer step, with every score of the evidence",
        CURVE: "reward and the scores of the evidence over the steps",
        SHEET: f"{kind} prompts before and after",
    }
    body = TEMPLATES.get_template("card.md.jinja").render(
        facts=facts,
        project=PROJECT,
        paper=PAPER,
        hub=HUB,
        names={"weights": HUB_WEIGHTS, "config": CONFIG, "metrics": METRICS, "curve": CURVE, "sheet": SHEET},
        warnings=[_parts(warning, facts) for warning in warnings_in(facts)],
        code_for_diffusers=_code_for_diffusers(facts),
        command_to_sample=f"alignprop sample {in_shell(facts.base or 'MODEL')} {in_shell(_example(facts))} "
        f"--adapter {in_shell(facts.repo_id)} --compare",
        results=[_row(facts, name, change) for name, change in facts.scores.items()],
        has_errors=any(math.isfinite(change.standard_error) for change in facts.changes.values()),
        making=_making(facts),
        about_files={name: about_files.get(name, "the adapter, for ComfyUI") for name in facts.files},
    )
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}")


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
    """One for each held-out score: the value after, with the value before and the standard error next to it."""
    return [
        EvalResult(
            task_type=facts.task,
            dataset_type="custom",
            dataset_name=visible(facts.of_prompts),
            metric_type=visible(name),
            metric_name=visible(f"{name} ({_kind(facts, name)})" if _kind(facts, name) not in ("", name) else name),
            metric_value=_plain(change.after),
            metric_args={"before": _plain(change.before), "standard_error_of_change": _plain(change.standard_error)},
        )
        for name, change in facts.scores.items()
        if math.isfinite(change.after)
    ]


# --- what is in the text ---------------------------------------------------------------------------------------------


def _parts(warning: RunWarning, facts: Facts) -> dict[str, str]:
    """A warning, taken apart where it names a judge, whose name is shown as code."""
    said, score, more = (
        warning.text.partition(warning.score) if warning.score in facts.judges else (warning.text, "", "")
    )
    return {"said": said, "score": score, "more": more}


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


def _row(facts: Facts, name: str, change: Change) -> dict[str, str]:
    error = f" ± {change.standard_error:.2g}" if math.isfinite(change.standard_error) else ""
    moved = f"{change.difference:+.3g}{error}" if math.isfinite(change.difference) else "–"
    numbers = {"before": _text(change.before), "after": _text(change.after), "change": moved}
    return {"score": name, "kind": _kind(facts, name), **numbers}


def _kind(facts: Facts, name: str) -> str:
    if name == "reward":
        return "the trained reward"
    if name == "diversity":
        return "mean distance of two pictures"
    if name in facts.judges:
        is_part = name not in facts.after.main_judges if facts.after else part_of(name, facts.judges)
        return "part of a judge" if is_part else "judge, never trained on"
    return "part of the reward"


def _making(facts: Facts) -> list[tuple[str, str]]:
    config = facts.config
    batch = config.get("batch_size", 0) * config.get("gradient_accumulation_steps", 1)
    kept = f", of which that of step {facts.kept_step} was kept" if 0 < facts.kept_step < facts.steps else ""
    truncation = config.get("truncation")
    rows = [
        ("reward", Markdown(cell(facts.reward)) if facts.reward else ""),
        ("prompts", facts.prompts_text),
        ("adapter", facts.size),
        ("optimizer steps", f"{facts.steps or ''}{kept}"),
        ("pictures trained on", f"{facts.steps * batch} ({batch} a step)" if batch and facts.steps else ""),
        ("time", _duration(facts.seconds)),
        ("device", facts.device),
        ("gradient", Markdown(f"through denoising steps {cell(truncation)}") if truncation else ""),
        ("seed", str(config.get("seed", ""))),
    ]
    return [(name, text) for name, text in rows if text]


# --- words -----------------------------------------------------------------------------------------------------------


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
