"""Pipelines of diffusers that do something that most do not, each checked in full as the sweep does (tests/sweep)."""

from typing import Any

import diffusers
import miniatures
import pytest
import torch
from aligning import settings
from by_hand import generators
from sweep.build import build
from sweep.checks import Case, check
from sweep.classes import arguments
from torch import nn

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.config.settings import LoraOptions
from alignprop_pipe.diffusion import lora, pipeline_call, pipeline_parts
from alignprop_pipe.diffusion.rollout import rollout
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.records import PromptBatch

pytestmark = pytest.mark.filterwarnings("ignore")

UNUSUAL = {
    "StableDiffusionPanoramaPipeline": "writes the scheduler's attributes anew, and into the sum that it divides",
    "StableCascadeDecoderPipeline": "names its denoiser decoder, which is not made for LoRAs",
    "WuerstchenDecoderPipeline": "tells its denoiser the share of noise, called r",
    "SkyReelsV2DiffusionForcingPipeline": "steps a copy of the scheduler for each frame",
    "LTXI2VLongMultiPromptPipeline": "decodes in a method decorated with no_grad; the frames come after the colours",
    "HiDreamImagePipeline": "sends pictures through experts in a method decorated with no_grad",
    "WanVACEPipeline": "takes one text and one generator, and no lists of them",
    "Kandinsky5I2VPipeline": "writes the next latents in the place of the last",
    "PRXPipeline": "tells its denoiser the timestep as a share of 1000",
    "StableDiffusionAdapterPipeline": "hands out NumPy arrays, whatever it is asked for",
    "QwenImage21Pipeline": "draws pictures with an alpha channel",
    "AllegroPipeline": "decodes in tiles that are written into one tensor",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_everything_holds_for_an_unusual_pipeline(name):
    result = check(getattr(diffusers, name))
    assert (result.outcome, result.words) == ("works", "")
    assert {"pictures", "adapter file", "gradient K=1", "gradient K=T", "align"} <= {*result.checks}


def test_schedulers_of_other_names_are_named():
    result = check(diffusers.UnCLIPPipeline)
    assert result.outcome == "refused"
    assert result.words.endswith("it steps prior_scheduler, decoder_scheduler, super_res_scheduler instead")


class Decorated(nn.Module):
    """A layer whose work is done in a method decorated with no_grad, such as experts in eval mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._work(x)

    @torch.no_grad()
    def _work(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def gradient(pipe: Any, **changed: Any) -> list[torch.Tensor]:
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    made = rollout(pipe, PromptBatch(["a dog", "a cat"]), settings(**changed), generators(), torch.Generator())
    return list(torch.autograd.grad(made.images.square().sum(), weights))


@pytest.mark.parametrize("place", ["unet", "vae.decoder"])
@pytest.mark.parametrize("checkpointing", ["all", "none"])
def test_a_decorated_method_inside_a_network_loses_nothing(place, checkpointing):
    pipe = miniatures.sd15()
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    for weight in lora.trainable(pipeline_parts.denoisers(pipe)):
        weight.data.fill_(0.1)
        weight.requires_grad_(True)
    wanted = gradient(pipe, truncation="full", checkpointing=checkpointing)
    name, _, inside = place.partition(".")
    part = getattr(pipe, name).get_submodule(inside)
    part.conv_out = Decorated(part.conv_out)
    got = gradient(pipe, truncation="full", checkpointing=checkpointing)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert type(part.conv_out) is Decorated


def test_steps_are_those_of_the_pipeline_however_often_its_scheduler_steps():
    """Once for every frame, and once more for the sound: three rounds all the same."""
    pipe = build(diffusers.SkyReelsV2DiffusionForcingPipeline)
    case = Case(type(pipe), pipe, 2, arguments(type(pipe), 2))
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    made = case.ours(truncation="last:2")
    assert (made.num_steps, made.graded) == (3, range(1, 3))


def test_the_scheduler_is_the_stock_one_after_a_rollout():
    pipe = miniatures.sd15()
    kind, own = type(pipe.scheduler), {*vars(pipe.scheduler)}
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    for weight in lora.trainable(pipeline_parts.denoisers(pipe)):
        weight.requires_grad_(True)
    gradient(pipe)
    assert type(pipe.scheduler) is kind
    assert "step" not in vars(pipe.scheduler)
    assert own <= {*vars(pipe.scheduler)}


def test_what_the_denoiser_was_given_may_not_be_written_into_unseen():
    """A recomputation would take what stands there now, and no gradient would say so."""
    pipe = miniatures.sd15()
    step = pipe.scheduler.step

    def in_place(noise: torch.Tensor, t: Any, latents: torch.Tensor, **given: Any) -> Any:
        made = step(noise, t, latents, **given)
        with torch.no_grad():
            latents.add_(1.0)
        return made

    pipe.scheduler.step = in_place
    lora.attach(pipeline_parts.denoisers(pipe), LoraOptions(rank=2), seed=0)
    for weight in lora.trainable(pipeline_parts.denoisers(pipe)):
        weight.data.fill_(0.1)
        weight.requires_grad_(True)
    keep = settings(truncation="full", guidance_scale=1.0)
    made = rollout(pipe, PromptBatch(["a dog", "a cat"]), keep, generators(), torch.Generator())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.images.sum().backward()


def test_several_prompts_of_one_video_are_refused_in_words():
    pipe = build(diffusers.LTXI2VLongMultiPromptPipeline)
    call = {"num_frames": 9, "max_sequence_length": 16}
    config = settings(height=32, width=32, steps=1)
    with pytest.raises(PipelineError, match="drew 1 for 2 prompts.*batch_size=1"):
        AlignPropPipeline.from_pipe(pipe).align("brightness", ["a dog", "a cat"], config, **call)


def test_one_prompt_goes_in_as_a_text_and_none_is_handed_on():
    pipe = miniatures.sd15()
    one = pipeline_call.call_arguments(pipe, ["a dog"], settings(negative_prompt="a cat").sampling, generators(1))
    assert (one["prompt"], one["negative_prompt"]) == ("a dog", "a cat")
    assert isinstance(one["generator"], torch.Generator)
    two = pipeline_call.call_arguments(pipe, ["a", "b"], settings().sampling, generators(), {"timesteps": None})
    assert two["prompt"] == ["a", "b"]
    assert two["timesteps"] is None
    assert "negative_prompt" not in two
