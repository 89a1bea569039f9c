"""The judge on a random miniature and on the bundled weights: right, wrong, and what is not asked."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.bundled import MODELS_DIR
from alignprop_pipe.errors import AlignError, RewardError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.rewards import AttributeJudge
from alignprop_pipe.rewards.scorers.judge import knows
from alignprop_pipe.training.align import usual_config

LABELS = ["subject:dog", "subject:cat", "subject:fox", "count:one", "count:two", "background:red", "background:blue"]
PREPROCESSOR = {
    "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "resample": 3,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a"] * 8


def save_miniature(folder: Path, labels: list[str] = LABELS) -> Path:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=len(labels)
    )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
        torch.nn.init.normal_(model.classifier[1].weight, std=3.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> AttributeJudge:
    return AttributeJudge(save_miniature(tmp_path_factory.mktemp("judge")))


def test_it_names_the_likeliest_value_of_each_attribute(judge):
    said = judge.predict(IMAGES)
    model = ResNetForImageClassification.from_pretrained(judge.model).eval()
    logits = model((IMAGES - 0.5) / 0.5).logits.detach()
    assert said["subject"] == [["dog", "cat", "fox"][index] for index in logits[:, :3].argmax(dim=1)]
    assert said["count"] == [["one", "two"][index] for index in logits[:, 3:5].argmax(dim=1)]
    assert said["background"] == [["red", "blue"][index] for index in logits[:, 5:].argmax(dim=1)]
    assert len(set(said["subject"])) > 1


def test_everything_asked_has_to_be_right(judge):
    said = judge.predict(IMAGES)
    scores = judge(IMAGES, PROMPTS, said)
    assert scores.total.tolist() == [1.0] * 8
    assert list(scores.parts) == ["emoji_judge"] + [
        f"emoji_judge.{name}" for name in ("subject", "count", "background")
    ]
    wrong = said | {"count": [{"one": "two", "two": "one"}[count] for count in said["count"][:3]] + said["count"][3:]}
    scores = judge(IMAGES, PROMPTS, wrong)
    assert scores.total.tolist() == scores.parts["emoji_judge.count"].tolist() == [0.0] * 3 + [1.0] * 5
    assert scores.parts["emoji_judge.subject"].tolist() == [1.0] * 8


def test_what_is_not_asked_is_not_judged(judge):
    said = judge.predict(IMAGES)
    scores = judge(IMAGES, PROMPTS, {"subject": said["subject"], "weather": ["sun"] * 8})
    assert list(scores.parts) == ["emoji_judge", "emoji_judge.subject"]
    partly = {"subject": said["subject"], "count": [None, *said["count"][1:]]}
    scores = judge(IMAGES, PROMPTS, partly)
    assert scores.total.tolist() == [1.0] * 8
    assert "emoji_judge.count" not in scores.parts


def test_numbers_may_be_written_as_such(judge):
    counts = [{"one": 1, "two": 2}[count] for count in judge.predict(IMAGES)["count"]]
    assert judge(IMAGES, PROMPTS, {"count": counts}).total.tolist() == [1.0] * 8
    assert judge(IMAGES, PROMPTS, {"count": [str(count) for count in counts]}).total.tolist() == [1.0] * 8


@pytest.mark.parametrize(
    "targets", [None, {}, {"weather": ["sun"] * 8}, {"subject": [None] * 8}, {"subject": [None] + ["dog"] * 7}]
)
def test_without_targets_the_needed_columns_are_named(judge, targets):
    with pytest.raises(RewardError, match="subject, count, background"):
        judge(IMAGES, PROMPTS, targets)


def test_a_value_it_never_learnt_is_named(judge):
    with pytest.raises(RewardError, match="no subject 'horse'.*dog, cat, fox"):
        judge(IMAGES, PROMPTS, {"subject": ["horse"] * 8})


def test_it_never_carries_gradient(judge):
    images = IMAGES.clone().requires_grad_(True)
    scores = judge(images, PROMPTS, {"subject": ["dog"] * 8})
    assert not scores.total.requires_grad
    assert not judge.trainable


def test_other_labels_are_refused(tmp_path):
    judge = AttributeJudge(save_miniature(tmp_path, ["dog", "cat"]))
    with pytest.raises(RewardError, match="subject:dog"):
        judge.predict(IMAGES)


BUNDLED = MODELS_DIR / "emoji-judge"


@pytest.mark.skipif(BUNDLED.exists(), reason="the bundled judge is here")
def test_a_missing_bundled_judge_is_named():
    with pytest.raises(AlignError, match="emoji-judge"):
        AttributeJudge().predict(IMAGES)


@pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled judge has not been trained yet")
def test_the_bundled_judge_knows_the_columns_of_the_prompts():
    said = AttributeJudge().predict(torch.rand(2, 3, 64, 64))
    assert list(said) == ["subject", "count", "background"]


@pytest.mark.parametrize(
    ("targets", "is_known"),
    [
        ({}, False),
        ({"count": [1, "two"]}, True),
        ({"count": [1, None], "subject": [None, "dog"]}, True),
        ({"count": [1, None]}, False),
        ({"count": [{"dog": 1}, {"dog": 2}]}, False),
        ({"count": [1, 7]}, False),
        ({"note": ["a", "b"]}, False),
    ],
)
def test_the_preset_s_judge_stays_where_it_knows_what_the_prompts_want(targets: dict, is_known: bool) -> None:
    prompts = PromptSet(("a dog", "two dogs"), {name: tuple(column) for name, column in targets.items()})
    assert knows(prompts.targets) is is_known
    pipe = AlignPropPipeline.from_pretrained("emoji")
    judges = usual_config(pipe, prompts).evaluation.judges
    assert judges  # a free one in its place
    assert ("emoji_judge" in judges) is is_known
