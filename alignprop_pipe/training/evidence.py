"""Evidence: held-out prompts rendered with fixed noise by the stock call, scored by the reward and by judges.

Over-optimisation is this method's weakness (AlignProp, section 4), so a reward that rises while the judges and the
diversity do not is what this file is there to show. Each picture has its own generator, made from the seed and its
place among the prompts: the noise is the same before and after training, whatever `eval_batch_size` is.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from alignprop_pipe.config.choices import Maximize
from alignprop_pipe.config.settings import CHOSEN, AlignConfig
from alignprop_pipe.diffusion import patching, pipeline_call
from alignprop_pipe.errors import ConfigError, PipelineError, PromptError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Evidence, Images, PromptBatch, Scores, Videos
from alignprop_pipe.rewards.base import Reward, merge_parts
from alignprop_pipe.rewards.networks.network import check_sources
from alignprop_pipe.rewards.registry import parse_reward
from alignprop_pipe.rewards.scorers.likeness import free_judge
from alignprop_pipe.runs.summary import paired_change as paired_change
from alignprop_pipe.seeds import SeededDraws, generator_for
from alignprop_pipe.training.loss import merit_of

DIVERSITY_SIZE = 16


def evaluate(
    pipe: DiffusionPipeline,
    reward: Reward,
    judges: Sequence[Reward],
    prompts: PromptSet,
    config: AlignConfig,
    step: int,
    **call_kwargs: Any,
) -> Evidence:
    """Render all `prompts` and score the pictures; trains nothing and draws nothing from the global seed.

    Videos are scored frame by frame and averaged; their middle frame is kept. `call_kwargs` are further arguments
    of this pipeline (`num_frames`, `strength`, ...). Raises PromptError for an empty set, and PipelineError.

    Examples:
        >>> from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, evaluate, parse_reward
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> config = AlignConfig.preset("emoji").replace(num_inference_steps=1)
        >>> judges = [parse_reward("sharpness")]
        >>> evaluate(pipe, parse_reward("jpeg"), judges, PromptSet(("a fox",)), config, step=0).judges.keys()
        dict_keys(['sharpness'])
    """
    return assess(reward, judges, prompts, render(pipe, prompts, config, **call_kwargs), config, step)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Some of the held-out prompts and what was drawn for them; a picture is a video of one frame."""

    batch: PromptBatch
    videos: Videos

    @property
    def pictures(self) -> Images:
        """The pictures, or the middle frames of the videos."""
        return self.videos[:, self.videos.shape[1] // 2]


def render(pipe: DiffusionPipeline, prompts: PromptSet, config: AlignConfig, **call_kwargs: Any) -> Iterator[Rendered]:
    """Draw all `prompts`, `eval_batch_size` at a time; see `evaluate`."""
    if not prompts.prompts:
        raise PromptError("there are no held-out prompts to look at; set eval_prompts=0 to run without evidence")
    size = config.evaluation.eval_batch_size
    for start in range(0, len(prompts), size):
        places = range(start, min(start + size, len(prompts)))
        batch = prompts.take(places)
        hidden = SeededDraws.after(generator_for("hidden", config.seed, sample=start))
        with _quiet(pipe), patching.mixed_precision(pipe, config.mixed_precision), hidden:
            videos = _render(pipe, batch, places, config, call_kwargs)
        yield Rendered(batch, videos)


def assess(
    reward: Reward,
    judges: Sequence[Reward],
    prompts: PromptSet,
    rendered: Iterable[Rendered],
    config: AlignConfig,
    step: int,
) -> Evidence:
    """Score what `render` drew for all `prompts`, also by what `config` says that `keep_best` follows."""
    kept: list[Tensor] = []
    scores: list[list[Scores]] = [[] for _ in (reward, *judges)]
    for part in rendered:
        kept.append(part.pictures.cpu())
        for scorer, column in zip((reward, *judges), scores, strict=True):
            column.append(_score(scorer, part.videos, part.batch))
    rewarded, *judged = [_joined(column) for column in scores]
    evidence = _evidence(step, prompts, torch.cat(kept), rewarded, list(zip(judges, judged, strict=True)))
    judge = followed_judge(config.evaluation.keep_best, judges)
    by_judge = () if judge is None else (judged[judge].total.mean().item(),)
    return replace(evidence, merit=(*by_judge, merit_of(config.loss, evidence.per_prompt["reward"])))


def with_chosen_judge(config: AlignConfig, reward: Reward) -> AlignConfig:
    """The settings with a judge that costs nothing in the place of "auto"; without evidence there is none to judge."""
    if CHOSEN not in (named := config.evaluation.judges):
        return config
    free = [free_judge(reward)] if config.evaluation.eval_prompts else []
    judges = [judge for text in named for judge in (free if text == CHOSEN else [text])]
    return config.replace(judges=tuple(dict.fromkeys(judges)))


def judges_of(config: AlignConfig) -> list[Reward]:
    """The judges, not calibrated yet; nothing is loaded for them.

    Raises RewardError for one that is not there, and ConfigError for one to follow that is none of them.
    """
    # A configuration that was read from a file has been searched for code by then.
    judges = [check_sources(parse_reward(text, allow_code=True)) for text in config.evaluation.judges]
    followed_judge(config.evaluation.keep_best, judges, config.evaluation.judges)
    return judges


def followed_judge(keep_best: bool | str, judges: Sequence[Reward], typed: Sequence[str] = ()) -> int | None:
    """The place of the judge that `keep_best` and `patience` follow; None: they follow the loss.

    A judge is named by its label, by its text, or as it was `typed`. Where two evaluations are alike for the judge,
    the loss decides. Raises ConfigError for a judge that is not there.
    """
    if keep_best == "reward" or not judges:
        return None
    if isinstance(keep_best, bool):
        return next((place for place, judge in enumerate(judges) if judge.leads), None)
    if keep_best == "judge":
        return 0
    for names in ([judge.label for judge in judges], list(map(str, judges)), typed):
        if keep_best in names:
            return list(names).index(keep_best)
    listed = ", ".join(repr(judge.label) for judge in judges)
    raise ConfigError(
        f"keep_best = {keep_best!r}: no judge has this name; the judges are {listed}. 'judge' follows the first, "
        "'reward' the loss"
    )


def followed_words(config: AlignConfig, judges: Sequence[Reward]) -> str:
    """What `keep_best` and `patience` follow: `the judge emoji_judge`, `the trained reward`, `the loss target:0.2`."""
    judge = followed_judge(config.evaluation.keep_best, judges)
    if judge is not None:
        return f"the judge {judges[judge].label}"
    rule = "the trained reward" if isinstance(config.loss, Maximize) else f"the loss {config.loss}"
    return f"{rule} without the distance to the base model" if config.distance_weight else rule


def diversity(images: Images) -> float:
    """Mean distance of all pairs of pictures; NaN for fewer than two.

    Each picture in [0, 1] is averaged down to 16x16; the distance of two is the root mean square of their pixel
    differences: 0 for equal ones, 1 for black and white, about 0.41 for uniform noise of 16x16. No model is asked.
    The prompts' own differences are in it, so only its change on the same prompts means something.
    """
    return float(_distances(images).mean()) if len(images) > 1 else math.nan


def measures_of(images: Images) -> dict[str, tuple[float, ...]]:
    """What each picture is like: its mean `distance` to the others, its `contrast`, and its `clipped` values.

    The contrast is the root mean square difference of the pixels from the picture's mean colour: 0 for one of a single
    colour, 0.5 for half black and half white. Clipped is the share of values that 8 bits write as 0 or 255.
    """
    pixels = images.detach().float().cpu()
    contrast = (pixels - pixels.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(1, 2, 3)).sqrt()
    clipped = ((pixels < 0.5 / 255) | (pixels > 254.5 / 255)).float().mean(dim=(1, 2, 3))
    found = {"distance": _distances(images), "contrast": contrast, "clipped": clipped}
    return {name: tuple(values.tolist()) for name, values in found.items()}


def _distances(images: Images) -> Tensor:
    """The mean distance of each picture to the others; see `diversity`."""
    small = adaptive_avg_pool2d(images.detach().float().cpu(), DIVERSITY_SIZE).flatten(1)
    apart = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(small.shape[1])
    return apart.sum(dim=1) / max(len(images) - 1, 1)


# --- pictures --------------------------------------------------------------------------------------------------------


def _render(
    pipe: DiffusionPipeline, batch: PromptBatch, places: range, config: AlignConfig, extra: Mapping[str, Any]
) -> Videos:
    """The stock call, whose own decorator has the gradient off; a picture becomes a video of one frame."""
    generators = [generator_for("evidence", config.seed, sample=place) for place in places]
    arguments = pipeline_call.call_arguments(pipe, batch.prompts, config.sampling, generators, extra)
    pictures = pipeline_call.pictures(pipe, type(pipe).__call__, arguments)  # pyright: ignore[reportAttributeAccessIssue]
    if len(pictures) != len(places):
        raise PipelineError(f"{type(pipe).__name__} made {len(pictures)} pictures for {len(places)} prompts")
    return pictures.float() if pictures.ndim == 5 else pictures.float().unsqueeze(1)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """No progress bar of the stock pipeline inside: the edges draw their own."""
    kept = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(kept or {}), "disable": True})
    try:
        yield
    finally:
        if kept is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = kept


# --- scores ----------------------------------------------------------------------------------------------------------


def _score(scorer: Reward, videos: Videos, batch: PromptBatch) -> Scores:
    frames = [scorer(frame, batch.prompts, batch.targets) for frame in videos.unbind(1)]
    parts = {name: _frame_mean([frame.parts[name] for frame in frames]) for name in frames[0].parts}
    return Scores(_frame_mean([frame.total for frame in frames]), parts)


def _frame_mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.detach().cpu().double() for value in values]).mean(dim=0)


def _joined(batches: Sequence[Scores]) -> Scores:
    parts = {name: torch.cat([batch.parts[name] for batch in batches]) for name in batches[0].parts}
    return Scores(torch.cat([batch.total for batch in batches]), parts)


def _evidence(
    step: int, prompts: PromptSet, images: Images, rewarded: Scores, judged: Sequence[tuple[Reward, Scores]]
) -> Evidence:
    """Put all scores under one set of names; a name that is taken gets a number: "clip", "clip_2"."""
    columns = [{"reward": rewarded.total}, rewarded.parts]
    for judge, scores in judged:
        name = judge.label
        columns.append({name: scores.total, **{part: v for part, v in scores.parts.items() if part != name}})
    table = merge_parts(columns)
    names = list(table)
    first = 1 + len(rewarded.parts)
    judges = names[first:]
    places = itertools.accumulate((len(column) for column in columns[2:-1]), initial=first) if judged else ()
    return Evidence(
        step=step,
        prompts=prompts.prompts,
        reward=table["reward"].mean().item(),
        parts={name: table[name].mean().item() for name in names[1:] if name not in judges},
        judges={name: table[name].mean().item() for name in judges},
        diversity=diversity(images),
        per_prompt={name: tuple(values.tolist()) for name, values in table.items()},
        images=images,
        measures=measures_of(images),
        judge_names=tuple(names[place] for place in places),
    )
