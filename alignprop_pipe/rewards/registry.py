"""The rewards that can be asked for by name, and text -> reward. A new scorer is one file and one entry here.

Importing this module loads no torch: the table holds where each reward is, and `make` goes there.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.expression import read_expression

if TYPE_CHECKING:
    from alignprop_pipe.rewards.base import Reward

_HERE = "alignprop_pipe.rewards"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardEntry:
    """A reward that has a name. `where` is `module:Class`, imported when it is made.

    `size_mb` is what has to be downloaded for the default weights; 0 when nothing has. A `judge` is only watched.
    """

    name: str
    summary: str
    licence: str
    where: str
    size_mb: float = 0.0
    judge: bool = False

    def make(self, *args: Any, **kwargs: Any) -> "Reward":
        """The reward with these arguments. Raises RewardError for arguments that it does not take."""
        module, _, attribute = self.where.partition(":")
        kind = getattr(import_module(module), attribute)
        try:
            inspect.signature(kind.__init__).bind(None, *args, **kwargs)
        except TypeError as error:
            known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
            takes = f"it takes: {', '.join(known)}" if known else "it takes no arguments"
            raise RewardError(f"reward {self.name!r}: {error}; {takes}") from error
        return kind(*args, **kwargs)


REGISTRY: dict[str, RewardEntry] = {
    entry.name: entry
    for entry in (
        RewardEntry(
            name="clip",
            summary="agreement of picture and prompt: cosine by a CLIP model (the bundled one, or model=...), -1 to 1",
            licence="bundled weights: Apache-2.0",
            where=f"{_HERE}.clip:ClipScore",
        ),
        RewardEntry(
            name="jpeg",
            summary="compressibility: minus what JPEG loses of the picture; -jpeg asks for rich detail; logs jpeg_kb",
            licence="no weights",
            where=f"{_HERE}.jpeg:Jpeg",
        ),
        RewardEntry(
            name="brightness",
            summary="mean luma, 0 (black) to 1 (white)",
            licence="no weights",
            where=f"{_HERE}.simple:Brightness",
        ),
        RewardEntry(
            name="colour",
            summary="colourfulness after Hasler and Suesstrunk, 0 (grey) to about 1; vivid photographs: 0.4",
            licence="no weights",
            where=f"{_HERE}.simple:Colour",
        ),
        RewardEntry(
            name="sharpness",
            summary="variance of the Laplacian of the luma, 0 (flat) to 16 (a chessboard of pixels)",
            licence="no weights",
            where=f"{_HERE}.simple:Sharpness",
        ),
        RewardEntry(
            name="tv",
            summary="total variation: mean step between neighbouring pixels, 0 (flat) to 2; -tv makes pictures calm",
            licence="no weights",
            where=f"{_HERE}.simple:TotalVariation",
        ),
        RewardEntry(
            name="symmetry",
            summary="minus the squared difference between left and right, -1 to 0 (mirror-symmetric)",
            licence="no weights",
            where=f"{_HERE}.simple:Symmetry",
        ),
        RewardEntry(
            name="emoji_judge",
            summary="is everything that the emoji prompt names right: 1 or 0; a judge, never trained on",
            licence="bundled weights: Apache-2.0",
            where=f"{_HERE}.judge:AttributeJudge",
            judge=True,
        ),
        RewardEntry(
            name="python",
            summary="your own: module:function or file.py:function, called with images (and prompts, and targets)",
            licence="yours",
            where=f"{_HERE}.python:PythonReward",
        ),
    )
}


def parse_reward(text: str) -> "Reward":
    """`clip + 0.1*jpeg(quality=80) - tv` -> the reward. `str()` of it gives the text back.

    Terms are names of `REGISTRY`, with arguments or without, `module:function` and `file.py:function`; they are
    added, subtracted, and multiplied with numbers. Raises RewardError that points at the character.
    """
    value = read_expression(text, _made)
    from alignprop_pipe.rewards.base import Reward

    if not isinstance(value, Reward):
        raise RewardError(f"{text!r} is no reward; use names and numbers, for example: clip + 0.1*jpeg")
    return value


def as_reward(source: "Reward | str | Callable[..., Any]") -> "Reward":
    """Make a reward of a reward, an expression, or any Python function that keeps the gradient."""
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.rewards.python import PythonReward

    if isinstance(source, Reward):
        return source
    if isinstance(source, str):
        return parse_reward(source)
    if callable(source):
        return source() if isinstance(source, type) and issubclass(source, Reward) else PythonReward(source)
    raise RewardError(
        f"a reward cannot be made of {type(source).__name__}: give an expression such as 'clip + 0.1*jpeg', a Reward, "
        "or a function of (images), (images, prompts) or (images, prompts, targets)"
    )


def _made(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Reward":
    if ":" in name:
        return REGISTRY["python"].make(name, *args, **kwargs)
    if name not in REGISTRY:
        close = difflib.get_close_matches(name.lower(), REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(REGISTRY))}"
        raise RewardError(f"reward {name!r} is not known; {hint}")
    return REGISTRY[name].make(*args, **kwargs)
