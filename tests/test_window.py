"""An adapter in a window of the steps: against a call whose adapter is switched on and off by hand at every step."""

import copy
import functools
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from miniatures import FAMILIES, make_scheduler, sd15, sd15_img2img, sdxl, wan
from peft.tuners.lora import LoraLayer
from random_adapters import draw, random_adapter
from torch import Tensor

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter, read_metadata, remove_adapter
from alignprop_pipe.config.choices import Window, window_from_text
from alignprop_pipe.diffusion import lora
from alignprop_pipe.diffusion import window as windows
from alignprop_pipe.diffusion.lora import attention_linears
from alignprop_pipe.errors import AdapterError, ConfigError, PipelineError

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]


PIPE = sd15()
"""Without an adapter; for what ends in an error."""


def switches(pipe: Any) -> list[LoraLayer]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)]


@contextmanager
def watched_steps(scheduler: Any, told: Callable[[int], None]) -> Iterator[None]:
    """`told(i)` before step i begins, by the scheduler's own `step`, and after the last one."""
    step, taken = scheduler.step, 0

    @functools.wraps(step)  # pipelines look into its signature
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        result = step(*args, **kwargs)
        taken += 1
        told(taken)
        return result

    scheduler.step = call
    try:
        told(0)
        yield
    finally:
        del scheduler.step


def few(part: Any) -> list[str]:
    """The last layers are enough, and quick to put on."""
    return attention_linears(part)[-3:]


def an_adapter(pipe: Any) -> Adapter:
    return random_adapter(pipe, paths=few, size=1.0)


def whole_call(pipe: Any, call: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
    """The picture, and the number of its steps."""
    counted: list[int] = []
    with watched_steps(pipe.scheduler, counted.append):
        picture = call(pipe)
    return picture, counted[-1]


def by_hand(pipe: Any, window: tuple[float, float], call: Callable[[Any], Tensor], total: int = 0) -> Tensor:
    """The picture with the adapter, which is on `pipe` without a window, switched by PEFT at every step."""
    total = total or whole_call(pipe, call)[1]

    def switch(step: int) -> None:
        for layer in switches(pipe):
            layer.enable_adapters(window[0] <= step / total < window[1])

    with watched_steps(pipe.scheduler, switch):
        picture = call(pipe)
    for layer in switches(pipe):
        layer.enable_adapters(True)
    return picture


def assert_as_by_hand(pipe: Any, window: tuple[float, float], call: Callable[[Any], Tensor]) -> None:
    adapter = an_adapter(pipe)
    base, total = whole_call(pipe, call)
    load_adapter(pipe, adapter)
    whole, wanted = call(pipe), by_hand(pipe, window, call, total)
    load_adapter(pipe, adapter, window=window)
    assert torch.equal(call(pipe), wanted)
    assert (wanted - whole).abs().max() > 1e-4
    assert (wanted - base).abs().max() > 1e-4


# --- the step decides --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # NumPy's, about diffusers
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(name: str) -> None:
    assert_as_by_hand(sd15(make_scheduler(name)), (0.3, 0.8), draw)


TOLD = {
    "scaled": lambda t: t / 1000,
    "on another timestep": lambda t: torch.ones_like(t) * (1 + t / 1e4),
    "turned round": lambda t: 1000 - t,
    "batched": lambda t: t.expand(2),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("from_picture", [False, True])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_denoiser_may_be_told_the_time_in_any_way(told: str, from_picture: bool, name: str) -> None:
    pipe = (sd15_img2img if from_picture else sd15)(make_scheduler(name))
    extra = FAMILIES["sd15_img2img"].call(1) if from_picture else {}

    def tell(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0], TOLD[told](torch.as_tensor(args[1])), *args[2:]), kwargs

    pipe.unet.register_forward_pre_hook(tell, with_kwargs=True)
    assert_as_by_hand(pipe, (0.0, 0.6), lambda pipe: draw(pipe, steps=8, **extra))


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_picture_to_start_from(name: str) -> None:
    extra = FAMILIES["sd15_img2img"].call(1)
    pipe = sd15_img2img(make_scheduler(name))
    assert_as_by_hand(pipe, (0.0, 0.6), lambda pipe: draw(pipe, steps=8, **extra))


@pytest.mark.parametrize("strength", [0.5, 0.9, 1.0])
def test_equal_timesteps_at_the_start_of_a_call(strength: float) -> None:
    """PNDM's second and third timestep are one: where a call begins there, the timestep alone does not say at which."""
    extra = {**FAMILIES["sd15_img2img"].call(1), "strength": strength}
    pipe = sd15_img2img(make_scheduler("PNDMScheduler"))
    assert_as_by_hand(pipe, (0.5, 0.8), lambda pipe: draw(pipe, steps=10, **extra))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart", "ltx", "sd15_controlnet"])
def test_any_family(family: str) -> None:
    extra = FAMILIES[family].call(1)
    assert_as_by_hand(FAMILIES[family].make(), (0.0, 0.5), lambda pipe: draw(pipe, steps=4, **extra))


def test_true_guidance_calls_the_denoiser_twice_a_step() -> None:
    pipe, extra, calls = wan(), FAMILIES["wan"].call(1), []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    draw(pipe, steps=4, guidance=3.0, **extra)
    hook.remove()
    assert len(calls) == 8
    assert_as_by_hand(pipe, (0.25, 0.75), lambda pipe: draw(pipe, steps=4, guidance=3.0, **extra))


def test_two_denoisers_share_the_steps() -> None:
    def pair() -> Any:
        pipe = wan()
        second = copy.deepcopy(pipe.transformer)
        pipe = type(pipe)(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.5)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    extra = FAMILIES["wan"].call(1)
    assert_as_by_hand(pair(), (0.25, 0.75), lambda pipe: draw(pipe, steps=4, **extra))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_another_call_and_another_scheduler_afterwards(name: str) -> None:
    """A call starts at its own first step."""
    pipe = sd15()
    load_adapter(pipe, an_adapter(pipe), window=(0.0, 0.5))
    first = draw(pipe)
    draw(pipe, steps=3)
    assert torch.equal(draw(pipe), first)
    pipe.scheduler = make_scheduler(name)
    got = draw(pipe)
    load_adapter(pipe, Adapter.of(pipe), window=(0.0, 1.0))
    assert torch.equal(got, by_hand(pipe, (0.0, 0.5), draw))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_call_that_was_broken_off(error: type[BaseException]) -> None:
    pipe = sd15(make_scheduler("HeunDiscreteScheduler"))
    adapter = an_adapter(pipe)
    load_adapter(pipe, adapter, scale=0.5, window=(0.0, 0.5))
    half = draw(pipe)
    load_adapter(pipe, adapter, window=(0.0, 0.5))
    wanted = draw(pipe)
    for scale, picture in ((None, wanted), (0.5, half)):
        for at in (1, 5):  # inside the window and outside
            with breaking_off(pipe.unet.conv_out, at, error), pytest.raises(error):
                draw(pipe)
            if scale is not None:
                pipe.set_adapters([lora.ADAPTER_NAME], [scale])
            assert torch.equal(draw(pipe), picture)
    with breaking_off(pipe.unet.conv_out, 5, error), pytest.raises(error):
        draw(pipe)
    lora.forget_window(pipe.unet)
    assert all(layer.scaling[lora.ADAPTER_NAME] > 0 for layer in switches(pipe))


@contextmanager
def breaking_off(layer: torch.nn.Module, at: int, error: type[BaseException]) -> Iterator[None]:
    """An error inside the denoiser's call number `at`."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error

    hook = layer.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


# --- exact at the ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_ends_are_exact(family: str) -> None:
    extra = FAMILIES[family].call(1)
    pipe = FAMILIES[family].make()
    adapter = an_adapter(pipe)
    base = draw(pipe, **extra)
    load_adapter(pipe, adapter)
    whole = draw(pipe, **extra)
    for window, wanted in (((0.0, 1.0), whole), ((0.0, 0.0), base), ((0.4, 0.4), base), ((1.0, 1.0), base)):
        load_adapter(pipe, adapter, window=window)
        assert torch.equal(draw(pipe, **extra), wanted), window
    assert not torch.equal(base, whole)


def test_scale_and_window() -> None:
    pipe = sd15()
    adapter = an_adapter(pipe)
    load_adapter(pipe, adapter, scale=0.5)
    wanted = by_hand(pipe, (0.0, 0.5), draw)
    load_adapter(pipe, adapter, scale=0.5, window="0.0-0.5")
    assert torch.equal(draw(pipe), wanted)
    load_adapter(pipe, adapter, window="0.0-0.5")
    pipe.set_adapters([lora.ADAPTER_NAME], [0.5])
    assert torch.equal(draw(pipe), wanted)


# --- taken away with the adapter ---------------------------------------------------------------------------------


def test_loading_another_takes_the_window_away() -> None:
    pipe = sd15()
    adapter = an_adapter(pipe)
    load_adapter(pipe, adapter)
    whole = draw(pipe)
    load_adapter(pipe, adapter, window=(0.0, 0.5))
    load_adapter(pipe, adapter)
    assert torch.equal(draw(pipe), whole)
    assert not hooks(pipe)


def hooks(pipe: Any) -> list[Any]:
    found = [hook for part in lora_parts(pipe) for hook in (*part._forward_pre_hooks.values(),)]
    return [*found, *(windows.held_by([part]) for part in lora_parts(pipe) if windows.held_by([part]) is not None)]


def lora_parts(pipe: Any) -> list[Any]:
    return [pipe.components[name] for name in ("unet", "transformer") if name in pipe.components]


@pytest.mark.parametrize(
    "leave",
    [
        remove_adapter,
        lambda pipe: lora.detach({"unet": pipe.unet}),
        lambda pipe: (pipe.unload_lora_weights(), lora.detach({"unet": pipe.unet})),
    ],
)
def test_the_stock_pipeline_is_left(leave: Callable[[Any], object]) -> None:
    pipe = sd15()
    base, before = draw(pipe), set(vars(pipe.unet))
    load_adapter(pipe, an_adapter(pipe), window=(0.2, 0.5))
    assert not torch.equal(draw(pipe), base)
    leave(pipe)
    assert torch.equal(draw(pipe), base)
    assert not hooks(pipe)
    assert lora.WINDOW not in set(vars(pipe.unet)) - before


def test_training_starts_without_a_window() -> None:
    pipe = AlignPropPipeline.from_pipe(sd15())
    pipe.load_adapter(an_adapter(pipe), window=(0.2, 0.5))
    small = {"steps": 1, "num_inference_steps": 2, "batch_size": 1, "gradient_accumulation_steps": 1}
    result = pipe.align("brightness", ["a dog", "a cat"], None, **small, eval_prompts=0, height=16, width=16)
    assert not hooks(pipe)
    assert "window" not in result.adapter.metadata


def test_the_base_inside_taken_out_and_in_a_saved_folder(tmp_path: Path) -> None:
    pipe = AlignPropPipeline.from_pipe(sd15())
    base = draw(pipe)
    pipe.load_adapter(an_adapter(pipe), window=(0.0, 0.5))
    wanted = draw(pipe)
    with lora.taken_out([pipe.unet]):
        assert torch.equal(draw(pipe), base)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(pipe), wanted)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(draw(opened), base)
    load_adapter(opened, tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(draw(opened), wanted, atol=1e-5, rtol=0)  # alpha is folded into one of the factors


def test_the_pipeline_is_not_kept_alive_and_its_networks_go_on() -> None:
    first = sd15()
    load_adapter(first, an_adapter(first), window=(0.0, 0.5))
    wanted, parts = draw(first), first.components
    second = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    del first
    gc.collect()
    assert torch.equal(draw(second), wanted)


def test_a_pipeline_made_of_it_that_starts_from_pictures() -> None:
    first = sd15()
    load_adapter(first, an_adapter(first), window=(0.0, 0.5))
    draw(first, steps=20)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    extra = FAMILIES["sd15_img2img"].call(1)
    got = draw(second, steps=10, **extra)
    load_adapter(second, Adapter.of(second), window=(0.0, 1.0))
    assert torch.equal(got, by_hand(second, (0.0, 0.5), lambda pipe: draw(pipe, steps=10, **extra)))


def test_another_pipeline_with_a_scheduler_of_its_own_says_so() -> None:
    first = sd15()
    load_adapter(first, an_adapter(first), window=(0.0, 0.5))
    parts = {**first.components, "scheduler": make_scheduler("EulerDiscreteScheduler")}
    second = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    with pytest.raises(PipelineError, match="that it was loaded on"):
        draw(second)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_denoiser(in_place: bool) -> None:
    pipe = sd15(make_scheduler("EulerDiscreteScheduler"))
    adapter = an_adapter(pipe)
    load_adapter(pipe, adapter, window=(0.0, 0.5))
    wanted = draw(pipe)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(draw(pipe), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(pipe), wanted, atol=1e-5, rtol=0)


def test_a_copy_of_the_denoiser_has_a_window_of_its_own() -> None:
    pipe = sd15()
    load_adapter(pipe, an_adapter(pipe), window=(0.0, 0.5))
    wanted, whole = draw(pipe), copy.deepcopy(pipe.unet)
    lora.forget_window(whole)
    assert torch.equal(draw(pipe), wanted)
    pipe.unet = whole
    assert not torch.equal(draw(pipe), wanted)


# --- in files ----------------------------------------------------------------------------------------------------


def test_the_window_travels_in_the_file(tmp_path: Path) -> None:
    pipe = AlignPropPipeline.from_pipe(sd15())
    pipe.load_adapter(an_adapter(pipe), window=(0.0, 0.5))
    wanted = draw(pipe)
    files = pipe.save_adapter(tmp_path / "adapter.safetensors")
    assert [read_metadata(file)["alignprop.window"] for file in files] == ["0.0-0.5"] * 2
    for source in (*files, Adapter.load(files[0]), Adapter.of(pipe)):
        other = sd15()
        load_adapter(other, source)
        torch.testing.assert_close(draw(other), wanted, atol=1e-5, rtol=0)
        load_adapter(other, source, window=(0.0, 1.0))
        assert (draw(other) - wanted).abs().max() > 1e-4
        assert "window" not in Adapter.of(other).metadata


def test_a_damaged_window_in_a_file_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    pipe = PIPE
    adapter = an_adapter(pipe)
    for text in ("0.9-0.1", "all", "nan-1", json.dumps([0, 1])):
        path = tmp_path / "adapter.safetensors"
        adapter.save(path, window=text)
        with pytest.raises(AdapterError, match=r"adapter\.safetensors.*window"):
            load_adapter(pipe, path)
        assert not switches(pipe)
        load_adapter(pipe, path, window=(0.0, 0.5))
        remove_adapter(pipe)


# --- wrong use ---------------------------------------------------------------------------------------------------


def test_values() -> None:
    assert str(Window(0.0, 0.6)) == "0.0-0.6"
    assert str(Window(-0.0, 1)) == "0.0-1.0"
    assert window_from_text(" .25 - 1 ") == Window(0.25, 1.0)
    assert windows.as_window([0, 1]) == windows.as_window((0.0, 1.0)) == windows.as_window("0-1") == Window()
    assert Window().is_whole
    assert not Window(0.0, 0.999).is_whole
    assert Window(0.1, 0.7).steps(10) == range(1, 7)
    assert Window(0.1 + 0.2, 0.7).steps(10) == range(3, 7)


@pytest.mark.parametrize(
    "value",
    ["", "0.5", "0.6-0.2", "0-2", "-0.5-1", "a-b", (0.5,), (0.1, 0.2, 0.3), (0.6, 0.2), (-0.1, 1)],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_window(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"0\.6"):
        load_adapter(PIPE, an_adapter(PIPE), window=value)
    assert not switches(PIPE)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [(0, float("nan")), (0, float("inf")), 3, 0.5, ("a", "b"), (True, 1)])
def test_other_types(value: Any) -> None:
    with pytest.raises(ConfigError):
        windows.as_window(value)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_text_and_steps(start: float, end: float, total: int) -> None:
    start, end = sorted((start, end))
    window = Window(start, end)
    assert window_from_text(str(window)) == window
    parts = [Window(0.0, start).steps(total), window.steps(total), Window(end, 1.0).steps(total)]
    assert [step for part in parts for step in part] == list(range(total))


def test_text_encoders_have_no_steps(tmp_path: Path) -> None:
    pipe = sdxl()
    adapter = an_adapter(pipe)
    encoder = random_adapter(pipe, paths=lambda _: []).layers
    linear = next(path for path, _ in pipe.text_encoder.named_modules() if path.endswith("q_proj"))
    width = pipe.text_encoder.get_submodule(linear).weight.shape[0]
    factors = next(iter(adapter.layers["unet"].values()))
    encoder = {linear: type(factors)(torch.ones(2, width), torch.ones(width, 2), 2.0)}
    both = Adapter({**adapter.layers, "text_encoder": encoder}, adapter.base)
    with pytest.raises(AdapterError, match="text_encoder"):
        load_adapter(pipe, both, window=(0.0, 0.5))
    assert not switches(pipe)
    load_adapter(pipe, both, window=(0.0, 1.0))


def test_a_fused_adapter_cannot_be_switched() -> None:
    pipe = sd15()
    load_adapter(pipe, an_adapter(pipe), window=(0.0, 0.5))
    wanted = draw(pipe)
    pipe.fuse_lora()
    with pytest.raises(PipelineError, match="unfuse_lora"):
        draw(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), wanted, atol=1e-4, rtol=0)


def test_a_call_outside_the_pipeline_says_so() -> None:
    """Its scheduler stands behind the last step."""
    pipe = sd15(make_scheduler("EulerDiscreteScheduler"))
    load_adapter(pipe, an_adapter(pipe), window=(0.0, 0.5))
    draw(pipe)
    text = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    with pytest.raises(PipelineError, match="window 0.0-0.5.*EulerDiscreteScheduler"):
        pipe.unet(torch.zeros(1, 4, 8, 8), 500, text)
