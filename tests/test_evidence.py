"""Evidence: the same noise whatever the batch, scores that agree with a computation by hand, nothing left behind."""

import dataclasses
import math

import pytest
import torch
from miniatures import sd15, wan

from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.errors import AlignError, PipelineError, PromptError
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Evidence
from alignprop_pipe.rewards.base import Reward
from alignprop_pipe.rewards.registry import parse_reward
from alignprop_pipe.training.evidence import diversity, evaluate, measures_of, paired_change

PROMPTS = PromptSet(
    ("a red dog", "two cats", "three birds on the snow", "a boat", "one house"), {"wanted": (0.1, 0.2, 0.3, 0.4, 0.5)}
)


class Brightness(Reward):
    name = "brightness"

    def score(self, images, prompts, targets):
        del prompts, targets
        return images.mean(dim=(1, 2, 3))


class NearWanted(Reward):
    """A judge that reads the targets and logs something besides."""

    name = "near"
    trainable = False

    def score(self, images, prompts, targets):
        assert len(prompts) == len(images) == len(targets["wanted"])
        return images.mean(dim=(1, 2, 3)) - torch.tensor(targets["wanted"])

    def extras(self, images, prompts, targets):
        del images, targets
        return {"near.words": torch.tensor([float(len(prompt.split())) for prompt in prompts])}


def settings(**changed) -> AlignConfig:
    fixed = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16, "eta": 1.0}
    return AlignConfig(seed=5).replace(**{**fixed, **changed})


@pytest.fixture(scope="module")
def pipe():
    return sd15()


def look(pipe, reward=None, judges=None, prompts=PROMPTS, step=0, **changed):
    judges = [NearWanted()] if judges is None else judges
    return evaluate(pipe, reward or Brightness(), judges, prompts, settings(**changed), step)


def pictures(evidence: Evidence) -> torch.Tensor:
    assert evidence.images is not None
    return evidence.images


def pictures_differ(first, second) -> float:
    return (pictures(first) - pictures(second)).abs().max().item()


# --- the noise -----------------------------------------------------------------------------------------------------


def test_batch_size_changes_nothing(pipe):
    whole = look(pipe, eval_batch_size=5)
    for size in (1, 2, 99):
        split = look(pipe, eval_batch_size=size)
        # Other matrix shapes round otherwise: float32, three steps, eta 1 (fresh noise in every step).
        assert pictures_differ(whole, split) < 1e-5
        for name, values in whole.per_prompt.items():
            assert split.per_prompt[name] == pytest.approx(values, abs=1e-5)


def test_noise_is_the_same_before_and_after_and_new_for_another_seed(pipe):
    before, after = look(pipe, step=0), look(pipe, step=40)
    assert pictures_differ(before, after) == 0
    assert dataclasses.replace(after, step=0, images=None) == dataclasses.replace(before, images=None)
    assert pictures_differ(before, look(pipe, seed=6)) > 0.01
    assert (before.step, after.step) == (0, 40)


def test_noise_belongs_to_the_place_not_to_the_prompt(pipe):
    twice = look(pipe, prompts=PromptSet(("a dog", "a dog")), judges=())
    assert (pictures(twice)[0] - pictures(twice)[1]).abs().max() > 0.01


def test_a_changed_denoiser_shows_in_the_pictures(pipe):
    before = look(pipe)
    weight = pipe.unet.conv_out.weight
    kept = weight.data.clone()
    weight.data.mul_(1.5)
    after = look(pipe)
    weight.data.copy_(kept)
    assert pictures_differ(before, after) > 1e-3
    change = paired_change(before, after)["reward"]
    assert change.difference == pytest.approx(after.reward - before.reward)
    assert change.difference != 0


# --- the scores ------------------------------------------------------------------------------------------------------


def test_scores_agree_with_a_computation_by_hand(pipe):
    got = look(pipe, eval_batch_size=2)
    bright = pictures(got).mean(dim=(1, 2, 3))
    near = bright - torch.tensor(PROMPTS.targets["wanted"])
    assert got.prompts == PROMPTS.prompts
    assert pictures(got).shape == (5, 3, 16, 16)
    assert 0 <= pictures(got).min() <= pictures(got).max() <= 1
    assert list(got.per_prompt) == ["reward", "brightness", "near", "near.words"]
    assert got.per_prompt["reward"] == got.per_prompt["brightness"] == pytest.approx(bright.tolist())
    assert got.per_prompt["near"] == pytest.approx(near.tolist())
    assert got.per_prompt["near.words"] == (3, 2, 5, 2, 2)
    assert got.reward == got.parts["brightness"] == pytest.approx(bright.mean().item())
    assert got.judges == pytest.approx({"near": near.mean().item(), "near.words": 14 / 5})


def test_sums_and_names_that_are_taken(pipe):
    reward = 2 * Brightness() + 3 * Brightness()
    got = look(pipe, reward, [Brightness(), -1 * Brightness(), NearWanted()], num_inference_steps=1)
    assert list(got.parts) == ["brightness", "brightness_2"]
    assert list(got.judges) == ["brightness_3", "-brightness", "brightness_4", "near", "near.words"]
    assert got.reward == pytest.approx(5 * got.parts["brightness"])
    assert got.judges["-brightness"] == pytest.approx(-got.parts["brightness"])
    assert set(got.per_prompt) == {"reward", *got.parts, *got.judges}


def test_a_part_called_reward_does_not_hide_the_total(pipe):
    named = Brightness()
    named.name = "reward"
    got = look(pipe, 2 * named, [], num_inference_steps=1)
    assert list(got.per_prompt) == ["reward", "reward_2"]
    assert got.reward == pytest.approx(2 * got.parts["reward_2"])


def test_videos_are_scored_on_every_frame():
    class Frames(Brightness):
        seen = 0

        def score(self, images, prompts, targets):
            Frames.seen += 1
            return super().score(images, prompts, targets)

    pipe, config = wan(), settings(num_inference_steps=2, eval_batch_size=2)
    prompts = PromptSet(PROMPTS.prompts[:3])
    got = evaluate(pipe, Frames(), [], prompts, config, 0, num_frames=5, max_sequence_length=16)
    assert Frames.seen == 2 * 5  # two batches of five frames
    assert pictures(got).shape == (3, 3, 16, 16)
    assert len(got.per_prompt["brightness"]) == 3
    assert got.reward != pytest.approx(
        pictures(got).mean().item(), abs=1e-9
    )  # the mean of all frames, not of the kept one


# --- what must stay as it was ----------------------------------------------------------------------------------------


def state_of(pipe) -> list:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [
        *((m.training, dict(vars(m)).keys(), len(m._forward_hooks)) for part in modules for m in part.modules()),
        *((p.requires_grad, p.grad, p.dtype, p.sum().item()) for part in modules for p in part.parameters()),
    ]


@pytest.mark.parametrize("progress", [None, {}, {"leave": False}])
def test_the_pipeline_is_left_as_it_was(progress, capsys):
    pipe = sd15()
    vars(pipe).pop("_progress_bar_config", None)
    if progress is not None:
        pipe.set_progress_bar_config(**progress)
    pipe.unet.train()
    pipe.unet.conv_in.weight.requires_grad_(True)
    before, drawn = state_of(pipe), torch.get_rng_state()
    got = look(pipe)
    assert state_of(pipe) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(pipe).get("_progress_bar_config") == progress
    assert not pictures(got).requires_grad
    assert capsys.readouterr() == ("", "")


def test_the_progress_bar_comes_back_after_a_failure(pipe):
    class Breaks(Brightness):
        def score(self, images, prompts, targets):
            del images, prompts, targets
            raise KeyboardInterrupt

    pipe.set_progress_bar_config(leave=False)
    with pytest.raises(KeyboardInterrupt):
        look(pipe, Breaks())
    assert pipe._progress_bar_config == {"leave": False}
    pipe.set_progress_bar_config(disable=True)


def test_no_prompts_is_told(pipe):
    with pytest.raises(PromptError, match="eval_prompts=0"):
        look(pipe, prompts=PromptSet(()))


def test_pictures_as_arrays_are_taken_and_what_is_no_picture_is_told(pipe, monkeypatch):
    called = type(pipe).__call__

    def as_arrays(self, prompt, generator, output_type):
        return called(self, prompt, generator=generator, num_inference_steps=1, output_type="np")

    monkeypatch.setattr(type(pipe), "__call__", as_arrays)
    assert len(look(pipe).images) == 5

    def as_words(self, prompt, generator, output_type):
        return (list(prompt),)

    monkeypatch.setattr(type(pipe), "__call__", as_words)
    with pytest.raises(PipelineError, match=r"list.*pictures .* or videos .* are needed"):
        look(pipe)

    def too_few(self, prompt, generator, output_type):
        return called(self, prompt[:1], generator=generator[:1], num_inference_steps=1, output_type=output_type)

    monkeypatch.setattr(type(pipe), "__call__", too_few)
    with pytest.raises(PipelineError, match="drew 1 for 5 prompts"):
        look(pipe)


# --- diversity and comparison ----------------------------------------------------------------------------------------


def test_diversity():
    black, white = torch.zeros(1, 3, 32, 48), torch.ones(1, 3, 32, 48)
    assert math.isnan(diversity(black))  # of one picture nothing is known
    assert diversity(torch.cat([black, black])) == 0
    assert diversity(torch.cat([black, white])) == pytest.approx(1)
    assert diversity(torch.cat([black, black, white])) == pytest.approx(2 / 3)
    noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = [(noise[i] - noise[j]).square().mean().sqrt() for i in range(6) for j in range(i)]
    assert diversity(noise) == pytest.approx(torch.stack(pairs).mean().item())
    assert diversity(noise) == pytest.approx(1 / math.sqrt(6), abs=0.01)
    # Detail under a sixteenth of the picture does not count: a checkerboard of single pixels is grey.
    checks = torch.stack([torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
    checks[0, :, ::2, ::2] = checks[0, :, 1::2, 1::2] = 0
    assert diversity(checks) == pytest.approx(0.5)


def test_paired_change(pipe):
    base = look(pipe, num_inference_steps=1)
    before = dataclasses.replace(base, per_prompt={"reward": (1.0, 2.0, 3.0, 4.0, 5.0), "gone": (0.0,) * 5})
    after = dataclasses.replace(base, per_prompt={"reward": (2.0, 2.0, 5.0, 4.0, 7.0), "new": (0.0,) * 5})
    changes = paired_change(before, after)
    assert list(changes) == ["reward"]
    change = changes["reward"]
    assert (change.before, change.after, change.difference) == (3.0, 4.0, 1.0)
    assert change.standard_error == pytest.approx(torch.tensor([1.0, 0, 2, 0, 2]).std().item() / math.sqrt(5))


def test_a_change_that_cannot_be_computed(pipe):
    base = look(pipe, num_inference_steps=1)
    other = dataclasses.replace(base, prompts=base.prompts[::-1])
    with pytest.raises(AlignError, match="the same prompts"):
        paired_change(base, other)
    alone = dataclasses.replace(base, prompts=("a",), per_prompt={"reward": (1.0,)})
    assert math.isnan(paired_change(alone, alone)["reward"].standard_error)


def test_judges_are_told_from_what_they_log_besides(pipe):
    """Names with a dot and parts of a sum included: only the judges themselves are main judges."""
    got = look(pipe, judges=[parse_reward("0.5*jpeg - brightness"), NearWanted(), parse_reward("-brightness")])
    assert got.main_judges == ["0.5*jpeg - brightness", "near", "-brightness"]
    assert {"jpeg", "jpeg_kb", "near.words"} <= set(got.judges) - set(got.main_judges)
    assert look(pipe, judges=[]).main_judges == []


def test_what_pictures_are_like():
    white, halves = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    halves[:, :, :4] = 1
    grey = torch.full((3, 8, 8), 0.5)
    found = measures_of(torch.stack([white, halves, grey]))
    assert found["contrast"] == (0.0, 0.5, 0.0)
    assert found["clipped"] == (1.0, 1.0, 0.0)
    assert sum(found["distance"]) / 3 == pytest.approx(diversity(torch.stack([white, halves, grey])))
