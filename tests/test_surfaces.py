"""Python and the command line show the same defaults, because both read them from AlignConfig."""

import inspect
import typing

import pytest

from alignprop_pipe.cli.app import sample, train
from alignprop_pipe.cli.options import config_for
from alignprop_pipe.config.settings import FIELD_PATHS, PRESETS, AlignConfig, SamplingOptions


@pytest.mark.parametrize("preset", PRESETS)
def test_without_flags_the_command_runs_the_preset(preset: str) -> None:
    assert config_for("any/model", {}, preset) == AlignConfig.preset(preset)


def test_train_has_a_flag_for_every_setting_and_none_has_its_own_default() -> None:
    flags = inspect.signature(train).parameters
    assert set(FIELD_PATHS) <= set(flags)
    assert all(flags[name].default is None for name in FIELD_PATHS)


def test_sample_takes_exactly_the_sampling_settings() -> None:
    flags = inspect.signature(sample).parameters
    asked = {name for name, (part, _) in FIELD_PATHS.items() if part == "sampling"}
    assert asked <= set(flags)
    assert asked == set(typing.get_type_hints(SamplingOptions))
    own = {"seed", "batch_size"}  # the pictures' own seed, and how many at once
    assert not (set(FIELD_PATHS) - asked - own) & set(flags)


def test_the_python_call_starts_from_the_same_preset() -> None:
    from alignprop_pipe.bundled import preset_for
    from alignprop_pipe.config.settings import AlignConfig

    for model in ("emoji", "org/name"):
        assert config_for(model, {}) == AlignConfig.preset(preset_for(model))
