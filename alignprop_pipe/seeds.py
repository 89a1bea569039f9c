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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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

DRAWS_INSIDE = ("dropout", "rrelu", "gumbel", "standard_gamma", "dirichlet", "binomial", "fractional", "attention")
"""What is in the names of functions that draw deep inside, where no generator can be given."""

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
            self.generator_on(device).set_state(state)

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
        if _draws_inside(func) and not _is_switched_off(func, args, kwargs):
            with _SeededOperators(self):
                return func(*args, **kwargs)
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
        return func(*args, **{**kwargs, "generator": self.generator_on(device)})

    def generator_on(self, device: torch.device) -> torch.Generator:
        """The one that numbers on this device come from."""
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


@functools.cache
def _draws_inside(func: Any) -> bool:
    return any(part in getattr(func, "__name__", "") for part in DRAWS_INSIDE)


def _is_switched_off(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether it is seen at once that nothing is drawn, as in every layer of a network in evaluation mode."""
    if func.__name__ == "scaled_dot_product_attention":
        return not (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0))
    third = args[2] if "dropout" in func.__name__ and len(args) > 2 else None
    return False in (third, kwargs.get("training"), kwargs.get("train"))


class _SeededOperators(TorchDispatchMode):
    """`SeededDraws` for what a function of torch calls, seen as operators; it would be slow round every function."""

    def __init__(self, draws: SeededDraws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        tensors = [value for value in args if isinstance(value, Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if func is torch.ops.aten.native_dropout.default:  # of CUDA; it takes no generator
            x, p, train = args
            kept = torch.ones_like(x, dtype=torch.bool)
            if train is not False:
                kept.bernoulli_(1 - p, generator=self.draws.generator_on(device))
            return x * kept * (1 / (1 - p) if p < 1 and train is not False else 1), kept
        func = getattr(func.overloadpacket, "generator", func)
        names = [argument.name for argument in func._schema.arguments]
        if "generator" in names:
            args = args[: names.index("generator")]
            kwargs = {**kwargs, "generator": self.draws.generator_on(device)}
        return func(*args, **kwargs)
