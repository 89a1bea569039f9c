"""Which graded steps are computed twice."""

from alignprop_pipe.config.choices import Checkpointing, KeepSteps, RecomputeAll, RecomputeNone


def recomputed(rule: Checkpointing, step: int, graded: range) -> bool:
    """Whether graded step `step` is recomputed in the backward pass instead of keeping its activations."""
    match rule:
        case RecomputeAll():
            return True
        case RecomputeNone():
            return False
        case KeepSteps(steps):
            return step < graded.stop - steps
