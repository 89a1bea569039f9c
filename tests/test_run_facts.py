"""A `config.json` of anybody's: what does not fit is told in a sentence, by its place in the file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from alignprop_pipe.config.settings import FIELD_PATHS, PARTS
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.runs import repeating
from alignprop_pipe.runs.facts import EACH, RUN, check_run

WHOLE: dict[str, Any] = {"config": {}, "model": "emoji", "reward": "tv", "prompts": ["a dog", "a cat"]}
ODD = (True, 0, -1, 10**400, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}, [[[]]])


def kinds(table: Mapping[str, Any] = RUN, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, kind in table.items():
        here = (*place, "some" if name == EACH else name)
        yield here, kind
        if isinstance(kind, Mapping):
            yield from kinds(kind, here)


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(place):
        value = {name: value}
    return WHOLE | value


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return isinstance(value, dict) if kind is Mapping or isinstance(kind, Mapping) else isinstance(value, kind)


@pytest.mark.parametrize(("place", "kind"), list(kinds()), ids=[".".join(place) for place, _ in kinds()])
def test_every_key_of_a_run_is_checked(place: tuple[str, ...], kind: Any) -> None:
    for value in ODD:
        if fits(value, kind) and value != {"a": 1}:
            check_run(with_value(place, value))
        elif not fits(value, kind):
            with pytest.raises(ConfigError, match=rf"^{'.'.join(place)} = .* is needed|newer version") as caught:
                check_run(with_value(place, value))
            assert len(str(caught.value)) < 200


def test_what_is_not_known_is_somebody_else_s() -> None:
    check_run(WHOLE | {"notes": 3, "pipeline": {"colour": [1]}, "result": None, "model": None})


def train(text: str, *words: str) -> str:
    """What is said of this config.json: refused with one sentence, and nothing else."""
    Path("config.json").write_text(text)
    done = run("train", "--config", "config.json", "--dry-run", "--device", "cpu", *words)
    assert done.exit_code == 2, done.output
    assert "unexpected" not in done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "a table of settings is needed"),
        ("NaN", "a table of settings is needed"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("", "not JSON"),
        ("\0", "zero byte"),
        (json.dumps(WHOLE | {"format": 99}), "newer version"),
        (json.dumps(WHOLE | {"format": "x"}), "format = 'x': 1 is needed"),
        (json.dumps(WHOLE | {"config": [1]}), "config = [1]: a table of settings"),
        (json.dumps(WHOLE | {"reward": 3}), "reward = 3: text is needed"),
        (json.dumps({"reward": 3}), "reward = 3: text is needed"),
        (json.dumps(WHOLE | {"pipeline": {"threads": 10**9}}), "pipeline.threads = 1000000000"),
        (json.dumps(WHOLE | {"pipeline": {"dtype": {"unet": "int3"}}}), "pipeline.dtype holds 'int3'"),
        (json.dumps(WHOLE | {"pipeline": {"call": {"a": {"b": 1}}}}), "'a' of the run cannot be read"),
        (json.dumps(WHOLE)[:-1] + ', "pipeline": {"call": {"a": ' + "[" * 900 + "]" * 900 + "}}}", "too deep"),
        (json.dumps(WHOLE)[:-1] + ', "prompt_set": {"prompts": ["a"], "targets": {"a": ["a", "b"]}}}', "target 'a'"),
        (json.dumps(WHOLE)[:-1] + ', "config": {"steps": 1' + "0" * 400 + "}}", "steps = a number of thousands"),
        (json.dumps(WHOLE)[:-1] + ', "config": {"steps": 1' + "0" * 5000 + "}}", "not JSON"),
    ],
    ids=[str(number) for number in range(18)],
)
def test_a_damaged_file_is_told_in_a_sentence(text: str, said: str) -> None:
    assert said in train(text)


@pytest.mark.parametrize("name", [*PARTS, *FIELD_PATHS])
@pytest.mark.usefixtures("unchecked")
def test_a_setting_of_another_type_is_told(name: str) -> None:
    assert name in train(json.dumps(WHOLE | {"config": {name: {"a": [1]}}}))


@pytest.mark.parametrize(
    "config",
    [{"num_train_timesteps": 10**10}, {"num_train_timesteps": 10**400}, {"beta_start": "x"}, {"beta_start": [1]},
     {"num_train_timesteps": None}, {"num_train_timesteps": -1}],
)  # fmt: skip
def test_a_scheduler_that_cannot_be_made_is_told(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"DDIMScheduler cannot be made from pipeline\.scheduler\.config"):
        repeating._scheduler(repeating._known("DDIMScheduler", repeating.SchedulerMixin), config)


def test_a_run_of_an_earlier_version_is_repeated_as_well_as_it_can_be() -> None:
    """Those told of neither pipeline nor format, and named the prompts' file alone."""
    Path("prompts.txt").write_text("a dog\na cat\n")
    old = {"started": "2026-01-01", "command": "alignprop train", "versions": {}, "device": "CPU", "result": {}}
    old |= {"model": "emoji", "reward": "zscore(tv)", "calibrated_reward": "zscore(tv, mean=1.0, std=2.0)"}
    old |= {"prompts": "prompts.txt", "config": {"batch_size": 1, "evaluation": {"eval_prompts": 0, "judges": []}}}
    Path("config.json").write_text(json.dumps(old))
    words = ["train", "--config", "config.json", "--dry-run", "--device", "cpu", "--json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["config"]["batch_size"] == 1
    assert "zscore(tv, mean=1.0, std=2.0)" in done.stderr
