"""Which pipeline classes of diffusers are swept, and with which arguments they are called."""

import inspect
import re
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from sweep.recipes import DROP, recipe_for

TEXTS = ("prompt", "editing_prompt", "content_prompt")
OUT_OF_SCOPE = {
    r".*Audio.*|AceStep.*|MusicLDM.*": "draws sound",
    r"DiffusionGemma.*|LLaDA2.*": "writes text",
    r".*Prior(Redux|Emb2Emb)?Pipeline": "makes embeddings for another pipeline",
    r"ShapE.*": "makes three-dimensional shapes",
    r"RFD4.*": "makes proteins",
}
"""Classes that take a prompt and draw no picture, by patterns of their names."""


def pipeline_classes() -> dict[str, type]:
    """Every pipeline class that diffusers exports."""
    found = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            found[name] = kind
    return found


def why_not(kind: type) -> str:
    """Why this class draws no picture from text, or nothing where it does."""
    if "__call__" not in dir(kind):
        return "only holds other pipelines"
    taken = call_parameters(kind)
    if not any(name in taken for name in TEXTS):
        return "takes no text"
    reasons = (reason for pattern, reason in OUT_OF_SCOPE.items() if re.fullmatch(pattern, kind.__name__))
    return next(reasons, "")


def makes_pictures(kind: type) -> bool:
    return not why_not(kind)


def call_parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(inspect.unwrap(kind.__call__)).parameters)


def arguments(kind: type, batch: int) -> dict[str, Any]:
    """Arguments of the stock call but for generators and the type of output; small and few."""
    recipe = recipe_for(kind.__name__)
    usual = {
        "prompt": list(recipe.prompts[:batch]) if batch > 1 else recipe.prompts[0],
        "num_inference_steps": recipe.steps,
        "guidance_scale": 2.0,
        "eta": 0.0,
        "height": 16,
        "width": 16,
    }
    given = {name: value(batch) if callable(value) else value for name, value in recipe.call.items()}
    taken = call_parameters(kind)
    return {name: value for name, value in {**usual, **given}.items() if name in taken and value is not DROP}
