"""Picture files to scores: which files, what is read from them, which prompt, which batch; and a reward on trial."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignprop_pipe.errors import PromptError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.rewards import ClipScore, Jpeg, PythonReward, Reward, parse_reward
from alignprop_pipe.scoring import score as scoring
from alignprop_pipe.scoring.picture_files import Found
from alignprop_pipe.scoring.score import Scored, Task


def picture(seed: int = 0, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values, mode)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class Noted(Reward):
    """The mean of the red channel; notes what it is called with."""

    name = "noted"

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[str], Mapping[str, Any]]] = []

    def score(self, images: Tensor, prompts: list[str], targets: Mapping[str, Any]) -> Tensor:
        self.calls.append((images, prompts, targets))
        return images[:, 0].mean(dim=(1, 2))

    def extras(self, images: Tensor, prompts: list[str], targets: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"green": images[:, 1].mean(dim=(1, 2))}


# --- prompts ---------------------------------------------------------------------------------------------------------


def found(*prompts: str | None) -> list[Found]:
    return [Found(Path("folder", f"{number}.png"), prompt) for number, prompt in enumerate(prompts)]


def test_which_rewards_read_prompts() -> None:
    for text, reads in (
        ("clip", True),
        ("jpeg - tv + 0.1*colour", False),
        ("jpeg + 0.1*clip", True),
        ("emoji_judge", False),  # it reads targets
        ("min(tv, symmetry)", False),
        ("min(tv, clip)", True),
    ):
        assert scoring.reads_prompts(parse_reward(text)) is reads
    assert not scoring.reads_prompts(PythonReward(lambda images: images.mean((1, 2, 3))))
    assert not scoring.reads_prompts(PythonReward(lambda images, *, targets: images.mean((1, 2, 3))))
    assert scoring.reads_prompts(PythonReward(lambda pictures, words: pictures.mean((1, 2, 3))))


def test_pictures_without_prompts_are_named_where_the_reward_needs_them() -> None:
    pictures = found("a dog", None, None, None, None)
    with pytest.raises(PromptError, match=r"clip .*1\.png, .*2\.png, .*3\.png and 1 more; give --prompt"):
        scoring.assign_own(pictures, parse_reward("0.5*clip"))
    assert [task.prompt for task in scoring.assign_own(pictures, Jpeg())] == ["a dog", "", "", "", ""]


def test_prompts_by_order_by_file_and_by_their_own_words() -> None:
    plain = PromptSet(("a dog", "a cat"), {"count": (1, 2)})
    by_order = scoring.assign(found(None, "a fox"), plain)
    assert [(task.prompt, task.targets) for task in by_order] == [("a dog", {"count": 1}), ("a cat", {"count": 2})]
    by_words = scoring.assign(found("a cat", "a dog", "a cat"), plain)
    assert [(task.prompt, task.targets["count"]) for task in by_words] == [("a cat", 2), ("a dog", 1), ("a cat", 2)]
    table = PromptSet(("x", "y", "z"), {"file": ("1.png", str(Path("folder", "0.png")), "other.png"), "n": (1, 2, 3)})
    by_file = scoring.assign(found(None, None), table)
    assert [(task.prompt, task.targets) for task in by_file] == [("y", {"n": 2}), ("x", {"n": 1})]


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PromptError, match="2 prompts do not fit 3 pictures.*1.png"):
        scoring.assign(found("a", "b", "c"), PromptSet(("a", "c")))
    with pytest.raises(PromptError, match="1.png.* is not in the column 'file'"):
        scoring.assign(found(None, None), PromptSet(("a", "b"), {"file": ("0.png", "2.png")}))
    with pytest.raises(PromptError, match="2 times"):
        scoring.assign(found(None), PromptSet(("a", "b"), {"file": ("0.png", "0.png")}))


# --- scores ----------------------------------------------------------------------------------------------------------


def test_each_score_is_that_of_the_picture_alone_whatever_its_size(tmp_path: Path) -> None:
    sizes, prompts = [(64, 64), (40, 70), (64, 64), (65, 64), (64, 64), (40, 70)], ["one dog", "two cats"]
    tasks = []
    for number, size in enumerate(sizes):
        picture(number, size).save(tmp_path / f"{number}.png")
        tasks.append(Task(tmp_path / f"{number}.png", prompts[number % 2]))
    reward = parse_reward("clip + 0.1*jpeg")
    results = list(scoring.score_files(reward, tasks, batch_size=2))
    assert sorted(one.path.name for one in results) == [f"{number}.png" for number in range(6)]
    for one in results:
        assert isinstance(one, Scored)
        alone = reward(as_tensor(Image.open(one.path))[None].float() / 255, [one.prompt])
        assert one.score == pytest.approx(alone.total.item(), abs=1e-5)
        assert set(one.parts) == {"clip", "jpeg", "jpeg_kb"}
        assert one.parts["jpeg_kb"] == pytest.approx(alone.parts["jpeg_kb"].item())


def test_batches_are_of_one_size_and_not_too_many_pictures_wait(tmp_path: Path) -> None:
    tasks = []
    for number in range(20):
        picture(number, (8, 4 + number % 10)).save(tmp_path / f"{number}.png")
        tasks.append(Task(tmp_path / f"{number}.png", f"prompt {number}", {"number": number}))
    reward, waiting, most = Noted(), 0, 0
    read = scoring.read_pixels

    def counted(path: Path) -> Any:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return read(path)

    scoring.read_pixels = counted
    try:
        for _ in scoring.score_files(reward, tasks, batch_size=2):
            waiting -= 1
    finally:
        scoring.read_pixels = read
    assert most <= scoring.HELD_BATCHES * 2 + 1
    assert sum(len(images) for images, _, _ in reward.calls) == 20
    for images, prompts, targets in reward.calls:
        assert len(images) <= 2
        assert not images.requires_grad
        assert [f"prompt {number}" for number in targets["number"]] == prompts


def test_no_graph_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0, (64, 64)).save(tmp_path / "a.png")
    made: list[bool] = []
    plain = ClipScore.score

    def watched(self: ClipScore, *args: Any) -> Tensor:
        scores = plain(self, *args)
        made.append(scores.requires_grad)
        return scores

    monkeypatch.setattr(ClipScore, "score", watched)
    (one,) = scoring.score_files(ClipScore(), [Task(tmp_path / "a.png", "one dog")])
    assert isinstance(one, Scored)
    assert made == [False]


def test_judges_score_too(tmp_path: Path) -> None:
    picture(0, (64, 64)).save(tmp_path / "a.png")
    task = Task(tmp_path / "a.png", "two dogs", {"subject": "dog", "count": 2})
    (one,) = scoring.score_files(parse_reward("emoji_judge"), [task])
    assert isinstance(one, Scored)
    assert one.score in (0.0, 1.0)
    assert {"emoji_judge", "emoji_judge.subject", "emoji_judge.count"} <= set(one.parts)


def test_damaged_files_and_scores_that_are_no_numbers_are_skipped(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(0, (16, 16)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    Image.new("RGB", (16, 16), "black").save(tmp_path / "c.png")
    tasks = [Task(tmp_path / f"{name}.png", "") for name in ("a", "b", "c")]
    reward = PythonReward(lambda images: images.mean((1, 2, 3)) / images.mean((1, 2, 3)))
    results = {one.path.stem: one for one in scoring.score_files(reward, tasks)}
    assert results["a"].score == 1.0
    assert "cut short" in results["b"].reason
    assert "nan" in results["c"].reason


def test_mean_and_deviation() -> None:
    values = [0.1, 0.5, -2.0, 7.25]
    assert scoring.mean_and_deviation(values) == (statistics.fmean(values), statistics.stdev(values))
    mean, deviation = scoring.mean_and_deviation([3.0, math.nan])
    assert mean == 3.0
    assert math.isnan(deviation)
    assert math.isnan(scoring.mean_and_deviation([])[0])


# --- a reward on trial -----------------------------------------------------------------------------------------------


def test_what_a_trial_measures() -> None:
    images, batch = scoring.random_batch(2, 64, "one dog", torch.device("cpu"))
    reward = parse_reward("2*brightness")
    trial = scoring.try_reward(reward, images, batch)
    scores = reward(images, batch.prompts).total
    assert (trial.reward, trial.refusal) == ("2*brightness", "")
    assert (trial.lowest, trial.highest) == (scores.min().item(), scores.max().item())
    # d brightness / d pixel is the channel's share of the luma, over the number of pixels.
    by_hand = 2 * math.sqrt(0.299**2 + 0.587**2 + 0.114**2) / 64
    assert trial.gradient_norm == pytest.approx(by_hand, rel=1e-3)
    assert trial.seconds > 0
    assert trial.weights_mb == 0


def test_the_memory_of_a_network() -> None:
    images, batch = scoring.random_batch(2, 64, "one dog", torch.device("cpu"))
    reward = ClipScore()
    small = scoring.try_reward(reward, images, batch)
    (network,) = [value for value in vars(reward).values() if isinstance(value, torch.nn.Module)]
    held = [*network.parameters(), *network.buffers()]
    assert small.weights_mb == pytest.approx(sum(t.numel() * t.element_size() for t in held) / 1e6, rel=0.01)
    large = scoring.try_reward(reward, *scoring.random_batch(8, 64, "one dog", torch.device("cpu")))
    assert large.activations_mb == pytest.approx(4 * small.activations_mb, rel=0.1)
    assert not images.requires_grad


def test_trials_of_the_whole_and_its_parts() -> None:
    texts = [str(one) for one in scoring.on_trial(parse_reward("min(clip, jpeg) - tv + 0.5*jpeg"))]
    assert texts == ["min(clip, jpeg) - tv + 0.5*jpeg", "clip", "jpeg", "tv"]
    assert [str(one) for one in scoring.on_trial(parse_reward("tv"))] == ["tv"]


def test_refusals_and_statistics() -> None:
    images, batch = scoring.random_batch(2, 32, "one dog", torch.device("cpu"))
    cut = scoring.try_reward(PythonReward(lambda images: images.detach().mean((1, 2, 3))), images, batch)
    assert "detach" in cut.refusal
    assert math.isnan(cut.gradient_norm)
    assert "judge" in scoring.try_reward(parse_reward("emoji_judge"), images, batch).refusal
    scaled = scoring.try_reward(parse_reward("zscore(jpeg)"), images, batch)
    assert not scaled.refusal
    assert scaled.highest == pytest.approx(math.sqrt(0.5), rel=1e-2)  # of two values, in their own deviations
