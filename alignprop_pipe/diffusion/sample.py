"""Pictures from a pipeline, with or without an adapter: prompts and a seed -> pictures.

The pictures come from the stock call, so the gradient is off. A picture's noise depends on the seed, its prompt
and its number alone: other prompts in the same call do not change it, and the base and the aligned model get the
same one.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.diffusion import memory, pipeline_call
from alignprop_pipe.images import to_pil
from alignprop_pipe.prompts import check_whole
from alignprop_pipe.seeds import SeededDraws, generator_for


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
    pipeline_call.tell_lost_words(pipe, prompts)
    wanted = [(prompt, number) for prompt in prompts for number in range(num)]
    memory.check_drawing(pipe, sampling, call_kwargs, min(batch_size, len(wanted)))
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        generators = [noise_generator(seed, prompt, number) for prompt, number in batch]
        arguments = pipeline_call.call_arguments(
            pipe, [prompt for prompt, _ in batch], sampling, generators, call_kwargs
        )
        with SeededDraws.after(noise_generator(seed, *batch[0])):  # for noise that a pipeline draws by itself
            call = type(pipe).__call__  # pyright: ignore[reportAttributeAccessIssue]
            outputs = pipeline_call.pictures(pipe, call, arguments)
        for (prompt, number), output in zip(batch, outputs, strict=True):
            yield Picture(prompt, number, _frames(output))


def noise_generator(seed: int, prompt: str, number: int) -> torch.Generator:
    """The noise of one picture."""
    return generator_for("noise", seed, step=zlib.crc32(prompt.encode()), sample=number)


def _frames(output: torch.Tensor) -> tuple[Image.Image, ...]:
    """[3, H, W], or [F, 3, H, W] of a video, in [0, 1]."""
    return tuple(to_pil(frame) for frame in (output if output.ndim == 4 else output[None]))
