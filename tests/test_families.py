"""The rollout over pipelines of many families: its pictures, its gradients, and where the gradient stops.

Families differ in denoiser, scheduler, calls a step, decoder and output; the package names none of them, so each is
checked against stock calls (`by_hand`).
"""

from collections.abc import Sequence
from typing import Any

import by_hand
import pytest
import torch
from by_hand import PROMPTS, Chain, double_inside
from miniatures import FAMILIES, Family
from torch import Tensor, nn

from alignprop_pipe.config.settings import AlignConfig, LoraOptions
from alignprop_pipe.config.truncation import LastK
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion.rollout import rollout
from alignprop_pipe.records import PromptBatch, Rollout

STEPS = {name: 5 if name == "sd15_img2img" else 3 for name in FAMILIES}  # strength 0.6 of 5 steps is 3
# diffusers' Euler scheduler hands torch tensors to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def adapted(family: Family, dtype: torch.dtype = torch.float64) -> tuple[Any, list[nn.Parameter]]:
    """A pipeline whose adapter is already in use: its up-projections are no longer zero."""
    pipe = family.make()
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    pipe.to(dtype)
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    generator = torch.Generator().manual_seed(11)
    for weight in weights:
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        weight.requires_grad_(True)
    return pipe, weights


def arguments(name: str) -> dict:
    return {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS[name],
        "guidance_scale": 2.0,
        **FAMILIES[name].call(len(PROMPTS)),
    }


def roll(name: str, pipe: Any, **settings: Any) -> Rollout:
    family = FAMILIES[name]
    config = AlignConfig().replace(
        num_inference_steps=STEPS[name], guidance_scale=2.0, height=family.height, width=family.width, **settings
    )
    extra = family.extra(len(PROMPTS))
    with by_hand.same_hidden_draws():
        return rollout(pipe, PromptBatch(PROMPTS), config, by_hand.generators(), torch.Generator(), **extra)


def gradient(chain: Chain, result: Rollout) -> Sequence[Tensor]:
    return torch.autograd.grad(chain.score(result.images), chain.weights)


@EVERY_FAMILY
@pytest.mark.parametrize("checkpointing", ["all", "none"])
def test_pictures_equal_the_stock_call(name, checkpointing):
    pipe, _ = adapted(FAMILIES[name], torch.float32)
    wanted = by_hand.stock_pictures(pipe, arguments(name))
    result = roll(name, pipe, truncation="last:2", checkpointing=checkpointing)
    assert torch.equal(result.images.detach(), wanted)
    assert result.images.requires_grad
    assert result.graded == range(1, 3)
    assert result.num_steps == 3


@EVERY_FAMILY
def test_gradient_equals_an_uncheckpointed_chain_and_the_slope(name):
    pipe, weights = adapted(FAMILIES[name])
    with double_inside():
        chain = Chain(pipe, next(iter(pipeline_parts.denoisers(pipe).values())), arguments(name), weights)
        assert chain.num_steps == 3
        for k in (1, 2, 3):
            got = gradient(chain, roll(name, pipe, truncation=LastK(k)))
            assert by_hand.relative_difference(got, chain.gradient(k)) < 1e-10
            direction = by_hand.direction_of(got)
            slope = chain.slope(k, direction, 1e-5)
            assert by_hand.dot(got, direction) == pytest.approx(slope, rel=1e-6)


@EVERY_FAMILY
def test_gradient_as_the_parts_compute_it(name):
    """With the float32 casts of schedulers and norms in place: still what the uncheckpointed chain gives."""
    pipe, weights = adapted(FAMILIES[name])
    chain = Chain(pipe, next(iter(pipeline_parts.denoisers(pipe).values())), arguments(name), weights)
    got = gradient(chain, roll(name, pipe, truncation="last:2"))
    assert by_hand.relative_difference(got, chain.gradient(2)) < 1e-10


@EVERY_FAMILY
def test_no_gradient_reaches_a_denoiser_call_before_the_cut(name):
    """Each call gets its own zero added to its latents; only graded calls' zeros are felt, recomputed or not."""
    pipe, weights = adapted(FAMILIES[name])
    denoiser = next(iter(pipeline_parts.denoisers(pipe).values()))
    zeros: list[Tensor] = []

    def probe(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        zeros.append(torch.zeros((), dtype=torch.float64, requires_grad=True))
        if args:
            return (args[0] + zeros[-1], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + zeros[-1]}

    with by_hand.hooked(denoiser.register_forward_pre_hook(probe, with_kwargs=True)):
        result = roll(name, pipe, truncation="last:2")
    result.images.double().square().sum().backward()
    first_graded = len(zeros) // 3
    assert len(zeros) in (3, 6)
    assert all(zero.grad is None for zero in zeros[:first_graded])
    assert all(zero.grad is not None and zero.grad != 0 for zero in zeros[first_graded:])
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights)


@EVERY_FAMILY
def test_adapter_gradient_is_zero_before_the_cut(name):
    """Zeros added behind every up-projection, one for each denoiser call: only those of graded calls get a gradient."""
    pipe, _ = adapted(FAMILIES[name])
    denoiser = next(iter(pipeline_parts.denoisers(pipe).values()))
    probes: list[list[Tensor]] = []

    def new_call(*_: object) -> None:
        probes.append([])

    def probe(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        probes[-1].append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1][-1]

    ups = [module for path, module in denoiser.named_modules() if path.endswith("lora_B.alignprop")]
    handles = [denoiser.register_forward_pre_hook(new_call), *(up.register_forward_hook(probe) for up in ups)]
    with by_hand.hooked(*handles):
        result = roll(name, pipe, truncation="last:1", checkpointing="none")
        result.images.double().square().sum().backward()
    first_graded = len(probes) - len(probes) // 3
    assert all(zero.grad is None for call in probes[:first_graded] for zero in call)
    assert all(any(zero.grad is not None and zero.grad.any() for zero in call) for call in probes[first_graded:])


def test_videos_keep_their_frames():
    for name in (name for name, family in FAMILIES.items() if family.video):
        pipe, _ = adapted(FAMILIES[name], torch.float32)
        result = roll(name, pipe, truncation="last:1")
        frames = FAMILIES[name].extra(2)["num_frames"]
        assert result.images.shape == (2, frames, 3, FAMILIES[name].height, FAMILIES[name].width)
        assert result.images.min() >= 0
        assert result.images.max() <= 1


def test_a_control_network_keeps_no_activations():
    """It is no denoiser, but is called as often: run without a graph before the cut, and recomputed after it.

    At the first graded step nothing that it sees carries gradient, so it need not be recomputed there.
    """
    pipe, _ = adapted(FAMILIES["sd15_controlnet"])
    assert list(pipeline_parts.denoisers(pipe)) == ["unet"]
    graphs: list[bool] = []
    handle = pipe.controlnet.conv_in.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    with by_hand.hooked(handle):
        result = roll("sd15_controlnet", pipe, truncation="last:2")
        before_backward = len(graphs)
        result.images.sum().backward()
    assert graphs[:before_backward] == [False, True, True]
    assert len(graphs) == before_backward + 1
