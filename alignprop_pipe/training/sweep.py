"""The row of pictures from one adapter to another, or from the base model to one adapter, with scores (AlignProp, 5.4).

Every column is one weight; all columns draw the same prompts from the same noise, so that the weight alone differs.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.apply import load_adapter, remove_adapter
from alignprop_pipe.adapters.mix import mix, said_of
from alignprop_pipe.config.expression import read_expression
from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.diffusion import pipeline_parts
from alignprop_pipe.diffusion.sample import Picture, sample_pictures
from alignprop_pipe.errors import ConfigError, RewardError
from alignprop_pipe.images import to_tensor
from alignprop_pipe.records import PromptBatch
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.registry import REGISTRY, parse_reward
from alignprop_pipe.runs import drawings

MOST_COLUMNS = 50


@dataclass(frozen=True, slots=True)
class Column:
    """The pictures of all prompts at one weight, and their scores by the text of each reward, in the same order."""

    weight: float
    pictures: tuple[Picture, ...]
    scores: Mapping[str, tuple[float, ...]]


def weights_from_text(text: str) -> tuple[float, ...]:
    """`0:1:0.25` (from, to, step) -> the weights, with both ends where the step meets them. Raises ConfigError."""
    try:
        start, end, step = (float(part) for part in text.split(":"))
        count = math.floor((end - start) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        count, start, step = 0, 0.0, 0.0
    if not 1 <= count <= MOST_COLUMNS or not math.isfinite(start + step):
        raise ConfigError(
            f"sweep {text!r} is not known; use from:to:step such as 0:1:0.25, with {MOST_COLUMNS} columns at most"
        )
    return tuple(round(start + number * step, 9) for number in range(count))


def sweep(
    pipe: DiffusionPipeline,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    batch: PromptBatch,
    sampling: SamplingOptions,
    rewards: Sequence[Reward] = (),
    seed: int = 0,
    batch_size: int = 4,
) -> Iterator[Column]:
    """Draw and score a column for each weight: w of the second adapter and 1 - w of the first, or w of the only one.

    The pictures are those that `sample_pictures` draws for `seed`. An adapter of ours that `pipe` holds is replaced,
    and at the end there is none. Raises AdapterError: base models that differ, or another than that of `pipe`.
    """
    first, *others = adapters
    try:
        for weight in weights:
            if others:
                load_adapter(pipe, mix([(first, 1 - weight), (others[0], weight)]))
            else:
                load_adapter(pipe, first, scale=weight)
            drawn = sample_pictures(pipe, batch.prompts, sampling, seed=seed, batch_size=batch_size)
            pictures = tuple(drawn)
            yield Column(weight, pictures, _scores(rewards, pictures, batch, pipeline_parts.device_of(pipe)))
    finally:
        remove_adapter(pipe)


def _scores(
    rewards: Sequence[Reward], pictures: Sequence[Picture], batch: PromptBatch, device: torch.device
) -> dict[str, tuple[float, ...]]:
    """Of the pictures as files would have them; of videos, of the frame in the middle."""
    images = torch.stack([to_tensor(picture.image) for picture in pictures]).to(device)
    totals = {str(reward): reward(images, batch.prompts, batch.targets).total for reward in rewards}
    return {name: tuple(values.detach().tolist()) for name, values in totals.items()}


def sheet(columns: Sequence[Column], names: Sequence[str], caption: str) -> Image.Image:
    """All columns on one sheet: a row for each prompt, the scores under every picture. `names` are the adapters'."""
    if len(names) > 1:
        heads = [f"{1 - column.weight:g} · {column.weight:g}" for column in columns]
        heads = [names[0] if column.weight == 0 else names[1] if column.weight == 1 else head
                 for column, head in zip(columns, heads, strict=True)]  # fmt: skip
    else:
        heads = ["base" if column.weight == 0 else f"{names[0]} {column.weight:g}" for column in columns]
    rows = [
        drawings.Row(
            columns[0].pictures[place].prompt,
            tuple(column.pictures[place].image for column in columns),
            tuple(tuple(f"{_short(n)} {v[place]:.4g}" for n, v in column.scores.items()) for column in columns),
        )
        for place in range(len(columns[0].pictures))
    ]
    return drawings.rows_sheet(heads, rows, caption)


def _short(reward: str) -> str:
    return reward if len(reward) <= 14 else "score"


# --- which rewards ---------------------------------------------------------------------------------------------------


def rewards_of(adapters: Sequence[Adapter]) -> list[Reward]:
    """The rewards that the adapters' headers name, as far as that needs no download.

    A header is data: an expression in it that names code, or weights other than those that are its default, is left
    out.
    """
    texts = dict.fromkeys(filter(None, (said_of(adapter, "reward") for adapter in adapters)))
    found = []
    for text in texts:
        try:
            if _is_harmless(text) and _uses_own_weights(reward := parse_reward(text)):
                found.append(reward)
        except RewardError:  # of another version, or one that needs its licence accepted
            continue
    return found


def _is_harmless(text: str) -> bool:
    named: list[bool] = []

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        known = REGISTRY.get(name)
        words = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        is_plain = not any(sign in word for word in words for sign in "/\\:")
        named.append(known is not None and name != "python" and known.here is not False and is_plain)
        return 1

    read_expression(text, note)
    return bool(named) and all(named)


def _uses_own_weights(reward: Reward) -> bool:
    """Whether all networks inside are the default ones, or bundled: those of any other name are not opened."""
    for member in members(reward):
        for name, spec in inspect.signature(type(member).__init__).parameters.items():
            is_source = name == "revision" or "Path" in str(spec.annotation)
            if is_source and getattr(member, name, spec.default) not in (spec.default, "emoji"):
                return False
    return True
