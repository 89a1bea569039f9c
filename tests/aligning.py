"""What the tests of `align` share: quick settings, and everything about a pipeline that a run must leave alone."""

import copy
import inspect
from typing import Any

import miniatures
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.cli.console import stop_on_interrupt
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.training.result import AlignResult

PROMPTS = ["a red dog", "two cats", "three birds on the snow", "a boat", "one house", "a fish"]

QUICK: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "rank": 2,
    "lr": 1e-2,
    "weight_decay": 1e-4,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "height": 16,
    "width": 16,
    "truncation": "last:1",
    "eval_prompts": 0,
}


def settings(**changed: Any) -> AlignConfig:
    return AlignConfig().replace(**{**QUICK, "judges": (), **changed})


def aligned(pipe: DiffusionPipeline | None = None) -> AlignPropPipeline:
    return AlignPropPipeline.from_pipe(miniatures.sd15() if pipe is None else pipe)


def align(pipe: AlignPropPipeline, reward: Any = "brightness", prompts: Any = PROMPTS, **changed: Any) -> AlignResult:
    given = {name: changed.pop(name) for name in ("out", "on_step", "stop") if name in changed}
    return pipe.align(reward, prompts, AlignConfig().replace(**QUICK, judges=()), **given, **changed)


def align_until_ctrl_c(*arguments: Any, **changed: Any) -> AlignResult:
    """As the command line does it: Ctrl-C ends the run after the step."""
    with stop_on_interrupt() as stop:
        return align(*arguments, stop=stop, **changed)


def pictures(pipe: DiffusionPipeline, **changed: Any) -> Tensor:
    arguments = {"prompt": PROMPTS[:2], "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt", **changed}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(**arguments, generator=generators)[0]  # pyright: ignore[reportCallIssue]


def adapter(pipe: DiffusionPipeline) -> list[Tensor]:
    """A copy of the adapter's weights; an empty list where there is none."""
    return lora.snapshot(pipeline_parts.denoisers(pipe))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def is_stock(pipe: DiffusionPipeline) -> bool:
    """Whether there is no PEFT layer left anywhere."""
    parts = pipeline_parts.components(pipe).values()
    layers = [module for part in parts for module in part.modules() if isinstance(module, BaseTunerLayer)]
    return not layers and not any(getattr(part, "_hf_peft_config_loaded", False) for part in parts)


def _base_name(path: str) -> str | None:
    """The name that a module or weight has without an adapter round it; None for the adapter's own."""
    return None if "lora_" in path else path.replace(".base_layer", "")


def state(pipe: DiffusionPipeline) -> dict[Any, Any]:
    """Modes, weights, hooks, replaced methods, guards, configuration: by names without the adapter."""
    found: dict[Any, Any] = {
        "config": dict(pipe.config),
        "progress": copy.deepcopy(vars(pipe).get("_progress_bar_config", "absent")),
        "guards": [id(getattr(pipe, name, None)) for name in patching.GUARDS],
        "scheduler": {key for key, value in vars(pipeline_parts.scheduler(pipe)).items() if inspect.isroutine(value)},
    }
    for name, part in pipeline_parts.components(pipe).items():
        found[name, "own"] = {key: id(value) for key, value in vars(part).items() if inspect.isroutine(value)}
        for path, module in part.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if (base := _base_name(path)) is not None:
                found[name, base] = (module.training, [list(one) for one in hooks], "forward" in vars(module))
        for path, weight in part.named_parameters():
            if (base := _base_name(path)) is not None:
                about = (weight.requires_grad, weight.dtype, weight.device, weight.grad is None)
                found[name, "weight", base] = (*about, weight.double().sum().item())
    return found
