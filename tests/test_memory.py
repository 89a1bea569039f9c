"""Which graded steps are computed twice."""

import pytest

from alignprop_pipe.config.choices import Checkpointing, KeepSteps, RecomputeAll, RecomputeNone
from alignprop_pipe.diffusion.checkpointing import recomputed


@pytest.mark.parametrize(
    ("rule", "twice"),
    [
        (RecomputeAll(), [6, 7, 8, 9]),
        (RecomputeNone(), []),
        (KeepSteps(0), [6, 7, 8, 9]),
        (KeepSteps(1), [6, 7, 8]),
        (KeepSteps(3), [6]),
        (KeepSteps(4), []),
        (KeepSteps(99), []),
    ],
    ids=str,
)
def test_recomputed(rule: Checkpointing, twice: list[int]) -> None:
    graded = range(6, 10)
    assert [step for step in graded if recomputed(rule, step, graded)] == twice
