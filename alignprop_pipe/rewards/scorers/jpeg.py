"""Compressibility: what JPEG would lose of a picture, by a differentiable JPEG (arXiv 2309.06978, kornia's codec).

A file's size has no slope. The distance between the picture and its re-decoded self has one: it is the detail that
JPEG cannot hold, so raising `jpeg` makes files smaller, and raising `-jpeg` makes them larger. At one quality alone
pixels settle on that quality's grid of values and the file stays as it was (measured, 60 steps on noisy pixels:
distance -95 %, file -4 %); at three qualities at once the detail itself has to go (file -29 %).
"""

import io
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from kornia.enhance import jpeg_codec_differentiable
from PIL import Image
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.entries import RewardEntry

BLOCK = 16  # pixels: a JPEG unit with halved colour resolution
COARSER = (1.0, 0.5, 0.25)  # shares of the quality at which the distance is measured


class Jpeg(Reward):
    """Minus the root mean squared distance to the picture after JPEG: about -0.2 (noise) to 0 (flat).

    Args:
        quality: of the JPEG, 1 to 100; the distance is the mean over it, its half and its quarter.

    Any size of picture: the edge is repeated up to multiples of 16. The extra `jpeg_kb` is the true size of the file
    at `quality`, by Pillow, in 1000 bytes.

    Examples:
        >>> import torch
        >>> from alignprop_pipe.rewards import Jpeg
        >>> flat, noisy = Jpeg()(torch.stack([torch.full((3, 32, 32), 0.5), torch.rand(3, 32, 32)]), ["", ""]).total
        >>> bool(flat > noisy)
        True
    """

    name = "jpeg"
    entry = RewardEntry(
        summary="compressibility: minus what JPEG loses of the picture; -jpeg asks for rich detail; logs jpeg_kb",
        licence="no weights",
        range_text="about -0.2 (noise) to 0 (flat)",
    )
    reads_prompts = False

    def __init__(self, quality: int = 80) -> None:
        if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
            raise RewardError(f"jpeg(quality={quality!r}): a whole number from 1 to 100 is needed")
        self.quality = quality

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        images = images if images.dtype == torch.float64 else images.float()
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
        losses = [(padded - self._decoded(padded, share))[..., :height, :width].square() for share in COARSER]
        # The small number keeps the slope of the root finite where JPEG loses nothing.
        return 1e-4 - (torch.stack(losses).mean(dim=(0, 2, 3, 4)) + 1e-8).sqrt()

    def _decoded(self, images: Images, share: float) -> Images:
        return jpeg_codec_differentiable(images, images.new_tensor([max(self.quality * share, 1.0)]))

    def extras(self, images: Images, prompts: list[str], targets: Targets) -> Mapping[str, Tensor]:
        sizes = [jpeg_bytes(image, self.quality) / 1000 for image in images.detach().float().cpu()]
        return {"jpeg_kb": torch.tensor(sizes, device=images.device)}


def jpeg_bytes(image: Tensor, quality: int) -> int:
    """The size of one picture [3, H, W] in [0, 1] as a JPEG file."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(file, format="JPEG", quality=quality)
    return file.tell()
