"""Picture files -> scores, and what a reward costs on one batch: the work behind `score` and `rewards check`.

Pictures come as [B, 3, H, W] in [0, 1] that need no gradient, so that frozen networks keep no graph: every reward is
used as a judge here. Each file is read once; pictures of one size are scored together.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_pipe.errors import AlignError, PromptError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Images, PromptBatch
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.guard import check_reward
from alignprop_pipe.scoring.picture_files import Found, Pixels, Skipped, read_pixels
from alignprop_pipe.seeds import generator_for

FILE = "file"
"""The column of a table of prompts that says which picture a row is about."""
HELD_BATCHES = 4
"""So many batches of decoded pictures wait at most for others of their size."""


@dataclass(frozen=True, slots=True)
class Task:
    """A picture file with the prompt and the targets that it is scored for."""

    path: Path
    prompt: str
    targets: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """One picture's score, and the parts of it under their own names, unweighted."""

    path: Path
    prompt: str
    score: float
    parts: Mapping[str, float]


# --- prompts ---------------------------------------------------------------------------------------------------------


def reads_prompts(reward: Reward) -> bool:
    """Whether the prompts matter to a reward, or to any that it is made of."""
    children = reward.children()
    return any(map(reads_prompts, children)) if children else reward.reads_prompts


def assign_own(found: Sequence[Found], reward: Reward) -> list[Task]:
    """Each picture with the prompt in its file. Raises PromptError that names the files without, if it matters."""
    lacking = [str(picture.path) for picture in found if picture.prompt is None]
    if lacking and reads_prompts(reward):
        raise PromptError(
            f"the reward {reward} compares pictures with their prompts, and there is none in {_listed(lacking)}; give "
            "--prompt TEXT, one for all, or --prompts FILE"
        )
    return [Task(picture.path, picture.prompt or "") for picture in found]


def assign(found: Sequence[Found], prompts: PromptSet) -> list[Task]:
    """Each picture with its row of a prompt file, which gives the prompt and the targets.

    Rows are found by a column "file" (a path, or the file's name); else by the prompts in the files, where each has one
    and all are in the set; else by order. Raises PromptError that says what does not fit.
    """
    named = next((column for name, column in prompts.targets.items() if name.strip().lower() == FILE), None)
    if named is not None:
        return [_task(picture, prompts, _row_of(picture.path, named)) for picture in found]
    places = {prompt: place for place, prompt in reversed(list(enumerate(prompts.prompts)))}
    if all(picture.prompt in places for picture in found):
        return [_task(picture, prompts, places[picture.prompt]) for picture in found if picture.prompt is not None]
    if len(found) == len(prompts):
        return [_task(picture, prompts, place) for place, picture in enumerate(found)]
    strange = [str(picture.path) for picture in found if picture.prompt not in places]
    raise PromptError(
        f"{len(prompts)} prompts do not fit {len(found)} pictures: give one for each, in the order of the files, or a "
        "table with the columns 'file' and 'prompt'. Pictures that hold their own prompt can come in any order, but "
        f"{_listed(strange)} holds none, or one that is not in the list"
    )


def _row_of(path: Path, files: Sequence[Any]) -> int:
    for same in (lambda file: Path(file) == path, lambda file: Path(file).name == path.name):
        rows = [place for place, file in enumerate(files) if file is not None and same(str(file))]
        if len(rows) == 1:
            return rows[0]
        if rows:
            raise PromptError(
                f"{str(path)!r} stands {len(rows)} times in the column 'file' of the prompts; once is needed"
            )
    raise PromptError(f"{str(path)!r} is not in the column 'file' of the prompts; add a row, or leave the picture out")


def _task(picture: Found, prompts: PromptSet, place: int) -> Task:
    targets = {name: column[place] for name, column in prompts.targets.items() if name.strip().lower() != FILE}
    return Task(picture.path, prompts.prompts[place], targets)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- scores ----------------------------------------------------------------------------------------------------------


def score_files(
    reward: Reward, tasks: Sequence[Task], *, device: torch.device | str = "cpu", batch_size: int = 8
) -> Iterator[Scored | Skipped]:
    """Score every picture; a file that cannot be read, and a score that is no number, is skipped with its reason.

    Results come as batches of one size get full, not in the order of `tasks`.
    """
    waiting: dict[tuple[int, ...], list[tuple[Task, Pixels]]] = {}
    for task in tasks:
        pixels = read_pixels(task.path)
        if isinstance(pixels, Skipped):
            yield pixels
            continue
        group = waiting.setdefault(tuple(pixels.shape), [])
        group.append((task, pixels))
        if len(group) == batch_size:
            yield from _scored(reward, waiting.pop(tuple(pixels.shape)), device)
        elif sum(map(len, waiting.values())) >= HELD_BATCHES * batch_size:
            yield from _scored(reward, waiting.pop(max(waiting, key=lambda size: len(waiting[size]))), device)
    for group in waiting.values():
        yield from _scored(reward, group, device)


def _scored(
    reward: Reward, group: Sequence[tuple[Task, Pixels]], device: torch.device | str
) -> Iterator[Scored | Skipped]:
    images = torch.stack([pixels for _, pixels in group]).to(device).float() / 255
    prompts = [task.prompt for task, _ in group]
    scores = reward(images, prompts, {name: [task.targets[name] for task, _ in group] for name in group[0][0].targets})
    totals = scores.total.detach().tolist()
    parts = {name: values.detach().tolist() for name, values in scores.parts.items()}
    for place, (task, _) in enumerate(group):
        if math.isfinite(totals[place]):
            yield Scored(task.path, task.prompt, totals[place], {name: values[place] for name, values in parts.items()})
        else:
            yield Skipped(task.path, f"its score is {totals[place]}, which is no number to go by")


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); the latter is NaN for a single value."""
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


# --- a reward on trial -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """A reward on one batch. `refusal` says why it cannot train, and is empty where it can.

    `gradient_norm` is the mean over the pictures of the length of d score / d pixels; `seconds` are those of one
    forward and backward pass, after the network was loaded. `weights_mb` is what its networks fill, `activations_mb`
    what the batch keeps for the backward pass, both in 10^6 bytes.
    """

    reward: str
    refusal: str = ""
    lowest: float = math.nan
    highest: float = math.nan
    gradient_norm: float = math.nan
    seconds: float = math.nan
    weights_mb: float = math.nan
    activations_mb: float = math.nan


def random_batch(size: int, side: int, prompt: str, device: torch.device) -> tuple[Images, PromptBatch]:
    """Pictures of seeded noise, `side` pixels high and wide, with the same prompt for each."""
    images = torch.rand(size, 3, side, side, generator=generator_for("evidence", 0)).to(device)
    return images, PromptBatch([prompt] * size)


def on_trial(reward: Reward) -> list[Reward]:
    """The whole, and after it each of the rewards that its gradient flows through."""
    parts: list[Reward] = []
    for part in reward.trained():
        if part not in parts:
            parts.append(part)
    return [reward, *parts] if parts != [reward] else parts


def try_reward(reward: Reward, images: Images, batch: PromptBatch) -> Trial:
    """Put a reward through the check that training starts with, then measure it. Gradient mode must be on.

    Statistics of pictures that it lacks, as `zscore` does, are taken from this batch.
    """
    name = str(reward)
    try:
        check_reward(reward, images, batch.prompts, batch.targets)
        reward = reward.calibrated(images, batch.prompts, batch.targets)
    except AlignError as error:
        return Trial(name, refusal=str(error))
    weights = _weights(reward)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    probe = images.detach().clone().requires_grad_(True)
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = reward(probe, batch.prompts, batch.targets).total
    (gradient,) = torch.autograd.grad(scores.sum(), probe)
    norm = gradient.flatten(1).norm(dim=1).mean().item()  # waits for the accelerator
    seconds, values = time.perf_counter() - began, scores.tolist()
    return Trial(
        reward=name,
        lowest=min(values),
        highest=max(values),
        gradient_norm=norm,
        seconds=seconds,
        weights_mb=sum(weights.values()) / 1e6,
        activations_mb=sum(kept.values()) / 1e6,
    )


def _weights(reward: Reward) -> dict[int, int]:
    """The size of every tensor in the networks of a reward, by its place in memory."""
    tensors = [tensor for network in reward.networks() for tensor in (*network.parameters(), *network.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
