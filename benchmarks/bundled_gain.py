"""What alignment gains on the bundled model, and what plain training of the same LoRA gains in the same time.

    python benchmarks/bundled_gain.py [--seeds 0 1 2] [--only align|plain] [--wrong SHARE]

Both start from the model that ships and adapt the same LoRA. `align` is `alignprop train` as it comes. `plain` is
ordinary denoising training (AdamW, the same rates) on pictures of the bundled world, with the same share of wrong
captions that the base was trained on: what more of the same data gives; `--wrong 0` corrects every caption. The judge,
which neither ever sees, says how many of 100 held-out prompts are drawn right in subject, number and background.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import mse_loss

from alignprop_pipe import AlignConfig, AlignPropPipeline, Evidence, PromptSet, evaluate, parse_reward
from alignprop_pipe.bundled import REWARD
from alignprop_pipe.diffusion import lora, patching, pipeline_parts

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "bundled_model"))
import render
from train_denoiser import WRONG

JUDGE = "emoji_judge"


def aligned(seed: int) -> tuple[float, float, float]:
    pipe = AlignPropPipeline.from_pretrained("emoji")
    began = time.monotonic()
    result = pipe.align(REWARD, "emoji", seed=seed)
    assert result.before
    assert result.after
    trained = sum(record.seconds for record in result.history)
    show(f"align  seed {seed}", result.before, result.after, trained, time.monotonic() - began)
    return trained, result.before.judges[JUDGE], result.after.judges[JUDGE]


def plain(seed: int, seconds: float, wrong: float) -> None:
    """Train the same LoRA on noisy latents of pictures, for as long as `align` trained, by the same cosine."""
    config = AlignConfig.preset("emoji").replace(seed=seed)
    pipe = AlignPropPipeline.from_pretrained("emoji")
    judge, reward = parse_reward(JUDGE), parse_reward(REWARD)
    held_out = PromptSet.load("emoji").split(config.evaluation.eval_prompts, seed)[1]
    before = evaluate(pipe, reward, [judge], held_out, config, 0)
    denoisers = pipeline_parts.denoisers(pipe)
    lora.attach(denoisers, config.lora, seed)
    parameters = lora.trainable(denoisers)
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    began, step = time.monotonic(), 0
    with patching.frozen_for_training(pipe, parameters):
        while (elapsed := time.monotonic() - began) < seconds:
            optimizer.param_groups[0]["lr"] = config.optimizer.lr * (1 + math.cos(math.pi * elapsed / seconds)) / 2
            denoising_loss(pipe, seed, step, wrong).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    after = evaluate(pipe, reward, [judge], held_out, config, step)
    show(f"plain  seed {seed}, {100 * wrong:g} % wrong, {step} steps", before, after, seconds, time.monotonic() - began)


def denoising_loss(pipe: AlignPropPipeline, seed: int, step: int, wrong: float, size: int = 32) -> torch.Tensor:
    batch = render.batch(size, seed, 777, step)
    rng = np.random.default_rng((seed, 778, step))
    told = np.where(rng.random((size, 1)) < wrong, rng.permutation(batch.labels), batch.labels)
    texts = [render.caption(label, rng) if rng.random() > 0.1 else "" for label in told]
    generator = torch.Generator().manual_seed(seed * 10**6 + step)
    with torch.no_grad():
        pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        clean = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
        words = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(words).last_hidden_state
    timesteps = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (size,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
    wanted = pipe.scheduler.get_velocity(clean, noise, timesteps)
    return mse_loss(pipe.unet(noisy, timesteps, hidden).sample, wanted)


def show(name: str, before: Evidence, after: Evidence, trained: float, seconds: float) -> None:
    parts = [
        f"{key.removeprefix(JUDGE + '.')} {100 * before.judges[key]:.0f} -> {100 * after.judges[key]:.0f}"
        for key in before.judges
    ]
    print(
        f"{name}: {', '.join(parts)} %; reward {before.reward:.3f} -> {after.reward:.3f}; diversity "
        f"{before.diversity:.3f} -> {after.diversity:.3f}; trained {trained:.0f} s, {seconds:.0f} s in all",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--only", choices=["align", "plain"])
    options.add_argument("--seconds", type=float, default=100.0, help="for plain alone: how long to train")
    options.add_argument("--wrong", type=float, default=WRONG, help="share of plain training's captions that are wrong")
    chosen = options.parse_args()
    for seed in chosen.seeds:
        seconds = chosen.seconds if chosen.only == "plain" else aligned(seed)[0]
        if chosen.only != "align":
            plain(seed, seconds, chosen.wrong)


if __name__ == "__main__":
    main()
