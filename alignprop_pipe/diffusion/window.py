"""An adapter that works in a window of the denoising steps alone.

Hooks on the denoisers ask the scheduler at which step it stands: the step decides, not the number of calls, so a second
call for true classifier-free guidance or a second denoiser makes no difference. Outside the window the adapter's scale
is 0 for the length of the call, which leaves the base model bit for bit.
"""

import copy
import inspect
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from alignprop_pipe.config.choices import Window, window_from_text
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.errors import ConfigError, PipelineError

CLOSE = 4e-3
"""Relative error of a timestep that a pipeline has cast to bfloat16."""

_uncompiled: Any = torch.compiler.disable  # a compiled denoiser has to ask at every step too; the type is for functions


def as_window(value: Window | str | Sequence[Any]) -> Window:
    """A Window, a text such as "0.0-0.6", or a pair of numbers -> the value. Raises ConfigError."""
    if isinstance(value, Window):
        return value
    if isinstance(value, str):
        return window_from_text(value)
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"window={value!r}: a pair of shares is needed, such as (0.0, 0.6)")
    return Window(*value)


def put_on(pipe: DiffusionPipeline, denoisers: Mapping[str, nn.Module], window: Window) -> None:
    """Let the adapter in `denoisers` work in `window` alone, in every later call of `pipe`.

    The steps are those of one call: where a picture is the start, the first is the one that the call begins with. The
    scheduler is the one that `pipe` has at the time of the call. Raises PipelineError.
    """
    clock = _Clock(pipe, window)
    _announced(pipe)  # by an earlier call
    for part in denoisers.values():
        lora.forget_window(part)
        before = part.register_forward_pre_hook(clock.before, with_kwargs=True)
        after = part.register_forward_hook(clock.after, always_call=True)
        setattr(part, lora.WINDOW, _Held(clock, (before, after)))


def held_by(parts: Iterable[nn.Module]) -> Window | None:
    """The window of the adapter that these networks hold; None where it works in every step."""
    found = (vars(part).get(lora.WINDOW) for part in parts)
    return next((held.clock.window for held in found if held is not None), None)


@dataclass(frozen=True, slots=True)
class _Held:
    clock: "_Clock"
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.clock.after()


class _Clock:
    """Knows at which step of a call the scheduler stands, and switches the adapter accordingly."""

    def __init__(self, pipe: DiffusionPipeline, window: Window) -> None:
        self.window = window
        self._pipe = weakref.ref(pipe)  # a hook that kept the pipeline alive would keep its memory
        self._scheduler = pipeline_parts.scheduler(pipe)
        self._timesteps: Any = None
        self._values: list[float] = []
        self._origin: int | None = None
        self._told: float | None = None
        self._changes = 0
        self._active = range(0)
        self._off: list[tuple[LoraLayer, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipe": self._pipe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pipe = state["_pipe"]
        vars(self).update(state, _pipe=(lambda: None) if pipe is None else weakref.ref(pipe))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Clock":
        memo[id(self)] = made = object.__new__(type(self))
        state = self.__getstate__()
        pipe = state.pop("_pipe")  # a copy of the denoiser alone takes no copy of the pipeline along
        made.__setstate__({**copy.deepcopy(state, memo), "_pipe": memo.get(id(pipe), pipe)})
        return made

    @_uncompiled
    def before(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook."""
        self.after()  # torch does not call hooks after Ctrl-C
        if lora.ADAPTER_NAME not in getattr(denoiser, "peft_config", {}):  # diffusers has taken it off
            return
        if self._step(_told(denoiser, args, kwargs)) in self._active:
            return
        layers = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)]
        layers = [layer for layer in layers if lora.ADAPTER_NAME in layer.scaling]
        if any(lora.ADAPTER_NAME in layer.merged_adapters for layer in layers):
            raise PipelineError(
                f"the adapter is fused into the weights and cannot be switched off outside its window {self.window}: "
                "call pipe.unfuse_lora() first, or load it without a window"
            )
        self._off = [(layer, layer.scaling[lora.ADAPTER_NAME]) for layer in layers]
        for layer in layers:
            layer.scaling[lora.ADAPTER_NAME] = 0.0

    @_uncompiled
    def after(self, *_: Any) -> None:
        """The hook behind the call, also where that failed. A scale that someone has set since then stays."""
        for layer, scale in self._off:
            if layer.scaling.get(lora.ADAPTER_NAME) == 0.0:
                layer.scaling[lora.ADAPTER_NAME] = scale
        self._off = []

    def _step(self, told: float | None) -> int:
        """The number of the step, from 0. Raises PipelineError where it cannot be told."""
        pipe = self._pipe()
        scheduler = self._scheduler = self._scheduler if pipe is None else pipeline_parts.scheduler(pipe)
        if scheduler.timesteps is not self._timesteps:  # every call of a pipeline sets them anew
            self._begin(scheduler, pipe, told)
        is_idle = getattr(scheduler, "num_inference_steps", 0) is None  # no call has set its steps yet
        if told != self._told:
            self._told, self._changes = told, self._changes + 1
        step = None if is_idle else self._taken(scheduler)
        if step is None or step not in range(len(self._values)):
            raise PipelineError(
                f"the adapter works in the window {self.window}, and {type(scheduler).__name__} does not tell which "
                "step this is. Call the pipeline that it was loaded on, not another one that shares its denoiser; or "
                "load the adapter without a window"
            )
        return step

    def _begin(self, scheduler: Any, pipe: DiffusionPipeline | None, told: float | None) -> None:
        self._timesteps, self._origin = scheduler.timesteps, getattr(scheduler, "step_index", None)
        self._told, self._changes = told, 0
        values = [float(value) for value in torch.as_tensor(scheduler.timesteps).flatten()]
        announced = None if pipe is None else _announced(pipe)
        begin = _first_step(scheduler, values, announced, told)
        self._values = values[begin:]
        self._active = self.window.steps(len(self._values))

    def _taken(self, scheduler: Any) -> int | None:
        """How many steps the scheduler has made in this call."""
        index = getattr(scheduler, "step_index", None)
        if index is not None:
            # Some schedulers know their place from the first step on only.
            self._origin = index - 1 if self._origin is None else self._origin
            return index - self._origin
        if hasattr(scheduler, "step_index"):
            return 0
        if hasattr(scheduler, "counter"):  # PNDM, whose second timestep comes twice
            return scheduler.counter
        # Every other scheduler has different timesteps; how a pipeline hands them to the denoiser is its own affair.
        return None if self._told is None else self._changes


def _first_step(scheduler: Any, values: list[float], announced: int | None, told: float | None) -> int:
    """Where in the timesteps the call begins: not at 0 where a picture is the start."""
    for name in ("begin_index", "step_index"):
        known = getattr(scheduler, name, None)
        if known is not None:
            return int(known)
    places = [place for place, value in enumerate(values) if told and math.isclose(value, told, rel_tol=CLOSE)]
    if not announced:
        return places[0] if places else 0
    last = len(values) - announced
    # A denoiser may be told the time in another unit. A call that ends early begins with the first timestep.
    return 0 if 0 in places and last not in places else max(0, last)


class _Asked(int):
    """A number of steps that was read already: every call of a pipeline sets its own."""


def _announced(pipe: DiffusionPipeline) -> int | None:
    """How many steps this call of `pipe` takes; None where it does not say, or where another pipeline is called."""
    painter = pipeline_parts.painting(pipe)
    number = getattr(painter, "_num_timesteps", None)
    if number is not None:
        painter._num_timesteps = _Asked(number)
    return None if isinstance(number, _Asked) else number


def _told(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """The timestep that a denoiser is called with; not every family passes it as the scheduler has it."""
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
    value = given.get("timestep", given.get("t"))
    return None if value is None else float(torch.as_tensor(value).flatten()[0])
