"""The bundled scorers know emoji alone: another model gets them only where they are named on purpose."""

from pathlib import Path

import pytest
import torch
from aligning import align, aligned
from command_line import run
from PIL import Image

from alignprop_pipe import AlignPropPipeline, parse_reward
from alignprop_pipe.bundled import MODELS_DIR
from alignprop_pipe.errors import AlignError, RewardError
from alignprop_pipe.rewards import ClipScore, Smooth
from alignprop_pipe.rewards.networks.network import check_fits, doubt_about

NAMED = "knows emoji pictures alone: name one with model="


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("clip", 'clip(model="emoji")'),
        ("0.5*clip(scale=2.0) + tv", '0.5*clip(scale=2.0, model="emoji") + tv'),
        ("smooth(zscore(clip))", 'smooth(zscore(clip("emoji")))'),
        ("tv + watch(clip)", 'tv + watch(clip(model="emoji"))'),
        ('count("dog", 2)', 'count("dog", 2, model="emoji")'),
        ('contains("dog")', 'contains("dog", "emoji")'),
        ('without("dog")', 'without("dog", model="emoji")'),
    ],
)
def test_by_default_they_are_refused_and_named_they_are_not(text: str, named: str) -> None:
    reward = parse_reward(text)
    with pytest.raises(RewardError, match=NAMED):
        check_fits(reward, "someone/other")
    assert check_fits(reward, "emoji") is reward
    assert check_fits(reward, str(MODELS_DIR / "emoji")) is reward
    on_purpose = parse_reward(named)
    assert str(on_purpose) == named
    assert check_fits(on_purpose, "someone/other") is on_purpose


def test_python_says_it_by_the_argument_too() -> None:
    with pytest.raises(RewardError, match=NAMED):
        check_fits(Smooth(ClipScore()), "other")
    for named in (ClipScore("emoji"), ClipScore(model="emoji"), ClipScore("openai/clip-vit-base-patch32")):
        assert check_fits(named, "other") is named

    class Mine(ClipScore):
        def __init__(self) -> None:
            super().__init__(model="emoji")

    check_fits(Mine(), "other")
    check_fits(parse_reward("aesthetic + emoji_judge + jpeg"), "other")


def test_align_refuses_reward_and_judges_before_anything_is_trained() -> None:
    pipe = aligned()
    with pytest.raises(RewardError, match=NAMED):
        align(pipe, "clip")
    with pytest.raises(RewardError, match=NAMED):
        align(pipe, "brightness", judges=("clip",))
    with pytest.raises(AlignError, match=NAMED):
        align(pipe, ClipScore())
    assert align(pipe, 'clip(model="emoji")', steps=1).reward == 'clip(model="emoji")'


def test_the_command_line_and_files_refuse_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(AlignPropPipeline, "from_pretrained", refuse)
    file = tmp_path / "run.toml"
    file.write_text('model = "someone/other"\nreward = "clip"\nprompts = "animals"\nsteps = 2\n')
    told = tmp_path / "judges.toml"
    told.write_text('model = "someone/other"\nreward = "jpeg"\nprompts = "animals"\n[evaluation]\njudges = ["clip"]\n')
    for words in (
        ["someone/other", "--reward", "clip", "--prompts", "animals"],
        ["someone/other", "--reward", "jpeg", "--judges", "clip", "--prompts", "animals"],
        ["--config", str(file)],
        ["--config", str(told)],
        ["someone/other", "--config", str(file)],
    ):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        result = run("train", *words, "--out", str(tmp_path / "out"))
        assert result.exit_code == 2, result.output
        assert NAMED in " ".join(result.stderr.replace("│", " ").split())


def test_without_a_reward_the_emoji_scorer_is_for_the_bundled_model_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('prompts = "animals"\nsteps = 2\n')
    result = run("train", "someone/other", "--config", str(file))
    assert result.exit_code == 2
    assert "Give --reward" in " ".join(result.stderr.replace("│", " ").split())


def test_scores_of_other_pictures_come_with_a_warning(tmp_path: Path) -> None:
    clip = parse_reward("clip")
    assert NAMED in doubt_about(clip, [(64, 64), (512, 512)])
    assert doubt_about(clip, [(64, 64)]) == doubt_about(parse_reward('clip(model="emoji")'), [(512, 512)]) == ""
    for name, side in (("emoji", 64), ("photo", 96)):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
        words = ["score", str(tmp_path / f"{name}.png"), "--reward", "clip", "--prompt", "a dog"]
        result = run(*words)
        assert result.exit_code == 0
        assert (NAMED in result.stderr) == (name == "photo")
    assert torch.is_grad_enabled()
