"""AlignPropPipeline over stock classes: the same pictures and files, shared weights, and what cannot be done."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aligning
import diffusers
import miniatures
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from aligning import PROMPTS, adapter, align, aligned, is_stock, pictures, same, state
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from alignprop_pipe import Adapter, AlignPropPipeline
from alignprop_pipe.adapters import apply
from alignprop_pipe.adapters.factors import Factors
from alignprop_pipe.bundled import MODELS_DIR
from alignprop_pipe.config.settings import PRESETS, AlignConfig, LoraOptions
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.diffusion.loading import known_types
from alignprop_pipe.errors import (
    AdapterError,
    ConfigError,
    PipelineError,
    PromptError,
    RewardError,
    RewardGradientError,
    RewardShapeError,
    RewardValueError,
    RunError,
)
from alignprop_pipe.pipeline import aligned_class, stock_class
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.rewards.registry import as_reward
from alignprop_pipe.rewards.scorers.simple import Brightness
from alignprop_pipe.training.align import config_of, tell_about
from alignprop_pipe.training.loop import start
from alignprop_pipe.training.session import Session

# --- the same as the stock pipeline -----------------------------------------------------------------------------------


def test_it_is_both() -> None:
    pipe = aligned()
    assert isinstance(pipe, AlignPropPipeline)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert type(pipe) is aligned_class(StableDiffusionPipeline)  # made once for each stock class
    assert stock_class(type(pipe)) is StableDiffusionPipeline
    assert (type(pipe).__name__, type(pipe).__qualname__) == (
        "StableDiffusionPipeline",
        "AlignPropStableDiffusionPipeline",
    )
    again = AlignPropPipeline.from_pipe(pipe)
    assert type(again) is type(pipe)


@pytest.mark.parametrize("make", [miniatures.sd15, miniatures.sd3], ids=lambda make: make.__name__)
def test_pictures_are_the_stock_ones_bit_for_bit(make: Any) -> None:
    pipe = make()
    wanted = pictures(pipe)
    assert torch.equal(pictures(aligned(pipe)), wanted)


def test_from_pipe_copies_no_weights() -> None:
    pipe = miniatures.sd15()
    made = aligned(pipe)
    for name, part in pipe.components.items():
        assert getattr(made, name) is part
    pipe.unet.conv_in.weight.data.mul_(2)
    assert torch.equal(pictures(made), pictures(pipe))


def tiny_decoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    ).eval()


def decoder_of_four_levels() -> AutoencoderKL:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=4, **levels
    )


def test_from_pipe_keeps_a_part_of_another_type_than_the_type_hint() -> None:
    pipe = miniatures.sd15()
    pipe.vae = tiny_decoder()
    made = aligned(pipe)
    assert made.vae is pipe.vae
    assert torch.equal(pictures(made), pictures(pipe))
    align(made)
    assert adapter(made)[1].any()


def test_from_pipe_replaces_parts_and_leaves_the_first_pipeline_alone() -> None:
    pipe = miniatures.sd15()
    scheduler, other = pipe.scheduler, miniatures.make_scheduler("EulerDiscreteScheduler")
    made = AlignPropPipeline.from_pipe(pipe, scheduler=other)
    assert (made.scheduler, pipe.scheduler) == (other, scheduler)
    assert pipe.config["scheduler"][1] == "DDIMScheduler"
    assert made.config["scheduler"][1] == "EulerDiscreteScheduler"


def test_stock_tools_take_it() -> None:
    pipe = aligned()
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is StableDiffusionImg2ImgPipeline
    back = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert torch.equal(pictures(back.to("cpu")), pictures(pipe))


def test_from_pipe_wants_a_pipeline(unchecked: None) -> None:
    with pytest.raises(PipelineError, match=r"not str; for a model id.*from_pretrained"):
        AlignPropPipeline.from_pipe("emoji")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_casts_as_the_stock_one(name: str, tmp_path: Path) -> None:
    pipe = miniatures.sd15()
    made = AlignPropPipeline.from_pipe(pipe, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in made.unet.parameters()} == {torch.bfloat16}
    assert name not in made.config
    made.save_pretrained(tmp_path)
    opened = AlignPropPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(pictures(opened), pictures(made))
    assert next(AlignPropPipeline.from_pipe(made).unet.parameters()).dtype == torch.bfloat16  # none was asked for


def test_from_pipe_works_out_what_depends_on_the_parts() -> None:
    pipe = miniatures.sd15()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(_name_or_path="me/model")
    made = AlignPropPipeline.from_pipe(pipe, vae=decoder_of_four_levels())
    fresh = StableDiffusionPipeline(**{**pipe.components, "vae": made.vae}, requires_safety_checker=False)
    assert made.vae_scale_factor == fresh.vae_scale_factor == 4 * pipe.vae_scale_factor
    assert made.image_processor.config.vae_scale_factor == made.vae_scale_factor
    assert made.name_or_path == "me/model"
    assert made._progress_bar_config == {"disable": True}
    assert type(made) is aligned_class(StableDiffusionPipeline)
    option = AlignPropPipeline.from_pipe(miniatures.sdxl(), force_zeros_for_empty_prompt=False)
    assert option.config.force_zeros_for_empty_prompt is False
    combined = miniatures.prior_and_decoder()
    scheduler = copy.deepcopy(combined.scheduler)
    changed = AlignPropPipeline.from_pipe(combined, scheduler=scheduler)
    assert changed.decoder_pipe.scheduler is scheduler  # the pipelines inside take it over
    assert combined.decoder_pipe.scheduler is combined.scheduler


def test_from_pipe_knows_its_names() -> None:
    pipe = miniatures.sd15()
    with pytest.raises(PipelineError, match=r"StableDiffusionPipeline takes no 'schedulr'; did you mean 'scheduler'\?"):
        AlignPropPipeline.from_pipe(pipe, schedulr=pipe.scheduler)
    with pytest.raises(PipelineError, match=r"takes no 'transformer'; did you mean .*'unet'"):
        AlignPropPipeline.from_pipe(pipe, transformer=pipe.unet)
    assert "schedulr" not in pipe.config


def test_pipelines_that_share_networks_draw_with_the_adapter_too() -> None:
    pipe = miniatures.sd15()
    made, drawn = aligned(pipe), pictures(pipe)
    align(made)
    assert not torch.equal(pictures(pipe), drawn)
    assert torch.equal(pictures(pipe), pictures(made))
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(made)
    assert type(image_to_image) is StableDiffusionImg2ImgPipeline
    assert image_to_image.unet is made.unet


# --- pickles ----------------------------------------------------------------------------------------------------------

FRESH = """
import pickle, sys, torch
from diffusers import StableDiffusionPipeline
from torch import multiprocessing
pipe = pickle.load(open(sys.argv[1], "rb"))
assert isinstance(pipe, StableDiffusionPipeline), type(pipe)
noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
pictures = pipe(prompt=sys.argv[3:], num_inference_steps=2, guidance_scale=2.0, output_type="pt", generator=noise)[0]
torch.save(pictures, sys.argv[2])
pipe.align("brightness", ["a dog"], steps=1, batch_size=1, num_inference_steps=1, eval_prompts=0, height=16, width=16)
"""


@pytest.mark.parametrize("window", [None, (0.0, 0.5)])
def test_a_pickle_is_read_in_another_process(window: Any, tmp_path: Path) -> None:
    pipe = aligned()
    pipe.load_adapter(align(aligned()).adapter, window=window)
    (tmp_path / "pickle").write_bytes(pickle.dumps(pipe))
    command = [sys.executable, "-W", "ignore", "-c", FRESH, tmp_path / "pickle", tmp_path / "pictures", *PROMPTS[:2]]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(torch.load(tmp_path / "pictures"), pictures(pipe), rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, (0.0, 0.5)])
def test_copies_and_pickles_of_every_protocol_are_pipelines_of_their_own(window: Any) -> None:
    pipe = aligned()
    pipe.load_adapter(align(aligned()).adapter, window=window)
    drawn = pictures(pipe)
    copies = [pickle.loads(pickle.dumps(pipe, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*copies, copy.deepcopy(pipe)):
        assert type(other) is type(pipe)
        assert torch.equal(pictures(other), drawn)
        other.scheduler = DDPMScheduler.from_config(other.scheduler.config)  # the window asks its own pipeline's
        pictures(other)
        align(other)
        assert not torch.equal(pictures(other), drawn)
    assert torch.equal(pictures(pipe), drawn)
    shallow = copy.copy(pipe)
    assert type(shallow) is type(pipe)
    assert shallow.unet is pipe.unet
    assert pickle.loads(pickle.dumps(type(pipe))) is type(pipe)


class Mine(StableDiffusionPipeline):
    """A class that diffusers does not know."""


def test_a_pipeline_class_of_ones_own_can_be_pickled() -> None:
    pipe = aligned(miniatures.sd15(kind=Mine))
    other = pickle.loads(pickle.dumps(pipe))
    assert isinstance(other, Mine)
    assert isinstance(other, AlignPropPipeline)
    assert torch.equal(pictures(other), pictures(pipe))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_opens_in_stock_diffusers(tmp_path: Path) -> None:
    pipe = aligned()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(opened) is StableDiffusionPipeline
    assert torch.equal(pictures(opened), pictures(pipe))
    made = AlignPropPipeline.from_pretrained(tmp_path)
    assert isinstance(made, StableDiffusionPipeline)
    assert made.name_or_path == str(tmp_path)
    assert torch.equal(pictures(made), pictures(pipe))


def test_an_aligned_pipeline_is_saved_as_its_base_and_a_lora(tmp_path: Path) -> None:
    pipe = aligned()
    base = pictures(pipe)
    align(pipe)
    trained, before = pictures(pipe), state(pipe)
    assert not torch.equal(trained, base)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(pictures(pipe), trained)  # saving changes nothing here
    stock_notes = {name: pipe.config[name] for name in ("_class_name", "_diffusers_version")}  # diffusers writes these
    assert state(pipe) == {**before, "config": {**before["config"], **stock_notes}}
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(pictures(opened), base)
    opened.load_lora_weights(tmp_path)
    torch.testing.assert_close(pictures(opened), trained, rtol=0, atol=1e-5)
    align(pipe)  # and it trains on
    pipe.save_pretrained(tmp_path / "without")
    lora.detach(pipeline_parts.denoisers(pipe))
    pipe.save_pretrained(tmp_path / "without")
    assert not any(file.name.startswith("pytorch_lora") for file in (tmp_path / "without").glob("unet/*"))


def test_adapter_files_round_trip(tmp_path: Path) -> None:
    pipe = aligned()
    with pytest.raises(AdapterError):
        pipe.save_adapter(tmp_path / "none.safetensors")
    result = align(pipe, out=tmp_path / "run")
    trained, weights = pictures(pipe), adapter(pipe)
    files = pipe.save_adapter(tmp_path / "a.safetensors", reward="brightness")
    assert [file.name for file in files] == ["a.safetensors", "a-comfyui.safetensors"]
    assert result.adapter_path == tmp_path / "run" / "adapter.safetensors"
    other = aligned()
    for path in (*files, tmp_path / "run"):
        other.load_adapter(path)
        assert same(adapter(other), weights)
        assert torch.equal(pictures(other), trained)
    other.load_adapter(files[0], scale=0.0)
    torch.testing.assert_close(pictures(other), pictures(miniatures.sd15()), rtol=0, atol=1e-6)


def test_known_types_hides_one_warning_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("diffusers.pipelines.pipeline_utils")
    caplog.set_level(logging.WARNING, "diffusers")  # the command line, tested in the same process, turns it down
    library.addHandler(caplog.handler)
    with known_types():
        library.warning("Expected types for vae: AutoencoderKL, got AutoencoderTiny.")
        library.warning("something else")
    library.warning("Expected types for unet: another one")
    library.removeHandler(caplog.handler)
    assert dict.fromkeys(record.getMessage() for record in caplog.records) == {
        "something else": None,
        "Expected types for unet: another one": None,
    }


# --- what align refuses -----------------------------------------------------------------------------------------------


def refused(pipe: Any, error: type[Exception], match: str, *args: Any, **changed: Any) -> None:
    """`align` raises, and the pipeline is as it was."""
    before = state(pipe) if isinstance(pipe, StableDiffusionPipeline) else None
    with pytest.raises(error, match=match):
        align(pipe, *args, **changed)
    assert before is None or state(pipe) == before
    assert is_stock(pipe)


def test_no_denoiser_and_no_prompt() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    refused(
        aligned(DDPMPipeline(unet=unet, scheduler=DDPMScheduler())),
        PipelineError,
        "DDPMPipeline takes no prompt: it cannot be aligned",
    )
    pipe = aligned()
    pipe.unet = None
    with pytest.raises(PipelineError, match=r"no denoiser.*vae \(AutoencoderKL\).*from_pretrained\('emoji'\)"):
        align(pipe)


def test_no_attention_projections() -> None:
    pipe = aligned()
    pipe.unet = miniatures.unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None
    )
    refused(pipe, PipelineError, r"unet \(UNet2DConditionModel\) has no linear attention.*target_modules")
    align(pipe, target_modules=("time_emb_proj",))  # the way out


def test_target_modules_that_fit_nothing() -> None:
    refused(aligned(), PipelineError, r"target_modules=\('to_p',\) do not fit unet", target_modules=("to_p",))


def test_an_earlier_adapter_survives_a_call_that_is_refused() -> None:
    pipe = aligned()
    align(pipe)
    trained, weights = pictures(pipe), adapter(pipe)
    for wrong in ({"target_modules": ("to_p",)}, {"reward": lambda images, prompts: images.mean()}, {"prompts": []}):
        with pytest.raises((PipelineError, RewardShapeError, PromptError)):
            align(pipe, **wrong)
        assert same(adapter(pipe), weights)
        assert torch.equal(pictures(pipe), trained)


def test_quantised() -> None:
    pipe = aligned()
    pipe.unet.is_quantized = True
    refused(pipe, PipelineError, "unet is quantised.*without a quantization_config")


def test_offloaded() -> None:
    pipe = aligned()
    add_hook_to_module(pipe.unet, ModelHook())
    refused(pipe, PipelineError, r"unet is offloaded.*remove_all_hooks\(\)")
    pipe.remove_all_hooks()
    align(pipe)  # the way out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is loaded
def test_compiled() -> None:
    pipe = aligned()
    network = pipe.unet
    pipe.unet = torch.compile(network)
    with pytest.raises(PipelineError, match=r"unet is compiled: call align\(\) first"):
        align(pipe)
    pipe.unet = network
    pipe.unet.compile()
    refused(pipe, PipelineError, r"unet is compiled: call align\(\) first")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "no prompts"), ([""], "prompt 1 is empty"), ("emojy", "did you mean 'emoji'"), (7, "given as int")],
)
def test_prompts_that_are_none(prompts: Any, words: str) -> None:
    refused(aligned(), PromptError, words, "brightness", prompts)


def whole_batch(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean()


def not_a_number(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) / 0 * 0


def detached(images: Tensor, prompts: list[str]) -> Tensor:
    return images.detach().mean(dim=(1, 2, 3))


def eight_bits(images: Tensor, prompts: list[str]) -> Tensor:
    return (images * 255).to(torch.uint8).float().mean(dim=(1, 2, 3))


def fails(images: Tensor, prompts: list[str]) -> Tensor:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (whole_batch, RewardShapeError, r"shape \(\) for 2 images"),
        (not_a_number, RewardValueError, "nan"),
        (detached, RewardGradientError, r"detach\(\) in test_pipeline.py"),
        (eight_bits, RewardGradientError, r"to\(\) in test_pipeline.py.*whole numbers"),
        (fails, RewardError, "KeyError"),
        ("brightnes", RewardError, "brightness"),
        ("emoji_judge", RewardError, "only watched"),
    ],
)
def test_rewards_that_cannot_train(reward: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    refused(aligned(), error, words, reward, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_overrides() -> None:
    pipe = aligned()
    refused(pipe, ConfigError, "'stepz' is not known; did you mean steps", stepz=3)
    refused(pipe, ConfigError, "steps = 0", steps=0)
    for name in ("prompt", "generator", "latents", "output_type"):
        refused(pipe, ConfigError, f"'{name}' is not known", **{"reward": "brightness", name: None})
    result = align(pipe, lora=LoraOptions(rank=3), guidance_rescale=0.5, guidance_scale=2.0)
    assert result.config.lora.rank == 3
    assert {len(weight) for weight in adapter(pipe)[::2]} == {3}


def test_a_folder_that_holds_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(aligned(), RunError, "holds files already", out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# --- what align tells -------------------------------------------------------------------------------------------------


def test_words_that_are_lost_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    long = "a dog " + "and a cat " * 40 + "under seven moons"
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        align(aligned(), prompts=[long, "a dog", "a red cat"])
    (record,) = [record for record in caplog.records if record.name.startswith("alignprop_pipe")]
    assert record.getMessage().startswith("1 of 3 prompts are longer than the tokenizer takes")
    assert record.getMessage().endswith("under seven moons'")


def test_a_bundled_scorer_for_another_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def told(pipe: AlignPropPipeline, text: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "alignprop_pipe"):
            tell_about(pipe, PromptSet(("a dog",)), as_reward(text))
        return [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_pipe")]

    pipe = aligned()
    (said,) = told(pipe, 'min(zscore(clip(model="emoji")), clip_above(clip(model="emoji"), 2)) + watch(emoji_judge)')
    assert said == "the bundled scorer of clip and emoji_judge knows only emoji pictures"
    assert told(pipe, 'clip(model="openai/clip-vit-large-patch14") + tv') == []
    for bundled in ("emoji", str(MODELS_DIR / "emoji")):
        pipe.register_to_config(_name_or_path=bundled)
        assert told(pipe, "clip") == []


def safety_checker() -> StableDiffusionSafetyChecker:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    return StableDiffusionSafetyChecker(config).eval()


def guarded() -> AlignPropPipeline:
    pipe = miniatures.sd15()
    parts = {**pipe.components, "safety_checker": safety_checker()}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return aligned(StableDiffusionPipeline(**parts))


@pytest.mark.parametrize("how", ["success", "failure"])
def test_a_safety_checker_is_off_while_training(how: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pipe, calls = guarded(), []
    checker = pipe.safety_checker
    checker.register_forward_hook(lambda *_: calls.append(1))
    before = state(pipe)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if images.shape[-1] == 16 and how == "failure":
            raise KeyError("broken in a step")
        return images.mean(dim=(1, 2, 3))

    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        if how == "failure":
            with pytest.raises(KeyError):
                align(pipe, reward)
        else:
            align(pipe, reward)
    (record,) = [record for record in caplog.records if record.name.startswith("alignprop_pipe")]
    assert record.getMessage().startswith("safety_checker is switched off while training")
    assert calls == []
    assert pipe.safety_checker is checker
    assert state(pipe) == before
    pictures(pipe)
    assert calls
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "safety_checker" / "config.json").is_file()


class Watermark:
    """As diffusers' own, which goes through NumPy."""

    seen = 0

    def apply_watermark(self, images: Tensor) -> Tensor:
        self.seen += 1
        return images.detach()


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_watermark_is_off_while_training() -> None:
    pipe, mark = aligned(miniatures.sdxl()), Watermark()
    pipe.watermark = mark
    align(pipe)
    assert pipe.watermark is mark
    assert mark.seen == 0
    assert adapter(pipe)[1].any()


# --- adapters next to ours
# ---------------------------------------------------------------------------------------------


def test_a_second_run_replaces_the_adapter_of_the_first() -> None:
    pipe = aligned()
    first = align(pipe, rank=4, seed=1)
    second = align(pipe)
    fresh = align(aligned())
    assert first.adapter.keys() == second.adapter.keys()
    assert all(torch.equal(weight, fresh.adapter[name]) for name, weight in second.adapter.items())
    assert list(pipe.unet.peft_config) == [lora.ADAPTER_NAME]


def with_style() -> tuple[AlignPropPipeline, dict[str, Tensor]]:
    """A pipeline on which a user has put a LoRA."""
    pipe = aligned()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), adapter_name="style")
    pipe.unet.requires_grad_(False).eval()
    return pipe, {name: weight.clone() for name, weight in pipe.unet.named_parameters() if ".style." in name}


@pytest.mark.parametrize("how", ["success", "failure"])
def test_the_lora_of_a_user_stays_active(how: str) -> None:
    pipe, style = with_style()
    drawn, before = pictures(pipe), state(pipe)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if images.shape[-1] == 16 and how == "failure":
            raise KeyError("broken in a step")
        return images.mean(dim=(1, 2, 3))

    if how == "failure":
        with pytest.raises(KeyError):
            align(pipe, reward)
        assert torch.equal(pictures(pipe), drawn)
        assert list(pipe.unet.peft_config) == ["style"]
    else:
        align(pipe, reward)
        assert pipe.unet.active_adapters() == ["style", lora.ADAPTER_NAME]
        assert not torch.equal(pictures(pipe), drawn)
    assert state(pipe) == before
    now = dict(pipe.unet.named_parameters())
    assert all(torch.equal(weight, now[name]) for name, weight in style.items())
    assert not any(now[name].requires_grad for name in style)
    lora.detach(pipeline_parts.denoisers(pipe))
    assert torch.equal(pictures(pipe), drawn)


def test_another_lora_is_named_wherever_the_adapter_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = with_style()
    pipe.set_adapters(["style"], [0.8])
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        result = align(pipe, out=tmp_path / "run")
    assert "trained on top of LoRA 'style' in unet (0.8): the adapter belongs with it" in caplog.text
    assert apply.read_metadata(tmp_path / "run")["alignprop.trained_with"] == "'style' in unet (0.8)"
    assert "'style' in unet (0.8)" in str(result)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        with_style()[0].load_adapter(tmp_path / "run")
    assert "switched off for adapter.safetensors: LoRA 'style' in unet (1)" in caplog.text
    assert "adapter.safetensors was trained on top of other LoRAs and belongs with them" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        pipe.save_pretrained(tmp_path / "model")
    assert "LoRA 'style' is not in the folder" in caplog.text
    pipe, _ = with_style()
    pipe.fuse_lora(lora_scale=0.5)
    assert lora.active_others(pipe) == [lora.OtherLora("unet", "style", 0.5, True)]
    pipe.unload_lora_weights()
    assert lora.active_others(pipe) == [lora.OtherLora("the weights", "style", None, True)]
    assert "fused" in str(align(pipe))


def test_a_loaded_adapter_is_not_dropped_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    pipe = aligned()
    adapter = align(pipe).adapter
    pipe.load_adapter(adapter)
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        align(pipe)
    assert "the adapter, which was loaded, is taken off: a run starts from the base model" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "alignprop_pipe"):
        align(pipe)  # in place of one of an earlier run, as `align` says
    assert "taken off" not in caplog.text


def test_all_of_a_loaded_adapter_goes_when_a_run_starts() -> None:
    """Its layers in a text encoder too."""
    pipe, both = aligned(), aligned()
    both.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style")
    text = {
        path: Factors(layer.lora_A["style"].weight.detach(), layer.lora_B["style"].weight.detach(), 2.0)
        for path, layer in both.text_encoder.named_modules()
        if "style" in getattr(layer, "lora_A", ())
    }
    wanted = align(pipe).adapter
    mixed = Adapter({**wanted.layers, "text_encoder": text}, wanted.base)
    pipe.load_adapter(mixed)
    result = align(pipe, "zscore(brightness)")
    fresh = align(aligned(), "zscore(brightness)")
    assert result.reward == fresh.reward  # measured on the base model
    assert result.adapter.keys() == fresh.adapter.keys()
    assert all(torch.equal(weight, fresh.adapter[name]) for name, weight in result.adapter.items())


@pytest.mark.parametrize("where", ["unet", "text_encoder"])
def test_a_lora_of_a_user_by_our_name_is_refused(where: str) -> None:
    pipe = aligned()
    adapter = align(aligned()).adapter
    targets = ["to_k"] if where == "unet" else ["q_proj"]
    getattr(pipe, where).add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "alignprop")
    drawn = pictures(pipe)
    words = rf"{where} holds a LoRA of yours under the name 'alignprop'.*adapter_name='mine'.*delete_adapters"
    with pytest.raises(PipelineError, match=words):
        align(pipe)
    with pytest.raises(AdapterError, match=words):
        pipe.load_adapter(adapter)
    assert torch.equal(pictures(pipe), drawn)
    pipe.delete_adapters("alignprop")
    align(pipe)


# --- gradient mode ----------------------------------------------------------------------------------------------------


def test_align_works_in_inference_mode(tmp_path: Path) -> None:
    wanted = align(aligned(), eval_prompts=1)
    pipe = aligned()
    pipe.save_pretrained(tmp_path)
    with torch.inference_mode():
        result = align(pipe, eval_prompts=1)
        loaded = align(AlignPropPipeline.from_pretrained(tmp_path), eval_prompts=1)  # as a ComfyUI node does
        assert torch.is_inference_mode_enabled()
    for got in (result, loaded):
        assert all(torch.equal(weight, wanted.adapter[name]) for name, weight in got.adapter.items())
        assert not any(weight.is_inference() for weight in got.adapter.values())
    align(pipe)  # and outside it again


def test_weights_that_were_loaded_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        pipe = aligned()
    with pytest.raises(PipelineError, match=r"inference_mode.*AlignPropPipeline\.from_pretrained"):
        align(pipe)
    assert is_stock(pipe)


# --- settings and the record of a run ---------------------------------------------------------------------------------


def test_a_bundled_model_has_its_own_settings() -> None:
    few = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "height": 16, "width": 16}
    pipe = aligned()
    assert pipe.align("brightness", PROMPTS, **few).config.lora.rank == PRESETS["paper"]["rank"]
    pipe.register_to_config(_name_or_path="emoji")
    assert pipe.align("brightness", PROMPTS, **few).config.lora.rank == PRESETS["emoji"]["rank"]


def test_the_run_folder_says_how_to_repeat_it(tmp_path: Path) -> None:
    pipe = aligned()
    result = align(pipe, Brightness() * 2, out=tmp_path / "run", eval_prompts=1)
    assert result.run_folder == tmp_path / "run"
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["reward"] == "2*brightness"
    assert about["prompts"] == PROMPTS
    assert about["config"] == result.config.to_dict()
    assert "made in Python" in about["command"]  # the miniature is nowhere on disk
    assert about["result"]["status"] == "completed"
    assert about["versions"]["diffusers"] == diffusers.__version__
    assert {"adapter.safetensors", "adapter-comfyui.safetensors", "metrics.jsonl", "report.html", "curve.png"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize("part", ["text_encoder", "unet", "tokenizer"])
def test_a_text_is_no_component(part: str) -> None:
    with pytest.raises(PipelineError, match=f"{part}='x': a loaded component is needed"):
        AlignPropPipeline.from_pipe(miniatures.sd15(), **{part: "x"})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_text_is_no_number_format(name: str) -> None:
    with pytest.raises(PipelineError, match="'float16': a number format of torch is needed"):
        AlignPropPipeline.from_pipe(miniatures.sd15(), **{name: "float16"})


def test_settings_may_be_a_table() -> None:
    table = {**aligning.QUICK, "steps": 1}
    config = aligning.aligned().align("brightness", aligning.PROMPTS, table).config
    assert (config.steps, config.lora.rank, config.sampling.height) == (1, 2, 16)
    with pytest.raises(ConfigError, match="an AlignConfig is needed, a table"):
        config_of("fast", config)
    with pytest.raises(ConfigError, match="'stepps' is not known; did you mean steps"):
        aligning.aligned().align("brightness", aligning.PROMPTS, config={"stepps": 1})


@pytest.mark.parametrize("where", ["override", "table", "config"])
def test_wrong_judges_are_told_with_the_other_mistakes(where: str) -> None:
    config: Any = {"table": {"judges": ["nonesuch"]}, "config": AlignConfig().replace(judges=("nonesuch",))}.get(where)
    given: Any = {"judges": ("nonesuch",)} if where == "override" else {}
    with pytest.raises(ConfigError, match="(?s)'brightnes' is not known.*'nonesuch' is not known"):
        aligning.aligned().align("brightnes", aligning.PROMPTS, config, **given)


def test_steps_that_have_become_slow_are_told_once(caplog) -> None:
    pipe, prompts, config = aligned(), PromptSet(tuple(PROMPTS)), aligning.settings(steps=5)
    session = Session(pipe, start(pipe, as_reward("brightness"), [], prompts, config, {}), prompts)
    record = align(aligned(), steps=1).history[-1]
    for step, seconds in enumerate((0.5, 0.6, 4.9, 6.0, 70.0), start=1):
        session.remember(replace(record, step=step, seconds=seconds))
    said = [entry.getMessage() for entry in caplog.records if "OMP_NUM_THREADS=1" in entry.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("step 4 took 6 s")
