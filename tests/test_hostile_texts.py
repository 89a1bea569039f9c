"""Texts from strangers: in expressions, workflows, configurations, headers and models. None of them runs anything."""

import importlib
import json
import sys
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import miniatures
import pytest
import torch
from aligning import align, aligned
from command_line import run
from random_adapters import random_adapter

from alignprop_pipe import Adapter, AlignConfig, parse_reward
from alignprop_pipe.config import code
from alignprop_pipe.errors import AlignError, ConfigError, RewardError
from alignprop_pipe.rewards import REGISTRY, Reward, as_reward, register, registry
from alignprop_pipe.rewards.guard import check_reward
from alignprop_pipe.rewards.scorers.python import load_module
from alignprop_pipe.training.sweep import rewards_of
from comfy_nodes import widgets

EVIL = """
from pathlib import Path
import os
from os import system
from subprocess import Popen
from torch import nn
from alignprop_pipe.rewards import PythonReward
Path("ran").touch()
def score(images):
    return images.mean((1, 2, 3))
class Net(nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))
class Plain:
    def __init__(self, *_, **__):
        Path("made").touch()
    def __call__(self, images):
        return images.mean((1, 2, 3))
made = Net()
"""

HOSTILE = [
    'subprocess:Popen(args="touch ran", shell=True)',
    'os:system(command="touch ran")',
    'builtins:exec("open(1)")',
    "evil.py:score",
    "./evil.py:score",
    "evil:score",
    "evil.pack:score",
    "evil.py:Plain(3)",
    "clip - 0.1*evil:score",
    "-evil:score",
    'python("evil.py:score")',
    "python(source='evil:score')",
    'python("ev" "il:score")',
    "python(*['evil:score'])",
    "python",
    "zscore(evil.py:score)",
    "min(brightness, watch(softmin(tv, evil:score)))",
    "scaled(clip_above(python('evil:score'), 1))",
    "softmin(brightness, tv, temperature=evil:score)",
    'count(objects={"dog": evil:score})',
    "contains([evil:score])",
    "clip(model=evil.py:score)",
    '"""a"b""" + python("evil:score") + """c"d"""',
    "(evil:score)(3)",
    "tv if evil:score else tv",
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a file that leaves a mark when it runs, also as a module; at the end nothing must have run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "_IMPORTED", {})
    (tmp_path / "evil.py").write_text(EVIL)
    yield tmp_path
    sys.modules.pop("evil", None)


def nothing_ran() -> bool:
    return not Path("ran").exists() and not Path("made").exists() and "evil" not in sys.modules


def words(text: str) -> str:
    """As one line, whatever the width of the terminal: rich breaks lines and draws a frame."""
    return " ".join(text.replace("│", " ").split())


# --- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_an_expression_names_no_code(text: str) -> None:
    before = set(sys.modules)
    with pytest.raises(RewardError, match="names Python code.* --import.* allow_code=True") as error:
        parse_reward(text)
    assert str(error.value).endswith("^")
    assert nothing_ran()
    assert set(sys.modules) == before


@pytest.mark.parametrize("text", ["loud + evil:score", "evil:score + loud", "min(loud, zscore(evil:score))"])
def test_one_hostile_term_stops_all_others(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(Reward):
        def __init__(self) -> None:
            Path("made").touch()

    monkeypatch.setattr(registry, "REGISTRY", dict(REGISTRY))
    register("loud", Loud)
    with pytest.raises(RewardError, match="'evil:score' names Python code"):
        parse_reward(text)
    assert nothing_ran()
    parse_reward("loud")
    assert Path("made").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('subprocess:Popen(args="touch made", shell=True)', "subprocess:Popen is a class"),
        ("pathlib:Path", "is a class"),
        ("evil.py:Plain", "evil.py:Plain is a class, and only classes of Reward and torch.nn.Module are made"),
        ("evil.py:Popen(args='touch made', shell=True)", "is a class"),
        ("functools:partial(func='x')", "is a class"),
        ("typing:Any", "a class|_AnyMeta|_SpecialForm"),
        ('os:system(command="touch made")', "takes 0 arguments"),
        ("builtins:exec(source=\"open('made', 'w')\")", "multiple values for argument 'source'"),
        ("evil.py:os.system", "evil.py:os is the module os"),
        ("torch:hub.load", "torch:hub is the module torch.hub"),
        ("evil.py:score.__globals__", "dict: a function of images is needed"),
        ("evil.py:PythonReward(source='os:system')", "multiple values for argument 'source'"),
    ],
)
def test_a_class_that_is_no_reward_is_not_made_even_where_code_is_typed(text: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        parse_reward(text, allow_code=True)
    assert not Path("made").exists()


def test_a_program_that_is_typed_as_a_reward_is_not_started_by_reading_it() -> None:
    reward = parse_reward('subprocess:run(args="touch made", shell=True)', allow_code=True)
    assert not Path("made").exists()
    with pytest.raises(RewardError, match="fails on a test batch"):
        check_reward(reward, torch.rand(2, 3, 8, 8), ["a", "b"], {})


def test_code_that_is_typed_is_taken() -> None:
    images = torch.rand(2, 3, 8, 8)
    for reward in (
        as_reward("evil.py:score"),
        as_reward("evil:Net"),
        parse_reward("evil.py:made", allow_code=True),
        parse_reward("python('./evil.py:score')", allow_code=True),
    ):
        torch.testing.assert_close(reward(images, ["", ""]).total, images.mean((1, 2, 3)))


@pytest.mark.parametrize("written", ["evil.py", "./evil.py", "sub/../evil.py"])
def test_what_import_named_may_be_named_by_any_text(written: str, place: Path) -> None:
    (place / "sub").mkdir()
    load_module(written)
    for text in ("evil.py:score", f"{place}/evil.py:Net", "./evil.py:made", 'python("evil.py:score")'):
        assert parse_reward(f"0.5*zscore({text})") is not None
        assert AlignConfig.from_dict({"judges": [text]}).evaluation.judges == (text,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("evil.py:system(command='touch made')", "imported there from"),
        ("evil.py:Popen(args='touch made', shell=True)", "imported there from subprocess"),
        ("evil.py:PythonReward(source='os:system')", "imported there from"),
        ("evil.py:nn.Softmax", "is the module"),
        ("evil.py:score.__call__", "imported there from"),
        ("evil.py:score.__globals__.get", "imported there from"),
        ("evil.py:made.__init__", "imported there from"),
        ("evil.py:Plain", "only classes of Reward and torch.nn.Module are made"),
        ("evil.py:score + os:system", "names Python code"),
        ("evil:score", "names Python code"),
        ("other.py:score", "names Python code"),
        ("python('evil.py:score', 'os:system')", "names Python code"),
    ],
)
def test_of_what_import_named_texts_reach_only_what_it_defines(text: str, said: str) -> None:
    load_module("evil.py")
    with pytest.raises(RewardError, match=said):
        parse_reward(text)
    assert not Path("made").exists()


def test_a_module_that_was_typed_as_a_reward_is_not_open_to_other_texts() -> None:
    as_reward("evil.py:score")
    with pytest.raises(RewardError, match="names Python code"):
        parse_reward("evil.py:score")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000_000,
        "9*" * 2_000_000 + "clip",
        "a-" * 5_000_000 + "a",
        "(" * 1_000_000,
        "-" * 9_000 + "clip",
        "clip+" * 1_900 + "clip",
        "a-" * 4_999 + "a",
        "9*" * 4_999 + "clip",
        "min(" * 1_900,
        "[" * 9_000 + "evil:score",
        "9**9**9*clip",
        "1.5*" + "9" * 400 + "*clip",
        "1e999*clip",
        "{[1]: 2}",
        "clip({clip: 1})",
        "clip(dtype=[1])",
        "count(dtype={'a': 1})",
        "jpeg(quality=[1])",
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
@pytest.mark.usefixtures("unchecked")
def test_a_text_that_would_take_all_time_or_memory_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    for allow_code in (False, True):
        with pytest.raises(RewardError) as error:
            parse_reward(text, allow_code=allow_code)
        assert len(str(error.value)) < 30_000
    assert time.process_time() - began < 5


# --- workflows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The modules of the nodes, in a stand-in for ComfyUI that gives base classes and nothing else."""
    io = MagicMock()
    io.ComfyNode, io.NodeOutput = type("ComfyNode", (), {}), lambda *values, **_: values
    names = ("comfy", "comfy.model_management", "comfy.utils", "folder_paths", "server", "comfy_api")
    for name in (*names, "comfy_api.latest"):
        monkeypatch.setitem(sys.modules, name, MagicMock(__path__=[]))
    sys.modules["comfy_api.latest"].io = io  # type: ignore[attr-defined]
    found = {name: importlib.import_module(f"comfy_nodes.{name}") for name in ("host", "rewards", "align")}
    yield types.SimpleNamespace(**found)
    for name in found:
        sys.modules.pop(f"comfy_nodes.{name}")
        delattr(sys.modules["comfy_nodes"], name)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_workflow_with_an_expression_that_names_code_is_refused_when_it_is_queued(
    nodes: types.SimpleNamespace, text: str
) -> None:
    said = nodes.rewards.RewardText.validate_inputs(text)
    assert "names Python code" in said
    assert "ALIGNPROP_ALLOW_CODE=1" in said
    with pytest.raises(RewardError, match="names Python code"):
        nodes.rewards.RewardText.execute(text)
    assert nothing_ran()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("python", {"source": "subprocess:Popen", "args": "touch made", "shell": True}),
        ("python", {"source": "evil.py:score"}),
        ("python", {}),
        ("evil.py:score", {}),
        ("python('evil.py:score')", {}),
        ("clip + evil.py:score", {}),
        ("tv) + (evil.py:score", {}),
        ("jpeg", {"quality": "60) + evil.py:score + jpeg(quality=60"}),
        ("jpeg", {"quality=60) + evil.py:score + jpeg(quality": 60}),
        ("count", {"objects": ["python('evil.py:score')"]}),
    ],
)
def test_a_workflow_with_a_reward_of_the_list_that_names_code_is_refused(
    nodes: types.SimpleNamespace, name: str, parameters: dict[str, Any]
) -> None:
    assert nodes.rewards.Reward.validate_inputs(name, json.dumps(parameters)) is not True
    with pytest.raises(AlignError):
        nodes.rewards.Reward.execute(name, json.dumps(parameters))
    assert nothing_ran()
    assert "python" not in widgets.reward_names()
    assert "python" not in widgets.reward_script_data()


@pytest.mark.parametrize("value", ["evil.py:score", 'subprocess:Popen(args="touch made", shell=True)', "clip", 3, None])
def test_a_text_that_a_workflow_writes_on_a_reward_s_socket_is_no_reward(
    nodes: types.SimpleNamespace, value: Any
) -> None:
    pipe = MagicMock()
    with pytest.raises(RewardError, match="connect a Reward"):
        nodes.align.Align.execute(pipe, value, MagicMock())
    with pytest.raises((RewardError, ValueError), match="connect"):
        nodes.rewards.CombineRewards.execute(reward_1=value)
    with pytest.raises(RewardError, match="connect a Reward"):
        nodes.rewards.Score.execute(torch.rand(1, 8, 8, 3), value)
    pipe.align.assert_not_called()
    assert nothing_ran()


@pytest.mark.parametrize("text", HOSTILE)
def test_judges_of_a_workflow_name_no_code(nodes: types.SimpleNamespace, text: str) -> None:
    pipe = MagicMock()
    for judges in (text, f"clip, {text}", f"tv\n{text}\n"):
        with pytest.raises(RewardError):
            nodes.align.Align.execute(pipe, parse_reward("tv"), MagicMock(), judges=judges)
    pipe.align.assert_not_called()
    assert nothing_ran()


def test_who_starts_the_server_may_allow_code(nodes: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "", "yes"):
        monkeypatch.setenv("ALIGNPROP_ALLOW_CODE", value)
        assert nodes.rewards.RewardText.validate_inputs("evil.py:score") is not True
    assert nothing_ran()
    monkeypatch.setenv("ALIGNPROP_ALLOW_CODE", "1")
    assert nodes.rewards.RewardText.validate_inputs("evil.py:score") is True
    assert nodes.rewards.Reward.validate_inputs("python", '{"source": "evil.py:score"}') is True
    assert "python" in widgets.reward_names()
    assert widgets.config_from({"judges": "evil.py:score"}).evaluation.judges == ("evil.py:score",)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_a_configuration_from_a_file_names_no_code(text: str, place: Path) -> None:
    typed = AlignConfig().replace(judges=("tv", text))
    (place / "a.json").write_text(typed.to_json())
    (place / "a.toml").write_text(typed.to_toml())
    for read in (
        lambda **more: AlignConfig.from_dict(typed.to_dict(), **more),
        lambda **more: AlignConfig.from_dict({"judges": [text]}, typed, **more),
        lambda **more: AlignConfig.from_json(typed.to_json(), **more),
        lambda **more: AlignConfig.from_toml(typed.to_toml(), **more),
        lambda **more: AlignConfig.load(place / "a.json", **more),
        lambda **more: AlignConfig.load(place / "a.toml", **more),
    ):
        with pytest.raises(ConfigError, match="judges: .*(names Python code|cannot be read|no meaning)"):
            read()
        assert text in read(allow_code=True).evaluation.judges
    assert nothing_ran()


def test_settings_of_a_file_are_laid_over_judges_that_were_typed() -> None:
    typed = AlignConfig().replace(judges=("evil.py:score",))
    assert AlignConfig.from_dict({"steps": 3}, typed).evaluation.judges == ("evil.py:score",)


TRAIN = ["train", "--steps", "1", "--device", "cpu", "--num-inference-steps", "2", "--eval-prompts", "2"]
TRAIN += ["--batch-size", "2", "--reward", "brightness", "--out", "run"]


@pytest.mark.parametrize("form", ["flat", "nested", "run folder", "toml"])
@pytest.mark.parametrize("text", ['subprocess:Popen(args="touch ran", shell=True)', "watch(evil.py:score)"])
def test_a_stranger_s_config_runs_nothing(form: str, text: str) -> None:
    file = Path("config.toml" if form == "toml" else "config.json")
    nested: dict[str, Any] = {"evaluation": {"judges": [text]}}
    written = {"flat": {"judges": [text]}, "nested": nested, "run folder": {"config": nested, "reward": "tv"}}
    file.write_text(f"judges = [{json.dumps(text)}]" if form == "toml" else json.dumps(written[form]))
    result = run(*TRAIN, "--config", file)
    assert result.exit_code != 0
    assert "names Python code" in words(result.stderr)
    assert "--import" in words(result.stderr)
    assert nothing_ran()
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"reward": "evil.py:score"}, "names Python code"),
        ({"calibrated_reward": "zscore(evil:score)", "reward": "tv"}, "names Python code"),
        ({"reward": 'subprocess:Popen(args="touch ran", shell=True)'}, "names Python code"),
        ({"pipeline": {"call": {"judges": ["evil.py:score"]}}}, "does not take"),
        ({"pipeline": {"call": {"reward": "evil.py:score"}}}, "does not take"),
        ({"pipeline": {"scheduler": {"class": "evil"}}}, "no class"),
        ({"pipeline": {"scheduler": {"class": "utils", "config": {}}}}, "no class"),
        ({"pipeline": {"class": "ModelMixin"}}, "no class"),
    ],
)
def test_what_stands_beside_the_settings_of_a_stranger_s_run_runs_nothing(beside: dict[str, Any], said: str) -> None:
    Path("config.json").write_text(json.dumps({"config": {}, "model": "emoji", "reward": "tv", **beside}))
    flags = [word for word in TRAIN if word not in ("--reward", "brightness")]
    result = run(*flags, "--config", "config.json", "--dry-run")
    assert result.exit_code != 0
    assert said in words(result.stderr)
    assert nothing_ran()


def test_a_config_of_one_s_own_is_allowed_by_import() -> None:
    Path("config.json").write_text(json.dumps({"judges": ["evil.py:score"]}))
    result = run(*TRAIN, "--config", "config.json", "--import", "evil.py", "--json")
    assert result.exit_code == 0, result.output
    assert "score" in result.stdout
    assert Path("ran").exists()
    code._IMPORTED.clear()  # as in another process
    again = run(*TRAIN[:-1], "again", "--config", "run/config.json", "--dry-run")
    assert "names Python code" in words(again.stderr)


@pytest.mark.parametrize("flags", [["--judges", "evil.py:score"], ["--reward", "tv + evil.py:score"]])
def test_what_is_typed_on_the_command_line_is_allowed(flags: list[str]) -> None:
    assert run(*TRAIN, *flags, "--quiet", "--dry-run").exit_code == 0
    assert Path("ran").exists()


# --- headers ---------------------------------------------------------------------------------------------------------

IN_HEADERS = [*HOSTILE[:6], HOSTILE[10], HOSTILE[16]]


@pytest.fixture(scope="module")
def run_of_mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    align(aligned(), out=folder, eval_prompts=2)
    return folder


def test_an_adapter_s_header_runs_nothing(run_of_mine: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    miniatures.sd15().save_pretrained(model)
    mine = Adapter.load(run_of_mine)
    small = ["--num-inference-steps", "2", "--height", "16", "--width", "16", "--device", "cpu"]
    for number, text in enumerate(IN_HEADERS):
        hostile = {**mine.metadata, "alignprop.reward": text, "alignprop.config": json.dumps({"judges": [text]})}
        replace(mine, metadata=hostile).save(f"{number}.safetensors", format="diffusers")
        assert rewards_of([Adapter.load(f"{number}.safetensors")]) == []
        assert run("inspect", f"{number}.safetensors").exit_code == 0
    sweep = ["mix", "0.safetensors", model, "--sweep", "0:1:1", "--out", "row.png", "--prompt", "a dog", *small]
    result = run(*sweep)
    assert result.exit_code == 0, result.output
    assert "no score" in result.output
    result = run("sample", model, "a dog", "--adapter", "3.safetensors", *small)
    assert result.exit_code == 0, result.output
    result = run("mix", "3.safetensors=1", "4.safetensors=1", "--out", "mixed.safetensors")
    assert result.exit_code == 0, result.output
    assert nothing_ran()


@pytest.mark.parametrize("text", IN_HEADERS)
def test_a_run_folder_of_a_stranger_is_pushed_without_running_anything(run_of_mine: Path, text: str) -> None:
    folder = Path("stranger")
    folder.mkdir()
    for file in run_of_mine.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "config.json").read_text())
    about["reward"] = about["calibrated"] = text
    about["config"]["evaluation"]["judges"] = [text]
    (folder / "config.json").write_text(json.dumps(about))
    result = run("push", folder, "me/evil", "--dry-run")
    assert result.exit_code == 0, result.output
    assert nothing_ran()


@pytest.mark.parametrize(
    ("text", "is_drawn"),
    [
        ("clip", True),
        ('clip(model="emoji")', True),
        ("count('dog', 2) + zscore(tv)", True),
        ('clip("me")', False),
        ('clip(model="models")', False),
        ("clip(model='..')", False),
        ("min(tv, count(model='hub'))", False),
        ("watch(emoji_judge('me')) + tv", False),
    ],
)
def test_a_header_opens_no_other_model(text: str, is_drawn: bool) -> None:
    adapter = replace(ONE, metadata={"alignprop.reward": text})
    assert bool(rewards_of([adapter])) is is_drawn


ONE = random_adapter(miniatures.sd15(), rank=1)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pipeline", "component", "module", "package"])
def test_code_in_a_model_s_folder_is_not_run(tmp_path: Path, how: str) -> None:
    model = tmp_path / "model"
    miniatures.sd15().save_pretrained(model)
    index = json.loads((model / "model_index.json").read_text())
    evil = EVIL + "\nfrom diffusers import StableDiffusionPipeline as Evil, UNet2DConditionModel as Net\n"
    if how == "pipeline":
        index["_class_name"] = ["evil", "Evil"]
        (model / "evil.py").write_text(evil)
    elif how == "component":
        index["unet"] = ["evil", "Net"]
        (model / "unet" / "evil.py").write_text(evil)
    elif how == "module":
        index["unet"] = ["evil", "Net"]  # in the current folder, which is on the path
    else:
        index["safety_checker"] = ["subprocess", "Popen"]
    (model / "model_index.json").write_text(json.dumps(index))
    result = run("sample", model, "a dog", "--device", "cpu")
    assert result.exit_code != 0
    said = {
        "pipeline": "could not be loaded",
        "component": "module 'evil'",
        "module": "module 'evil'",
        "package": "Popen",
    }
    assert said[how] in words(result.stderr)
    assert nothing_ran()


@pytest.mark.parametrize("text", ["clip(model={0})", "ask('is it?', model={0})", "count('dog', 1, model={0})"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_reward_s_weights_is_neither_run_nor_asked_for(
    place: Path, text: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignprop_pipe.bundled import bundled_path

    kind = "emoji-scorer" if "clip" in text else "emoji-answerer" if "ask" in text else "emoji-detector"
    folder = place / "weights"
    folder.mkdir()
    for path in Path(bundled_path(kind)).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    about = json.loads((folder / file).read_text())
    names = {"AutoConfig": "evil.Net", "AutoModel": "evil.Net", "AutoTokenizer": ["evil.Net", "evil.Net"]}
    about |= {"auto_map": names, "model_type": "evil"} if file == "config.json" else {"auto_map": names}
    about |= {"tokenizer_class": "EvilTokenizer"} if file != "config.json" else {}
    (folder / file).write_text(json.dumps(about))
    (folder / "evil.py").write_text(EVIL)
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    reward = parse_reward(text.format(json.dumps(str(folder))))
    with suppress(RewardError):  # a tokenizer may do without its code
        reward(torch.rand(2, 3, 64, 64), ["a dog", "a cat"])
        assert file != "config.json"
    assert not asked
    assert nothing_ran()
