"""Rewards: images and prompts in, one differentiable score per image out. One file for each scorer.

Names are loaded on first use, so that the table of rewards (`REGISTRY`) can be read without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward, WeightedSum
    from alignprop_pipe.rewards.clip import ClipScore
    from alignprop_pipe.rewards.guard import check_reward
    from alignprop_pipe.rewards.jpeg import Jpeg
    from alignprop_pipe.rewards.judge import AttributeJudge
    from alignprop_pipe.rewards.python import PythonReward
    from alignprop_pipe.rewards.registry import REGISTRY, RewardEntry, as_reward, parse_reward
    from alignprop_pipe.rewards.simple import Brightness, Colour, Sharpness, Symmetry, TotalVariation

_HOME = {
    "Reward": "base",
    "WeightedSum": "base",
    "ClipScore": "clip",
    "check_reward": "guard",
    "Jpeg": "jpeg",
    "AttributeJudge": "judge",
    "PythonReward": "python",
    "REGISTRY": "registry",
    "RewardEntry": "registry",
    "as_reward": "registry",
    "parse_reward": "registry",
    "Brightness": "simple",
    "Colour": "simple",
    "Sharpness": "simple",
    "Symmetry": "simple",
    "TotalVariation": "simple",
}
__all__ = [
    "REGISTRY",
    "AttributeJudge",
    "Brightness",
    "ClipScore",
    "Colour",
    "Jpeg",
    "PythonReward",
    "Reward",
    "RewardEntry",
    "Sharpness",
    "Symmetry",
    "TotalVariation",
    "WeightedSum",
    "as_reward",
    "check_reward",
    "parse_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
