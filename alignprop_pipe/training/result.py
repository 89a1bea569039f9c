"""What `align` gives back: the adapter, the history, and the evidence that it made the pictures better."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.escaping import in_html, one_line
from alignprop_pipe.records import Change, Cut, Evidence, StepRecord
from alignprop_pipe.runs.summary import RunWarning, best_of, paired_change, warnings_of


@dataclass(frozen=True, slots=True, repr=False)
class AlignResult:
    """A finished run.

    `adapter` is a copy on the CPU of the LoRA that was kept, the one of step `kept_step`. `before` and `after` are the
    evidence on the same prompts and noise; `after` belongs to the adapter that was kept and is None where no
    evaluation was
    taken at it. `stopped` says why a run ended early and is empty where it did not. `trained_on` says how many prompts
    were trained on and held out, in words; `followed` what the kept adapter was chosen by; `chosen_from` is the number
    of evaluations that it was chosen from: with more than one, its scores there are a little better than they would be
    on other prompts (`choice` says so). `cuts` are the prompts that a reward or a judge could not read to their end.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> result = pipe.align("jpeg", ["a fox"], **options)
        >>> result.steps, result.reward, result.interrupted
        (1, 'jpeg', False)
    """

    reward: str
    config: AlignConfig
    adapter: Adapter
    history: tuple[StepRecord, ...]
    before: Evidence | None
    after: Evidence | None
    seconds: float
    run_folder: Path | None = None
    adapter_path: Path | None = None
    interrupted: bool = False
    stopped: str = ""
    changes: Mapping[str, Change] = field(default_factory=dict)
    kept_step: int = 0
    chosen_from: int = 0
    followed: str = ""
    trained_on: str = ""
    cuts: tuple[Cut, ...] = ()

    @property
    def choice(self) -> str:
        """How the kept adapter was chosen and what that does to its scores; empty where there was no choice."""
        return choice_sentence(self.after, self.chosen_from, self.followed)

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        return self.history[-1].step if self.history else 0

    @property
    def warnings(self) -> tuple[RunWarning, ...]:
        """What the evidence warns of, the worst first, such as an adapter that is worse than the base model."""
        return warnings_of(self.before, self.after, self.changes, loss=self.config.loss, cuts=self.cuts)

    def rows(self) -> list[tuple[str, str]]:
        """The result in words, as pairs for a table; the warnings are the last of them."""
        rows = [("reward", self.reward), ("steps", f"{self.steps} in {self.seconds:.0f} s")]
        if self.trained_on:
            rows.append(("prompts", self.trained_on))
        if self.stopped:
            rows.append(("stopped", self.stopped))
        if self.before is not None and self.after is not None:
            rows += [(self.after.named(name), change_text(change)) for name, change in self.changes.items()]
            if math.isfinite(self.after.diversity):
                spread = f"{self.before.diversity:.3f} -> {self.after.diversity:.3f}"
                rows.append((self.after.named("diversity"), spread))
        if "trained_with" in self.adapter.metadata:
            rows.append(("trained on top of", self.adapter.metadata["trained_with"]))
        if self.choice:
            rows.append(("kept", self.choice))
        if self.run_folder is not None:
            rows.append(("run folder", str(self.run_folder)))
        return rows + [("warning", warning.text) for warning in self.warnings]

    def __repr__(self) -> str:
        lines = [f"  {one_line(name)}: {one_line(text)}" for name, text in self.rows()]
        return "\n".join(["AlignResult", *lines])

    def _repr_html_(self) -> str:
        cells = (f"<tr><th>{in_html(name)}</th><td>{in_html(text)}</td></tr>" for name, text in self.rows())
        return f"<table>{''.join(cells)}</table>"


def change_text(change: Change) -> str:
    """`0.500 -> 0.700 (+0.200 +- 0.050)`; what is not known is left out."""
    if not math.isfinite(change.difference):
        return " -> ".join(f"{value:.3f}" if math.isfinite(value) else "unknown" for value in change[:2])
    spread = f" +- {change.standard_error:.3f}" if math.isfinite(change.standard_error) else ""
    return f"{change.before:.3f} -> {change.after:.3f} ({change.difference:+.3f}{spread})"


def choice_sentence(after: Evidence | None, chosen_from: int, followed: str) -> str:
    """That the scores of `after` flatter the adapter, which was chosen by them; empty for fewer than two."""
    if after is None or chosen_from < 2:
        return ""
    return (
        f"the adapter of step {after.step}, the best of {chosen_from} evaluations by {followed}. They were of the "
        f"same {after.what} as are reported here, so these scores are a little better than on other prompts, and the "
        "standard errors do not count that in"
    )


def kept_evidence(history: Sequence[StepRecord], config: AlignConfig) -> Evidence | None:
    """The evaluation of the adapter that was kept: the best one with `keep_best`, else the newest."""
    return best_of(looks_in(history), config.evaluation.keep_best)


def looks_in(history: Sequence[StepRecord]) -> list[Evidence]:
    """The evaluations that a run took after its first step, in their order."""
    return [record.evidence for record in history if record.step > 0 and record.evidence is not None]


def changes_between(before: Evidence | None, after: Evidence | None) -> Mapping[str, Change]:
    """Every score before and after; nothing where one side is missing."""
    return {} if before is None or after is None else paired_change(before, after)
