"""How close a training step comes to the denoiser calls that cannot be avoided, and whether memory is flat in T.

    python benchmarks/step_cost.py

Ratios within one run, on the bundled model with one thread: (1) the time of a rollout and its backward pass over the
time of the same denoiser calls alone; (2) the same with fewer recomputed steps; (3) bytes that autograd keeps, for
growing numbers of denoising steps.
"""

import statistics
import time
from collections.abc import Callable

import torch

from alignprop_pipe import AlignConfig, AlignPropPipeline, FullBackprop, LastK, PromptSet
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.rollout import autograd_on, rollout
from alignprop_pipe.records import PromptBatch
from alignprop_pipe.seeds import generator_for

BATCH = 4


def median_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def noise() -> list[torch.Generator]:
    return [generator_for("noise", 0, 0, i) for i in range(BATCH)]


def training_step(pipe: AlignPropPipeline, batch: PromptBatch, config: AlignConfig) -> int:
    """Rollout and backward; returns the bytes that autograd kept between the two."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = lora.trainable(pipeline_parts.denoisers(pipe))
    with patching.frozen_for_training(pipe, parameters), autograd_on():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = rollout(pipe, batch, config, noise(), generator_for("truncation", 0))
        made.images.mean().backward()
    weights = {p.untyped_storage().data_ptr() for p in pipeline_parts.parameters(pipe)}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def denoiser_calls(pipe: AlignPropPipeline, forward: int, graded: int) -> None:
    """The calls that no implementation can avoid: `forward` without a graph, `graded` with backward."""
    unet, size = pipe.unet, pipe.unet.config.sample_size
    latents = torch.randn(2 * BATCH, unet.config.in_channels, size, size)
    words = torch.randn(2 * BATCH, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)
    parameters = lora.trainable(pipeline_parts.denoisers(pipe))
    with patching.frozen_for_training(pipe, parameters):
        with torch.no_grad():
            for _ in range(forward):
                unet(latents, 500, words)
        for _ in range(graded):
            unet(latents.requires_grad_(), 500, words).sample.mean().backward()


def main() -> None:
    torch.set_num_threads(1)
    pipe = AlignPropPipeline.from_pretrained("emoji")
    batch = PromptSet.load("emoji").batch(0, 0, BATCH)
    base = AlignConfig.preset("emoji")
    lora.attach(pipeline_parts.denoisers(pipe), base.lora, 0)
    print(f"{'T':>3} {'K':>3} {'recompute':>9} {'step s':>7} {'calls s':>7} {'ratio':>6} {'kept MB':>8}")
    for steps, k in ((10, 1), (10, 5), (10, 10), (20, 10), (40, 10), (40, 40)):
        for recompute in ("all", "none"):
            if recompute == "none" and k > 10:
                continue
            rule = FullBackprop() if k == steps else LastK(k)
            config = base.replace(num_inference_steps=steps, truncation=rule, checkpointing=recompute)
            seconds = median_seconds(lambda config=config: training_step(pipe, batch, config))
            calls = median_seconds(lambda steps=steps, k=k: denoiser_calls(pipe, steps - k, k))
            kept = training_step(pipe, batch, config) / 2**20
            print(
                f"{steps:>3} {k:>3} {recompute:>9} {seconds:>7.2f} {calls:>7.2f} {seconds / calls:>6.2f} {kept:>8.1f}"
            )


if __name__ == "__main__":
    main()
