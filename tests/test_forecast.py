"""The forecast: it leaves the pipeline as it was, and grows where a run gets longer."""

from typing import Any

import miniatures
import psutil
import pytest
import torch
from aligning import adapter, align, aligned, pictures, same, settings, state

from alignprop_pipe.config.truncation import Truncation, truncation_from_text
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.seeds import generator_for
from alignprop_pipe.training.forecast import Forecast, Probe, forecast, held_at_once, looks, scaled

MB = 2**20
# Two steps of which one is graded, four of which two are: 1 s a step forward, 3 s a graded step backward, 0.5 s and
# 10 MB for the rest, 100 MB a graded step.
SHORT, LONG = Probe(2.25, 3.25, 110 * MB, 2), Probe(4.25, 6.25, 210 * MB, 4)


def cost(**changed: Any) -> Forecast:
    return scaled(miniatures.sd15(), settings(num_inference_steps=10, **changed), SHORT, LONG, 1000, 300 * MB)


@pytest.mark.parametrize(
    ("changed", "calls", "seconds"),
    [
        ({"truncation": "last:4"}, 14, 0.5 + 14 + 12),
        ({"truncation": "last:4", "checkpointing": "none"}, 10, 0.5 + 10 + 12),
        ({"truncation": "last:4", "checkpointing": "1"}, 13, 0.5 + 13 + 12),
        ({"truncation": "full"}, 20, 0.5 + 20 + 30),
        ({"truncation": "last:99"}, 20, 0.5 + 20 + 30),
        ({"truncation": "random:2-6"}, 14, 0.5 + 14 + 12),
        ({"truncation": "last:4", "gradient_accumulation_steps": 3}, 42, 3 * (0.5 + 14 + 12)),
    ],
    ids=str,
)
def test_denoiser_calls_and_seconds_by_hand(changed: dict[str, Any], calls: float, seconds: float) -> None:
    got = cost(**changed)
    assert got.denoiser_calls_per_step == calls
    assert got.seconds_per_step == pytest.approx(seconds)
    assert got.trainable_parameters == 1000


def test_memory_by_hand() -> None:
    pipe = miniatures.sd15()
    weights = 4 * sum(weight.numel() for weight in pipeline_parts.parameters(pipe))
    fixed = weights / MB + 16 * 1000 / MB + 10
    for changed, held in (
        ({"truncation": "full"}, 1),
        ({"truncation": "full", "checkpointing": "none"}, 10),
        ({"truncation": "last:4", "checkpointing": "none"}, 4),
        ({"truncation": "random:1-6", "checkpointing": "none"}, 6),  # the largest K decides
        ({"truncation": "random", "checkpointing": "3"}, 4),
        ({"truncation": "last:2", "checkpointing": "3"}, 2),
    ):
        assert cost(**changed).memory_mb == pytest.approx(fixed + 100 * held), changed


def test_the_process_fills_more_than_the_pipeline() -> None:
    """What it had filled before, and what a step needs besides."""
    got = cost(truncation="last:4", checkpointing="none")
    assert got.process_mb == pytest.approx(300 + 16 * 1000 / MB + 10 + 400)


@pytest.mark.parametrize(
    ("steps", "every", "prompts", "count"),
    [(60, 10, 16, 7), (60, 0, 16, 2), (61, 10, 16, 8), (60, 10, 0, 0), (1, 1, 4, 2)],
)
def test_the_time_has_every_look_in_it(steps: int, every: int, prompts: int, count: int) -> None:
    """A picture of an evaluation has the 0.25 s that a batch of two needs besides, and ten steps."""
    config = settings(num_inference_steps=10, steps=steps, eval_every=every, eval_prompts=prompts, batch_size=2)
    got = scaled(miniatures.sd15(), config, SHORT, LONG, 1000, 0)
    assert looks(config) == count
    assert got.seconds_per_picture == pytest.approx((0.25 + 10) / 2)
    assert got.seconds(config, prompts) == pytest.approx(steps * got.seconds_per_step + count * prompts * 5.125)


def test_noise_in_the_measurement_gives_no_negative_numbers() -> None:
    got = scaled(miniatures.sd15(), settings(), LONG, SHORT, 1000, 0)
    assert got.seconds_per_step >= 0
    assert got.memory_mb >= 0


@pytest.mark.parametrize("text", ["full", "last:3", "last:9", "random", "random:2-4", "random:2-9"])
def test_most_graded_steps_is_the_largest_draw(text: str) -> None:
    rule: Truncation = truncation_from_text(text)
    drawn = max(len(rule.plan(5, generator_for("truncation", seed))) for seed in range(60))
    assert rule.most(5) == drawn
    assert held_at_once(settings(checkpointing="none"), drawn) == drawn


def test_it_measures_a_real_pipeline_and_leaves_it_as_it_was() -> None:
    pipe = miniatures.sd15()
    drawn, before = pictures(pipe), state(pipe)
    rss = psutil.Process().memory_info().rss / MB
    config = settings(num_inference_steps=6, truncation="full", checkpointing="none")
    got = forecast(pipe, config)
    assert state(pipe) == before
    assert torch.equal(pictures(pipe), drawn)
    assert adapter(pipe) == []
    assert got.denoiser_calls_per_step == 6
    assert 0 < got.seconds_per_step < 600
    lora.attach(pipeline_parts.denoisers(pipe), config.lora, 0)
    assert got.trainable_parameters == sum(weight.numel() for weight in adapter(pipe))
    weights = 4 * sum(weight.numel() for weight in pipeline_parts.parameters(pipe))
    assert got.memory_mb > weights / MB
    assert got.process_mb >= 0.9 * rss
    # Twice the pictures keep about twice the activations, and those of one graded step are a small part of those of 6.
    larger = forecast(miniatures.sd15(), config.replace(batch_size=4))
    least = forecast(miniatures.sd15(), config.replace(checkpointing="all"))
    activations = got.memory_mb - least.memory_mb
    assert activations > 0
    assert larger.memory_mb - got.memory_mb == pytest.approx(6 / 5 * activations, rel=0.3)


def test_a_trained_adapter_survives() -> None:
    pipe = aligned()
    align(pipe, rank=3)
    weights, drawn, before = adapter(pipe), pictures(pipe), state(pipe)
    forecast(pipe, settings(rank=1))
    assert same(adapter(pipe), weights)
    assert torch.equal(pictures(pipe), drawn)
    assert state(pipe) == before


def test_what_cannot_be_aligned_is_said() -> None:
    pipe = miniatures.sd15()
    with pytest.raises(PipelineError, match="target_modules"):
        forecast(pipe, settings(target_modules=("no_such_layer",)))
    assert adapter(pipe) == []
