"""Modules under the names that they had in 0.1.0."""

import importlib
import subprocess
import sys

import pytest

from alignprop_pipe import moved


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no old name had been imported yet."""
    for name in moved.MOVED:
        monkeypatch.delitem(sys.modules, f"alignprop_pipe.{name}", raising=False)


@pytest.mark.parametrize("old", moved.MOVED)
def test_an_old_name_is_the_module_of_today(old: str) -> None:
    name = f"alignprop_pipe.{moved.MOVED[old]}"
    today = importlib.import_module(name)
    spec = today.__spec__
    with pytest.warns(DeprecationWarning, match=f"alignprop_pipe.{old} is called {name} now"):
        assert importlib.import_module(f"alignprop_pipe.{old}") is today
    assert today.__spec__ is spec
    assert today.__name__ == name


def test_it_works_in_every_form_of_import_and_loads_no_torch() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import alignprop_pipe\n"
        "assert 'torch' not in sys.modules\n"
        "from alignprop_pipe import lora, stock\n"
        "from alignprop_pipe.choices import Hinge\n"
        "from alignprop_pipe.config import AlignConfig\n"
        "import alignprop_pipe.sampling\n"
        "from alignprop_pipe.rewards.aesthetic import Aesthetic\n"
        "assert AlignConfig is alignprop_pipe.AlignConfig and Hinge is alignprop_pipe.Hinge\n"
        "assert lora.__name__ == 'alignprop_pipe.diffusion.lora'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_names_are_not_there() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("alignprop_pipe.nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("alignprop_pipe.config").nothing  # noqa: B018
