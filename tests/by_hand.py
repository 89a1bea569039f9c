"""The rollout's results computed another way, with nothing of `alignprop_pipe`: stock calls and module hooks.

The step of a denoiser call is known from the number of calls so far. A truncated gradient is not the slope of the
whole chain, so the finite differences move the adapter at graded steps only: a hook swaps its weights at the cut.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

PROMPTS = ["a red dog", "two cats on a blue background"]


@contextmanager
def double_inside() -> Iterator[None]:
    """Ignores casts of float64 tensors to float32.

    Several schedulers and norms compute in float32 whatever they are given, which hides the slope below 1e-4. With
    their casts ignored, finite differences see it to 1e-8. (A torch function mode would not reach the backward pass.)
    """
    to, single = Tensor.to, Tensor.float

    def lasting_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(self, *args, **kwargs)

    Tensor.to = lasting_to
    Tensor.float = lambda self: self if self.dtype == torch.float64 else single(self)
    try:
        yield
    finally:
        Tensor.to, Tensor.float = to, single


def generators(batch: int = 2, seed: int = 7) -> list[torch.Generator]:
    """One for each picture; new ones for each call, since a call uses them up."""
    return [torch.Generator().manual_seed(seed + number) for number in range(batch)]


@contextmanager
def same_hidden_draws() -> Iterator[None]:
    """What a network draws from the process-wide generator is the same in each call inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        yield


def stock_pictures(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """The plain call that any user makes."""
    batch = len(arguments["prompt"])
    with same_hidden_draws():
        return pipe(**arguments, generator=generators(batch), output_type="pt", return_dict=False)[0]


@dataclass(slots=True)
class Chain:
    """A pipeline with its arguments, adapter weights, number of steps and denoiser calls a step."""

    pipe: DiffusionPipeline
    denoiser: nn.Module
    arguments: dict[str, Any]
    weights: list[nn.Parameter]
    num_steps: int = 0
    calls_a_step: int = 0
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        with hooked(self.denoiser.register_forward_pre_hook(self._count)), counted_steps(self.pipe) as steps:
            stock_pictures(self.pipe, self.arguments)
        self.num_steps, self.calls_a_step = len(steps), self.calls // len(steps)
        assert self.calls == self.num_steps * self.calls_a_step

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def score(self, pictures: Tensor) -> Tensor:
        """A smooth function that tells all pixels apart."""
        weight = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (weight * pictures.double() + (pictures.double() - 0.5).square()).sum() / len(pictures)

    def gradient(self, k: int) -> list[Tensor]:
        """Of the score, by an uncheckpointed chain whose denoiser outputs before the cut are detached."""
        self.calls = 0

        def detach_before_cut(_module: nn.Module, _args: Any, output: Any) -> Any:
            step = self.calls // self.calls_a_step
            self.calls += 1
            return output if step >= self.num_steps - k else (output[0].detach(), *output[1:])

        call = inspect.unwrap(type(self.pipe).__call__)
        batch = len(self.arguments["prompt"])
        hook = self.denoiser.register_forward_hook(detach_before_cut)
        with hooked(hook), torch.enable_grad(), same_hidden_draws():
            pictures = call(
                self.pipe, **self.arguments, generator=generators(batch), output_type="pt", return_dict=False
            )[0]
            return list(torch.autograd.grad(self.score(pictures), self.weights))

    def slope(self, k: int, direction: Sequence[Tensor], size: float) -> float:
        """Of the score along `direction`, by central differences of the weights of the last `k` steps alone."""
        up, down = (self._score_moved(k, direction, sign * size) for sign in (1, -1))
        return (up - down) / (2 * size)

    def _score_moved(self, k: int, direction: Sequence[Tensor], size: float) -> float:
        self.calls = 0
        frozen = [weight.detach().clone() for weight in self.weights]

        def swap(*_: Any) -> None:
            if self.calls // self.calls_a_step == self.num_steps - k:
                for weight, start, way in zip(self.weights, frozen, direction, strict=True):
                    weight.data.copy_(start + size * way)
            self.calls += 1

        try:
            with hooked(self.denoiser.register_forward_pre_hook(swap)):
                return float(self.score(stock_pictures(self.pipe, self.arguments)))
        finally:
            for weight, start in zip(self.weights, frozen, strict=True):
                weight.data.copy_(start)


def direction_of(gradient: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    """A random direction plus the gradient's own, so that the slope along it is never lost in rounding."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in gradient]
    lengths = [float(torch.cat([part.flatten() for part in parts]).norm()) for parts in (noise, gradient)]
    return [n / lengths[0] + g / lengths[1] for n, g in zip(noise, gradient, strict=True)]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))


def relative_difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any entry, over the largest entry."""
    largest = max(float(part.abs().max()) for part in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)) / largest


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def counted_steps(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """A list that grows by one entry for each scheduler step inside."""
    kind, taken = type(pipe.scheduler), []
    step = kind.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        taken.append(len(taken))
        return step(*args, **kwargs)

    counting.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # pipelines look for eta in it
    kind.step = counting
    try:
        yield taken
    finally:
        kind.step = step
