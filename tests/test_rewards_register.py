"""Rewards of one's own under a name: what can be registered, what it is called, and which names are refused."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import REGISTRY, Reward, RewardEntry, parse_reward, register, registry
from alignprop_pipe.rewards.entries import ENTRIES, entries_in


@pytest.fixture(autouse=True)
def _registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", dict(REGISTRY))


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def redness(images: Tensor, factor: float = 1.0) -> Tensor:
    """How red.

    And nothing else.
    """
    return factor * images[:, 0].mean((1, 2))


def test_a_function_as_decorator_and_as_call() -> None:
    assert register("redness", redness) is redness
    assert register("red2.1", summary="twice", licence="MIT")(redness) is redness
    entry = registry.REGISTRY["redness"]
    assert (entry.summary, entry.licence) == ("How red.", "yours")
    assert registry.REGISTRY["red2.1"].summary == "twice"
    reward = parse_reward("2*redness(factor=0.5) + red2.1 - tv")
    assert str(reward) == "2*redness(factor=0.5) + red2.1 - tv"
    assert parse_reward(str(reward)) == reward
    scores = reward(IMAGES, ["", ""])
    assert set(scores.parts) == {"redness", "red2.1", "tv"}
    torch.testing.assert_close(scores.parts["redness"], 0.5 * IMAGES[:, 0].mean((1, 2)))
    assert not parse_reward("redness").reads_prompts
    with pytest.raises(RewardError, match="'source'"):
        parse_reward("redness(source='os:system')")


def test_a_class_takes_the_name_and_its_arguments() -> None:
    @register("calm")
    class Quiet(Reward):
        """Calm."""

        def __init__(self, strength: float = 1.0) -> None:
            self.strength = strength

        def score(self, images: Tensor, prompts: list[str], targets: object) -> Tensor:
            return -self.strength * images.diff(dim=3).abs().mean((1, 2, 3))

    assert Quiet.name == "calm"
    assert parse_reward("calm(2.0)") == Quiet(2.0)
    assert str(Quiet(strength=3)) == "calm(strength=3)"
    assert set(Quiet()(IMAGES, ["", ""]).parts) == {"calm"}
    with pytest.raises(RewardError, match="registered as 'calm'"):
        register("quiet", Quiet)
    with pytest.raises(RewardError, match="strength"):
        parse_reward("calm(speed=1)")


def test_a_reward_that_is_made_is_short_for_its_expression() -> None:
    register("mix", parse_reward("min(zscore(brightness), zscore(tv))"))
    assert registry.REGISTRY["mix"].summary == "min(zscore(brightness), zscore(tv))"
    assert str(parse_reward("2*mix + jpeg")) == "2*min(zscore(brightness), zscore(tv)) + jpeg"
    with pytest.raises(RewardError, match="no arguments"):
        parse_reward("mix(3)")


def test_names_that_are_taken() -> None:
    with pytest.raises(RewardError, match=r"'clip' is taken by .*clip:ClipScore; choose another$"):
        register("clip", redness, replace=True)
    register("mine", redness)
    register("mine", redness)  # a cell that runs again, a file that is loaded again
    with pytest.raises(RewardError, match="replace=True"):
        register("mine", lambda images: images.mean((1, 2, 3)))
    register("mine", lambda images: images.mean((1, 2, 3)), replace=True)
    torch.testing.assert_close(parse_reward("mine")(IMAGES, ["", ""]).total, IMAGES.mean((1, 2, 3)))
    mix = parse_reward("tv + jpeg")
    register("mix", mix)
    with pytest.raises(RewardError, match="taken"):
        register("mix", parse_reward("tv - jpeg"))


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a-b", "2fast", "in", "None", "True", "lambda", "a:b", "m.py:f", "a(", "'a'", "1", "a.", "a+b", "*"],
)
def test_names_that_cannot_stand_in_an_expression(name: str) -> None:
    with pytest.raises(RewardError, match="cannot be the name"):
        register(name, redness)
    assert name not in registry.REGISTRY


@pytest.mark.parametrize("name", ["a", "style2.1", "größe", "_x", "a.b.c", "e5"])
def test_names_that_can(name: str) -> None:
    register(name, redness)
    assert str(parse_reward(f"0.5*{name} + {name}(factor=2)")) == f"0.5*{name} + {name}(factor=2)"


@pytest.mark.parametrize("thing", [3, "clip", [redness]])
def test_what_is_no_reward_is_refused(thing: object) -> None:
    with pytest.raises(RewardError, match="a function of images or a Reward"):
        register("thing", thing)


def test_a_file_may_be_loaded_twice_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from alignprop_pipe.rewards import register\n@register('mine')\ndef mine(images):\n"
        "    return images.mean((1, 2, 3))\ndef other(images):\n    return images.amax((1, 2, 3))\n"
    )
    reward = parse_reward("mine.py:mine + mine.py:other + mine", allow_code=True)
    assert str(reward) == "mine.py:mine + mine.py:other + mine"
    assert registry.REGISTRY["mine"].where.endswith("mine.py:mine")
    with pytest.raises(RewardError, match="taken by .*mine.py:mine"):
        register("mine", redness)


def test_close_names_are_offered() -> None:
    register("redness", redness)
    with pytest.raises(RewardError, match="did you mean redness"):
        parse_reward("rednes")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that names two rewards, one whose name is taken and one that cannot be imported."""
    about = tmp_path / "warm_rewards-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-rewards\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[alignprop.rewards]\nwarm_plugin = warm_rewards:warmth\ncool_plugin = warm_rewards:Cool\n"
        "jpeg = warm_rewards:warmth\nbroken_plugin = warm_rewards.nothing:x\n"
    )
    (tmp_path / "warm_rewards.py").write_text(
        "from alignprop_pipe.rewards import Reward\n"
        'def warmth(images, factor=1.0):\n    """How warm."""\n    return factor * images[:, 0].mean((1, 2))\n'
        'class Cool(Reward):\n    """How cool."""\n    name = "cool"\n'
        "    def score(self, images, prompts, targets):\n        return images[:, 2].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_asked", set())
    return tmp_path


def test_rewards_of_installed_packages(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = parse_reward("2*warm_plugin(factor=0.5) - cool_plugin")
    torch.testing.assert_close(reward(IMAGES, ["", ""]).total, IMAGES[:, 0].mean((1, 2)) - IMAGES[:, 2].mean((1, 2)))
    assert registry.REGISTRY["warm_plugin"].summary == "How warm."
    assert parse_reward("jpeg") == REGISTRY["jpeg"].make()  # ours goes first
    left_out = [record.getMessage() for record in caplog.records]
    assert len(left_out) == 2
    assert any("'jpeg'" in text and "is taken" in text for text in left_out)
    assert any("'broken_plugin'" in text and "No module named" in text for text in left_out)
    with pytest.raises(RewardError, match="did you mean warm_plugin"):
        parse_reward("warm_plugins")


def test_a_class_carries_its_entry_into_the_list() -> None:
    @register("warm")
    class Warm(Reward):
        """Never shown, since the entry says more."""

        entry = RewardEntry(summary="red minus blue", licence="MIT", range_text="-1 to 1")

        def score(self, images: Tensor, prompts: list[str], targets: object) -> Tensor:
            return (images[:, 0] - images[:, 2]).mean((1, 2))

    entry = registry.REGISTRY["warm"]
    assert (entry.name, entry.summary, entry.licence, entry.range_text) == ("warm", "red minus blue", "MIT", "-1 to 1")
    assert entry.where.endswith("Warm")


def test_a_new_reward_is_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "rewards" / "scorers"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "warmth.py").write_text(
        "raise RuntimeError('reading the list imports nothing')\n\n\nclass Warmth(Reward):\n"
        "    name = 'warmth'\n"
        "    entry = RewardEntry(summary='how ' 'warm', size_mb=3.5, weights=(('me/warm', 'w.pt'),))\n"
        "\n\nclass Cold(Reward):\n    name = 'cold'\n"
    )
    (found,) = entries_in(tmp_path / "rewards", "alignprop_pipe.rewards")
    wanted = RewardEntry(
        name="warmth", where="alignprop_pipe.rewards.scorers.warmth:Warmth", summary="how warm", size_mb=3.5,
        weights=(("me/warm", "w.pt"),),
    )  # fmt: skip
    assert found == wanted
    (folder / "warmth.py").write_text("class Warmth(Reward):\n    name = N\n    entry = RewardEntry(summary='')\n")
    (folder / "other.py").write_text("class Other(Reward):\n    entry: object = RewardEntry(summary='')\n")
    with pytest.raises(ValueError, match="Other has an entry and no name"):
        list(entries_in(tmp_path / "rewards", "alignprop_pipe.rewards"))
    (folder / "other.py").unlink()
    with pytest.raises(ValueError, match="malformed"):
        list(entries_in(tmp_path / "rewards", "alignprop_pipe.rewards"))


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_what_is_read_from_a_file_is_what_its_class_carries(entry: RewardEntry) -> None:
    module, _, name = entry.where.partition(":")
    assert getattr(import_module(module), name).entry == entry
