"""Stage 1: pictures <-> latents [8, 16, 16], with diffusers' AutoencoderTiny (0.32 M weights)."""

import sys

import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, train
from diffusers import AutoencoderTiny
from render import batch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

STEPS, BATCH, WIDTH = 2000, 16, 32


def autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 2, 2),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=8,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    across, down = (l1_loss(a, b) for a, b in zip(edges(made), edges(real), strict=True))
    coarse = mse_loss(avg_pool2d(made, 4), avg_pool2d(real, 4))
    return l1_loss(made, real) + mse_loss(made, real) + 0.5 * (across + down) + coarse


def moment_loss(latents: Tensor) -> Tensor:
    """Pull every channel towards mean 0 and deviation 1, the scale that the noise schedule expects."""
    return latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()


def main() -> None:
    torch.manual_seed(SEED)
    network = autoencoder().to(torch.bfloat16, memory_format=torch.channels_last)
    trainer = HalfPrecisionTrainer([(network, 1.0)], peak=1.5e-3)

    def loss_at(step: int) -> Tensor:
        real = pixels(batch(BATCH, SEED, 1, step).images)
        generator = torch.Generator().manual_seed(step)
        latents = network.encode((real * 2 - 1).bfloat16()).latents
        noise = 0.05 * torch.randn(latents.shape, generator=generator).bfloat16()
        made = (network.decode(latents + noise).sample.float() + 1) / 2
        return reconstruction_loss(made, real) + 0.01 * moment_loss(latents.float())

    train(trainer, "autoencoder", STEPS, 1.5e-3, loss_at)
    network.save_pretrained(WORK / "vae")
    with torch.no_grad():
        real = pixels(batch(128, SEED, 99).images)
        latents = network.encode(real * 2 - 1).latents
        made = (network.decode(latents).sample.clamp(-1, 1) + 1) / 2
        psnr = -10 * (made - real).square().mean((1, 2, 3)).log10().mean()
    print(f"autoencoder: {psnr:.2f} dB, latent mean {latents.mean():.3f}, deviation {latents.std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
