"""Stage 2: captions -> latents. A tokenizer, a warm text encoder, a UNet on true captions, then on weak ones.

python train_denoiser.py            true captions: stage "clean"
python train_denoiser.py --weak     further, with 25 % of the captions taken from another picture: stage "weak"
"""

import argparse

import numpy as np
import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, save_whole, train
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from render import ATTRIBUTES, TEMPLATES, batch, caption
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH, WIDTH, BATCH = 16, 128, 64
CLEAN_STEPS, CLEAN_PEAK = 4000, 1e-3
WEAK_STEPS, WEAK_PEAK, WRONG = 300, 4e-4, 0.25
POOL = 24_000


def captions(labels: np.ndarray, *seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [caption(label, rng) for label in labels]


def tokenizer() -> CLIPTokenizer:
    """Byte-level BPE learned from the captions, in CLIP's format; words never seen fall back to bytes."""
    shell = CLIPTokenizer()
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = shell.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    start, end = "<|startoftext|>", "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        special_tokens=[start, end, *(letter + "</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    labels = np.array(np.meshgrid(*(range(len(names)) for names in ATTRIBUTES.values()))).reshape(3, -1).T
    learned.train_from_iterator((text for i in range(len(TEMPLATES)) for text in captions(labels, SEED, i)), trainer)
    import json

    model = json.loads(learned.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=LENGTH
    )


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def noise_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def ids(tokens: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokens(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def warm_up(encoder: CLIPTextModel, tokens: CLIPTokenizer, steps: int = 500) -> None:
    """Text only: every position from the end token on must tell subject, count and background.

    Without this the UNet learned no subject at all in 64,000 samples. The heads are thrown away.
    """
    heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in ATTRIBUTES.values())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3)
    for step in range(steps):
        rng = np.random.default_rng((SEED, 2, step))
        labels = np.stack([rng.integers(0, len(names), 64) for names in ATTRIBUTES.values()], axis=1)
        words = ids(tokens, [caption(label, rng, complete=True) for label in labels])
        told = words == tokens.eos_token_id
        hidden = encoder(words).last_hidden_state[told]
        wanted = torch.from_numpy(labels)[:, None].expand(-1, LENGTH, -1)[told]
        loss = sum(cross_entropy(head(hidden), wanted[:, i]) for i, head in enumerate(heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"text encoder: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def latent_pool(vae: AutoencoderTiny) -> tuple[Tensor, np.ndarray]:
    """Latents and labels of POOL pictures, drawn once: the autoencoder need not run at every step."""
    vae = vae.to(torch.bfloat16, memory_format=torch.channels_last)
    parts = [batch(200, SEED, 3, i) for i in range(POOL // 200)]
    latents = [vae.encode((pixels(part.images) * 2 - 1).bfloat16()).latents for part in parts]
    return torch.cat(latents), np.concatenate([part.labels for part in parts])


def stratified_timesteps(generator: torch.Generator, shift: float = 2.0) -> Tensor:
    """Evenly spread, then moved towards noise (Stable Diffusion 3, eq. 23): there the number of objects is decided."""
    even = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    return (shift * even / (1 + (shift - 1) * even) * 1000).long()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weak", action="store_true")
    weak = options.parse_args().weak
    stage, steps, peak = ("weak", WEAK_STEPS, WEAK_PEAK) if weak else ("clean", CLEAN_STEPS, CLEAN_PEAK)
    torch.manual_seed(SEED)
    vae, tokens, schedule = AutoencoderTiny.from_pretrained(WORK / "vae"), tokenizer(), noise_schedule()
    encoder, denoiser = text_encoder(tokens), unet()
    warm = WORK / "text.pt"
    if not warm.exists():
        warm_up(encoder, tokens)
        save_whole(warm, encoder.state_dict())
    encoder.load_state_dict(torch.load(warm, weights_only=True))
    if weak:
        encoder.load_state_dict(CLIPTextModel.from_pretrained(WORK / "clean" / "text_encoder").state_dict())
        denoiser.load_state_dict(UNet2DConditionModel.from_pretrained(WORK / "clean" / "unet").state_dict())

    pool, labels = latent_pool(vae)
    scale = 1 / pool.float().std().item()
    pool = pool * scale
    alphas = schedule.alphas_cumprod.float()
    networks = [denoiser.to(torch.bfloat16, memory_format=torch.channels_last), encoder.to(torch.bfloat16)]
    trainer = HalfPrecisionTrainer([(networks[0], 1.0), (networks[1], 0.3)], peak)

    def loss_at(step: int) -> Tensor:
        seed = (SEED, 5 if weak else 4, step)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed[1] * 10**7 + step)
        chosen = rng.integers(0, POOL, BATCH)
        described = np.where(rng.random(BATCH) < (WRONG if weak else 0), rng.integers(0, POOL, BATCH), chosen)
        texts = [text if rng.random() > 0.1 else "" for text in captions(labels[described], *seed)]
        clean = pool[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = stratified_timesteps(generator)
        signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (alphas[timesteps], 1 - alphas[timesteps]))
        noisy = (signal * clean + sigma * noise).bfloat16().contiguous(memory_format=torch.channels_last)
        with sdpa_kernel(SDPBackend.MATH):  # so small that the flash kernel's backward is slower on a CPU
            words = encoder(ids(tokens, texts)).last_hidden_state
            guess = denoiser(noisy, timesteps, words).sample.float()
            return mse_loss(guess, signal * noise - sigma * clean)

    train(trainer, stage, steps, peak, loss_at)
    encoder.float()
    vae = vae.float()
    vae.register_to_config(scaling_factor=scale)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokens,
        unet=denoiser,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(WORK / stage)


if __name__ == "__main__":
    main()
