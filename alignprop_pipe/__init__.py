"""AlignProp for every diffusers pipeline: train a LoRA by backpropagating a reward through the sampler.

The public names are those of `_HOME`. Each is loaded when it is first asked for, so `import alignprop_pipe` is quick
and needs neither torch nor ComfyUI.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_pipe import errors as errors
    from alignprop_pipe import rewards as rewards
    from alignprop_pipe.adapters.adapter import Adapter as Adapter
    from alignprop_pipe.adapters.apply import load_adapter as load_adapter
    from alignprop_pipe.adapters.apply import save_adapter as save_adapter
    from alignprop_pipe.adapters.inspect import Inspection as Inspection
    from alignprop_pipe.adapters.inspect import inspect_adapter as inspect_adapter
    from alignprop_pipe.adapters.merge import merge as merge
    from alignprop_pipe.adapters.mix import mix as mix
    from alignprop_pipe.config.choices import Hinge as Hinge
    from alignprop_pipe.config.choices import KeepSteps as KeepSteps
    from alignprop_pipe.config.choices import Maximize as Maximize
    from alignprop_pipe.config.choices import RecomputeAll as RecomputeAll
    from alignprop_pipe.config.choices import RecomputeNone as RecomputeNone
    from alignprop_pipe.config.choices import Target as Target
    from alignprop_pipe.config.choices import Window as Window
    from alignprop_pipe.config.settings import AlignConfig as AlignConfig
    from alignprop_pipe.config.settings import EvaluationOptions as EvaluationOptions
    from alignprop_pipe.config.settings import LoraOptions as LoraOptions
    from alignprop_pipe.config.settings import OptimizerOptions as OptimizerOptions
    from alignprop_pipe.config.settings import SamplingOptions as SamplingOptions
    from alignprop_pipe.config.truncation import FullBackprop as FullBackprop
    from alignprop_pipe.config.truncation import LastK as LastK
    from alignprop_pipe.config.truncation import RandomLastK as RandomLastK
    from alignprop_pipe.errors import AlignError as AlignError
    from alignprop_pipe.pipeline import AlignPropPipeline as AlignPropPipeline
    from alignprop_pipe.prompts import PromptSet as PromptSet
    from alignprop_pipe.records import Evidence as Evidence
    from alignprop_pipe.records import Rollout as Rollout
    from alignprop_pipe.records import Scores as Scores
    from alignprop_pipe.records import StepRecord as StepRecord
    from alignprop_pipe.rewards.base import Reward as Reward
    from alignprop_pipe.rewards.registry import as_reward as as_reward
    from alignprop_pipe.rewards.registry import parse_reward as parse_reward
    from alignprop_pipe.runs.trackers import Trackers as Trackers
    from alignprop_pipe.training.evidence import evaluate as evaluate
    from alignprop_pipe.training.loop import align_steps as align_steps
    from alignprop_pipe.training.result import AlignResult as AlignResult

from alignprop_pipe import moved

__version__ = "0.2.0"

# We name no image processor by its class, so transformers' hint to write the class otherwise is not for our users.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)

_HOME = {
    "AlignPropPipeline": "alignprop_pipe.pipeline",
    "AlignResult": "alignprop_pipe.training.result",
    "Adapter": "alignprop_pipe.adapters.adapter",
    "align_steps": "alignprop_pipe.training.loop",
    "AlignConfig": "alignprop_pipe.config.settings",
    "LoraOptions": "alignprop_pipe.config.settings",
    "OptimizerOptions": "alignprop_pipe.config.settings",
    "SamplingOptions": "alignprop_pipe.config.settings",
    "EvaluationOptions": "alignprop_pipe.config.settings",
    "FullBackprop": "alignprop_pipe.config.truncation",
    "LastK": "alignprop_pipe.config.truncation",
    "RandomLastK": "alignprop_pipe.config.truncation",
    "RecomputeAll": "alignprop_pipe.config.choices",
    "RecomputeNone": "alignprop_pipe.config.choices",
    "KeepSteps": "alignprop_pipe.config.choices",
    "Maximize": "alignprop_pipe.config.choices",
    "Target": "alignprop_pipe.config.choices",
    "Hinge": "alignprop_pipe.config.choices",
    "Window": "alignprop_pipe.config.choices",
    "PromptSet": "alignprop_pipe.prompts",
    "Reward": "alignprop_pipe.rewards.base",
    "as_reward": "alignprop_pipe.rewards.registry",
    "parse_reward": "alignprop_pipe.rewards.registry",
    "Rollout": "alignprop_pipe.records",
    "StepRecord": "alignprop_pipe.records",
    "Evidence": "alignprop_pipe.records",
    "Scores": "alignprop_pipe.records",
    "evaluate": "alignprop_pipe.training.evidence",
    "save_adapter": "alignprop_pipe.adapters.apply",
    "load_adapter": "alignprop_pipe.adapters.apply",
    "Inspection": "alignprop_pipe.adapters.inspect",
    "inspect_adapter": "alignprop_pipe.adapters.inspect",
    "merge": "alignprop_pipe.adapters.merge",
    "mix": "alignprop_pipe.adapters.mix",
    "Trackers": "alignprop_pipe.runs.trackers",
    "AlignError": "alignprop_pipe.errors",
    "errors": "alignprop_pipe",
    "rewards": "alignprop_pipe",
}
"""Every public name and the module it comes from; those of `alignprop_pipe` itself are modules."""

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]  # a second list would go stale


moved.install()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None and name in moved.MOVED:
        return import_module(f"{__name__}.{name}")
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}") if home == __name__ else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
