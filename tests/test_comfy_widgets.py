"""Widgets of the ComfyUI nodes, without ComfyUI: what they show, and what becomes of what a user writes into them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.config.settings import FIELD_PATHS, PRESETS, AlignConfig
from alignprop_pipe.errors import AlignError, ConfigError, RewardError
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.registry import REGISTRY, parse_reward, register
from comfy_nodes import widgets

SETTINGS = {widget.name: widget for widget in widgets.setting_widgets()}
REWARDS = widgets.reward_names()
NEEDED: dict[str, dict[str, Any]] = {
    "ask": {"question": "is the dog, or (the) cat, wearing a 'hat'?"},
}
"""Parameters that a reward cannot do without."""


def one_sentence(error: "pytest.ExceptionInfo[AlignError]") -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def range_of(widget: widgets.Widget) -> tuple[float, float, float]:
    """Both ends and the step; every number widget has them."""
    assert widget.low is not None
    assert widget.high is not None
    assert widget.step is not None
    return widget.low, widget.high, widget.step


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_widget_and_those_up_front_come_first() -> None:
    assert set(SETTINGS) == set(FIELD_PATHS)
    assert len(SETTINGS) == len(widgets.setting_widgets())
    assert tuple(SETTINGS)[: len(widgets.UP_FRONT)] == widgets.UP_FRONT
    assert [name for name, widget in SETTINGS.items() if not widget.advanced] == list(widgets.UP_FRONT)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_has_a_tooltip_and_a_number_its_range_and_step(name: str) -> None:
    widget = SETTINGS[name]
    assert widget.tooltip.startswith(FIELD_PATHS[name][1].metadata["help"].partition(" (default")[0])
    assert "default:" not in widget.tooltip, "the widget says what stands for it: 0, or empty"
    assert not widget.required
    if widget.kind in ("INT", "FLOAT"):
        low, high, step = range_of(widget)
        assert low <= widget.default <= high
        assert 0 < step < high - low
    assert (widget.kind == "COMBO") == (widget.default in widget.options)


@pytest.mark.parametrize("name", [name for name, one in SETTINGS.items() if one.kind in ("INT", "FLOAT")])
def test_both_ends_of_a_range_are_settings(name: str) -> None:
    for end in (SETTINGS[name].low, SETTINGS[name].high):
        widgets.config_from({name: end})


def test_the_defaults_of_the_widgets_are_the_default_settings() -> None:
    assert widgets.config_from({name: widget.default for name, widget in SETTINGS.items()}) == AlignConfig()
    assert widgets.config_from({}) == AlignConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_filled_into_the_widgets_is_that_preset(preset: str) -> None:
    shown = widgets.presets()[preset]
    assert set(shown) == set(SETTINGS)
    assert widgets.config_from(json.loads(json.dumps(shown))) == AlignConfig.preset(preset)
    for name, value in shown.items():
        widget = SETTINGS[name]
        assert widget.low is None or widget.low <= value <= widget.high
        assert widget.kind != "COMBO" or value in widget.options


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.integers(int(one.low or 0), int(one.high or 0))
            if one.kind == "INT"
            else st.floats(one.low, one.high)
            for name, one in SETTINGS.items()
            if one.kind in ("INT", "FLOAT")
        },
    )
)
def test_numbers_within_their_ranges_are_kept(values: dict[str, float]) -> None:
    # 8 is the smallest side; 0 stands for the pipeline's own.
    values = {name: 8 if name in ("height", "width") and 0 < value < 8 else value for name, value in values.items()}
    if values.get("patience"):  # which needs looks to count
        values |= {name: max(1, values.get(name, 1)) for name in ("eval_every", "eval_prompts")}
    config = widgets.config_from(values)
    for name, value in values.items():
        part = FIELD_PATHS[name][0]
        kept = getattr(config if part is None else getattr(config, part), name)
        assert kept == (None if name in ("alpha", "max_grad_growth", "height", "width") and value == 0 else value)


@pytest.mark.parametrize(
    ("text", "judges"),
    [
        ("", ()),
        ("clip", ("clip",)),
        (" clip ,\njpeg,, ", ("clip", "jpeg")),
        ("min(clip, jpeg), tv", ("min(clip, jpeg)", "tv")),
        ('ask("red, or blue?"), tv', ('ask("red, or blue?")', "tv")),
        ('ask("a ) b", answer="x"), tv', ('ask("a ) b", answer="x")', "tv")),
        (r'ask("the \"end\", or"), tv', (r'ask("the \"end\", or")', "tv")),
        ("ask('it\"s (, no'), tv", ("ask('it\"s (, no')", "tv")),
        ("min(clip,\njpeg)\ntv", ("min(clip,\njpeg)", "tv")),
    ],
)
def test_judges_are_split_at_commas_that_are_no_part_of_them(text: str, judges: tuple[str, ...]) -> None:
    assert widgets.config_from({"judges": text}).evaluation.judges == judges
    for judge in judges:
        parse_reward(judge)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_questions_of_any_letters_stay_whole_as_judges(questions: list[str]) -> None:
    judges = [f"ask({json.dumps(question)})" for question in questions]
    assert widgets.config_from({"judges": ", ".join(judges)}).evaluation.judges == tuple(judges)


def test_lists_of_names_and_numbers() -> None:
    config = widgets.config_from({"target_modules": "to_q, to_k", "betas": " 0.8,0.95 "})
    assert (config.lora.target_modules, config.optimizer.betas) == (("to_q", "to_k"), (0.8, 0.95))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("values", "way_out"),
    [
        ({"betas": "0.9; 0.99"}, "commas between"),
        ({"betas": "0.9"}, "a list of 2"),
        ({"betas": ""}, "a list of 2"),
        ({"truncation": "lats:5"}, "last:5"),
        ({"checkpointing": "some"}, "none"),
        ({"loss": "minimize"}, "maximize"),
        ({"lr": 0.0}, "> 0"),
        ({"lr": float("nan")}, "finite"),
        ({"height": 4}, ">= 8"),
        ({"lr_scheduler": "cosin"}, "cosine"),
        ({"stesp": 5}, "did you mean steps"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(values: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ConfigError) as error:
        widgets.config_from(values)
    text = one_sentence(error)
    assert next(iter(values)) in text
    assert way_out in text


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_the_list_holds_what_can_be_trained_on_alone() -> None:
    assert {"clip", "jpeg", "count", "aesthetic2.5"} <= set(REWARDS)
    assert not {"min", "zscore", "watch", "emoji_judge"} & set(REWARDS)
    assert set(REWARDS) == {one.name for one in REGISTRY.values() if not (one.combines or one.judge)} - {"python"}


@pytest.mark.parametrize("name", REWARDS)
def test_every_parameter_has_a_tooltip_and_a_number_its_range(name: str) -> None:
    for widget in widgets.reward_parameters(name):
        assert len(widget.tooltip) > 10, f"the docstring of {name!r} says nothing of {widget.name!r} under Args"
        assert not re.search(r"\bNone\b|`|\s{2}|True", widget.tooltip), "a word of Python, not of widgets"
        if widget.kind in ("INT", "FLOAT"):
            low, high, step = range_of(widget)
            assert low <= widget.default <= high
            assert 0 < step < high - low
        assert (widget.kind == "COMBO") == bool(widget.options)
        assert widget.kind != "COMBO" or widget.default in widget.options


@pytest.mark.parametrize("name", REWARDS)
def test_untouched_widgets_give_the_plain_reward(name: str) -> None:
    defaults = {widget.name: widget.default for widget in widgets.reward_parameters(name)}
    needed = NEEDED.get(name, {})
    text = widgets.reward_text(name, json.dumps(defaults | needed))
    assert text == (name if not needed else f"{name}({', '.join(f'{key}={needed[key]!r}' for key in needed)})")
    assert parse_reward(text, accept_license=True) is not None
    assert widgets.reward_text(name, json.dumps(needed)) == text


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("end", ["low", "high"])
def test_every_parameter_reaches_the_reward(name: str, end: str) -> None:
    for widget in widgets.reward_parameters(name):
        value = changed(widget, end)
        if name in NEEDED and widget.name in NEEDED[name]:
            value = NEEDED[name][widget.name]
        given = NEEDED.get(name, {}) | {widget.name: value}
        given |= {"objects": "dog"} if widget.name == "number" else {}
        made = parse_reward(widgets.reward_text(name, json.dumps(given)), accept_license=True)
        held = {key: one for key, one in made._kwargs.items() if key != "accept_license"}
        assert held == {key: one for key, one in given.items() if not is_default(name, key, one)}
        assert parse_reward(str(made)) == made


def changed(widget: widgets.Widget, end: str) -> Any:
    """A value that is not the default: the last choice, other words, or an end of the range."""
    if widget.kind in ("INT", "FLOAT"):
        low, high, step = range_of(widget)
        blank = widget.default == low  # "not given": the least that can be given is a step above
        return high if end == "high" else low + (step if blank else 0)
    return {"BOOLEAN": not widget.default, "COMBO": "float16"}.get(widget.kind, "two dogs")


def is_default(name: str, key: str, value: Any) -> bool:
    return any(one.name == key and one.default == value for one in widgets.reward_parameters(name))


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("clip", "", "clip"),
        ("clip", "{}", "clip"),
        ("jpeg", '{"quality": 60}', "jpeg(quality=60)"),
        ("jpeg", '{"quality": null}', "jpeg"),
        ("count", '{"number": -1, "threshold": 0}', "count"),
        ("count", '{"objects": "dog", "number": 2}', "count(objects='dog', number=2)"),
        ("count", '{"objects": {"dog": 2}}', "count(objects={'dog': 2})"),
        ("contains", '{"objects": "dog, cat"}', "contains(objects='dog, cat')"),
        ("clip", '{"offload": true}', "clip(offload=True)"),
        ("aesthetic2.5", '{"trunk": "a/b"}', "aesthetic2.5(trunk='a/b')"),
    ],
)
def test_parameters_become_an_expression(name: str, parameters: str, text: str) -> None:
    assert widgets.reward_text(name, parameters) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_words_in_a_parameter_stay_as_they_are(words: str) -> None:
    made: Any = parse_reward(widgets.reward_text("ask", json.dumps({"question": words})))
    assert made.question == words


@pytest.mark.parametrize(
    "objects", ["dog", "dog, cat", '["dog", "cat"]', '{"dog": 2, "cat": 1}', "two dogs and a cat", "", "  dog  "]
)
def test_what_the_tooltips_say_can_be_written_into_objects(objects: str) -> None:
    count, contains = (
        {widget.name: widget.tooltip for widget in widgets.reward_parameters(name)}["objects"]
        for name in ("count", "contains")
    )
    assert "two dogs and a cat" in count
    assert "commas" in contains
    for name in ("count",) if objects.startswith(("{", "two")) else ("contains", "without"):
        made: Any = parse_reward(widgets.reward_text(name, json.dumps({"objects": objects})))
        assert (made.objects is None) == (not objects.strip())


@pytest.mark.parametrize(
    ("name", "parameters", "way_out"),
    [
        ("clap", "{}", "known: aesthetic"),
        ("jpeg", "quality=60", '{"quality": 60}'),
        ("jpeg", "[60]", '{"quality": 60}'),
        ("jpeg", "60", '{"quality": 60}'),
        ("jpeg", "[" * 100_000, '{"quality": 60}'),
        ("jpeg", '{"qualty": 60}', "it takes quality"),
        ("tv", '{"quality": 60}', "it takes none"),
        ("ask", "{}", "needs question"),
        ("ask", '{"question": ""}', "needs question"),
        ("python", "{}", "ALIGNPROP_ALLOW_CODE=1"),
        ("python", '{"source": "my_reward.py:warm"}', "ALIGNPROP_ALLOW_CODE=1"),
        ("clip", "{\"__import__('os')\": 1}", "is no parameter"),
    ],
)
def test_wrong_parameters_are_told_in_one_sentence(name: str, parameters: str, way_out: str) -> None:
    with pytest.raises(RewardError) as error:
        widgets.reward_text(name, parameters)
    assert way_out in one_sentence(error)


@given(st.text(max_size=30))
def test_any_text_for_parameters_is_understood_or_refused(text: str) -> None:
    try:
        assert widgets.reward_text("jpeg", text).startswith("jpeg")
    except RewardError as error:
        words = str(error)
    else:
        return
    assert "'jpeg'" in words


def test_the_script_gets_plain_values_of_every_reward() -> None:
    data = widgets.reward_script_data()
    assert list(data) == REWARDS
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["jpeg"]["about"] == REGISTRY["jpeg"].summary
    assert [one["name"] for one in data["jpeg"]["parameters"]] == ["quality"]


class Warm(Reward):
    """A user's own.

    Args:
        strength: how much it counts.
        words: what it says.
    """

    def __init__(self, strength: float = 2.0, power: int = 1, words: str | None = None) -> None:
        self.strength, self.power, self.words = strength, power, words


def bright(images: Any, gain: float = 1.0) -> Any:
    return gain * images.mean((1, 2, 3))


@pytest.fixture
def own() -> Iterator[None]:
    """Rewards of a user's own, known to this test only."""
    before = dict(REGISTRY)
    register("warm", Warm)
    register("bright", bright)
    register("both", parse_reward("clip + jpeg"))
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.mark.usefixtures("own")
def test_rewards_that_are_registered_later_are_shown_with_widgets_of_their_kinds() -> None:
    assert set(widgets.reward_script_data()) >= {"warm", "bright", "both"}
    kinds = [(one.name, one.kind, one.default) for one in widgets.reward_parameters("warm")]
    assert kinds == [("strength", "FLOAT", 2.0), ("power", "INT", 1), ("words", "STRING", "")]
    made: Any = parse_reward(widgets.reward_text("warm", '{"strength": 3, "power": 2, "words": "hot"}'))
    assert (made.strength, made.power, made.words) == (3, 2, "hot")
    assert widgets.reward_parameters("bright") == ()
    assert parse_reward(widgets.reward_text("bright", '{"gain": 2.0}'))._kwargs == {"gain": 2.0}
    assert str(parse_reward(widgets.reward_text("both", "{}"))) == "clip + jpeg"


# --- names of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pasted", ["/a/b c", '"/a/b c"', " '/a/b c' ", '" /a/b c "'])
def test_quotes_and_blanks_round_a_pasted_path_go(pasted: str) -> None:
    assert widgets.cleaned(pasted) == "/a/b c"


def test_a_changed_file_has_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "prompts.txt", tmp_path / "pipe"
    folder.mkdir()
    file.write_text("a dog")
    (folder / "model_index.json").write_text("{}")
    before = widgets.fingerprint(f'"{file}"', str(folder))
    assert before == widgets.fingerprint(str(file), str(folder))
    file.write_text("two dogs")
    between = widgets.fingerprint(str(file), str(folder))
    (folder / "model_index.json").write_text('{"_class_name": "X"}')
    assert len({before, between, widgets.fingerprint(str(file), str(folder))}) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert widgets.fingerprint("~/prompts.txt") == widgets.fingerprint(str(file)) != ""


@pytest.mark.parametrize("path", ["", "  ", "emoji", "org/name", "/no/such/file"])
def test_what_is_no_file_has_an_empty_fingerprint(path: str) -> None:
    assert widgets.fingerprint(path) == ""
