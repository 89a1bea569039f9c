"""The dry call before training: a reward that cannot train is refused, in words that say what and where.

What breaks a reward is mostly silent: a detour through uint8, PIL or NumPy, `.detach()`, argmax, rounding. So the dry
call is recorded: the operation that took a tensor with gradient and gave one without is named, with file and line.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import jaxtyping
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alignprop_pipe.errors import AlignError, RewardError, RewardGradientError, RewardValueError
from alignprop_pipe.records import Images, Targets
from alignprop_pipe.rewards import base
from alignprop_pipe.rewards.base import Combination, Reward, members

_LEFT_TORCH = "leaves torch for NumPy or plain Python; compute the score by torch operations"
_WHOLE = "casts to whole numbers; stay in floating point"
_STEPS = "has no slope; use a smooth stand-in such as sigmoid, softmax or a mean"
_WHY = {
    **dict.fromkeys(("detach", "detach_", "data"), "cuts the gradient off; leave it out"),
    **dict.fromkeys(("numpy", "__array__", "tolist", "item", "__float__", "__int__"), _LEFT_TORCH),
    **dict.fromkeys(("tensor", "as_tensor"), "copies values without their gradient; use torch.stack or torch.cat"),
    **dict.fromkeys(("to", "type", "byte", "int", "long", "short", "char", "bool"), _WHOLE),
    **dict.fromkeys(("argmax", "argmin", "argsort", "bucketize", "count_nonzero"), f"gives positions and {_STEPS}"),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne"), f"compares: a threshold {_STEPS}"),
}
_FLAT = ("round", "floor", "ceil", "trunc", "sign", "heaviside", "fix")
_OUT_OF_TORCH = ("numpy", "__array__", "tolist", "item", "__float__", "__int__")
# Files between the reward's code and this recorder: torch, and the type checker that tests put round functions.
_BETWEEN = (__file__, str(Path(torch.__file__).parent), str(Path(jaxtyping.__file__).parent), "<")


def check_reward(reward: Reward, images: Images, prompts: list[str], targets: Targets) -> None:
    """Call the reward once on a small batch and follow the gradient back to the pixels.

    Every reward inside a combination is looked at for itself: `min` of two would hide the larger one, and `clip_above`
    rightly has no slope where noise scores well. So nothing need be calibrated yet. What is watched is left out.
    Gradient mode must be on. Raises RewardShapeError, RewardGradientError or RewardValueError; RewardError for a judge
    and for a reward that fails.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.errors import RewardError
        >>> from alignprop_pipe.rewards import as_reward, check_reward
        >>> blind = as_reward(lambda images: images.detach().mean(dim=(1, 2, 3)))
        >>> try:
        ...     check_reward(blind, torch.rand(2, 3, 64, 64), ["", ""], {})
        ... except RewardError as error:
        ...     print("gradient" in str(error))
        True
    """
    terms = list(reward.trained())
    if not terms:
        raise RewardError(f"{reward} is only watched, so nothing is left to train on; add a reward: clip + {reward}")
    for member in [member for term in terms for member in members(term)]:
        if not member.trainable and not isinstance(member, Combination):
            raise RewardError(
                f"{member.name} is only watched: a judge that is trained on can no longer judge. Take it out of the "
                f"reward and name it as a judge (judges=...), or write watch({member.name})"
            )
    if len(images) == 1:  # one score for the whole batch would pass for one score per image
        images, prompts = torch.cat([images, images.flip(-1)]), prompts * 2
        targets = {name: [*values, *values] for name, values in targets.items()}
    for term in terms:
        _check(term, images, prompts, targets)


def _check(reward: Reward, images: Images, prompts: list[str], targets: Targets) -> None:
    probe = images.detach().clone().requires_grad_(True)
    recorder = _Recorder()
    try:
        with recorder:
            scores = reward(probe, prompts, targets).total
    except RewardGradientError as error:
        raise RewardGradientError(f"{error}{recorder.suspicion()}") from error
    except (AlignError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if "requires grad" in str(error) and "numpy" in str(error):
            raise RewardGradientError(f"reward {reward.name!r} turns images into NumPy: this {_LEFT_TORCH}") from error
        raise RewardError(f"reward {reward.name!r} fails on a test batch: {type(error).__name__}: {error}") from error
    if not scores.isfinite().all():
        raise RewardValueError(
            f"reward {reward.name!r} returned {[round(v, 4) for v in scores.tolist()]} for noisy pictures; finite "
            "numbers are needed: look for a division by zero, or a logarithm or root of something negative"
        )
    _check_gradient(reward, probe, scores, recorder)


def _check_gradient(reward: Reward, probe: Tensor, scores: Tensor, recorder: "_Recorder") -> None:
    lost = f"reward {reward.name!r} lost the gradient between its images and its scores"
    if not scores.requires_grad:
        raise RewardGradientError(f"{lost}{recorder.suspicion(scores)}")
    (gradient,) = torch.autograd.grad(scores.sum(), probe, allow_unused=True)
    if gradient is None:
        raise RewardGradientError(f"{lost}: the scores depend on other tensors with gradient{recorder.suspicion()}")
    if not gradient.isfinite().all():
        raise RewardValueError(
            f"the scores of reward {reward.name!r} are finite but their gradient is not: look for a root or a norm at "
            "zero (add a small number inside), or a division by something tiny"
        )
    if not gradient.any():
        flat = f": {recorder.flat} {_STEPS}" if recorder.flat else "; look for rounding, a threshold or a clamp"
        raise RewardGradientError(f"the gradient of reward {reward.name!r} is zero at every pixel{flat}")


@dataclass
class _Recorder(TorchFunctionMode):
    """Remembers which operations lost the gradient, and which tensors come from those."""

    origin: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    left: str = ""
    flat: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if _callers()[0].f_code.co_filename == base.__file__:  # what is detached there goes to the log
            return func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs or {})))
        graded = any(tensor.requires_grad for tensor in inputs)
        known = next((self.origin[id(tensor)][1] for tensor in inputs if id(tensor) in self.origin), "")
        name = _operation(func)
        result = func(*args, **(kwargs or {}))
        outputs = list(_tensors(result))
        if graded and name in _FLAT and not self.flat:
            self.flat = _place(name)
        if (graded or known) and name in _OUT_OF_TORCH and not self.left:
            self.left = known or _described(name)
        if (graded or known) and outputs and not any(tensor.requires_grad for tensor in outputs):
            for tensor in outputs:
                self.origin[id(tensor)] = (tensor, known or _described(name))
        return result

    def suspicion(self, scores: Tensor | None = None) -> str:
        """The operation that the scores owe their loss to, as far as it can be known: else the first that lost it."""
        if scores is not None and id(scores) in self.origin:
            return f": {self.origin[id(scores)][1]}"
        first = self.left or next((text for _, text in self.origin.values()), "")
        return f": probably {first}" if first else "; were they computed from the images, by torch operations?"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _operation(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    # A property such as Tensor.data arrives as its getter.
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _described(name: str) -> str:
    if not torch.is_grad_enabled():
        return f"{_place(name)} runs under torch.no_grad() or inference_mode; leave that out"
    return f"{_place(name)} {_WHY.get(name, 'gives a result without gradient')}"


def _place(name: str) -> str:
    """The operation with the line that called it: the user's own line, where it is an installed package's."""
    callers = _callers()
    own = [frame for frame in callers if "site-packages" not in frame.f_code.co_filename]
    frame = own[0] if own and own[0].f_code.co_filename != base.__file__ else callers[0]
    return f"{name}() in {Path(frame.f_code.co_filename).name}, line {frame.f_lineno},"


def _callers() -> list[FrameType]:
    """The frames that led to an operation, the nearest first."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_BETWEEN):
            frames.append(frame)
        frame = frame.f_back
    return frames
