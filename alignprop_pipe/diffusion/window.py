"""An adapter that works in a window of the denoising steps alone.

Hooks on the denoisers ask the scheduler at which step it stands: the step decides, not the number of calls, so a second
call for true classifier-free guidance or a second denoiser makes no difference. Outside the window the adapter's scale
is 0 for the length of the call, which leaves the base model bit for bit.
"""

import copy
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
from alignprop_pipe.diffusion.clock import StepClock, announced_steps, place_of, steps_of_call, told_timestep
from alignprop_pipe.errors import ConfigError, PipelineError

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
    switch = _Switch(pipe, window)
    announced_steps(pipe)  # by an earlier call
    for part in denoisers.values():
        lora.forget_window(part)
        before = part.register_forward_pre_hook(switch.before, with_kwargs=True)
        after = part.register_forward_hook(switch.after, always_call=True)
        setattr(part, lora.WINDOW, _Held(switch, (before, after)))


def held_by(parts: Iterable[nn.Module]) -> Window | None:
    """The window of the adapter that these networks hold; None where it works in every step."""
    found = (vars(part).get(lora.WINDOW) for part in parts)
    return next((held.switch.window for held in found if held is not None), None)


@dataclass(frozen=True, slots=True)
class _Held:
    switch: "_Switch"
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.switch.after()


class _Switch:
    """Switches the adapter on and off by the step at which a call is."""

    def __init__(self, pipe: DiffusionPipeline, window: Window) -> None:
        self.window = window
        self._pipe = weakref.ref(pipe)  # a hook that kept the pipeline alive would keep its memory
        self._scheduler = pipeline_parts.scheduler(pipe)
        self._timesteps: Any = None
        self._clock = StepClock()
        self._place: float | None = None
        self._num_steps = 0
        self._off: list[tuple[LoraLayer, float]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipe": self._pipe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pipe = state["_pipe"]
        vars(self).update(state, _pipe=(lambda: None) if pipe is None else weakref.ref(pipe))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Switch":
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
        step = self._step(told_timestep(denoiser, args, kwargs))
        if step in self.window.steps(self._num_steps):
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
        place = place_of(scheduler, told)
        if scheduler.timesteps is not self._timesteps:  # every call of a pipeline sets them anew
            self._timesteps, self._clock = scheduler.timesteps, StepClock()
            self._num_steps = steps_of_call(pipe, scheduler, told)
        elif place != self._place:
            self._clock.scheduler_stepped()
        self._place = place
        self._clock.end_step()
        is_idle = getattr(scheduler, "num_inference_steps", 0) is None  # no call has set its steps yet
        if is_idle or place is None or self._clock.step >= self._num_steps:
            raise PipelineError(
                f"the adapter works in the window {self.window}, and {type(scheduler).__name__} does not tell which "
                "step this is. Call the pipeline that it was loaded on, not another one that shares its denoiser; or "
                "load the adapter without a window"
            )
        return self._clock.step
