"""All randomness of a run, derived from (seed, step, sample, purpose), so that nothing about it need be saved.

A resumed run, a run in one piece and a run on two processes draw the same numbers. Generators live
on the CPU: a seed then gives the same start on every card. The random state of the process is neither read nor set.
"""

import functools
import hashlib
import inspect
import threading
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Purpose = Literal["noise", "truncation", "prompts", "adapter", "split", "evidence", "hidden"]


def generator_for(purpose: Purpose, seed: int, step: int = 0, sample: int = 0) -> torch.Generator:
    """A CPU generator that depends on these four values and on nothing else."""
    text = f"{purpose}/{seed}/{step}/{sample}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return torch.Generator("cpu").manual_seed(number & (2**63 - 1))


LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand, torch.randint_like: torch.randint}
"""Older versions of torch take no generator for these."""

DRAWING = {
    *LIKE,
    *(torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial),
    *(torch.poisson, Tensor.bernoulli, Tensor.multinomial, Tensor.normal_, Tensor.uniform_, Tensor.random_),
    *(Tensor.bernoulli_, Tensor.exponential_, Tensor.log_normal_, Tensor.cauchy_, Tensor.geometric_),
}
"""Functions of torch that draw from the generator given to them, else from the process-wide one."""

DROPOUT = {
    functional.dropout: lambda shape: shape,
    functional.dropout1d: lambda shape: (*shape[:-1], 1),
    functional.dropout2d: lambda shape: (*shape[:-2], 1, 1),
    functional.dropout3d: lambda shape: (*shape[:-3], 1, 1, 1),
}
"""Functions that draw and take no generator -> the shape of what they draw for an input."""

_entered = threading.local()


class SeededDraws(TorchFunctionMode):
    """Inside, in this thread, what torch draws without a generator comes from this value's own.

    Some networks and pipelines draw noise for which nobody can hand them a generator (a decoder that injects noise, a
    scheduler's fresh noise); weights of a new layer are drawn so too. The same `seed` gives the same numbers, whatever
    the process has drawn before, and the process-wide generators are left alone. Each device has a generator of its
    own, as the numbers of one cannot be drawn by another's.
    """

    def __init__(self, seed: int, states: Mapping[torch.device, Tensor] | None = None) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        for device, state in (states or {}).items():
            self._generator(device).set_state(state)

    @classmethod
    def after(cls, generator: torch.Generator) -> "SeededDraws":
        """Draws whose seed is the next number of `generator`."""
        return cls(int(torch.randint(2**63 - 1, (), generator=generator)))

    @staticmethod
    def entered() -> "SeededDraws | None":
        """The innermost one that this thread is in."""
        return next(iter(getattr(_entered, "stack", ())[-1:]), None)

    def from_here(self) -> "SeededDraws":
        """A copy that goes on with the numbers that come next; for drawing the same ones a second time."""
        return SeededDraws(self.seed, {device: one.get_state() for device, one in self._generators.items()})

    def __enter__(self) -> Any:
        _entered.stack = [*getattr(_entered, "stack", ()), self]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _entered.stack = _entered.stack[:-1]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING or _takes_generator(func):
            return self._drawn(func, args, kwargs)
        if func in DROPOUT:
            return self._dropped(func, args, kwargs)
        return func(*args, **kwargs)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = kwargs.get("device") or (tensors[0].device if tensors else torch.get_default_device())
        device = torch.device(device)
        if device.type == "meta":
            return func(*args, **kwargs)
        if func in LIKE:
            like, *rest = args or (kwargs.pop("input"),)
            about = {"dtype": like.dtype, "device": like.device, **kwargs}
            about.pop("memory_format", None)
            bounds = {name: about.pop(name) for name in ("low", "high") if name in about}
            rest = [bounds.get("low", 0), bounds["high"]] if bounds else rest
            func, args, kwargs = LIKE[func], (*rest, like.shape), about
        return func(*args, **{**kwargs, "generator": self._generator(device)})

    def _dropped(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        x, p = given.arguments["input"], given.arguments["p"]
        if not given.arguments["training"] or p == 0:
            return func(*args, **kwargs)
        kept = torch.empty(DROPOUT[func](x.shape), dtype=x.dtype, device=x.device)
        kept.bernoulli_(1 - p, generator=self._generator(x.device))
        return x * kept / (1 - p) if p < 1 else x * 0

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


@functools.cache
def _takes_generator(func: Any) -> bool:
    """Whether it is written in Python and takes a generator, such as what initialises weights."""
    try:
        return isinstance(func, FunctionType) and "generator" in inspect.signature(func).parameters
    except ValueError:  # a method of a tensor
        return False
