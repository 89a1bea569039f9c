import aligning
import huggingface_hub
import pytest
import torch

from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import as_reward, calibrate, parse_reward
from alignprop_pipe.rewards.scorers.likeness import SMALL_CLIPS, Likeness, free_judge
from alignprop_pipe.training.evidence import with_chosen_judge


def base(count: int = 12, size: int = 32) -> torch.Tensor:
    """A coloured square somewhere on a coloured ground."""
    draw = torch.Generator().manual_seed(3)
    pictures = torch.rand(count, 3, 1, 1, generator=draw).expand(-1, -1, size, size).clone()
    for picture, (x, y) in zip(pictures, torch.randint(0, size // 2, (count, 2), generator=draw).tolist(), strict=True):
        picture[:, x : x + size // 2, y : y + size // 2] = torch.rand(3, 1, 1, generator=draw)
    return pictures


def scores(judge: object, pictures: torch.Tensor) -> torch.Tensor:
    return judge(pictures, [""] * len(pictures)).total  # type: ignore[operator]


GARBAGE = {
    "one colour": lambda x: x.mean(dim=(2, 3), keepdim=True).expand_as(x),
    "white": lambda x: 1 - 0.05 * (1 - x),
    "noise": lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(5)),
    "stripes": lambda x: (x + 0.8 * torch.linspace(0, 40, x.shape[-1]).sin()).clamp(0, 1),
}


@pytest.mark.parametrize("how", GARBAGE)
@pytest.mark.parametrize("size", [32, 160])
def test_garbage_is_unlike_the_base_models_pictures(how: str, size: int) -> None:
    pictures = base(size=size)
    judge = calibrate(Likeness(), pictures, [""] * len(pictures))
    before, after = scores(judge, pictures), scores(judge, GARBAGE[how](pictures))
    assert before.mean() > 0.55
    assert after.mean() < 0.6 * before.mean()


def test_what_a_sound_run_does_is_no_fault() -> None:
    pictures = base(40)
    judge = calibrate(Likeness(), pictures, [""] * len(pictures))
    other = base(80)[40:]  # other pictures of the same kind
    assert abs(scores(judge, other).mean() - scores(judge, pictures).mean()) < 0.1
    assert (scores(judge, (pictures * 1.05).clamp(0, 1)).mean() - scores(judge, pictures).mean()).abs() < 0.03


def test_its_text_makes_it_again() -> None:
    pictures = base()
    judge = calibrate(Likeness(), pictures, [""] * len(pictures))
    assert torch.equal(scores(parse_reward(str(judge)), pictures), scores(judge, pictures))
    with pytest.raises(RewardError, match="align\\(\\) measures"):
        scores(Likeness(), pictures)
    with pytest.raises(RewardError, match="two pictures"):
        calibrate(Likeness(), pictures[:1], [""])
    with pytest.raises(RewardError, match="10 finite numbers"):
        Likeness(mean=[0.0], std=[1.0])
    with pytest.raises(RewardError, match="above 0"):
        Likeness(mean=[0.0] * 10, std=[0.0] * 10)


def test_a_run_without_a_judge_gets_one_that_tells_of_a_collapse_and_is_not_followed(tmp_path) -> None:
    table = {**aligning.QUICK, "steps": 6, "lr": 0.2, "eval_prompts": 8}
    result = aligning.aligned().align("-10*tv", [f"a fox, {n}" for n in range(20)], table, out=tmp_path / "run")
    assert result.config.evaluation.judges[0].startswith("likeness(mean=")
    assert result.followed == "the trained reward"
    assert "likeness" in repr(result)
    assert "judge likeness" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("lr", "collapses"), [(0.2, True), (1e-6, False)])
def test_a_whole_configuration_without_a_judge_gets_one_that_warns_where_it_should(lr: float, collapses: bool) -> None:
    config = aligning.settings(
        steps=10, lr=lr, eval_prompts=16, truncation="full", rank=4, keep_best=False, judges=("auto",)
    )
    result = aligning.aligned().align("brightness", [f"a fox, {n}" for n in range(24)], config)
    assert result.config.evaluation.judges[0].startswith("likeness(mean=")
    assert result.after is not None
    assert set(result.after.judges) == {"likeness"}
    found = [warning.text for warning in result.warnings if warning.kind == "reward-gamed"]
    assert bool(found) is collapses
    assert all("The judge likeness, which was never trained on, fell" in text for text in found)


def test_the_choice_is_a_word_in_the_list_and_an_empty_list_is_none() -> None:
    reward = as_reward("colour")
    for config, judges in (
        (AlignConfig(), ("likeness",)),
        (AlignConfig.preset("paper"), ("likeness",)),
        (AlignConfig.from_dict({"judges": ["jpeg", "auto"]}), ("jpeg", "likeness")),
        (AlignConfig.from_dict({"evaluation": {"judges": []}}), ()),
        (AlignConfig().replace(eval_prompts=0), ()),
        (AlignConfig.preset("emoji"), ("emoji_judge",)),
    ):
        assert with_chosen_judge(config, reward).evaluation.judges == judges
    assert AlignConfig.from_json(AlignConfig().to_json()) == AlignConfig()


def test_no_judge_where_none_is_wanted() -> None:
    table = {**aligning.QUICK, "steps": 1, "eval_prompts": 4}
    result = aligning.aligned().align("brightness", aligning.PROMPTS, {**table, "judges": ()})
    assert result.config.evaluation.judges == ()
    assert aligning.aligned().align("brightness", aligning.PROMPTS, table, judges=()).after.judges == {}


def test_a_small_clip_is_taken_where_it_is_here(monkeypatch, tmp_path) -> None:
    name = SMALL_CLIPS[0]
    assert free_judge(as_reward("colour + jpeg")) == "likeness"
    folder = tmp_path / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (folder / "snapshots" / "abc" / file).write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert free_judge(as_reward("colour + jpeg")) == f'clip(model="{name}")'
    assert free_judge(as_reward("colour + clip")) == "likeness"
