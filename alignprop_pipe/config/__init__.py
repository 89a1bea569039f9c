"""What decides a run: its choices, the settings with their checks, the presets, and the text form of a reward."""

from importlib import import_module
from typing import Any

OF_SETTINGS = ("AlignConfig", "EvaluationOptions", "LoraOptions", "OptimizerOptions", "SamplingOptions", "PRESETS")
"""Names that this had when it was one file."""


def __getattr__(name: str) -> Any:
    if name not in OF_SETTINGS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.settings"), name)
