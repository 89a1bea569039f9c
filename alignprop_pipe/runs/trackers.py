"""Records to TensorBoard, Weights & Biases and the other trackers that accelerate has: an `on_step` for `align`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignprop_pipe.config.settings import AlignConfig, leaves
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.records import StepRecord

PROJECT = "alignprop"


class Trackers:
    """Sends every record to the trackers named, such as `"tensorboard"` or `"wandb"`.

    `with Trackers(["tensorboard"], config, out) as trackers: pipe.align(..., out=out, on_step=trackers.on_step)`.
    What a tracker writes to disk goes to `<out>/alignprop`. Nothing is started before the first record.

    Raises ConfigError for a tracker that accelerate does not know, or that is not installed.

    Examples:
        >>> from alignprop_pipe import AlignConfig, AlignPropPipeline, Trackers
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> with Trackers([], AlignConfig(), "runs/fox") as trackers:  # for example ["tensorboard"]
        ...     pipe.align("jpeg", ["a fox"], on_step=trackers.on_step, **options).steps
        1
    """

    def __init__(self, names: Sequence[str], config: AlignConfig, out: str | Path) -> None:
        self.names: list[Any] = list(dict.fromkeys(names))
        self.config, self.out = config, Path(out)
        self._accelerator: Any = None
        if self.names:
            check_trackers(self.names)

    def on_step(self, record: StepRecord) -> None:
        """Log one record: its numbers, and those of its evaluation of the held-out prompts."""
        if not self.names:
            return
        if self._accelerator is None:
            self._accelerator = self._started()
        self._accelerator.log(numbers_of(record), step=record.step)

    def _started(self) -> Any:
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=self.names, project_dir=self.out)
        settings = {name: value for name, _, value in leaves(self.config)}
        accelerator.init_trackers(
            PROJECT, config={k: v if isinstance(v, bool | int | float) else str(v) for k, v in settings.items()}
        )
        return accelerator

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError unless all of these trackers are known and installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"tracker {name!r} is not known; use one of: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in installed:
            raise ConfigError(f"tracker {name!r} is not installed: pip install {name.replace('_', '-')}")


def numbers_of(record: StepRecord) -> dict[str, float]:
    """All finite numbers of a record by name: `reward`, `part/clip`, `held-out/reward`, `held-out/diversity`, ..."""
    found: dict[str, float] = {"loss": record.loss, "reward": record.reward, "grad_norm": record.grad_norm}
    found |= {f"part/{name}": value for name, value in record.parts.items()}
    found |= {"graded_steps": len(record.graded), "seconds": record.seconds, "memory_mb": record.memory_mb}
    if record.distance is not None:
        found["distance"] = record.distance
    if record.evidence is not None:
        look = record.evidence
        held_out = {"reward": look.reward, "diversity": look.diversity, **look.parts, **look.judges}
        of = "held-out" if look.held_out else "training-prompts"
        found |= {f"{of}/{name}": value for name, value in held_out.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def all_of(*watchers: Callable[[StepRecord], object]) -> Callable[[StepRecord], None]:
    """One `on_step` that calls several."""

    def on_step(record: StepRecord) -> None:
        for watch in watchers:
            watch(record)

    return on_step
