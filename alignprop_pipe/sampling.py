"""Pictures from a pipeline, with or without an adapter: prompts and a seed -> pictures, grids, PNG bytes.

The pictures come from the stock call, so the gradient is off. A picture's noise depends on the seed, its prompt
and its number alone: other prompts in the same call do not change it, and the base and the aligned model get the
same one.
"""

import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from alignprop_pipe import drawings, room, stock
from alignprop_pipe.config import SamplingOptions
from alignprop_pipe.prompts import check_whole
from alignprop_pipe.seeds import SeededDraws, generator_for

SMALLEST_SHOWN = 256
"""Pictures with shorter sides are enlarged where a person looks at several."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture, or the frames of a video; `number` counts the pictures of one prompt from 0."""

    prompt: str
    number: int
    frames: tuple[Image.Image, ...]

    @property
    def image(self) -> Image.Image:
        """The picture; of a video, the frame in the middle."""
        return self.frames[len(self.frames) // 2]


def sample_pictures(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: SamplingOptions,
    *,
    seed: int = 0,
    num: int = 1,
    batch_size: int = 4,
    **call_kwargs: Any,
) -> Iterator[Picture]:
    """Render `num` pictures of every prompt, `batch_size` at once.

    `call_kwargs` are further arguments of this pipeline. Raises PipelineError, PromptError for half a character, and
    ConfigError for more than the memory can hold.
    """
    for number, prompt in enumerate(prompts, start=1):
        check_whole(prompt, f"prompt {number}")
    wanted = [(prompt, number) for prompt in prompts for number in range(num)]
    room.check_drawing(pipe, sampling, call_kwargs, min(batch_size, len(wanted)))
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        generators = [noise_generator(seed, prompt, number) for prompt, number in batch]
        arguments = stock.call_arguments(pipe, [prompt for prompt, _ in batch], sampling, generators, call_kwargs)
        with SeededDraws.after(noise_generator(seed, *batch[0])):  # for noise that a pipeline draws by itself
            outputs = stock.pictures(pipe, type(pipe).__call__, arguments)  # pyright: ignore[reportAttributeAccessIssue]
        for (prompt, number), output in zip(batch, outputs, strict=True):
            yield Picture(prompt, number, _frames(output))


def noise_generator(seed: int, prompt: str, number: int) -> torch.Generator:
    """The noise of one picture."""
    return generator_for("noise", seed, step=zlib.crc32(prompt.encode()), sample=number)


def _frames(output: torch.Tensor) -> tuple[Image.Image, ...]:
    """[3, H, W], or [F, 3, H, W] of a video, in [0, 1]."""
    return tuple(drawings.picture(frame) for frame in (output if output.ndim == 4 else output[None]))


# --- pictures of pictures ---------------------------------------------------------------------------------------------


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


# --- files ------------------------------------------------------------------------------------------------------------


def png_bytes(frames: Sequence[Image.Image], about: Mapping[str, str] | None = None) -> bytes:
    """A PNG with `about` in its text chunks; several frames become an animated one."""
    chunks = PngInfo()
    for name, text in (about or {}).items():
        chunks.add_text(name, text)
    buffer = io.BytesIO()
    first, *others = frames
    moving = {"save_all": True, "append_images": others, "duration": 125, "loop": 0} if others else {}
    first.save(buffer, "PNG", pnginfo=chunks, **moving)
    return buffer.getvalue()
