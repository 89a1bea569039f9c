"""The rollout on one pipeline: schedulers, precision, checkpointing, memory, and what it leaves behind."""

import copy
import functools
import inspect
import random
from contextlib import nullcontext
from typing import Any

import by_hand
import miniatures
import numpy as np
import pytest
import torch
from by_hand import PROMPTS, Chain, double_inside
from diffusers import (
    DiffusionPipeline,
    IFImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from miniatures import make_scheduler
from torch import Tensor, nn

from alignprop_pipe.config.settings import AlignConfig, LoraOptions
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.rollout import rollout
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.records import PromptBatch, Rollout
from alignprop_pipe.seeds import SeededDraws

pytestmark = [
    # diffusers' Euler scheduler hands torch tensors to NumPy 2; its SDXL pipeline calls a method that it deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),  # between its own pipelines
]

EXACT = ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
EXACT += ["LCMScheduler"]
SINGLE_INSIDE = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
STEPS = 4


def adapted(pipe: DiffusionPipeline, dtype: torch.dtype = torch.float64, size: float = 0.3) -> list[nn.Parameter]:
    """Put an adapter that is already in use on `pipe` and return its weights."""
    pipe.to(dtype)
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    if dtype == torch.float64:
        pipe.to(dtype)
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    generator = torch.Generator().manual_seed(11)
    for weight in weights:
        weight.data.copy_(size * torch.randn(weight.shape, generator=generator))
        weight.requires_grad_(True)
    return weights


def sd15(scheduler: str = "DDIMScheduler", dtype: torch.dtype = torch.float64) -> tuple[DiffusionPipeline, list]:
    pipe = miniatures.sd15(make_scheduler(scheduler))
    return pipe, adapted(pipe, dtype)


def roll(pipe: DiffusionPipeline, *, seed: int = 0, extra: dict | None = None, **settings: Any) -> Rollout:
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "height": 16, "width": 16, "truncation": "last:2"}
    config = AlignConfig().replace(**{**defaults, **settings})
    truncation_generator = torch.Generator().manual_seed(seed)
    return rollout(pipe, PromptBatch(PROMPTS), config, by_hand.generators(), truncation_generator, **(extra or {}))


def arguments(**settings: Any) -> dict:
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "height": 16, "width": 16, "eta": 0.0}
    return {"prompt": PROMPTS, **defaults, **settings}


def gradient(images: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(images.double().square().sum(), weights))


# --- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [*EXACT, *SINGLE_INSIDE])
def test_pictures_equal_the_stock_call_under_every_scheduler(scheduler):
    pipe, _ = sd15(scheduler, torch.float32)
    assert torch.equal(roll(pipe).images.detach(), by_hand.stock_pictures(pipe, arguments()))


def check_gradient(
    pipe: DiffusionPipeline, weights: list, k: int, step: float, tolerance: float, **settings: Any
) -> None:
    """Against an uncheckpointed chain, and against finite differences of the graded tail."""
    chain = Chain(pipe, pipe.components.get("unet") or pipe.transformer, arguments(**settings), weights)
    got = torch.autograd.grad(chain.score(roll(pipe, truncation=f"last:{k}", **settings).images), weights)
    assert by_hand.relative_difference(got, chain.gradient(k)) < 1e-10
    direction = by_hand.direction_of(got)
    assert by_hand.dot(got, direction) == pytest.approx(chain.slope(k, direction, step), rel=tolerance)


@pytest.mark.parametrize("scheduler", EXACT)
def test_gradient_is_the_slope(scheduler):
    pipe, weights = sd15(scheduler)
    check_gradient(pipe, weights, k=2, step=1e-5, tolerance=1e-7)


@pytest.mark.parametrize("scheduler", SINGLE_INSIDE)
def test_gradient_is_the_slope_where_the_scheduler_computes_in_float32(scheduler):
    pipe, weights = sd15(scheduler)
    check_gradient(pipe, weights, k=2, step=1e-3, tolerance=1e-3)
    with double_inside():
        check_gradient(pipe, weights, k=2, step=1e-5, tolerance=1e-7)


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching(scheduler):
    pipe = miniatures.sd3(make_scheduler(scheduler))
    weights = adapted(pipe, torch.float32)
    settings = {"max_sequence_length": 16}
    wanted = by_hand.stock_pictures(pipe, {k: v for k, v in arguments(**settings).items() if k != "eta"})
    assert torch.equal(roll(pipe, extra=settings).images.detach(), wanted)
    pipe.to(torch.float64)
    with double_inside():
        chain = Chain(pipe, pipe.transformer, {k: v for k, v in arguments(**settings).items() if k != "eta"}, weights)
        got = torch.autograd.grad(chain.score(roll(pipe, extra=settings).images), weights)
        assert by_hand.relative_difference(got, chain.gradient(2)) < 1e-10
        direction = by_hand.direction_of(got)
        assert by_hand.dot(got, direction) == pytest.approx(chain.slope(2, direction, 1e-5), rel=1e-7)


def test_a_copy_of_the_scheduler_steps_itself_and_is_not_counted():
    """Pipelines that draw sound too step a deep copy of their scheduler, made inside the call."""
    pipe, _ = sd15("EulerDiscreteScheduler", torch.float32)
    copied: list[int] = []

    def sound(_module: nn.Module, _args: object, output: Any) -> None:
        twin = copy.deepcopy(pipe.scheduler)
        twin.step(output[0], twin.timesteps[len(copied)], torch.zeros_like(output[0]))
        copied.append(twin.step_index)

    wanted = by_hand.stock_pictures(pipe, arguments())
    with by_hand.hooked(pipe.unet.register_forward_hook(lambda m, a, out: sound(m, a, (out[0].chunk(2)[0],)))):
        result = roll(pipe, checkpointing="none")
    assert torch.equal(result.images.detach(), wanted)
    assert result.num_steps == STEPS
    assert copied == [1, 2, 3, 4]


# --- settings of the call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 1.0},
        {"eta": 0.5, "guidance_scale": 1.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5},
        {"height": 16, "width": 24},
        {"height": 24, "width": 8},
        {"num_inference_steps": 1},
        {"num_inference_steps": 6},
    ],
    ids=str,
)
def test_settings_of_the_call(settings):
    pipe, weights = sd15()
    assert torch.equal(roll(pipe, **settings).images.detach(), by_hand.stock_pictures(pipe, arguments(**settings)))
    check_gradient(pipe, weights, k=1, step=1e-5, tolerance=1e-6, **settings)


def test_a_negative_prompt_is_passed_on():
    pipe, _ = sd15(dtype=torch.float32)
    wanted = by_hand.stock_pictures(pipe, arguments(negative_prompt=["a red ball"] * 2))
    assert torch.equal(roll(pipe, negative_prompt="a red ball").images.detach(), wanted)
    assert not torch.equal(roll(pipe).images.detach(), wanted)


def test_arguments_of_this_pipeline_alone_are_passed_on():
    pipe, _ = sd15(dtype=torch.float32)
    wanted = by_hand.stock_pictures(pipe, arguments(guidance_rescale=0.7))
    assert torch.equal(roll(pipe, extra={"guidance_rescale": 0.7}).images.detach(), wanted)


def test_img2img_counts_the_steps_that_are_left():
    pipe = miniatures.sd15_img2img()
    weights = adapted(pipe, torch.float32)
    extra = miniatures.FAMILIES["sd15_img2img"].call(2)
    for truncation, graded in (("last:2", range(1, 3)), ("full", range(3)), ("last:50", range(3))):
        result = roll(pipe, extra=extra, num_inference_steps=5, truncation=truncation)
        assert result.num_steps == 3
        assert result.graded == graded
        assert all(part.any() for part in gradient(result.images, weights))


# --- how many steps there are ---------------------------------------------------------------------------------------


class Silent(StableDiffusionPipeline):
    """Does not say how many steps it takes."""

    _num_timesteps = property(lambda self: None, lambda self, value: None)


class SilentFromPictures(StableDiffusionImg2ImgPipeline):
    """The same; of its scheduler's steps it takes the last ones."""

    _num_timesteps = property(lambda self: None, lambda self, value: None)


TOLD = {
    "scaled": lambda t: t / 1000,
    "scaled so that it falls on another timestep": lambda t: torch.ones_like(t),
    "turned round": lambda t: 1000 - t,
    "shifted": lambda t: t + 1,
    "batched": lambda t: t.expand(4),
    "in words of another scheduler": lambda t: torch.sigmoid(t.float() / 500),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(
    ("kind", "scheduler"), [(Silent, "DDIMScheduler"), (SilentFromPictures, "EulerDiscreteScheduler")]
)
def test_a_denoiser_may_be_told_the_time_in_any_way(told, kind, scheduler):
    pipe = miniatures.sd15(make_scheduler(scheduler), kind=kind)
    weights = adapted(pipe, torch.float32)
    from_pictures = issubclass(kind, StableDiffusionImg2ImgPipeline)
    extra = miniatures.FAMILIES["sd15_img2img"].call(2) if from_pictures else {}
    settings = {"num_inference_steps": 5 if from_pictures else 3}

    def tell(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args[0], TOLD[told](torch.as_tensor(args[1])), *args[2:]), kwargs

    with by_hand.hooked(pipe.unet.register_forward_pre_hook(tell, with_kwargs=True)):
        given = arguments(**settings) | extra
        wanted = by_hand.stock_pictures(pipe, {k: v for k, v in given.items() if not (from_pictures and k in SIZE)})
        for _ in range(2):  # what was counted is known the second time
            result = roll(pipe, extra=extra, truncation="last:2", **settings)
            assert torch.equal(result.images.detach(), wanted)
            assert (result.num_steps, result.graded) == (3, range(1, 3))
        assert all(part.any() for part in gradient(result.images, weights))


SIZE = ("height", "width")


def test_a_call_that_ends_early_is_counted():
    """A user's callback may break off the loop: what was announced is not what is taken."""
    pipe, weights = sd15(dtype=torch.float32)

    def enough(pipe: Any, step: int, _timestep: Any, kept: dict) -> dict:
        pipe._interrupt = step >= 1
        return kept

    result = roll(pipe, extra={"callback_on_step_end": enough}, truncation="last:1")
    assert (result.num_steps, result.graded) == (2, range(1, 2))
    wanted = by_hand.stock_pictures(pipe, arguments(callback_on_step_end=enough))
    assert torch.equal(result.images.detach(), wanted)
    assert any(part.any() for part in gradient(result.images, weights))


def test_the_truncation_is_drawn_as_if_the_steps_had_been_known():
    pipe = miniatures.sd15(kind=SilentFromPictures)
    adapted(pipe, torch.float32)
    extra = miniatures.FAMILIES["sd15_img2img"].call(2)
    for seed in range(4):
        drawn = roll(pipe, seed=seed, extra=extra, num_inference_steps=5, truncation="random").graded
        fresh = miniatures.sd15_img2img()
        adapted(fresh, torch.float32)
        assert drawn == roll(fresh, seed=seed, extra=extra, num_inference_steps=5, truncation="random").graded


# --- what draws random numbers --------------------------------------------------------------------------------------

HIDDEN = {
    "randn_like": lambda x: x + 0.3 * torch.randn_like(x),
    "normal_": lambda x: x + 0.3 * torch.empty_like(x).normal_(),
    "rand": lambda x: x * (0.5 + torch.rand(x.shape[-2:], dtype=x.dtype)),
    "randint": lambda x: x + 0.1 * torch.randint(3, x.shape).to(x),
    "dropout": lambda x: nn.functional.dropout(x, 0.3, training=True),
    "dropout2d": lambda x: nn.functional.dropout2d(x, 0.3, training=True),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "rrelu, which takes no generator": lambda x: nn.functional.rrelu(x, training=True),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "gumbel_softmax": lambda x: x + nn.functional.gumbel_softmax(x.detach(), dim=1),
    "beta": lambda x: x + torch.distributions.Beta(2.0, 3.0).sample(x.shape).to(x),
    "attention": lambda x: x + nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    "numpy": lambda x: x * (1 + np.random.rand()),  # noqa: NPY002 - what is process-wide there
    "python": lambda x: x * (1 + random.random()),
}


def seed_the_process():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


@pytest.mark.parametrize(
    ("where", "noise", "seeded"),
    [
        *(("decoder", noise, False) for noise in HIDDEN),
        *(("decoder", noise, True) for noise in HIDDEN),
        ("unet", "normal_", True),
        ("unet", "dropout2d", False),
        *(("unet", noise, True) for noise in ("alpha_dropout", "attention", "numpy", "python")),
    ],
)
@pytest.mark.usefixtures("unchecked")  # the type checks draw some
def test_the_gradient_is_exact_where_something_draws_random_numbers(where, noise, seeded):
    """Computed twice or once, the noise is that of the first time."""
    pipe, weights = sd15()
    part = pipe.vae.decoder.mid_block if where == "decoder" else pipe.unet.mid_block
    results = {}
    with by_hand.hooked(part.register_forward_hook(lambda _m, _a, out: HIDDEN[noise](out))):
        for choice in ("all", "none"):
            seed_the_process()
            with SeededDraws(5) if seeded else nullcontext():
                images = roll(pipe, checkpointing=choice, truncation="full").images
            moved = not torch.equal(torch.get_rng_state(), torch.manual_seed(3).get_state())
            assert moved == (not seeded and noise not in ("numpy", "python"))
            between = (torch.rand(7), random.random(), np.random.rand())  # noqa: NPY002 - drawn between the two passes
            assert len(between) == 3
            results[choice] = images, gradient(images, weights)
        seed_the_process()
        call = inspect.unwrap(type(pipe).__call__)
        with SeededDraws(5) if seeded else nullcontext():
            plain = call(pipe, **arguments(), generator=by_hand.generators(), output_type="pt", return_dict=False)[0]
        wanted = gradient(plain, weights)
    for images, got in results.values():
        assert torch.equal(images, plain)
        assert by_hand.relative_difference(got, wanted) < 1e-12


def test_a_second_backward_pass_draws_the_same():
    pipe, weights = sd15()
    with by_hand.hooked(pipe.vae.decoder.register_forward_hook(lambda _m, _a, out: out + torch.rand_like(out))):
        score = roll(pipe).images.square().sum()
        first = torch.autograd.grad(score, weights, retain_graph=True)
        assert by_hand.relative_difference(torch.autograd.grad(score, weights), first) == 0


def test_the_random_state_of_the_process_moves_only_where_the_networks_move_it():
    pipe, weights = sd15(dtype=torch.float32)
    before = torch.get_rng_state()
    gradient(roll(pipe).images, weights)
    assert torch.equal(torch.get_rng_state(), before)
    with by_hand.hooked(pipe.unet.register_forward_hook(lambda _m, _a, out: (out[0] + torch.rand_like(out[0]),))):
        torch.manual_seed(0)
        pipe(**arguments(), generator=by_hand.generators(), output_type="pt")
        after_stock = torch.get_rng_state()
        torch.manual_seed(0)
        gradient(roll(pipe).images, weights)
        assert torch.equal(torch.get_rng_state(), after_stock)


# --- truncation -----------------------------------------------------------------------------------------------------


def test_k_is_drawn_once_for_a_trajectory():
    pipe, _ = sd15(dtype=torch.float32)
    config = AlignConfig().replace(
        num_inference_steps=6, guidance_scale=1.0, height=16, width=16, truncation="random", checkpointing="none"
    )
    seen = set()
    for seed in range(8):
        drawn, expected = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        graph: list[bool] = []
        handle = pipe.unet.register_forward_hook(lambda _m, _a, out, graph=graph: graph.append(out[0].requires_grad))
        with by_hand.hooked(handle):
            result = rollout(pipe, PromptBatch(PROMPTS), config, by_hand.generators(), drawn)
        assert result.graded == config.truncation.plan(6, expected)
        assert torch.equal(drawn.get_state(), expected.get_state())  # one draw, no more
        assert graph == [step in result.graded for step in range(6)]
        seen.add(len(result.graded))
    assert len(seen) > 2


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [miniatures.sd15, miniatures.sdxl, miniatures.flux])
def test_half_precision_base_with_float32_adapter(make, dtype):
    pipe = make()
    weights = adapted(pipe, dtype, size=0.1)
    assert {weight.dtype for weight in weights} == {torch.float32}
    wanted = by_hand.stock_pictures(pipe, {k: v for k, v in arguments().items() if k != "eta"})
    with patching.frozen_for_training(pipe, weights):
        result = roll(pipe, truncation="full")
        assert (result.images.detach().float() - wanted.float()).abs().max() < 2e-2  # one rounding of half precision
        grads = gradient(result.images, weights)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in grads)
    assert sum(bool(part.any()) for part in grads) == len(grads)
    assert (
        {part.dtype for part in pipe.unet.parameters() if part.ndim == 4} == {dtype} if hasattr(pipe, "unet") else True
    )


def test_timesteps_of_ones_own():
    pipe, weights = sd15("EulerDiscreteScheduler", torch.float32)
    chosen = {"timesteps": [900, 500, 100]}
    result = roll(pipe, extra=chosen, truncation="last:2")
    assert torch.equal(result.images.detach(), by_hand.stock_pictures(pipe, arguments(**chosen)))
    assert (result.num_steps, result.graded) == (3, range(1, 3))
    assert any(part.any() for part in gradient(result.images, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures_equal_the_stock_call(dtype):
    pipe, _ = sd15(dtype=dtype)
    pipe.vae.register_to_config(force_upcast=False)
    assert torch.equal(roll(pipe).images.detach(), by_hand.stock_pictures(pipe, arguments()))


def test_half_precision_img2img_encodes_its_picture():
    pipe = miniatures.sd15_img2img()
    weights = adapted(pipe, torch.float16, size=0.1)
    with patching.frozen_for_training(pipe, weights):
        result = roll(pipe, extra=miniatures.FAMILIES["sd15_img2img"].call(2), num_inference_steps=5)
        assert all(part.isfinite().all() for part in gradient(result.images, weights))


# --- the gradient's growth ------------------------------------------------------------------------------------------


def limited_by_hand(chain: Chain, growth: float, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradient, piece by piece: from the pictures to the last latents, cut there to size, on to the ones before."""
    kind, latents = type(chain.pipe.scheduler), []
    step = kind.step

    @functools.wraps(step)
    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents.append(result[0])
        return result

    monkeypatch.setattr(kind, "step", kept)
    with torch.enable_grad(), by_hand.same_hidden_draws():
        pictures = inspect.unwrap(type(chain.pipe).__call__)(
            chain.pipe, **chain.arguments, generator=by_hand.generators(), output_type="pt", return_dict=False
        )[0]
    total = [torch.zeros_like(weight) for weight in chain.weights]
    (pull,) = torch.autograd.grad(chain.score(pictures), latents[-1], retain_graph=True)
    limits = growth * pull.flatten(1).norm(dim=1)
    for now, before in zip(reversed(latents), [*reversed(latents[:-1]), None], strict=True):
        pull = torch.stack([one * min(1.0, limit / one.norm()) for one, limit in zip(pull, limits, strict=True)])
        inputs = [*chain.weights, *([] if before is None else [before])]
        # Of this step alone: the latents before are constants here.
        parts = torch.autograd.grad(now, inputs, pull, retain_graph=True, allow_unused=True)
        through = [] if before is None else torch.autograd.grad(before, chain.weights, parts[-1], retain_graph=True)
        for place, part in enumerate(parts[: len(total)]):
            total[place] += part - (through[place] if through else 0)
        pull = parts[-1]
    return total


@pytest.mark.parametrize("growth", [1e6, 1.0, 0.2])
def test_a_gradient_grows_no_further_than_it_may(growth, monkeypatch):
    pipe, weights = sd15()
    images = roll(pipe, truncation="full", max_grad_growth=growth).images
    chain = Chain(pipe, pipe.unet, arguments(), weights)
    got = torch.autograd.grad(chain.score(images), weights)
    assert by_hand.relative_difference(got, limited_by_hand(chain, growth, monkeypatch)) < 1e-9
    is_exact = by_hand.relative_difference(got, chain.gradient(STEPS)) < 1e-10
    assert is_exact == (growth == 1e6)


def test_the_growth_is_limited_picture_by_picture():
    pipe, weights = sd15()
    images = roll(pipe, truncation="full", max_grad_growth=0.5).images
    alone = [torch.autograd.grad(image.square().sum(), weights, retain_graph=True) for image in images]
    assert by_hand.relative_difference(gradient(images, weights), [a + b for a, b in zip(*alone, strict=True)]) < 1e-10


# --- checkpointing and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["last:1", "last:3", "full"])
def test_checkpointing_changes_no_gradient(truncation):
    pipe, weights = sd15()
    results = {
        choice: roll(pipe, truncation=truncation, checkpointing=choice) for choice in ("all", "none", "0", "1", "9")
    }
    wanted = gradient(results["none"].images, weights)
    for result in results.values():
        assert torch.equal(result.images, results["none"].images)
        if result is not results["none"]:
            assert all(torch.equal(a, b) for a, b in zip(gradient(result.images, weights), wanted, strict=True))


def test_checkpointing_says_which_steps_run_twice():
    pipe, weights = sd15(dtype=torch.float32)
    inside = pipe.unet.mid_block.resnets[0]
    for choice, again in {"all": 3, "none": 0, "0": 3, "1": 2, "2": 1, "3": 0, "50": 0}.items():
        calls = []
        with by_hand.hooked(inside.register_forward_hook(lambda *_, calls=calls: calls.append(1))):
            gradient(roll(pipe, truncation="last:3", checkpointing=choice).images, weights)
        assert len(calls) == STEPS + again, choice


def test_a_call_with_a_cache_is_not_recomputed():
    """An object among the arguments may be empty again by the time of the backward pass."""
    pipe, weights = sd15(dtype=torch.float32)
    calls: list[int] = []
    inside = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    with by_hand.hooked(inside):
        result = roll(pipe, extra={"cross_attention_kwargs": {"cache": object()}}, checkpointing="all")
        gradient(result.images, weights)
    assert len(calls) == STEPS


def bytes_kept(pipe: DiffusionPipeline, **settings: Any) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, the models' own weights left out."""
    own = {
        parameter.untyped_storage().data_ptr()
        for part in pipeline_parts.components(pipe).values()
        for parameter in part.parameters()
    }
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # a freed storage's address could come back
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = roll(pipe, truncation="full", **settings)
    assert result.images.requires_grad
    return sum(kept.values())


def test_memory_is_flat_in_the_number_of_steps():
    pipe, _ = sd15(dtype=torch.float32)
    latents = 2 * 4 * 8 * 8 * 4  # batch, channels, height, width, bytes of a float32
    growth = {}
    for choice in ("all", "none"):
        short, middle, long = (
            bytes_kept(pipe, checkpointing=choice, num_inference_steps=steps) for steps in (3, 6, 12)
        )
        growth[choice] = (long - middle) / 6
        assert (middle - short) / 3 == pytest.approx(growth[choice], rel=0.2, abs=latents)
    # Guidance doubles the batch, and the scheduler's sum keeps a handful of tensors.
    assert growth["all"] <= 8 * latents
    assert growth["none"] > 50 * latents


def test_the_decoder_is_recomputed_too():
    pipe, _ = sd15(dtype=torch.float32)
    kept = bytes_kept(pipe, num_inference_steps=1)
    picture = 2 * 3 * 16 * 16 * 4  # and one feature map of the decoder is larger than a picture
    assert kept <= 4 * picture
    calls: list[int] = []
    with by_hand.hooked(pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))):
        roll(pipe).images.sum().backward()
    assert len(calls) == 2


# --- the distance to the base model ---------------------------------------------------------------------------------


def test_distance_is_the_mean_squared_change_of_the_prediction():
    pipe, weights = sd15()
    assert roll(pipe).distance is None
    inputs: list[tuple[tuple, dict]] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _m, a, k: inputs.append((a, k)), with_kwargs=True)
    with by_hand.hooked(handle):
        stock_images = by_hand.stock_pictures(pipe, arguments())
    changes = []
    with torch.no_grad():
        for args, kwargs in inputs[-2:]:
            with_adapter = pipe.unet(*args, **kwargs)[0]
            pipe.unet.disable_adapters()
            changes.append((with_adapter - pipe.unet(*args, **kwargs)[0]).square().mean())
            pipe.unet.enable_adapters()
    for weight in weights:
        weight.requires_grad_(True)
    result = roll(pipe, distance_weight=0.5)
    assert result.distance is not None
    assert torch.equal(result.images.detach(), stock_images)
    assert result.distance.item() == pytest.approx(float(torch.stack(changes).mean()), rel=1e-5)
    assert all(part.any() for part in torch.autograd.grad(result.distance, weights))


def test_distance_is_zero_for_a_new_adapter():
    pipe = miniatures.sd15()
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    distance = roll(pipe, distance_weight=1.0).distance
    assert distance is not None
    assert distance.item() == 0.0


# --- gradient mode and state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_flows_also_where_the_caller_switched_it_off(mode):
    pipe, weights = sd15()
    wanted = gradient(roll(pipe).images, weights)
    with mode():
        result = roll(pipe)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(gradient(result.images, weights), wanted, strict=True))


def state(pipe: DiffusionPipeline) -> dict:
    """All that a rollout must leave as it was."""
    found: dict = {
        "progress": copy.deepcopy(getattr(pipe, "_progress_bar_config", None)),
        "grad": torch.is_grad_enabled(),
    }
    for name, part in pipeline_parts.components(pipe).items():
        found[name, "own"] = {key: id(value) for key, value in vars(part).items() if callable(value)}
        for path, module in part.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            found[name, path] = (module.training, *(list(one) for one in hooks), "forward" in vars(module))
        found[name, "weights"] = {
            path: (weight.requires_grad, weight.dtype, weight.device, weight.grad is None)
            for path, weight in part.named_parameters()
        }
    found["scheduler"] = {key for key, value in vars(pipe.scheduler).items() if inspect.isroutine(value)}
    return found


class Broken(Exception):
    pass


@pytest.mark.parametrize("broken_at", [None, 1, 3, "decoder"])
def test_everything_is_left_as_it_was(broken_at):
    pipe, weights = sd15(dtype=torch.float32)
    pipe.unet.train()
    pipe.vae.encoder.requires_grad_(True)
    weights[0].requires_grad_(False)
    calls = []

    def breaks(module: nn.Module, *_: object) -> None:
        calls.append(module)
        if len(calls) == broken_at or (broken_at == "decoder" and module is pipe.vae.decoder):
            raise Broken

    with by_hand.hooked(*(part.register_forward_pre_hook(breaks) for part in (pipe.unet, pipe.vae.decoder))):
        before = state(pipe)
        if broken_at is None:
            roll(pipe)
        else:
            with pytest.raises(Broken):
                roll(pipe)
        assert state(pipe) == before
    pipe.unet.eval()
    assert torch.equal(roll(pipe).images.detach(), by_hand.stock_pictures(pipe, arguments()))


def test_a_forward_that_someone_else_replaced_is_put_back():
    pipe, _ = sd15(dtype=torch.float32)
    original, calls = pipe.unet.forward, []

    def theirs(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    pipe.unet.forward = theirs
    roll(pipe)
    assert pipe.unet.forward is theirs
    assert len(calls) == STEPS


def test_the_base_model_gets_no_gradient():
    pipe, weights = sd15(dtype=torch.float32)
    roll(pipe).images.sum().backward()
    trained = {id(weight) for weight in weights}
    for part in pipeline_parts.components(pipe).values():
        assert all(weight.grad is None for weight in part.parameters() if id(weight) not in trained)
    assert all(weight.grad is not None for weight in weights)


def test_the_same_generators_give_the_same_pictures():
    pipe, _ = sd15("EulerAncestralDiscreteScheduler", torch.float32)
    first, second = (roll(pipe, seed=seed, truncation="random").images for seed in (1, 2))
    assert torch.equal(first, second)  # the truncation draw is another one and moves no picture


# --- pipelines that are made otherwise ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"), [("pixels", {"clean_caption": False}), ("prior_and_decoder", {"prior_num_inference_steps": 2})]
)
def test_pictures_that_come_as_the_network_made_them_are_brought_to_0_and_1(name, extra):
    """One denoises pixels, the other calls two pipelines; both hand out [-1, 1] for "pt" and [0, 1] for NumPy."""
    pipe = getattr(miniatures, name)()
    assert list(pipeline_parts.denoisers(pipe)) == ["unet"]
    weights = adapted(pipe, torch.float32, size=0.1)
    given = {"prompt": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": 2.0, "height": 16, "width": 16, **extra}
    wanted = torch.from_numpy(pipe(**given, generator=by_hand.generators(), output_type="np").images)
    results = {choice: roll(pipe, extra=extra, checkpointing=choice) for choice in ("all", "none")}
    for result in results.values():
        assert torch.equal(result.images.detach(), wanted.permute(0, 3, 1, 2))
        assert (result.num_steps, result.graded) == (STEPS, range(2, 4))
    got, plain = (gradient(result.images, weights) for result in results.values())
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert any(part.any() for part in got)


def test_a_pipeline_that_starts_later_and_does_not_say_so():
    """Of 5 steps, strength 0.6 leaves 3; only the timestep that the denoiser is told first shows it."""
    pipe = miniatures.pixels(kind=IFImg2ImgPipeline)
    adapted(pipe, torch.float32, size=0.1)
    start = {"clean_caption": False, **miniatures.FAMILIES["sd15_img2img"].call(2)}
    result = roll(pipe, num_inference_steps=5, extra=start)
    assert (result.num_steps, result.graded) == (3, range(1, 3))


def test_a_pipeline_in_a_pipeline_is_left_as_it_was():
    pipe = miniatures.prior_and_decoder()
    adapted(pipe, torch.float32)
    before = [(vars(part).get("_progress_bar_config"), type(part)) for part in pipeline_parts.inner(pipe)]
    roll(pipe, extra={"prior_num_inference_steps": 2})
    assert [(vars(part).get("_progress_bar_config"), type(part)) for part in pipeline_parts.inner(pipe)] == before


def test_processors_that_a_call_puts_in_are_taken_out_again():
    pipe = miniatures.sd15_pag()
    weights, before = adapted(pipe, torch.float32), dict(pipe.unet.attn_processors)
    gradient(roll(pipe, extra={"pag_scale": 2.0}).images, weights)
    assert pipe.unet.attn_processors == before


# --- what is refused ------------------------------------------------------------------------------------------------


def test_pictures_that_lose_the_gradient_are_refused(monkeypatch):
    pipe, _ = sd15(dtype=torch.float32)
    inside = pipe.image_processor.postprocess
    monkeypatch.setattr(pipe.image_processor, "postprocess", lambda image, **options: inside(image.detach(), **options))
    with pytest.raises(PipelineError, match="after its last denoising step.*another pipeline class"):
        roll(pipe)
    monkeypatch.undo()
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *given, **options: (step(*given, **options)[0].detach(),))
    with pytest.raises(PipelineError, match="in its denoising loop"):
        roll(pipe)


@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
def test_a_pipeline_that_leaves_torch_is_refused_where_its_decoder_does_not_make_its_pictures(monkeypatch):
    pipe = miniatures.numpy_only()
    adapted(pipe, torch.float32)
    picture = miniatures.FAMILIES["sd15_controlnet"].call(2)
    inside = pipe.decode_latents
    monkeypatch.setattr(pipe, "decode_latents", lambda latents: inside(latents) ** 2)
    with pytest.raises(PipelineError, match="loses the gradient after its last denoising step.*NumPy"):
        roll(pipe, extra=picture)
    step = pipe.scheduler.step

    def arrays_in_the_loop(noise: Tensor, *given: Any, **options: Any) -> Any:
        return step(torch.from_numpy(noise.numpy()), *given, **options)

    monkeypatch.setattr(pipe.scheduler, "step", arrays_in_the_loop)
    with pytest.raises(PipelineError, match="NumPy.*newer pipeline class"):
        roll(pipe, extra=picture)


@pytest.mark.parametrize(
    ("made", "said"), [((2, 7), r"shape \(2, 7\)"), ((2, 1, 8, 8), r"shape \(2, 1, 8, 8\)"), (None, "list")]
)
def test_what_is_no_picture_is_refused(made, said, monkeypatch):
    pipe, _ = sd15(dtype=torch.float32)
    sound = ["a", "b"] if made is None else torch.zeros(made)
    monkeypatch.setattr(pipe.image_processor, "postprocess", lambda image, **_: sound)
    with pytest.raises(PipelineError, match=f"{said} .*pictures .* are needed.*Load a text-to-image"):
        roll(pipe)


def test_a_call_that_lacks_an_argument_says_which_there_are():
    pipe = miniatures.sd15_controlnet()
    adapted(pipe, torch.float32)
    with pytest.raises(PipelineError, match=r"before its first denoising step with TypeError: .*it takes image, "):
        roll(pipe)


def test_an_error_after_the_first_step_stays_what_it_is():
    pipe, _ = sd15(dtype=torch.float32)

    def breaks(*_: object) -> None:
        raise ValueError("of someone else")

    with (
        by_hand.hooked(pipe.vae.decoder.register_forward_pre_hook(breaks)),
        pytest.raises(ValueError, match="someone else"),
    ):
        roll(pipe)


def test_steps_that_differ_from_call_to_call_are_refused():
    pipe, _ = sd15(dtype=torch.float32)
    calls: list[int] = []

    def more_each_time(*_given: object) -> None:
        calls.append(1)
        for _ in calls:
            latents = torch.zeros(2, 4, 8, 8)
            noise = pipe.unet(latents, 1, encoder_hidden_states=torch.zeros(2, 77, miniatures.WIDTH))[0]
            pipe.scheduler.step(noise, 1, latents)

    with (
        by_hand.hooked(pipe.vae.decoder.register_forward_pre_hook(more_each_time)),
        pytest.raises(PipelineError, match="num_inference_steps"),
    ):
        roll(pipe)
