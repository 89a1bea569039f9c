"""Tensors and Pillow's pictures: from one to the other, several on one sheet, and as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

SMALLEST_SHOWN = 256
"""Pictures with shorter sides are enlarged where a person looks at several."""


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """A tensor in [0, 1] as a picture of 8 bits."""
    pixels = image.detach().float().cpu().nan_to_num(0).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """A picture as a tensor in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def make_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures on one sheet, as square as it gets; each cell has the size of the largest picture."""
    if not images:
        raise ValueError("make_grid needs one picture or more")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    gap = max(2, width // 64)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (width + gap), place // columns * (height + gap)))
    return sheet


def side_by_side(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Pictures next to each other, each under its label; small ones are enlarged without smoothing."""
    shown = [enlarged(image) for image in images]
    bar = 24
    framed = [Image.new("RGB", (image.width, image.height + bar), "white") for image in shown]
    for frame, image, label in zip(framed, shown, labels, strict=True):
        frame.paste(image, (0, bar))
        ImageDraw.Draw(frame).text((frame.width / 2, bar / 2), label, "black", ImageFont.load_default(14), anchor="mm")
    return make_grid(framed, columns=len(framed))


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture in whole multiples of its pixels, a large one as it is."""
    factor = -(-SMALLEST_SHOWN // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def png_bytes(image: Image.Image | Sequence[Image.Image], about: Mapping[str, str] | None = None) -> bytes:
    """A PNG with `about` in its text chunks; of several frames, an animated one."""
    chunks = PngInfo()
    for name, text in (about or {}).items():
        chunks.add_text(name, text)
    buffer = io.BytesIO()
    first, *others = [image] if isinstance(image, Image.Image) else image
    moving = {"save_all": True, "append_images": others, "duration": 125, "loop": 0} if others else {}
    first.save(buffer, "PNG", pnginfo=chunks, **moving)
    return buffer.getvalue()
