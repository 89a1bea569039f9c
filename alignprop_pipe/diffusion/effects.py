"""Settings that change nothing, told once before a run: those that somebody has set, not the usual ones."""

import inspect
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from diffusers import DiffusionPipeline

from alignprop_pipe.config.choices import KeepSteps
from alignprop_pipe.config.settings import AlignConfig, SamplingOptions, leaves
from alignprop_pipe.config.truncation import LastK, RandomLastK
from alignprop_pipe.diffusion import pipeline_call, pipeline_parts

logger = logging.getLogger(__name__)

OF_LOOKS = ("eval_every", "eval_batch_size", "keep_best", "patience", "judges")
DTYPES = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
DRAWING = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt", "eta")


def settings_without_effect(
    pipe: DiffusionPipeline, config: AlignConfig, usual: AlignConfig, call_kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Name of a setting that was set and changes nothing in this run -> why, and what to do.

    Where only a part of it changes nothing, the words begin with "past". Set is what differs from the default and from
    `usual`, the model's preset.
    """
    defaults = {name: value for name, _, value in leaves(AlignConfig())}
    presets = {name: value for name, _, value in leaves(usual)}
    given = {n: value for n, _, value in leaves(config) if value not in (defaults[n], presets[n], ())}
    return {
        **drawing_without_effect(pipe, config.sampling, given, call_kwargs),
        **_steps(config, given),
        **_looks(config, given),
        **_precision(pipe, config, given),
    }


def drawing_without_effect(
    pipe: DiffusionPipeline, sampling: SamplingOptions, given: Collection[str], call_kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """The same for what is set of the options of drawing."""
    taken, kind = pipeline_call.call_parameters(pipe), type(pipe).__name__
    found = {name: f"{kind} takes no {name}" for name in DRAWING if name in given and name not in taken}
    for name in DRAWING:
        if name in given and name in call_kwargs:
            found[name] = f"the call's own {name} goes before it"
    unguided = _unguided(sampling, taken, call_kwargs)
    if "negative_prompt" in given and "negative_prompt" in taken and unguided:
        found["negative_prompt"] = unguided
    if (
        "eta" in given
        and "eta" in taken
        and "eta" not in inspect.signature(pipeline_parts.scheduler(pipe).step).parameters
    ):
        found["eta"] = f"{type(pipeline_parts.scheduler(pipe)).__name__} takes none; DDIMScheduler does"
    return found


def tell(config: AlignConfig | SamplingOptions, found: Mapping[str, str]) -> None:
    """Log what has no effect; a command shows it, and writes it as a record too."""
    values = {name: value for name, _, value in leaves(config)} if isinstance(config, AlignConfig) else asdict(config)
    for name, why in found.items():
        value = values[name] if isinstance(values[name], int | float | str) else str(values[name])
        said = f" {why}" if why.startswith("past ") else f": {why}"  # the first is of a part of what the value says
        logger.warning("%s=%r has no effect%s", name, value, said, extra={"setting": name})


# --- inside ----------------------------------------------------------------------------------------------------------


def _unguided(sampling: SamplingOptions, taken: Mapping[str, inspect.Parameter], call_kwargs: Mapping[str, Any]) -> str:
    """Why the pipeline does not look at the negative prompt, if it does not."""
    if "true_cfg_scale" in taken:  # guidance_scale is then an input of the network
        scale, name = call_kwargs.get("true_cfg_scale", taken["true_cfg_scale"].default), "true_cfg_scale"
    elif "guidance_scale" in taken:
        scale, name = call_kwargs.get("guidance_scale", sampling.guidance_scale), "guidance_scale"
    else:
        return ""
    is_off = isinstance(scale, int | float) and scale <= 1
    return f"{name}={scale:g} is without guidance, which alone looks at it; use a {name} above 1" if is_off else ""


def _steps(config: AlignConfig, given: Collection[str]) -> dict[str, str]:
    """Of the steps, of optimizing and of denoising."""
    found, total = {}, config.sampling.num_inference_steps
    warmup, graded = config.optimizer.warmup_steps, config.truncation.most(total)
    if "warmup_steps" in given and warmup == 1:
        found["warmup_steps"] = "the rate of the first step is lr with it and without; 2 or more let it rise"
    elif "warmup_steps" in given and warmup > config.steps:
        found["warmup_steps"] = f"past the end of {config.steps} steps: the rate never gets to lr"
    if "max_skipped" in given and config.max_skipped > config.steps:
        found["max_skipped"] = f"{config.max_skipped} is more than the {config.steps} steps of the run"
    if "truncation" in given:
        match config.truncation:
            case LastK(k) if k > total:
                found["truncation"] = f"{config.truncation} is as 'full': there are {total} denoising steps"
            case RandomLastK(low, high) if low > total or (high is not None and high > total):
                found["truncation"] = f"past the {total} denoising steps that there are"
            case _:
                pass
    match config.checkpointing:
        case KeepSteps(kept) if "checkpointing" in given and kept >= graded:
            found["checkpointing"] = f"{kept} is as 'none': at most {graded} steps carry gradient"
        case _:
            pass
    return found


def _looks(config: AlignConfig, given: Collection[str]) -> dict[str, str]:
    """Of the evaluations of the held-out prompts."""
    options, found = config.evaluation, {}
    if not options.eval_prompts:
        return {name: "eval_prompts=0 switches the held-out evidence off" for name in OF_LOOKS if name in given}
    looks = config.steps // options.eval_every if options.eval_every else 0
    if "eval_every" in given and options.eval_every > config.steps:
        found["eval_every"] = (
            f"{options.eval_every} is past the end of {config.steps} steps: there is no evaluation between"
        )
    if "patience" in given and options.patience and options.patience >= max(1, looks):
        found["patience"] = f"{options.patience} evaluations without gain cannot come before the end: there are {looks}"
    if "keep_best" in given and options.keep_best and looks < 2 and config.steps < 2 * max(1, options.eval_every):
        found["keep_best"] = (
            "there is one evaluation after the start, and nothing to choose from; use a smaller eval_every"
        )
    return found


def _precision(pipe: DiffusionPipeline, config: AlignConfig, given: Collection[str]) -> dict[str, str]:
    wanted = DTYPES.get(config.mixed_precision)
    own = {str(next(part.parameters()).dtype) for part in pipeline_parts.denoisers(pipe).values()}
    if "mixed_precision" in given and own == {wanted}:
        return {"mixed_precision": f"the denoiser is in {wanted} already"}
    return {}
