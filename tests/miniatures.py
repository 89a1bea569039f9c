"""Tiny pipelines of the real diffusers classes with seeded random weights, for tests.

Every family comes from a function without required arguments. The weights are drawn after building, so that no
layer is zero (proj_out, adaLN) and an adapter at any depth moves the pictures. Tokenizers are the real classes, with
vocabularies built here, offline. Everything goes through `save_pretrained` and `from_pretrained`.
"""

# diffusers annotates tuple[str] where any length is taken, and one class where several are.
# pyright: reportArgumentType=false

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    KandinskyV22CombinedPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

VOCABULARY = """
a an and the of in on at with under over one two three four five red green blue yellow white black grey pink
purple orange brown dog dogs cat cats fox foxes horse horses bird birds fish tree trees house car cars boat ball snow
sea sky picture photo painting small large background happy sleeping running star heart flower moon sun"""
WORDS = VOCABULARY.split()

WIDTH = 16
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


# --- parts -------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level, with merges for `WORDS`; any text can be encoded. 77 tokens at most, as the real ones take."""
    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges[word[:end], pieces[end]] = None
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: whole words, and single letters for the rest."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS if len(word) > 1]
    pieces += [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_text_encoder(tokenizer: CLIPTokenizer, *, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_text_encoder(tokenizer: T5Tokenizer, *, multilingual: bool = False) -> Any:
    kind, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    return kind(
        config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
    )


def image_decoder(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """Two blocks: a latent is 2x2 pixels."""
    return AutoencoderKL(
        block_out_channels=(8, WIDTH),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def unet(**config: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (WIDTH, WIDTH),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **config})


def redraw(module: nn.Module, seed: int) -> None:
    """Draw every weight anew, at a scale that keeps signals near 1, so that nothing is zero or saturated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def finish(pipe: Any, seed: int) -> Any:
    """Random weights, eval mode, no progress bar; the decoder's last layer small enough that no pixel saturates."""
    for number, (_, part) in enumerate(sorted(pipe.components.items())):
        if isinstance(part, nn.Module):
            redraw(part, 1000 * seed + number)
            part.eval().requires_grad_(False)
    decoder = getattr(getattr(pipe, "vae", getattr(pipe, "movq", None)), "decoder", None)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters() if decoder is not None else ():
            if "conv_out" in name:
                parameter.mul_(0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- schedulers --------------------------------------------------------------------------------------------------


def make_scheduler(name: str, **config: Any) -> Any:
    """A diffusers scheduler by class name, with Stable Diffusion's noise schedule where it has one."""
    kind = getattr(diffusers, name)
    usual = {
        **NOISE_SCHEDULE,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{**{key: value for key, value in usual.items() if key in taken}, **config})


# --- pipelines ---------------------------------------------------------------------------------------------------


def sd15(scheduler: Any = None, seed: int = 0, kind: type = StableDiffusionPipeline) -> Any:
    tokenizer = clip_tokenizer()
    pipe = kind(
        vae=image_decoder(),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=scheduler or make_scheduler("DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, seed)


def sd15_pag(scheduler: Any = None, seed: int = 0) -> Any:
    """Its attention processors are put in for the call and taken out at its end; three predictions a step."""
    return sd15(scheduler, seed, kind=StableDiffusionPAGPipeline)


def numpy_only(scheduler: Any = None, seed: int = 0) -> Any:
    """Hands out NumPy arrays, whatever it is asked for."""
    tokenizer = clip_tokenizer()
    pipe = StableDiffusionAdapterPipeline(
        vae=image_decoder(),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet(),
        adapter=T2IAdapter(
            channels=[WIDTH, WIDTH], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
        ),
        scheduler=scheduler or make_scheduler("DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, seed)


def sd15_img2img(scheduler: Any = None, seed: int = 0) -> Any:
    return sd15(scheduler, seed, kind=StableDiffusionImg2ImgPipeline)


def sd15_controlnet(scheduler: Any = None, seed: int = 0) -> Any:
    """A second network is called at every step, sees the latents, and has no LoRA."""
    control = ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 4))
    pipe = StableDiffusionControlNetPipeline(**sd15(scheduler).components, controlnet=control)
    return finish(pipe, seed)


def sdxl(scheduler: Any = None, seed: int = 0, kind: type = StableDiffusionXLPipeline, **parts: Any) -> Any:
    tokenizer = clip_tokenizer()
    denoiser = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )
    pipe = kind(
        vae=image_decoder(),
        text_encoder=clip_text_encoder(tokenizer),
        text_encoder_2=clip_text_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=scheduler or EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading", steps_offset=1),
        **(parts or {"add_watermarker": False}),
    )
    return finish(pipe, seed)


def sdxl_adapter(scheduler: Any = None, seed: int = 0) -> Any:
    """The denoiser takes the T2I-adapter's residuals out of the list that holds them."""
    adapter = T2IAdapter(channels=[WIDTH, WIDTH], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
    return sdxl(scheduler, seed, kind=StableDiffusionXLAdapterPipeline, adapter=adapter)


def sd3(scheduler: Any = None, seed: int = 0) -> Any:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        vae=image_decoder(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=clip_text_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_text_encoder(tokenizer, projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_wide(t5),
        tokenizer_3=t5,
        transformer=denoiser,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return finish(pipe, seed)


def t5_wide(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """SD3 pads CLIP's width up to T5's, so T5 is the wider one there."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )


def flux(scheduler: Any = None, seed: int = 0) -> Any:
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        vae=image_decoder(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_text_encoder(t5),
        tokenizer_2=t5,
        transformer=denoiser,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return finish(pipe, seed)


def pixart(scheduler: Any = None, seed: int = 0) -> Any:
    t5 = t5_tokenizer()
    denoiser = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=t5,
        text_encoder=t5_text_encoder(t5),
        vae=image_decoder(),
        transformer=denoiser,
        scheduler=scheduler or DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
    )
    return finish(pipe, seed)


def wan(scheduler: Any = None, seed: int = 0) -> Any:
    """Video; guidance above 1 calls the denoiser twice a step."""
    t5 = t5_tokenizer()
    pipe = WanPipeline(
        tokenizer=t5,
        text_encoder=t5_text_encoder(t5, multilingual=True),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return finish(pipe, seed)


def ltx(scheduler: Any = None, seed: int = 0) -> Any:
    """Video, the text mask given to the denoiser; the decoder draws noise without a generator."""
    t5 = t5_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 4,
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(True,) * 5,  # as LTX-Video 0.9.1's
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    pipe = LTXPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_text_encoder(t5),
        tokenizer=t5,
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )
    return finish(pipe, seed)


def pixels(scheduler: Any = None, seed: int = 0, kind: type = IFPipeline) -> Any:
    """Denoises pixels and has no decoder; for output_type="pt" its pictures are in [-1, 1]."""
    t5 = t5_tokenizer()
    pipe = kind(
        tokenizer=t5,
        text_encoder=t5_text_encoder(t5),
        unet=unet(in_channels=3, out_channels=6, encoder_hid_dim=WIDTH),
        scheduler=scheduler or DDPMScheduler(variance_type="learned_range", prediction_type="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return finish(pipe, seed)


def prior_and_decoder(scheduler: Any = None, seed: int = 0) -> Any:
    """Two pipelines in one, each with a scheduler: a prior makes an image embedding of the text, the other draws it."""
    tokenizer = clip_tokenizer()
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    pipe = KandinskyV22CombinedPipeline(
        unet=unet(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
        ),
        scheduler=scheduler or DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, steps_offset=1),
        movq=VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=12,
            norm_type="spatial",
        ),
        prior_prior=PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_embeddings=77, num_layers=1
        ),
        prior_image_encoder=image_encoder,
        prior_text_encoder=clip_text_encoder(tokenizer, projection=True),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        ),
        prior_image_processor=CLIPImageProcessorPil(size=16, crop_size=16),
    )
    return finish(pipe, seed)


# --- how to call them --------------------------------------------------------------------------------------------


def _nothing(_batch: int) -> dict[str, Any]:
    return {}


def _pixart(_batch: int) -> dict[str, Any]:
    return {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}


def _start_pictures(batch: int) -> dict[str, Any]:
    """Smooth colour ramps to start from; strength 0.6 leaves 3 of 5 steps."""
    pictures = [
        Image.linear_gradient("L").rotate(90 * number).resize((16, 16)).convert("RGB") for number in range(batch)
    ]
    return {"image": pictures, "strength": 0.6}


def _control_pictures(batch: int) -> dict[str, Any]:
    return {"image": _start_pictures(batch)["image"]}


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of pipeline: how to make it, and what its call needs besides prompts, steps, guidance and generators."""

    make: Callable[..., Any]
    height: int | None = 16
    width: int | None = 16
    extra: Callable[[int], Mapping[str, Any]] = _nothing
    video: bool = False

    def call(self, batch: int) -> dict[str, Any]:
        """Keyword arguments for a stock call with `batch` prompts: size and extras."""
        size = {} if self.height is None else {"height": self.height, "width": self.width}
        return {**size, **self.extra(batch)}


FAMILIES: dict[str, Family] = {
    "sd15": Family(sd15),
    "sd15_img2img": Family(sd15_img2img, None, None, _start_pictures),
    "sd15_controlnet": Family(sd15_controlnet, extra=_control_pictures),
    "sd15_pag": Family(sd15_pag, extra=lambda _: {"pag_scale": 2.0}),
    "sdxl": Family(sdxl),
    "sdxl_adapter": Family(sdxl_adapter, extra=_control_pictures),
    "sd3": Family(sd3, extra=lambda _: {"max_sequence_length": 16}),
    "flux": Family(flux, extra=lambda _: {"max_sequence_length": 16}),
    "pixart": Family(pixart, extra=_pixart),
    "wan": Family(wan, extra=lambda _: {"num_frames": 5, "max_sequence_length": 16}, video=True),
    "ltx": Family(ltx, 32, 32, lambda _: {"num_frames": 9, "max_sequence_length": 16}, video=True),
}
