"""Every script in examples/ runs, in a folder of its own; the bundled model's only where its files are there."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import pytest
from aligning import align, aligned

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.bundled import MODELS
from alignprop_pipe.config.settings import PRESETS
from alignprop_pipe.rewards import REGISTRY, parse_reward
from alignprop_pipe.runs.folder import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"

Run = Callable[..., dict]


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after its test."""
    monkeypatch.setattr("alignprop_pipe.rewards.registry.REGISTRY", dict(REGISTRY))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script as `python examples/NAME ARGUMENTS` would, with settings that end soon."""
    monkeypatch.chdir(tmp_path)
    few = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_inference_steps": 2, "eval_prompts": 2}
    for preset in ("fast", "emoji"):
        monkeypatch.setitem(PRESETS, preset, {**PRESETS[preset], **few})

    def script(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return script


needs_the_bundled_model = pytest.mark.skipif(
    any(model.missing for model in MODELS), reason="the bundled model is not in alignprop_pipe/models"
)


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "align_bundled.py",
        "custom_reward.py",
        "your_own_pipeline.py",
    }


@needs_the_bundled_model
def test_align_bundled(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("align_bundled.py", "1")["result"]
    assert result.steps == 1
    assert result.history[0].evidence.judges  # the preset of the bundled model watches its judge
    assert "AlignResult" in capsys.readouterr().out
    assert Path("cats.png").stat().st_size > 100
    AlignPropPipeline.from_pretrained("emoji").load_adapter("cats.safetensors")


@needs_the_bundled_model
def test_custom_reward(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("custom_reward.py", "1")
    assert "warmth on training prompts, fresh noise:" in capsys.readouterr().out


def test_the_custom_reward_works_on_the_command_line() -> None:
    result = align(aligned(), f"{EXAMPLES / 'custom_reward.py'}:warmth", steps=4, eval_prompts=2, eval_every=0)
    assert result.changes["warmth"].difference > 0


def test_your_own_pipeline(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniatures.sd15().save_pretrained(tmp_path / "model")
    found = run("your_own_pipeline.py", str(tmp_path / "model"), "1")
    assert found["result"].steps == 1
    assert found["pipe"].unet is found["stock"].unet
    assert "held-out colour" in capsys.readouterr().out
    assert [record.step for record in read_metrics(tmp_path / "runs" / "colourful-animals")] == [0, 1]


@needs_the_bundled_model
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # two adapters are what mixing is
def test_objectives_are_measured_mixed_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "emoji", {**PRESETS["emoji"], "steps": 1, "batch_size": 2, "num_inference_steps": 2})
    objectives = runpy.run_path(str(EXAMPLES / "objectives" / "objectives.py"))
    measure, page = objectives["measure"], objectives["page"]
    inside = measure.__globals__
    inside.update(HELD_OUT=3, HERE=tmp_path, ADAPTERS=tmp_path / "adapters")
    results = {name: {"0": measure(name, 0)} for name in ("alignment", "compressibility", "mixed-adapters")}
    results["compressibility-too-far"] = {"0": measure("compressibility-too-far", 0)}
    for name, runs in results.items():
        assert runs["0"]["jpeg_kb"][0] > runs["0"]["webp_kb"][0] > 0
        assert (tmp_path / f"{name}.png").stat().st_size > 100
    assert results["mixed-adapters"]["0"]["emoji_judge"][0] == results["alignment"]["0"]["emoji_judge"][0]
    text = page(results)
    assert "## compressibility: `smooth(clip)" in text
    assert "### compressibility-too-far: `jpeg`" in text
    assert "(1 steps of 2 pictures)" in text


def test_every_objective_can_be_read() -> None:
    objectives = runpy.run_path(str(EXAMPLES / "objectives" / "objectives.py"))["OBJECTIVES"]
    for objective in objectives.values():
        assert str(parse_reward(objective.reward, allow_code=True)) == objective.reward
        assert not objective.too_far or str(parse_reward(objective.too_far)) == objective.too_far


@needs_the_bundled_model
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNPROP_STEPS", "1")
    few = {"batch_size": 2, "eval_prompts": 2}
    monkeypatch.setitem(PRESETS, "emoji", {**PRESETS["emoji"], **few})
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["result"].steps == 1
    assert (tmp_path / "emoji-aligned.safetensors").is_file()
    assert (tmp_path / "runs/notebook/report.html").is_file()
