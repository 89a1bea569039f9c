"""How every test runs: offline, on one thread, without windows or progress bars; hypothesis the same each time."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
)

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and children inherit that: some tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a loaded machine is not a bug. Derandomized: a green run stays green until the code changes.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _talks_as_before() -> Iterator[None]:
    """A command that ran in this process has set up our logger and the libraries' bars for a terminal."""
    ours, shown = logging.getLogger("alignprop_pipe"), warnings.showwarning
    # As after an import: a fixture of a whole file may have run a command before.
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)
    yield
    warnings.showwarning = shown
    for library in ("diffusers.utils.logging", "transformers.utils.logging"):
        if library in sys.modules:
            sys.modules[library]._tqdm_active = True


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as users have it, without type checks: for what it says itself about a value of a wrong type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
