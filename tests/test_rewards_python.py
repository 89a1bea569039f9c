"""Users' own functions: how they are found, called and named, and what is said when they are not there."""

import functools
import textwrap
from pathlib import Path

import pytest
import torch

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import Brightness, Jpeg, PythonReward, Reward, as_reward, parse_reward
from alignprop_pipe.rewards.guard import check_reward

typed = functools.partial(parse_reward, allow_code=True)

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a dog", "two cats"]
TARGETS = {"count": [1, 2]}


def of_images(images):
    return images.mean(dim=(1, 2, 3))


def of_prompts(images, prompts):
    return of_images(images) * images.new_tensor([len(prompt) for prompt in prompts])


def of_targets(images, prompts, targets):
    return of_prompts(images, prompts) * images.new_tensor(targets["count"])


def by_name(images, targets):
    return of_images(images) * images.new_tensor(targets["count"])


def by_keyword(images, *, prompts, strength=1.0):
    return of_prompts(images, prompts) * strength


def by_position(pixels, words, columns=None):
    assert columns is None
    return of_prompts(pixels, words)


def of_columns(images, prompts, **targets):
    return of_targets(images, prompts, targets)


def anything(*args):
    return of_targets(*args)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        return of_prompts(images, prompts) * self.scale


class Mine(Reward):
    name = "mine"

    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, images, prompts, targets):
        return of_images(images) * self.scale


mixed = Brightness() + Jpeg()
number = 3

CALLED_WITH = [
    (of_images, 0),
    (of_prompts, 1),
    (of_targets, 2),
    (by_name, 3),
    (by_keyword, 1),
    (by_position, 1),
    (of_columns, 2),
    (anything, 2),
    (Network(), 1),
    (Network, 1),
    (functools.partial(by_keyword, strength=1.0), 1),
    (Mine(), 0),
    (Mine, 0),
]


@pytest.mark.parametrize(("function", "kind"), CALLED_WITH)
def test_a_function_gets_what_its_signature_asks_for(function, kind):
    plain, lengths, counts = of_images(IMAGES), torch.tensor([5, 8]), torch.tensor([1, 2])
    expected = [plain, plain * lengths, plain * lengths * counts, plain * counts][kind]
    torch.testing.assert_close(as_reward(function)(IMAGES, PROMPTS, TARGETS).total, expected)


def test_a_function_is_named_in_text_and_back():
    reward = as_reward(of_images) + 0.5 * as_reward(f"{__name__}:by_keyword")
    assert str(reward) == f"{__name__}:of_images + 0.5*{__name__}:by_keyword"
    again = typed(str(reward))
    torch.testing.assert_close(again(IMAGES, PROMPTS).total, reward(IMAGES, PROMPTS).total)
    assert list(again(IMAGES, PROMPTS).parts) == ["of_images", "by_keyword"]
    assert as_reward(of_images) == as_reward(of_images) != as_reward(of_prompts)


def test_options_are_passed_on():
    reward = typed(f"{__name__}:by_keyword(strength=3)")
    torch.testing.assert_close(reward(IMAGES, PROMPTS).total, 3 * of_prompts(IMAGES, PROMPTS))
    assert str(reward) == f"{__name__}:by_keyword(strength=3)"
    assert typed(f"{__name__}:Mine(scale=2)")(IMAGES, PROMPTS).total.equal(2 * of_images(IMAGES))


def test_a_reward_found_by_name_logs_its_own_parts():
    reward = typed(f"0.5*{__name__}:mixed")
    assert list(reward(IMAGES, PROMPTS).parts) == ["brightness", "jpeg", "jpeg_kb"]
    assert list(typed(f"{__name__}:Mine")(IMAGES, PROMPTS).parts) == ["mine"]
    check_reward(reward, IMAGES, PROMPTS, {})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    source = """
        from dataclasses import dataclass
        from torch import nn
        @dataclass
        class Plain:
            power: int = 2
            def __call__(self, images):
                return (images ** self.power).mean(dim=(1, 2, 3))
        class Score(nn.Module):
            def __init__(self, power=2):
                super().__init__()
                self.power = power
            def forward(self, images):
                return (images ** self.power).mean(dim=(1, 2, 3))
        def blur(images): return images.mean(dim=(1, 2, 3))
        squared = Plain()
        sevens = [7]
    """
    for name in ("mine.py", "a b/mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(source))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_found_from_the_current_folder(folder):
    for text in ("mine.py:blur", "./mine.py:squared", f"{folder}/mine.py:Score(power=3)", 'python("a b/mine.py:blur")'):
        reward = typed(f"0.5*brightness + {text}")
        assert str(reward) == f"0.5*brightness + {text}"
        assert reward(IMAGES, PROMPTS).total.shape == (2,)
    assert typed("mine.py:blur").name == "blur"


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("mnie.py:blur", "did you mean mine.py"),
        ("nowhere/x.py:blur", "give a path"),
        ("mine.py:blurr", "it has: blur"),
        ("mine.py:sevens", "list: a function of images is needed"),
        ("mine.py:Score(strength=3)", "strength"),
        ("math:pi.nothing", "math has no 'nothing'"),
        (
            "mine.py:Plain(power=3)",
            r"mine.*:Plain is a class.*only classes of Reward and torch.nn.Module are made.*instance",
        ),
        ("mine.py:nn.Softmax", "mine.py:nn is the module torch.nn: name it before the colon"),
        ("broken.py:f", "SyntaxError"),
        ("needs.py:f", "no_such_package"),
        ("no_such_package.sub:f", "no_such_package/sub.py:f"),
        (f"{__name__}:nothing", "it has"),
        (f"{__name__}:number", "int"),
        (f"{__name__}:by_keyword(strenght=3)", "strenght"),
        (f"{__name__}:mixed(scale=3)", "takes no scale"),
        ('python("nothing")', "module:function or file.py:function"),
        ("python()", "source"),
    ],
)
def test_what_is_missing_is_named(folder, text, way_out):
    with pytest.raises(RewardError, match=way_out):
        typed(text)


def test_a_signature_that_cannot_be_served_is_refused():
    with pytest.raises(RewardError, match="takes 0 arguments"):
        as_reward(lambda: 0)
    with pytest.raises(RewardError, match="takes 4 arguments"):
        as_reward(lambda a, b, c, d: a + b + c + d)
    with pytest.raises(RewardError, match="cannot be called"):
        as_reward(lambda images, *, level: images * level)


def test_a_lambda_still_has_a_name_and_a_text():
    reward = PythonReward(lambda images: images.mean(dim=(1, 2, 3)))
    assert reward.name == "lambda"
    assert str(reward).startswith("python(")


def test_to_moves_a_network():
    reward = as_reward(Network())
    assert isinstance(reward, PythonReward)
    reward.to("meta")
    assert reward.inner.scale.device.type == "meta"


def test_a_file_that_is_named_twice_is_run_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "counted.py"
    text = "with open({!r}, 'a') as file:\n    file.write('x')\ndef score(images):\n    return images.mean((1, 2, 3))\n"
    file.write_text(text.format(str(tmp_path / "runs")))
    first, again = (parse_reward(f"{file}:score", allow_code=True) for _ in range(2))
    assert first.inner is again.inner
    assert (tmp_path / "runs").read_text() == "x"
    file.write_text(file.read_text() + "# changed\n")
    assert parse_reward(f"{file}:score", allow_code=True).inner is not first.inner
    assert (tmp_path / "runs").read_text() == "xx"
