"""Which denoising step a call of a pipeline is at, and how many there are: for the rollout and for windows."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from alignprop_pipe.diffusion import pipeline_parts

CLOSE = 4e-3
"""Relative error of a timestep that a pipeline has cast to bfloat16."""


@dataclass(slots=True)
class StepClock:
    """Counts the denoising steps of one call of a pipeline.

    A step ends when a denoiser is called after the scheduler has stepped. So it does not matter how often the denoiser
    is called before a step (guidance), nor how often the scheduler steps after one call (once for every frame, or on
    copies of it), nor how the pipeline passes the timestep, which it may scale, shift or repeat.

    Examples:
        >>> clock = StepClock()
        >>> clock.scheduler_stepped()
        >>> clock.end_step()
        >>> clock.step
        1
    """

    step: int = 0
    has_stepped: bool = False

    def scheduler_stepped(self) -> None:
        """A scheduler has stepped."""
        self.has_stepped = True

    def end_step(self) -> None:
        """Count the step that is through, if one is: when a denoiser is called, and at the end."""
        self.step += self.has_stepped
        self.has_stepped = False


class _Read(int):
    """A number of steps that was read already: every call of a pipeline sets its own."""


def announced_steps(pipe: DiffusionPipeline) -> int | None:
    """How many steps the current call of `pipe` says that it takes; None where it says nothing, or said it before."""
    painter = pipeline_parts.painting(pipe)
    number = getattr(painter, "_num_timesteps", None)
    if number is None or isinstance(number, _Read):
        return None
    painter._num_timesteps = _Read(number)
    return int(number)


def steps_of_call(pipe: DiffusionPipeline | None, scheduler: Any, told: float | None) -> int:
    """How many steps the current call takes, at its first denoiser call.

    It may begin later than with the first timestep, where it starts from a picture. `told` is the timestep that the
    denoiser is called with (`told_timestep`).
    """
    if pipe is not None and (announced := announced_steps(pipe)):
        return announced
    values = [float(value) for value in torch.as_tensor(scheduler.timesteps).flatten()]
    for name in ("begin_index", "step_index"):
        if (known := getattr(scheduler, name, None)) is not None:
            return len(values) - int(known)
    places = [place for place, value in enumerate(values) if told and math.isclose(value, told, rel_tol=CLOSE)]
    return len(values) - (places[0] if places else 0)


def told_timestep(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """The timestep that a denoiser is called with; not every family passes it as the scheduler has it."""
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
    value = given.get("timestep", given.get("t"))
    return None if value is None else float(torch.as_tensor(value).flatten()[0])


def place_of(scheduler: Any, told: float | None) -> float | None:
    """What changes when this scheduler steps: its index, its counter, or else the timestep that comes next."""
    if hasattr(scheduler, "step_index"):  # some know it from the first step on only
        return -1 if scheduler.step_index is None else scheduler.step_index
    return getattr(scheduler, "counter", told)  # PNDM counts; every other scheduler has different timesteps
