"""What the stages hand to each other: frozen records with names, and the shapes of the tensors in them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
Videos = Float[Tensor, "batch frames 3 height width"]
Rewards = Float[Tensor, " batch"]
Targets = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one batch and the columns that came with them, one value per prompt."""

    prompts: list[str]
    targets: Targets = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Finished pictures in [0, 1]; their graph reaches back through the denoiser calls of `graded`.

    Examples:
        >>> import torch
        >>> from alignprop_pipe import Rollout
        >>> rollout = Rollout(torch.zeros(1, 3, 8, 8), range(45, 50), 50, None)
        >>> len(rollout.graded)
        5
    """

    images: Images | Videos
    graded: range
    num_steps: int
    distance: Float[Tensor, ""] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """One total per picture, and each part of the reward under its own name, unweighted.

    Examples:
        >>> import torch
        >>> from alignprop_pipe import parse_reward
        >>> scores = parse_reward("brightness + 2*symmetry")(torch.ones(1, 3, 8, 8), ["a fox"])
        >>> scores.total, sorted(scores.parts)
        (tensor([1.]), ['brightness', 'symmetry'])
    """

    total: Rewards
    parts: Mapping[str, Rewards]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Prompts rendered with fixed noise and scored.

    `reward`, `parts` and `judges` are means over the prompts; `per_prompt` holds the single values, in the order of
    `prompts`, under the same names ("reward" for the total). A judge stands under its own name, and what it logs
    besides under theirs; a name that is taken gets a number ("clip_2"). `diversity` is the mean distance of all pairs
    of pictures (see `evidence.diversity`), NaN of a single one. Of videos, `images` holds the middle frames. `measures`
    say what the pictures are like, whatever the reward, one value per prompt: `distance` to the other pictures, whose
    mean is the diversity, `contrast`, and the `clipped` share of their values (see `evidence.measures_of`).
    `judge_names` are those of the judges themselves.

    `held_out` is False where there were too few prompts to keep any out of the training: then these are the training
    prompts, with noise that the training never draws. `merit` is what `keep_best` and `patience` follow, higher is
    better, compared number by number; empty where it is not known.

    Examples:
        >>> from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, evaluate, parse_reward
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> config = AlignConfig.preset("emoji").replace(num_inference_steps=1)
        >>> evidence = evaluate(pipe, parse_reward("jpeg"), [], PromptSet(("a fox", "two cats")), config, step=0)
        >>> len(evidence.per_prompt["reward"]), tuple(evidence.images.shape)
        (2, (2, 3, 64, 64))
    """

    step: int
    prompts: tuple[str, ...]
    reward: float
    parts: Mapping[str, float]
    judges: Mapping[str, float]
    diversity: float
    per_prompt: Mapping[str, tuple[float, ...]]
    images: Images | None = None
    measures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    judge_names: tuple[str, ...] = ()
    held_out: bool = True
    merit: tuple[float, ...] = ()

    @property
    def main_judges(self) -> list[str]:
        """The judges themselves, without what they log besides, whose fall may be good or bad."""
        known = [name for name in self.judge_names if name in self.judges]
        return known or [name for name in self.judges if not part_of(name, self.judges)]

    @property
    def what(self) -> str:
        """`16 held-out prompts`, or `16 pictures of training prompts, fresh noise`."""
        count = len(self.prompts)
        if self.held_out:
            return f"{count} held-out prompt{'s' * (count != 1)}"
        return f"{count} picture{'s' * (count != 1)} of training prompts, fresh noise"

    def named(self, score: str) -> str:
        """A score by its full name: `held-out reward`, or `reward on training prompts, fresh noise`."""
        return f"held-out {score}" if self.held_out else f"{score} on training prompts, fresh noise"


def part_of(name: str, judges: Iterable[str]) -> str:
    """The judge that `name` ("judge.count") is an attribute of; empty for a judge ("hpsv2.1") and for other scores."""
    return next((judge for judge in judges if name.startswith(f"{judge}.")), "")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. `step` counts from 1; a skipped one left the adapter as it was, see `skipped_because`.

    `images` are the pictures of the step's first batch, on the CPU, for a preview (of videos the middle frames); a
    finished run keeps none of them.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"batch_size": 1, "num_inference_steps": 2, "eval_prompts": 0, "progress": False}
        >>> result = pipe.align("jpeg", ["a fox"], steps=2, truncation="last:1", **options)
        >>> [(record.step, record.graded) for record in result.history]
        [(1, (1,)), (2, (1,))]
    """

    step: int
    loss: float
    reward: float
    parts: Mapping[str, float]
    grad_norm: float
    distance: float | None
    graded: tuple[int, ...]
    seconds: float
    memory_mb: float
    skipped: bool = False
    evidence: Evidence | None = None
    images: Images | None = None

    @property
    def skipped_because(self) -> str:
        """Why the adapter was left as it was; empty where it was not."""
        if not self.skipped:
            return ""
        is_finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return "it made weights that no adapter has" if is_finite else "loss or gradient not finite"


@dataclass(frozen=True, slots=True)
class Cut:
    """Texts that a reward cannot read to their end: how many, and the first of them with its length in tokens.

    `read` is how many tokens the reward reads. `what` they are: prompts, or the question of `ask`.
    """

    reward: str
    first: str
    tokens: int
    read: int
    count: int = 1
    what: str = "prompt"


class Change(NamedTuple):
    """A held-out score before and after, and the standard error of the mean of the paired differences (NaN of one)."""

    before: float
    after: float
    difference: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: the files and their sizes in bytes, and where they are now.

    `url` is that of the commit or pull request; empty after a dry run, whose files are in `folder`. `changed` is
    false where the repository held all of it already.
    """

    repo_id: str
    files: Mapping[str, int]
    url: str = ""
    folder: Path | None = None
    changed: bool = True

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def __repr__(self) -> str:
        files = "\n".join(f"  {size:>12,}  {name}" for name, size in self.files.items())
        return f"{self}\n{files}"
