"""What a pipeline class needs beyond the usual: other settings of its parts, and arguments of its call.

`RULES` are tried in order, and every rule whose pattern matches the whole class name adds to the recipe.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from sweep.parts import WIDTH, clip_processor

Value = Any
"""An argument of the call, or a function of the batch size that makes it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make and call one class.

    `parts` holds settings by the name of the component ("class" names another class than the hint's first), None for a
    component that is left out, or a function of the parts so far. `cannot` says why no miniature can be made.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Value] = field(default_factory=dict)
    steps: int = 3
    batch: int = 2
    prompts: tuple[str, ...] = ("a red dog", "two cats on a blue background")
    after: Callable[[Any], object] = lambda _pipe: None
    cannot: str = ""


# --- arguments -------------------------------------------------------------------------------------------------------


def picture(number: int = 0, size: int = 16) -> Image.Image:
    """A smooth ramp, turned by 90 degrees for each number."""
    return Image.linear_gradient("L").rotate(90 * number).resize((size, size)).convert("RGB")


def pictures(size: int = 16) -> Callable[[int], list[Image.Image]]:
    return lambda batch: [picture(number, size) for number in range(batch)]


def one(size: int = 16) -> Callable[[int], Image.Image]:
    return lambda _batch: picture(0, size)


def mask(size: int = 16) -> Callable[[int], Image.Image]:
    """White in the right half: that half is drawn anew."""

    def make(_batch: int) -> Image.Image:
        found = Image.new("L", (size, size), 0)
        found.paste(255, (size // 2, 0, size, size))
        return found

    return make


def mask_array(_batch: int) -> np.ndarray:
    """[16, 16], one in the right half."""
    found = np.zeros((16, 16), dtype=np.float32)
    found[:, 8:] = 1
    return found


def frames(count: int, size: int = 16) -> Callable[[int], list[Image.Image]]:
    return lambda _batch: [picture(number, size) for number in range(count)]


def tensor(*shape: int) -> Callable[[int], torch.Tensor]:
    """[batch, *shape] in [0, 1]."""

    def make(batch: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(3))

    return make


def one_tile(pipe: Any) -> None:
    """Allegro decodes in tiles or not at all, and nothing of a video that is smaller than a tile."""
    pipe.vae.enable_tiling()
    pipe.vae.kernel = pipe.vae.stride = (8, 16, 16)


def small_area(pipe: Any) -> None:
    """A picture that is edited comes in 64 by 64 pixels, where the pipeline's code has a million for any picture."""
    module = sys.modules[type(pipe).__module__]
    if hasattr(module, "calculate_dimensions"):
        original = module.calculate_dimensions
        module.calculate_dimensions = lambda _area, ratio: original(64 * 64, ratio)
    else:
        processor = pipe.vae_image_processor
        buckets = sys.modules[type(processor).__module__].BUCKETS
        buckets[processor.config.basesize] = [(64, 64)]


def controls(_batch: int) -> list[torch.Tensor]:
    return list(tensor(3, 32, 32)(5))


DROP = object()
"""In a call: leave out the argument that is usual."""
SHORT = {"max_sequence_length": 16}
START = {"image": pictures(), "strength": 0.6}
INPAINT = {"image": one(), "mask_image": mask()}
SIDE_32 = {"height": 32, "width": 32}
SIDE_64 = {"height": 64, "width": 64}
SIDE_128 = {"height": 128, "width": 128}
TALL = {"max_position_embeddings": 128}
EMBEDS = {"image_embeds": tensor(WIDTH), "negative_image_embeds": tensor(WIDTH)}
WIDE_LATENTS = {"in_channels": 16, "out_channels": 16}
DEEP: dict[str, Any] = {
    "block_out_channels": (4,) * 6,
    "down_block_types": ("DownEncoderBlock2D",) * 6,
    "up_block_types": ("UpDecoderBlock2D",) * 6,
}
"""A pixel of the latent is 32 pixels wide, for classes that draw a million pixels whatever they are asked for."""
EIGHTFOLD: dict[str, Any] = {
    "block_out_channels": (4,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
DEEP_QWEN = {"dim_mult": [1] * 6, "temperal_downsample": [False] * 5}
GLIGEN = {"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
FLOW_UNIPC = {"class": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
PRIOR_PARTS = {"prior_image_encoder": {}, "prior_image_processor": {}}
CASCADE_DECODER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "effnet_in_channels": 16,
    "clip_text_in_channels": None,
    "clip_image_in_channels": None,
}
CASCADE_PRIOR = {"in_channels": 16, "out_channels": 16}
CHAT_TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
VISION_OFF = {"image_encoder": None}

TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
SDXL = {"cross_attention_dim": 2 * WIDTH, **TEXT_TIME}
FLUX_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
DDIM = {"class": "DDIMScheduler", "clip_sample": False, "steps_offset": 1}


def rule(pattern: str, **recipe: Any) -> tuple[re.Pattern[str], dict[str, Any]]:
    return re.compile(pattern), recipe


RULES = [
    # Stable Diffusion 1 and 2
    rule(r"StableDiffusion(?!3|XL)(?!.*Inpaint).*Img2ImgPipeline", call=START, steps=5),
    rule(r"(AltDiffusionImg2Img|CycleDiffusion|StableDiffusionDepth2Img)Pipeline", call=START, steps=5),
    rule(r"StableDiffusion(?!3|XL).*Inpaint(?!PipelineLegacy).*", call=INPAINT),
    rule(r"StableDiffusionInpaintPipelineLegacy", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"StableDiffusionControlNet(PAG)?Pipeline", call={"image": pictures()}),
    rule(r"StableDiffusionControlNet(Img2Img|Inpaint|PAGInpaint)Pipeline", call={"control_image": pictures()}),
    rule(
        r"StableDiffusion(XL)?ControlNetXSPipeline",
        call={"image": pictures()},
        parts={"unet": {"layers_per_block": 2, "use_linear_projection": True}},
    ),
    rule(r".*PAG.*", call={"pag_scale": 2.0}),
    rule(r"StableDiffusion(XL)?AdapterPipeline", call={"image": pictures()}),
    rule(
        r"StableDiffusion(XL)?InstructPix2PixPipeline", parts={"unet": {"in_channels": 8}}, call={"image": pictures()}
    ),
    rule(
        r"StableDiffusionUpscalePipeline",
        parts={"unet": {"in_channels": 7, "num_class_embeds": 1000}},
        settings={"max_noise_level": 350},
        call={"image": pictures(8)},
    ),
    rule(
        r"StableDiffusionLatentUpscalePipeline",
        parts={"unet": {"in_channels": 8, "time_cond_proj_dim": 160, "out_channels": 5}},
        call={"image": pictures()},
    ),
    rule(r"LatentConsistencyModel.*", parts={"unet": {"time_cond_proj_dim": 16}}),
    rule(r"LatentConsistencyModelImg2ImgPipeline", call=START, steps=5),
    # Stable Diffusion XL
    rule(
        r"StableDiffusionXL.*|TextToVideoZeroSDXLPipeline",
        parts={"unet": SDXL, "scheduler": {"class": "EulerDiscreteScheduler"}},
        settings={"add_watermarker": False},
    ),
    rule(r"StableDiffusionXLAdapterPipeline", settings={}),
    rule(
        r"StableDiffusionXL.*(Img2Img|Inpaint).*",
        settings={"add_watermarker": False, "requires_aesthetics_score": False},
    ),
    rule(r"StableDiffusionXL(?!.*Inpaint).*Img2ImgPipeline", call=START, steps=5),
    rule(r"StableDiffusionXL.*InpaintPipeline", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"StableDiffusionXLControlNet(Union|PAG)?(Img2Img|Inpaint)?Pipeline", parts={"controlnet": SDXL}),
    rule(r"StableDiffusionXLControlNet(PAG)?Pipeline", call={"image": pictures()}),
    rule(r"StableDiffusionXLControlNet(Union|PAG)?(Img2Img|Inpaint)Pipeline", call={"control_image": pictures()}),
    rule(r"StableDiffusionXLControlNetUnionPipeline", call={"control_image": pictures()}),
    rule(
        r"StableDiffusionXLControlNetUnion.*",
        call={"control_mode": [0], "control_image": lambda _batch: [picture(1)]},
    ),
    # Stable Diffusion 3
    rule(
        r"StableDiffusion3.*",
        parts={"text_encoder_3": {"d_model": 2 * WIDTH}, "vae": {"shift_factor": 0.0609, "scaling_factor": 1.5035}},
        call=SHORT,
    ),
    rule(r"StableDiffusion3.*Img2ImgPipeline", call=START, steps=5),
    rule(
        r"StableDiffusion3InpaintPipeline",
        call={**INPAINT, "strength": 0.6},
        steps=5,
        parts={"transformer": WIDE_LATENTS, "vae": {"latent_channels": 16}},
    ),
    rule(r"StableDiffusion3ControlNetPipeline", call={"control_image": one()}),
    rule(
        r"StableDiffusion3ControlNetInpaintingPipeline",
        parts={"controlnet": {"extra_conditioning_channels": 1}},
        call={"control_image": one(), "control_mask": mask()},
    ),
    # Flux and its relatives
    rule(
        r"(Flux(?!2)|Chroma|Ovis|LongCat|Bria(?!Fibo)|VisualCloze).*",
        parts={"vae": FLUX_VAE, "image_encoder": None},
        call=SHORT,
    ),
    rule(r"(Flux|Chroma)(?!2).*Img2ImgPipeline", call=START, steps=5),
    rule(r"(Flux|Chroma)(?!2).*InpaintPipeline", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"FluxControl(?!Net).*", parts={"transformer": {"in_channels": 32, "out_channels": 16}}),
    rule(r"FluxControl.*", call={"control_image": one()}),
    rule(r"FluxFillPipeline", parts={"transformer": {"in_channels": 48, "out_channels": 16}}, call=INPAINT),
    rule(r"FluxKontext.*", call={"image": one(), "_auto_resize": False, "max_area": 256}),
    rule(r"Flux2.*", call={**SHORT, "text_encoder_out_layers": (1,)}),
    rule(r"Flux2KleinInpaintPipeline", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"Flux2KleinKVPipeline", call={"image": one(64)}),
    rule(
        r"LongCatImage.*",
        parts={"vae": {"latent_channels": 16}, "transformer": {"in_channels": 64}},
        call={"enable_prompt_rewrite": False},
    ),
    rule(r"LongCatImageEditPipeline", call={"image": one(32)}, batch=1, parts={"vae": DEEP}, after=small_area),
    rule(
        r"VisualCloze.*",
        parts={"transformer": {"in_channels": 48, "out_channels": 16}},
        settings={"resolution": 16},
        call={
            "task_prompt": ["draw a dog"],
            "content_prompt": ["a red dog"],
            "image": lambda _batch: [[[picture(0), picture(1)], [picture(2), None]]],
        },
        batch=1,
    ),
    # other transformers that draw pictures
    rule(r"PixArt.*", call={"use_resolution_binning": False, "clean_caption": False, **SHORT}),
    rule(r"PixArtSigma.*", parts={"scheduler": {"class": "DPMSolverMultistepScheduler"}}),
    rule(r"PixArtSigmaPAGPipeline", parts={"transformer": {"num_layers": 2}}),
    rule(
        r"Sana(?!Video|Image|WM).*",
        call={"use_resolution_binning": False, "complex_human_instruction": None, **SHORT, **SIDE_32},
    ),
    rule(r"SanaPAGPipeline", parts={"transformer": {"num_layers": 2}}),
    rule(
        r"SanaSprint.*",
        parts={
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
            "scheduler": {"class": "SCMScheduler"},
        },
    ),
    rule(r"SanaSprintImg2ImgPipeline", call={"image": pictures(32), "strength": 1.0}, steps=5),
    rule(r"SanaControlNetPipeline", call={"control_image": one(32)}),
    rule(r"HunyuanDiT.*", call={"use_resolution_binning": False}),
    rule(r"HunyuanDiTControlNetPipeline", call={"control_image": one()}),
    rule(r"CogView.*", call=SHORT),
    rule(r"CogView4.*|BriaFibo(2)?Pipeline", call={"negative_prompt": "a house"}),
    rule(r"CogView3PlusPipeline", parts={"scheduler": {"class": "CogVideoXDDIMScheduler"}}),
    rule(r"CogView4ControlPipeline", parts={"transformer": {"in_channels": 8}}, call={"control_image": one()}),
    rule(r"QwenImage.*", call={"true_cfg_scale": 2.0, "negative_prompt": "a house", "max_sequence_length": 64}),
    rule(r"QwenImage(?!Edit).*Img2ImgPipeline", call=START, steps=5),
    rule(r"QwenImage(?!Edit)(?!ControlNet).*InpaintPipeline", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"QwenImage(Edit.*|Layered)Pipeline", after=small_area),
    rule(r"QwenImageEdit.*", call={"image": one(32)}, batch=1),
    rule(r"QwenImageEditInpaintPipeline", call={"image": one(32), "mask_image": mask(32), "strength": 0.6}, steps=5),
    rule(r"QwenImageControlNet.*", call={"control_image": one()}),
    rule(
        r"QwenImageControlNetInpaintPipeline",
        parts={"controlnet": {"extra_condition_channels": 4}},
        call={"control_mask": mask()},
    ),
    rule(r"QwenImageLayeredPipeline", call={"image": one(32), "layers": 2}, batch=1),
    rule(
        r"ZImage.*",
        parts={
            "text_encoder": {"class": "Qwen3Model"},
            "tokenizer": {"class": "Qwen2Tokenizer"},
            "transformer": {"in_channels": 4},
        },
        call=SHORT,
    ),
    rule(r"ZImageImg2ImgPipeline", call={"image": one(), "strength": 0.6}, steps=5),
    rule(r"ZImageInpaintPipeline", call={**INPAINT, "strength": 0.6}, steps=5),
    rule(r"ZImageControlNet.*", call={"control_image": one()}),
    rule(
        r"ZImageControlNetInpaintPipeline",
        call={"image": one(), "mask_image": mask(), "control_image": one()},
        batch=1,
        parts={"controlnet": {"control_in_dim": 9}},
    ),
    rule(r"Lumina2Pipeline", call={"max_sequence_length": 64}),
    rule(r"LuminaPipeline", call={"clean_caption": False, **SIDE_32, "negative_prompt": "a house"}),
    rule(
        r"PRXPipeline",
        parts={"vae": {"class": "AutoencoderKL", "shift_factor": 0.1}},
        settings={"default_sample_size": 16},
    ),
    rule(
        r"PRXPixelPipeline",
        parts={
            "text_encoder": {"class": "Qwen3Model"},
            "transformer": {"in_channels": 3, "bottleneck_size": 8, "resolution_embeds": True},
        },
        settings={"default_sample_size": 16, "prompt_max_tokens": 16},
    ),
    rule(r"PRX.*", call={"use_resolution_binning": False}, batch=1),
    rule(
        r"HiDreamImagePipeline",
        parts={"text_encoder": TALL, "text_encoder_2": TALL},
        after=lambda pipe: setattr(pipe, "default_sample_size", 8),
    ),
    rule(
        r"HunyuanImageRefinerPipeline",
        call={"image": pictures()},
        parts={
            "transformer": {"in_channels": 16, "patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4), "out_channels": 8}
        },
    ),
    rule(r"Hunyuan.*", parts={"guider": {}, "ocr_guider": {}}),
    rule(
        r"MotifVideo.*",
        parts={"guider": {}, "scheduler": {"class": "FlowMatchEulerDiscreteScheduler"}},
        call={**SHORT, "num_frames": 5},
    ),
    rule(
        r"Amused.*",
        parts={
            "vqvae": {
                "norm_type": "group",
                "num_vq_embeddings": 32,
                "lookup_from_codebook": True,
                "latent_channels": 8,
            },
            "scheduler": {"mask_token_id": 32},
        },
        batch=1,
    ),
    # pixels
    rule(
        r"IF.*",
        parts={
            "unet": {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": WIDTH},
            "scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"},
        },
        settings={"requires_safety_checker": False},
    ),
    rule(r"IF(Img2Img)?Pipeline", call={"clean_caption": False}),
    rule(r"IFImg2ImgPipeline", call={"image": pictures(), "strength": 0.6}, steps=5),
    rule(r"IFInpaintingPipeline", call={"image": pictures(), "mask_image": mask(), "strength": 0.6}, steps=5),
    rule(
        r"IF.*SuperResolutionPipeline",
        parts={"unet": {"in_channels": 6, "class_embed_type": "timestep"}},
        call={"image": tensor(3, 8, 8)},
    ),
    rule(
        r"IF(Img2Img|Inpainting)SuperResolutionPipeline", call={"original_image": pictures(), "strength": 0.6}, steps=5
    ),
    rule(r"IFInpaintingSuperResolutionPipeline", call={"mask_image": mask()}),
    # Kandinsky
    rule(
        r"Kandinsky(?!V22|3|5|6).*",
        parts={
            "unet": {
                "out_channels": 8,
                "addition_embed_type": "text_image",
                "encoder_hid_dim": WIDTH,
                "encoder_hid_dim_type": "text_image_proj",
            },
            "scheduler": DDIM,
            **PRIOR_PARTS,
        },
    ),
    rule(
        r"KandinskyV22.*",
        parts={
            "unet": {
                "out_channels": 8,
                "addition_embed_type": "image",
                "encoder_hid_dim": WIDTH,
                "encoder_hid_dim_type": "image_proj",
            },
            "scheduler": DDIM,
            **PRIOR_PARTS,
        },
    ),
    rule(r"Kandinsky(V22)?.*Combined.*", call={"prior_num_inference_steps": 2}),
    rule(r"Kandinsky(Img2Img|Inpaint)?Pipeline", call=EMBEDS),
    rule(r"Kandinsky(V22)?Img2Img(Combined)?Pipeline", call=START, steps=5),
    rule(
        r"Kandinsky(V22)?Inpaint.*",
        parts={"unet": {"in_channels": 9}},
        call={"image": pictures(), "mask_image": mask_array},
        batch=1,
    ),
    rule(r"Kandinsky3.*", parts={"unet": {"block_out_channels": (32, 64), "layers_per_block": 3}}),
    rule(r"Kandinsky3Img2ImgPipeline", call=START, steps=5),
    rule(r"Kandinsky5.*", parts={"tokenizer": {"class": "Qwen2VLProcessor"}}, call={"max_sequence_length": 64}),
    rule(r"Kandinsky5.*2I.*", after=lambda pipe: setattr(pipe, "resolutions", [(32, 32)])),
    rule(r"Kandinsky5.*V.*", call={"num_frames": 5}),
    rule(r"Kandinsky5I2.*", parts={"transformer": {"visual_cond": True}}, call={"image": one()}),
    # cascades
    rule(r"StableCascade(?!Prior).*", parts={"decoder": CASCADE_DECODER}),
    rule(
        r"StableCascadeCombined.*",
        parts={"prior_prior": CASCADE_PRIOR},
        call={"prior_num_inference_steps": 2, **SIDE_128},
    ),
    rule(r"StableCascadeDecoder.*", call={"image_embeddings": tensor(16, 4, 4)}),
    rule(r"Wuerstchen(Decoder|Combined)Pipeline", settings={"latent_dim_scale": 10.67}),
    rule(r"WuerstchenCombinedPipeline", settings={}, call={"prior_num_inference_steps": 2, **SIDE_128}),
    rule(r"WuerstchenDecoderPipeline", call={"image_embeddings": tensor(2, 3, 3), "guidance_scale": 0.0}),
    # videos
    rule(r"AnimateDiff(?!SDXL).*", call={"num_frames": 2}),
    rule(r"AnimateDiff.*|PIAPipeline", parts={"unet": {"class": "UNet2DConditionModel"}}),
    rule(
        r"AnimateDiffSDXLPipeline",
        parts={"unet": SDXL, "motion_adapter": {"use_motion_mid_block": False}},
        call={"num_frames": 2},
    ),
    rule(r"AnimateDiffVideoToVideo.*", call={"video": frames(2), "strength": 0.6}, steps=5, batch=1),
    rule(r"AnimateDiff.*ControlNetPipeline", call={"conditioning_frames": frames(2)}, batch=1),
    rule(r"AnimateDiffSparseControlNetPipeline", call={"controlnet_frame_indices": [0, 1]}),
    rule(
        r"PIAPipeline",
        parts={"unet": {"class": "UNet2DConditionModel"}, "motion_adapter": {"conv_in_channels": 9}},
        call={"image": one(), "num_frames": 2, "strength": 1.0},
        batch=1,
    ),
    rule(r"TextToVideoSDPipeline", call={"num_frames": 2}),
    rule(r"VideoToVideoSDPipeline", call={"video": frames(1), "strength": 0.6}, steps=5, batch=1),
    rule(
        r"I2VGenXLPipeline",
        call={"image": one(), "num_frames": 2},
        parts={"image_encoder": {}, "feature_extractor": {}},
    ),
    rule(r"TextToVideoZero.*", call={"video_length": 2, "t0": 1, "t1": 2}, batch=1),
    rule(r"(Wan|SkyReels|AnyFlow|Helios|Chrono|Lucy).*", call={**SHORT, "num_frames": 5}),
    rule(
        r"(Wan|SkyReelsV2)ImageToVideoPipeline|ChronoEditPipeline", parts={"image_encoder": {}, "image_processor": {}}
    ),
    rule(
        r"(Wan|SkyReelsV2)ImageToVideoPipeline",
        parts={"transformer": {"in_channels": 36, "image_dim": WIDTH}},
        call={"image": one()},
    ),
    rule(r"ChronoEditPipeline", call={"image": one()}),
    rule(
        r"WanAnimatePipeline",
        parts={"image_encoder": {}, "image_processor": {}},
        call={"image": one(), "pose_video": frames(5), "face_video": frames(5), "segment_frame_length": 5},
        batch=1,
    ),
    rule(r"WanVideoToVideoPipeline", call={"video": frames(5), "strength": 0.6, "num_frames": DROP}, steps=5),
    rule(r"LucyEditPipeline", parts={"transformer": {"in_channels": 32}}, call={"video": frames(5)}, batch=1),
    rule(
        r"SkyReels.*",
        parts={
            "scheduler": FLOW_UNIPC,
            "text_encoder": {"class": "UMT5EncoderModel"},
            "tokenizer": {"class": "T5Tokenizer"},
        },
    ),
    rule(r"SkyReelsV2DiffusionForcingImageToVideoPipeline", call={"image": one()}),
    rule(
        r"SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        call={"video": frames(5), "num_frames": 9, "overlap_history": 1, "base_num_frames": 5},
        batch=1,
    ),
    rule(r"LTX.*", call={**SHORT, "num_frames": 9, **SIDE_32}),
    rule(r"LTX(2)?ImageToVideoPipeline", call={"image": tensor(3, 32, 32)}),
    rule(r"LTX2.*", parts={"duration_head": None, "processor": None}, call={"num_frames": 5}),
    rule(r"CogVideoX.*", parts={"scheduler": {"class": "CogVideoXDDIMScheduler"}}, call={**SHORT, "num_frames": 8}),
    rule(
        r"CogVideoXImageToVideoPipeline",
        parts={
            "transformer": {
                "in_channels": 8,
                "use_rotary_positional_embeddings": True,
                "use_learned_positional_embeddings": True,
            }
        },
        call={"image": one()},
        batch=1,
    ),
    rule(
        r"CogVideoXFunControlPipeline",
        parts={"transformer": {"in_channels": 8}},
        call={"control_video": frames(8), "num_frames": DROP},
        batch=1,
    ),
    rule(
        r"CogVideoXVideoToVideoPipeline",
        call={"video": frames(8), "strength": 0.6, "num_frames": DROP},
        steps=5,
        batch=1,
    ),
    rule(r"Hunyuan(Video|Skyreels).*", call={"num_frames": 5}),
    rule(r"Hunyuan(Video(?!15)|Skyreels).*", call={**CHAT_TEMPLATE, **SHORT}),
    rule(
        r"HunyuanSkyreelsImageToVideoPipeline",
        parts={"transformer": {"in_channels": 8}},
        call={"image": one()},
        batch=1,
    ),
    rule(
        r"HunyuanVideoFramepackPipeline",
        parts={"image_encoder": {}, "feature_extractor": {}},
        call={"image": one(32), **SIDE_32, "latent_window_size": 3, "num_frames": 9},
        batch=1,
    ),
    rule(
        r"HunyuanVideo15ImageToVideoPipeline",
        parts={"image_encoder": {}, "feature_extractor": {}},
        call={"image": one()},
        batch=1,
    ),
    rule(r"MochiPipeline", call={**SHORT, "num_frames": 7}),
    rule(
        r"AllegroPipeline", call={**SHORT, "num_frames": 8}, parts={"vae": {"sample_size": 16}}, after=one_tile, batch=1
    ),
    rule(r"LattePipeline", call={"video_length": 2, "clean_caption": False}),
    rule(
        r"MotifVideoImage2VideoPipeline",
        parts={"feature_extractor": {}, "transformer": {"image_embed_dim": WIDTH}},
        call={"image": one()},
        batch=1,
    ),
    rule(
        r"EasyAnimate.*", parts={"text_encoder": {"class": "Qwen2VLForConditionalGeneration"}}, call={"num_frames": 5}
    ),
    rule(
        r"SanaVideoPipeline|SanaImageToVideoPipeline",
        parts={"vae": {"class": "AutoencoderKLWan"}},
        call={**SHORT, **SIDE_32, "frames": 9, "complex_human_instruction": [], "use_resolution_binning": False},
    ),
    rule(r"SanaImageToVideoPipeline", call={"image": one(32)}, batch=1),
    rule(r"SanaVideoPipeline", parts={"scheduler": {"class": "FlowMatchEulerDiscreteScheduler"}}),
    rule(
        r"Cosmos.*",
        parts={"safety_checker": {"class": "CosmosSafetyChecker"}},
        call={**SHORT, "num_frames": 5, **SIDE_32},
    ),
    rule(r"CosmosTextToWorldPipeline", parts={"transformer": {"in_channels": 16}}),
    rule(
        r"Cosmos(2)?VideoToWorldPipeline", parts={"transformer": {"in_channels": 17}}, call={"image": one(32)}, batch=1
    ),
    rule(
        r"Cosmos2_5.*",
        parts={"transformer": {"in_channels": 17, "text_embed_dim": 2 * WIDTH}, "scheduler": FLOW_UNIPC},
        batch=1,
    ),
    # a part, an argument or a size that one class needs, and what stands in the way of others
    rule(r"ZImage.*|HiDream.*|Lumina2.*", parts={"vae": {"shift_factor": 0.1, "scaling_factor": 0.5}}),
    rule(r"Krea2Pipeline", settings={"text_encoder_select_layers": (0, 1, 2)}),
    rule(r"BriaFibo2Pipeline", parts={"text_encoder": {"num_hidden_layers": 36, "intermediate_size": 8}}),
    rule(r"NucleusMoEImagePipeline", call={"return_index": -1}),
    rule(
        r"BriaFiboEditPipeline",
        prompts=tuple(f'{{"text": "{text}", "edit_instruction": "{text}"}}' for text in ("a red dog", "two cats")),
        call={"image": one(32), "negative_prompt": "a house", "_auto_resize": False},
    ),
    rule(r"EasyAnimate.*|ErnieImagePipeline", call={"negative_prompt": "a house"}),
    rule(r"EasyAnimateControlPipeline", parts={"transformer": {"in_channels": 8}}, call={"control_video": frames(5)}),
    rule(
        r"EasyAnimateInpaintPipeline",
        parts={"transformer": {"in_channels": 9}},
        call={"video": tensor(3, 5, 16, 16), "mask_video": tensor(1, 5, 16, 16)},
    ),
    rule(
        r"HeliosPipeline",
        parts={"scheduler": {"stages": 1, "stage_range": [0, 1]}},
        call={"num_latent_frames_per_chunk": 2},
    ),
    rule(
        r"HeliosPyramidPipeline",
        call={"pyramid_num_inference_steps_list": [1, 1, 1], **SIDE_64, "num_latent_frames_per_chunk": 2},
        batch=1,
        parts={"scheduler": {"gamma": 0.3}},
    ),
    rule(r"HunyuanVideo15.*", batch=1),
    rule(
        r"HunyuanVideoImageToVideoPipeline",
        parts={"image_processor": {}, "transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}},
        batch=1,
        call={"image": one()},
    ),
    rule(
        r"Ideogram4Pipeline",
        call={"guidance_schedule": None},
        parts={"text_encoder": {"class": "Qwen3VLModel", "num_hidden_layers": 36}},
    ),
    rule(r"JoyImageEditPipeline", after=small_area),
    rule(r"JoyImageEditPlusPipeline", call={"images": lambda batch: [[picture(1, 32)]] * batch, **SIDE_64}),
    rule(r"Kandinsky6TI2VAPipeline", call={"sample_audio": False, "num_frames": 5}),
    rule(
        r"LDMTextToImagePipeline",
        parts={
            "bert": {"class": "LDMBertModel"},
            "tokenizer": {"class": "BertTokenizer"},
            "vqvae": {"class": "AutoencoderKL"},
            "unet": {"class": "UNet2DConditionModel"},
        },
    ),
    rule(r"LTX2DFRPipeline", parts={"transformer": {"use_keyframes_abs_pos_embedding": True}}),
    rule(r"LTX2ImageToVideoPipeline", call={"image_crf": 0}),
    rule(r"OmniGenPipeline", cannot="its own processor needs torchvision, which is not installed"),
    rule(r"SanaSprint(Img2Img)?Pipeline", steps=2),
    rule(r"SkyReelsV2ImageToVideoPipeline", parts={"image_processor": {"class": "CLIPImageProcessorPil"}}),
    rule(r"StableDiffusionAttendAndExcitePipeline", call={"attn_res": (4, 4), "token_indices": [[1]]}, batch=1),
    rule(
        r"StableDiffusionDepth2ImgPipeline",
        parts={"unet": {"in_channels": 5}, "depth_estimator": None},
        call={"depth_map": tensor(8, 8)},
    ),
    rule(r"StableDiffusionParadigmsPipeline", parts={"scheduler": {"class": "DDIMParallelScheduler"}}),
    rule(
        r"StableUnCLIP.*",
        parts={
            "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH},
            "image_noising_scheduler": {"class": "DDPMScheduler"},
            "prior_scheduler": {"class": "UnCLIPScheduler"},
        },
    ),
    rule(r"StableUnCLIPPipeline", call={"prior_num_inference_steps": 2}),
    rule(
        r"StableUnCLIPImg2ImgPipeline", parts={"image_encoder": {}, "feature_extractor": {}}, call={"image": pictures()}
    ),
    rule(
        r"UnCLIPPipeline",
        parts={
            "decoder": {
                "in_channels": 3,
                "out_channels": 6,
                "class_embed_type": "identity",
                "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "sample_size": 8,
            },
            "decoder_scheduler": {"variance_type": "learned_range", "prediction_type": "epsilon"},
            "super_res_scheduler": {"prediction_type": "epsilon"},
        },
        call={"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2},
    ),
    rule(
        r"VersatileDiffusionDualGuidedPipeline",
        parts={"image_encoder": {}, "image_feature_extractor": {"class": "CLIPImageProcessorPil"}},
        call={"image": pictures()},
    ),
    rule(r"WanVACEPipeline|DreamLite.*|QwenImageEdit.*", batch=1),
    rule(r"WanVACEPipeline", call={"num_frames": 5}),
    rule(
        r"Cosmos2_5_TransferPipeline",
        call={"controls": controls, "num_frames_per_chunk": 5},
        cannot="its ControlNet needs torchvision, which is not installed",
    ),
    rule(r"Cosmos(2|Text).*", parts={"transformer": {"concat_padding_mask": False}}),
    rule(r"CosmosVideo.*", parts={"transformer": {"concat_padding_mask": False}}),
    rule(r"CycleDiffusionPipeline", call={"source_prompt": ["a blue dog", "a red house"], "eta": 0.1}),
    rule(r"StableDiffusionGLIGENPipeline", parts={"unet": {"attention_type": "gated"}}, call=GLIGEN, batch=1),
    rule(r"StableDiffusionModelEditingPipeline", parts={"scheduler": {"class": "DDIMScheduler"}}),
    rule(r"StableDiffusionDiffEditPipeline", cannot="needs a mask and inverted latents that other methods of it make"),
    rule(r"StableDiffusionPix2PixZeroPipeline", cannot="needs embeddings of a source and a target concept"),
    rule(r"LEditsPP.*", cannot="edits a picture that a method of its own has inverted before"),
    rule(r"LTX2DFRTemporalRefinePipeline", cannot="needs the latents of another pipeline"),
    rule(r"AmusedImg2ImgPipeline", call=START, steps=5),
    rule(
        r"AmusedInpaintPipeline", call={**INPAINT, "strength": 0.6, "image": one(16), "mask_image": mask(16)}, steps=5
    ),
    rule(r"VQDiffusionPipeline", cannot="draws tokens of a codebook, and its miniature is not made yet"),
    rule(r"QwenImage(Edit|Layered).*", parts={"vae": DEEP_QWEN}),
    rule(r"Cosmos2.*", parts={"scheduler": {"use_karras_sigmas": True}}),
    rule(r"Kandinsky5I2IPipeline", batch=1, call={"max_sequence_length": 512}, parts={"vae": EIGHTFOLD}),
    rule(r"QwenImageEdit.*|QwenImage21Pipeline", call=SIDE_64),
    rule(r"ZImageOmniPipeline", parts={"siglip": None, "siglip_processor": None}),
    rule(r"JoyImageEdit.*", parts={"vae": {**DEEP_QWEN, "scale_factor_spatial": 32}}),
    rule(r"Kandinsky5I2VPipeline", call={"num_frames": 21}),
    rule(
        r"StableDiffusionGLIGENTextImagePipeline",
        parts={
            "unet": {"attention_type": "gated-text-image"},
            "image_encoder": {},
            "processor": lambda parts: clip_processor(parts["tokenizer"]),
        },
        call={**GLIGEN, "gligen_images": lambda _batch: [picture(1)]},
        batch=1,
    ),
    rule(
        r"Hunyuan(VideoImageToVideo).*",
        parts={"image_processor": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}},
    ),
    rule(r"EasyAnimate(Inpaint)?Pipeline", batch=1),
    rule(r"QwenImage21Pipeline", batch=1),
    rule(r"LTXI2VLongMultiPromptPipeline", batch=1),
    rule(r"Cosmos3OmniPipeline", batch=1),
    rule(r"Wuerstchen.*", batch=1),
    rule(
        r"StableDiffusionXLControlNetXSPipeline",
        parts={
            "controlnet": {
                "transformer_layers_per_block": (1, 2),
                "cross_attention_dim": 2 * WIDTH,
                "num_attention_heads": (2, 4),
            }
        },
    ),
]


def recipe_for(name: str) -> Recipe:
    """Every rule that matches, the later ones over the earlier."""
    parts: dict[str, Any] = {}
    found: dict[str, Any] = {"settings": {}, "call": {}}
    for pattern, given in RULES:
        if not pattern.fullmatch(name):
            continue
        for part, settings in given.get("parts", {}).items():
            both = isinstance(settings, dict) and isinstance(parts.get(part), dict)
            parts[part] = {**parts[part], **settings} if both else settings
        found["call"] = {**found["call"], **given.get("call", {})}
        found["settings"] = (
            {**found["settings"], **given["settings"]}
            if given.get("settings")
            else ({} if "settings" in given else found["settings"])
        )
        found |= {key: given[key] for key in ("steps", "batch", "prompts", "after", "cannot") if key in given}
    return Recipe(parts=parts, **found)
