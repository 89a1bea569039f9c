"""What `align` gives back: the adapter, the history, and the evidence that it made the pictures better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignprop_pipe.adapter import Adapter
from alignprop_pipe.config import AlignConfig
from alignprop_pipe.escaping import in_html, one_line
from alignprop_pipe.records import Change, Evidence, StepRecord
from alignprop_pipe.summary import RunWarning, paired_change, warnings_of


@dataclass(frozen=True, slots=True, repr=False)
class AlignResult:
    """A finished run.

    `adapter` is a copy on the CPU of the LoRA that was kept. `before` and `after` are the
    evidence on the same held-out prompts and noise; `after` belongs to the adapter that was kept. `stopped` says why
    a run ended early and is empty where it did not.
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

    @property
    def steps(self) -> int:
        """Optimizer steps that were taken."""
        return self.history[-1].step if self.history else 0

    @property
    def warnings(self) -> tuple[RunWarning, ...]:
        """What the evidence warns of, the worst first, such as an adapter that is worse than the base model."""
        return warnings_of(self.before, self.after, self.changes, loss=self.config.loss)

    def rows(self) -> list[tuple[str, str]]:
        """The result in words, as pairs for a table; the warnings are the last of them."""
        rows = [("reward", self.reward), ("steps", f"{self.steps} in {self.seconds:.0f} s")]
        if self.stopped:
            rows.append(("stopped", self.stopped))
        rows += [(f"held-out {name}", change_text(change)) for name, change in self.changes.items()]
        if self.before is not None and self.after is not None:
            rows.append(("held-out diversity", f"{self.before.diversity:.3f} -> {self.after.diversity:.3f}"))
        if "trained_with" in self.adapter.metadata:
            rows.append(("trained on top of", self.adapter.metadata["trained_with"]))
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
    """`0.500 -> 0.700 (+0.200 +- 0.050)`."""
    return f"{change.before:.3f} -> {change.after:.3f} ({change.difference:+.3f} +- {change.standard_error:.3f})"


def kept_evidence(history: list[StepRecord], config: AlignConfig) -> Evidence | None:
    """The look at the adapter that was kept: the best one with `keep_best`, else the newest."""
    looks = [record.evidence for record in history if record.step > 0 and record.evidence is not None]
    if not looks:
        return None
    finite = [look for look in looks if math.isfinite(look.reward)]
    return max(finite, key=lambda look: look.reward) if config.evaluation.keep_best and finite else looks[-1]


def changes_between(before: Evidence | None, after: Evidence | None) -> Mapping[str, Change]:
    """Every held-out score before and after; nothing where one side is missing."""
    return {} if before is None or after is None else paired_change(before, after)
