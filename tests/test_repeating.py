"""config.json repeats its run, bit for bit on one thread: by the command that it holds, in any folder."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from aligning import PROMPTS, QUICK, align, aligned
from command_line import run
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import ConfigError
from alignprop_pipe.rewards import registry
from alignprop_pipe.runs import repeating

ROOT = Path(__file__).parents[1]
MIXED = "zscore(brightness) + 0.5*zscore(jpeg)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    miniatures.sd15().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where runs are started, next to one where they are repeated."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    monkeypatch.setattr(repeating, "REGISTRY", registry.REGISTRY)
    return tmp_path


def about(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "memory_mb")} for line in lines]


def assert_same(first: Path, second: Path) -> None:
    one, two = load_file(first / "adapter.safetensors"), load_file(second / "adapter.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(tensor.any()) for name, tensor in one.items() if "lora_B" in name or "lora.up" in name)
    assert records(first) == records(second)


def pasted(command: str, folder: Path) -> Path:
    """Run the command in `folder` by a shell, and find the run folder that it made."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PY": sys.executable}
    line = f'alignprop() {{ "$PY" -m alignprop_pipe "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = [path for path in (folder / "runs").iterdir() if not path.is_symlink()]
    return made


def typed(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `pasted`, in this process."""
    monkeypatch.chdir(folder)
    done = run(*shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    (made,) = [path for path in (folder / "runs").iterdir() if not path.is_symlink()]
    return made


def test_a_python_run_is_repeated_by_its_command(model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another scheduler, number format, arguments of the call, a measured reward, and prompts of a file."""
    Path("prompts.csv").write_text("prompt,count\n" + "".join(f"{prompt},{i}\n" for i, prompt in enumerate(PROMPTS)))
    pipe = AlignPropPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    given = {"sigmas": [9.0, 2.0], "guidance_rescale": 0.3, "guidance_scale": 3.0}
    align(pipe, MIXED, "prompts.csv", out="first", eval_prompts=2, judges=("zscore(tv)",), **given)
    said = about(Path("first"))
    assert said["pipeline"]["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert said["pipeline"]["scheduler"]["config"]["timestep_spacing"] == "trailing"
    assert set(said["pipeline"]["dtype"].values()) == {"bfloat16"}
    assert said["pipeline"]["call"] == {"sigmas": [9.0, 2.0], "guidance_rescale": 0.3}
    assert said["prompts"] == "prompts.csv"
    assert said["prompt_set"]["targets"] == {"count": [str(i) for i in range(len(PROMPTS))]}
    assert not said["not_repeatable"]
    assert shlex.split(said["command"]) == ["alignprop", "train", "--config", str(place / "here/first/config.json")]
    Path("prompts.csv").unlink()
    assert_same(place / "here/first", typed(said["command"], place / "there", monkeypatch))


def test_a_command_is_repeated_by_its_command(model: Path, place: Path) -> None:
    """With a model, prompts and a reward by paths from where it was started."""
    (place / "here/tiny").symlink_to(model)
    Path("my rewards.py").write_text("def glow(images, power=1.0):\n    return images.mean((1, 2, 3)) ** power\n")
    Path("judges.py").write_text("def dark(images):\n    return 1 - images.mean((1, 2, 3))\n")
    Path("named.py").write_text(
        "from alignprop_pipe.rewards import register\n@register('red_in_here')\n"
        "def red(images):\n    return images[:, 0].mean((1, 2))\n"
    )
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    small = [f"--{name.replace('_', '-')}={value}" for name, value in {**QUICK, "eval_prompts": 2}.items()]
    reward = "python('my rewards.py:glow', power=2.0) + 0.5*red_in_here"
    words = ["--reward", reward, "--import", "named.py", "--judges", "judges.py:dark", "--prompts", "prompts.txt"]
    done = run("train", "tiny", *small, *words, "--out", "first", "--dtype", "float16")
    assert done.exit_code == 0, done.output
    said = about(Path("first"))
    assert str(place / "here/my rewards.py") in said["command"]
    assert_same(Path("first"), pasted(said["command"], place / "there"))


def test_the_file_decides_flags_win_and_what_wins_is_told(model: Path, place: Path) -> None:
    align(AlignPropPipeline.from_pretrained(model), MIXED, PROMPTS, out="first")
    done = run("train", "--config", "first", "--seed", "5", "--reward", "jpeg", "--steps", "2", "--out", "second")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "--seed 5 wins over 0 in first/config.json" in text
    assert f"--reward jpeg wins over {MIXED} in first/config.json" in text
    assert "--steps" not in text
    said = about(Path("second"))
    assert (said["reward"], said["config"]["seed"], said["prompts"]) == ("jpeg", 5, PROMPTS)
    assert said["model"] == about(Path("first"))["model"] == str(model)
    done = run("train", "--config", "first", "--out", "third")
    assert_same(Path("first"), Path("third"))
    assert "wins" not in done.output


@pytest.mark.usefixtures("place")
def test_a_settings_file_may_name_model_reward_and_prompts(model: Path) -> None:
    settings = AlignConfig().replace(**QUICK).to_toml()
    Path("run.toml").write_text(f'model = "{model}"\nreward = "jpeg"\nprompts = ["a dog", "a cat"]\n{settings}')
    done = run("train", "--config", "run.toml", "--out", "first", "--lr", "0.5")
    assert done.exit_code == 0, done.output
    said = about(Path("first"))
    assert (said["model"], said["reward"], said["prompts"]) == (str(model), "jpeg", ["a dog", "a cat"])
    assert said["config"]["optimizer"]["lr"] == 0.5
    assert "--lr 0.5 wins over 0.01" in " ".join(done.output.split())


def test_prompts_whose_file_has_changed_are_those_of_the_run(model: Path, place: Path) -> None:
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    align(AlignPropPipeline.from_pretrained(model), "brightness", "prompts.txt", out="first")
    Path("prompts.txt").write_text("something else")
    done = run("train", "--config", "first/config.json", "--out", "second")
    assert "holds others now" in " ".join(done.output.split())
    assert_same(Path("first"), Path("second"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"reward": "subprocess:Popen", "calibrated_reward": "subprocess:Popen(args='touch x')"}, "Python code"),
        ({"calibrated_reward": "hpsv2(accept_license=True)"}, "--accept-license"),
        ({"model": "models/sd15"}, "hf://models/sd15"),
        ({"prompts": None, "prompt_set": None, "model": "./x"}, "there is no file or folder './x'"),
        ({"pipeline": {"scheduler": {"class": "os"}}}, "no class of the installed diffusers"),
        ({"pipeline": {"scheduler": {"class": "StableDiffusionPipeline"}}}, "no class of the installed diffusers"),
        ({"pipeline": {"call": {"out": "x"}}}, "'out'"),
        ({"pipeline": {"call": {"image": {"described": "a Image of 8x8"}}}}, "a Image of 8x8"),
        ({"not_repeatable": {"reward": "it was a lambda"}}, "it was a lambda"),
        ({"format": 2}, "newer version"),
    ],
)
def test_a_strange_file_is_refused_in_words(model: Path, place: Path, wrong: dict[str, Any], said: str) -> None:
    config = AlignConfig().replace(**QUICK).to_dict()
    whole = {"config": config, "model": str(model), "reward": "jpeg", "prompts": ["a dog", "a cat"], **wrong}
    Path("config.json").write_text(json.dumps(whole))
    done = run("train", "--config", "config.json", "--out", "out")
    assert done.exit_code in (1, 2), done.output
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not Path("x").exists()
    assert not Path("out").exists()


def test_what_no_file_can_hold_is_said(place: Path) -> None:
    first = align(aligned(), lambda images: images.mean((1, 2, 3)), out="first")
    assert first.run_folder is not None
    said = about(first.run_folder)
    assert "made in Python" in said["not_repeatable"]["model"]
    assert said["command"].startswith("cannot be repeated")
    assert "cannot be repeated" in (first.run_folder / "report.html").read_text()
    assert run("train", "--config", "first").exit_code == 2


def test_a_reward_without_a_name_is_said(model: Path, place: Path) -> None:
    align(AlignPropPipeline.from_pretrained(model), lambda images: images.mean((1, 2, 3)), out="first")
    said = about(Path("first"))
    assert "'file.py:function'" in said["not_repeatable"]["reward"]
    done = run("train", "--config", "first", "--out", "second")
    assert done.exit_code == 2
    assert "file.py:function" in done.stderr
    assert run("train", "--config", "first", "--reward", "jpeg", "--out", "second").exit_code == 0


def test_another_lora_is_written_down(model: Path, place: Path) -> None:
    style = align(AlignPropPipeline.from_pretrained(model), out="style")
    assert style.adapter_path is not None
    pipe = AlignPropPipeline.from_pretrained(model)
    pipe.load_lora_weights(str(style.adapter_path), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    align(pipe, out="second")
    said = about(Path("second"))
    assert said["pipeline"]["adapters"] == [{"component": "unet", "name": "style", "weight": 0.5, "is_fused": False}]
    assert "'style'" in said["not_repeatable"]["pipeline"]
    assert about(Path("style"))["pipeline"]["adapters"] == []


@pytest.mark.parametrize("value", [None, 1, 0.25, "a", True, [1, [2]], (1, 2), {"a": (1,)}, [{"tuple": [1]}]])
def test_plain_values_come_back(value: Any) -> None:
    assert repeating.decoded("x", json.loads(json.dumps(repeating.encoded(value)))) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Image.new("RGB", (8, 4)), "a Image of 8x4"),
        (torch.zeros(2, 3), "a Tensor of 2x3"),
        ([1, (torch.zeros(2),)], "a Tensor of 2"),
        ({"a": {1: 2}}, "a dict"),
        (float("nan"), "a float"),
    ],
)
def test_other_values_are_described(value: Any, words: str) -> None:
    assert repeating.encoded(value) == {"described": words}
    with pytest.raises(ConfigError, match=words):
        repeating.decoded("x", repeating.encoded(value))


@pytest.mark.parametrize(
    ("busy", "ours", "limit", "expected"),
    [
        ([0.0] * 4, {0, 1, 2, 3}, "max 100000", 4),
        ([50.0] * 4, {0, 1, 2, 3}, "max 100000", 2),
        ([100.0] * 4, {0, 1, 2, 3}, "max 100000", 1),
        ([0.0] * 4, {1, 2}, "max 100000", 2),  # taskset, or a scheduler of jobs
        ([0.0, 100.0, 100.0, 0.0], {1, 2, 3}, "max 100000", 1),  # the free core 0 is not ours
        ([0.0] * 4, {0, 1, 2, 3}, "250000 100000", 2),  # a container that may use two and a half cores
        ([0.0] * 4, {0, 1, 2, 3}, "50000 100000", 1),
        ([0.0] * 4, {0, 1, 2, 3}, "no limit", 4),
    ],
)
def test_a_run_takes_as_many_threads_as_find_a_free_core(
    monkeypatch, tmp_path: Path, busy: list[float], ours: set[int], limit: str, expected: int
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    monkeypatch.setattr(repeating, "CPU_LIMITS", ((str(tmp_path / "cpu.max"),),))
    monkeypatch.setattr(repeating.os, "sched_getaffinity", lambda pid: ours, raising=False)
    monkeypatch.setattr(repeating.psutil, "cpu_percent", lambda interval, percpu: busy)
    monkeypatch.setattr(repeating.torch, "get_num_threads", lambda: 4)
    assert repeating.free_threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert repeating.free_threads() == 4


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1.5), ("-1", float("inf"))])
def test_the_older_control_groups_are_read_too(monkeypatch, tmp_path: Path, quota: str, expected: float) -> None:
    (tmp_path / "quota").write_text(quota + "\n")
    (tmp_path / "period").write_text("100000\n")
    older = (str(tmp_path / "quota"), str(tmp_path / "period"))
    monkeypatch.setattr(repeating, "CPU_LIMITS", ((str(tmp_path / "absent"),), older))
    assert repeating.granted_cores() == expected
