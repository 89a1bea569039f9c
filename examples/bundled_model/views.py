"""The many ways in which a picture may reach the judge and the scorer: shifted, recoloured, blurred, noisy, decoded."""

import numpy as np
import torch
from common import WORK, pixels
from diffusers import AutoencoderTiny
from render import ATTRIBUTES, render
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

SHIFT, CHUNKS = 3, 8


def draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fresh pictures of the given labels, uint8 [n, 64, 64, 3]."""
    return np.stack([render(*label, rng) for label in labels])


def every_label() -> np.ndarray:
    """Each of the 16 x 4 x 8 combinations once, int [512, 3]."""
    return np.array(np.meshgrid(*(range(len(names)) for names in ATTRIBUTES.values()), indexing="ij")).reshape(3, -1).T


@torch.no_grad()
def decoded(
    images: np.ndarray, generator: torch.Generator, most: float = 0.3, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same pictures after the autoencoder, with latent noise of up to `most` deviations; uint8 [n, 3, 64, 64]."""
    vae = AutoencoderTiny.from_pretrained(WORK / "vae", dtype=dtype)
    vae = vae.to(memory_format=torch.channels_last)
    made = []
    for start in range(0, len(images), 64):
        latents = vae.encode((pixels(images[start : start + 64]) * 2 - 1).to(dtype)).latents
        strength = most * torch.rand(len(latents), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        made.append(((vae.decode(latents.to(dtype)).sample.float() + 1) * 127.5).clamp(0, 255).round().byte())
    return torch.cat(made)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture, float [n, 3, h, w] in [0, 1], a little moved, recoloured, and at times blurred or noisy."""
    height, width = images.shape[-2:]
    padded = pad(images, (SHIFT,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * SHIFT + 1, (CHUNKS, 2), generator=generator).tolist()
    parts = zip(padded.chunk(CHUNKS), corners, strict=False)
    return recoloured(torch.cat([part[..., y : y + height, x : x + width] for part, (y, x) in parts]), generator)


def recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """As `augment`, but everything stays in its place."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator)

    coloured = images * (0.9 + 0.2 * uniform(3, 1, 1)) + 0.08 * (uniform(3, 1, 1) - 0.5)
    soft = avg_pool2d(pad(coloured, (1,) * 4, mode="replicate"), 3, stride=1)
    blurred = coloured.lerp(soft, (2 * uniform(1, 1, 1) - 1).clamp(min=0))
    strength = 0.12 * (2 * uniform(1, 1, 1) - 1).clamp(min=0)
    return (blurred + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
