"""What a pipeline is made of, found without naming a family; and the state that training needs, given back."""

from collections.abc import Callable
from typing import Any

import by_hand
import miniatures
import pytest
import torch
from aligning import PROMPTS, pictures, state
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan, DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.diffusion import patching, pipeline_call, pipeline_parts
from alignprop_pipe.errors import PipelineError

NETWORKS = {
    "sd15": ("unet", AutoencoderKL),
    "sd15_img2img": ("unet", AutoencoderKL),
    "sd15_controlnet": ("unet", AutoencoderKL),
    "sd15_pag": ("unet", AutoencoderKL),
    "sdxl": ("unet", AutoencoderKL),
    "sdxl_adapter": ("unet", AutoencoderKL),
    "sd3": ("transformer", AutoencoderKL),
    "flux": ("transformer", AutoencoderKL),
    "pixart": ("transformer", AutoencoderKL),
    "wan": ("transformer", AutoencoderKLWan),
    "ltx": ("transformer", AutoencoderKLLTXVideo),
}


@pytest.mark.parametrize("name", miniatures.FAMILIES)
def test_denoiser_decoder_and_scheduler_are_found(name: str) -> None:
    pipe = miniatures.FAMILIES[name].make()
    denoiser, decoder = NETWORKS[name]
    assert pipeline_parts.denoisers(pipe) == {denoiser: getattr(pipe, denoiser)}
    assert type(pipeline_parts.decoder(pipe)) is decoder
    assert pipeline_parts.decoder(pipe) is pipe.vae
    assert pipeline_parts.scheduler(pipe) is pipe.scheduler
    assert {"text_encoder", "vae", denoiser} <= set(pipeline_parts.components(pipe))
    assert not {"scheduler", "tokenizer"} & set(pipeline_parts.components(pipe))


def test_two_denoisers_are_found() -> None:
    pipe = miniatures.wan()
    second = miniatures.wan(seed=1).transformer
    pipe.register_modules(transformer_2=second)
    assert pipeline_parts.denoisers(pipe) == {"transformer": pipe.transformer, "transformer_2": second}


def test_a_pipeline_without_a_scheduler() -> None:
    pipe = miniatures.sd15()
    pipe.scheduler = None
    with pytest.raises(PipelineError, match=r"no scheduler.*set pipe\.scheduler first"):
        pipeline_parts.scheduler(pipe)


# --- arguments of the call --------------------------------------------------------------------------------------------


def arguments(pipe: DiffusionPipeline, extra: Any = None, **changed: Any) -> dict[str, Any]:
    generators = [torch.Generator(), torch.Generator()]
    return pipeline_call.call_arguments(pipe, PROMPTS[:2], SamplingOptions(**changed), generators, extra)


def test_arguments_are_those_that_the_call_takes() -> None:
    full = arguments(miniatures.sd15(), height=16, width=24, eta=0.5, negative_prompt="grey")
    assert full.pop("generator").__len__() == 2
    assert full == {
        "prompt": PROMPTS[:2],
        "negative_prompt": ["grey", "grey"],
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "eta": 0.5,
        "height": 16,
        "width": 24,
        "output_type": "pt",
    }
    assert "eta" not in arguments(miniatures.flux(), eta=0.5)
    assert not {"height", "width"} & set(arguments(miniatures.sd15_img2img(), height=16, width=16))


def test_what_was_not_set_is_left_to_the_pipeline() -> None:
    given = arguments(miniatures.sd15())
    assert not {"height", "width", "negative_prompt"} & set(given)


def test_arguments_of_one_pipeline_alone_go_before_the_settings() -> None:
    given = arguments(miniatures.wan(), {"num_frames": 5, "height": 32, "no_such": 1}, height=16)
    assert (given["num_frames"], given["height"]) == (5, 32)
    assert "no_such" not in given


def test_lists_are_given_as_copies() -> None:
    extra = {"prompt_2": ["a", "b"], "cross_attention_kwargs": {"scale": 1.0}}
    given = arguments(miniatures.sdxl(), extra)
    given["prompt_2"][0] = "<|user|>a"  # as ZImagePipeline does
    given["cross_attention_kwargs"]["scale"] = 0.5
    assert extra == {"prompt_2": ["a", "b"], "cross_attention_kwargs": {"scale": 1.0}}


def test_a_pipeline_that_takes_no_prompt() -> None:
    class Unconditional(DiffusionPipeline):
        def __call__(self, batch_size: int = 1, output_type: str = "pil") -> None: ...

    with pytest.raises(PipelineError, match="Unconditional takes no prompt: it cannot be aligned"):
        arguments(Unconditional())


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_loss_scaling_is_for_float16_alone(dtype: torch.dtype, half: bool) -> None:
    assert pipeline_parts.is_half(miniatures.sd15().to(dtype)) is half


# --- the state that training needs ---


@pytest.mark.parametrize("breaks", [False, True])
def test_frozen_for_training(breaks: bool) -> None:
    pipe = miniatures.sd15().to(torch.float16)
    pipe.unet.train()
    pipe.vae.requires_grad_(True)
    before = state(pipe)
    chosen = [pipe.unet.conv_in.weight]
    try:
        with patching.frozen_for_training(pipe, chosen):
            networks = pipeline_parts.components(pipe).values()
            assert not any(module.training for network in networks for module in network.modules())
            graded = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
            assert len(graded) == 1
            assert graded[0] is chosen[0]
            assert not breaks or 1 / 0
    except ZeroDivisionError:
        pass
    assert state(pipe) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float16_decoder_that_overflows_decodes_in_float32(dtype: torch.dtype) -> None:
    network = miniatures.sd15().vae.to(dtype)  # says force_upcast, as Stable Diffusion's own
    assert pipeline_parts.decoding_dtype(network) == (torch.float32 if dtype == torch.float16 else dtype)
    network.register_to_config(force_upcast=False)
    assert pipeline_parts.decoding_dtype(network) == dtype


def test_guards_are_off_inside_and_their_class_is_not_forgotten() -> None:
    pipe = miniatures.sd15()
    assert patching.guards_on(pipe) == []
    checker = torch.nn.Linear(1, 1)
    pipe.safety_checker = checker
    pipe.register_to_config(safety_checker=("stable_diffusion", "StableDiffusionSafetyChecker"))
    pipe.watermark = "mark"
    assert patching.guards_on(pipe) == ["safety_checker", "watermark"]
    with pytest.raises(KeyError), patching.guards_off(pipe):
        assert (pipe.safety_checker, pipe.watermark) == (None, None)
        raise KeyError
    assert (pipe.safety_checker, pipe.watermark) == (checker, "mark")
    assert pipe.config["safety_checker"] == ("stable_diffusion", "StableDiffusionSafetyChecker")


# --- prompts that are too long ----------------------------------------------------------------------------------------


def test_lost_words() -> None:
    pipe = miniatures.sd15()
    fits = " ".join(["dog"] * 75)  # 77 places, two of them for start and end
    assert pipeline_call.lost_words(pipe, "a dog") == ""
    assert pipeline_call.lost_words(pipe, fits) == ""
    assert pipeline_call.lost_words(pipe, f"{fits} cat") == "cat"
    assert pipeline_call.lost_words(pipe, f"{fits} two cats") == "two cats"


def test_words_that_another_tokenizer_takes_are_not_lost() -> None:
    pipe = miniatures.sd3()  # two of CLIP, and T5 which takes 512
    assert pipeline_call.lost_words(pipe, " ".join(["dog"] * 100)) == ""
    pipe.tokenizer_3 = None
    assert pipeline_call.lost_words(pipe, " ".join(["dog"] * 75 + ["cat"])) == "cat"


def test_the_stock_call_loses_the_same_words() -> None:
    pipe = miniatures.sd15()
    fits = " ".join(["dog"] * 75)
    same_start = [pictures(pipe, prompt=[f"{fits} {end}"] * 2) for end in ("cat", "fish")]
    assert torch.equal(*same_start)
    assert not torch.equal(same_start[0], pictures(pipe, prompt=[" ".join(["dog"] * 74) + " fish"] * 2))


# --- pictures that are in [0, 1] already, and those that are not ---


def shown(pipe: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The pictures of a pipeline whose processor hands out `change` of the pictures in [0, 1]."""
    inside = pipe.image_processor.postprocess
    given = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    given |= {"prompt": by_hand.PROMPTS, "generator": by_hand.generators()}
    with patching.replaced(pipe.image_processor, "postprocess", lambda image, **how: change(inside(image, **how))):
        return pipeline_call.pictures(pipe, type(pipe).__call__, given)


def below(pixels: int, by: float) -> Callable[[Tensor], Tensor]:
    def change(images: Tensor) -> Tensor:
        images = images.clone()
        images.view(-1)[:pixels] = -by
        return images

    return change


@pytest.mark.parametrize(("pixels", "by"), [(1, 1e-4), (1, 0.2), (700, 1e-3), (5, 1e-9)])
def test_a_few_pixels_below_0_rescale_nothing(pixels, by):
    pipe = miniatures.sd15()
    wanted = below(pixels, 0.0)(shown(pipe, lambda images: images))
    assert torch.equal(shown(pipe, below(pixels, by)), wanted)


def test_pixels_above_1_are_cut_off():
    pipe = miniatures.sd15()
    assert shown(pipe, lambda images: images + 0.7).max() == 1


@pytest.mark.parametrize("turned", [False, True])
def test_pictures_as_the_decoder_made_them_are_brought_to_0_and_1(turned):
    """Bright or dark, and where they are a copy."""
    pipe = miniatures.sd15()
    plain = shown(pipe, lambda images: images)
    back = shown(pipe, lambda images: (images * 2 - 1).flip(-1).flip(-1) if turned else images * 2 - 1)
    assert torch.allclose(back, plain, atol=1e-6)
