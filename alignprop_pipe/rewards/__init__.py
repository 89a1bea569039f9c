"""Rewards: images and prompts in, one differentiable score per image out. One file for each scorer.

Names are loaded on first use, so that the table of rewards (`REGISTRY`) can be read without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward, WeightedSum
    from alignprop_pipe.rewards.combine import ClipAbove, Min, Scaled, SoftMin, Watch, ZScore, calibrate
    from alignprop_pipe.rewards.entries import RewardEntry
    from alignprop_pipe.rewards.guard import check_reward
    from alignprop_pipe.rewards.networks.clip import ClipScore
    from alignprop_pipe.rewards.objects.count import Contains, Count, Without
    from alignprop_pipe.rewards.registry import REGISTRY, as_reward, parse_reward, register
    from alignprop_pipe.rewards.scorers.aesthetic import Aesthetic, Aesthetic25
    from alignprop_pipe.rewards.scorers.ask import Ask
    from alignprop_pipe.rewards.scorers.hpsv2 import HpsV2, HpsV21
    from alignprop_pipe.rewards.scorers.imagereward import ImageReward
    from alignprop_pipe.rewards.scorers.jpeg import Jpeg
    from alignprop_pipe.rewards.scorers.judge import AttributeJudge
    from alignprop_pipe.rewards.scorers.pickscore import PickScore
    from alignprop_pipe.rewards.scorers.python import PythonReward
    from alignprop_pipe.rewards.scorers.simple import Brightness, Colour, Sharpness, Symmetry, TotalVariation
    from alignprop_pipe.rewards.smooth import Smooth

_HOME = {
    "Aesthetic": "scorers.aesthetic",
    "Aesthetic25": "scorers.aesthetic",
    "HpsV2": "scorers.hpsv2",
    "HpsV21": "scorers.hpsv2",
    "PickScore": "scorers.pickscore",
    "Ask": "scorers.ask",
    "Reward": "base",
    "WeightedSum": "base",
    "ClipScore": "networks.clip",
    "ClipAbove": "combine",
    "Min": "combine",
    "Scaled": "combine",
    "Smooth": "smooth",
    "SoftMin": "combine",
    "Watch": "combine",
    "ZScore": "combine",
    "calibrate": "combine",
    "RewardEntry": "entries",
    "check_reward": "guard",
    "ImageReward": "scorers.imagereward",
    "Jpeg": "scorers.jpeg",
    "AttributeJudge": "scorers.judge",
    "Contains": "objects.count",
    "Count": "objects.count",
    "Without": "objects.count",
    "PythonReward": "scorers.python",
    "REGISTRY": "registry",
    "as_reward": "registry",
    "parse_reward": "registry",
    "register": "registry",
    "Brightness": "scorers.simple",
    "Colour": "scorers.simple",
    "Sharpness": "scorers.simple",
    "Symmetry": "scorers.simple",
    "TotalVariation": "scorers.simple",
}
__all__ = [
    "REGISTRY",
    "Aesthetic",
    "Aesthetic25",
    "Ask",
    "AttributeJudge",
    "Brightness",
    "ClipAbove",
    "ClipScore",
    "Colour",
    "Contains",
    "Count",
    "HpsV2",
    "HpsV21",
    "ImageReward",
    "Jpeg",
    "Min",
    "PickScore",
    "PythonReward",
    "Reward",
    "RewardEntry",
    "Scaled",
    "Sharpness",
    "Smooth",
    "SoftMin",
    "Symmetry",
    "TotalVariation",
    "Watch",
    "WeightedSum",
    "Without",
    "ZScore",
    "as_reward",
    "calibrate",
    "check_reward",
    "parse_reward",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
