"""The figures: judge, scorer, detector and answerer on fresh renderings, then on pictures of the text-to-image model.

`python measure.py work/weak` prints them and writes weak-measured.json and weak-measured.png next to that folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import SEED, WORK, pixels
from diffusers import DiffusionPipeline
from PIL import Image
from render import ATTRIBUTES, BACKGROUNDS, COUNTS, SUBJECTS, batch, caption
from torch import Tensor
from train_answerer import claims, facts, questions
from train_judge import verdicts
from train_scorer import best_prompts
from transformers import AutoModelForImageClassification, CLIPModel, CLIPTokenizer
from views import decoded

from alignprop_pipe.rewards import Ask, Contains, Count

AT_ONCE, QUESTIONS = 10, 1500


def prompt_labels(number: int) -> np.ndarray:
    """Labels that take all subjects in turn and spread over counts and backgrounds, int [number, 3]."""
    i = np.arange(number)
    turn = i // len(SUBJECTS)
    return np.stack([i % len(SUBJECTS), (i + turn) % len(COUNTS), (i // len(COUNTS) + turn) % len(BACKGROUNDS)], axis=1)


def shares(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How often each attribute agrees, and how often all do."""
    same = found == wanted
    figures = dict(zip(ATTRIBUTES, same.float().mean(0).tolist(), strict=True))
    return {name: round(share, 4) for name, share in figures.items()} | {
        "all": round(same.all(1).float().mean().item(), 4)
    }


def counted(detector: Path, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How often the rewards `contains` and `count` find the subject, and as many of it, of labels [n, 3]."""
    targets = {name: [ATTRIBUTES[name][i] for i in column] for name, column in zip(ATTRIBUTES, labels.T, strict=True)}
    words = [""] * len(images)
    rewards = {"subject": (Contains, "contains.right"), "count": (Count, "count.right")}
    return {
        name: round(kind(model=detector)(images, words, targets).parts[part].mean().item(), 4)
        for name, (kind, part) in rewards.items()
    }


@torch.no_grad()
def answered(answerer: Path, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How often `ask` says yes to what labels [n, 3] say, and no where a word or two of it are wrong: half each."""
    about, figures = facts(labels.numpy()), {}
    kinds = {"subject": "subject", "count": "number", "background": "background", "all": "everything"}
    ask = Ask("{prompt}", model=answerer)
    for column, kind in kinds.items():
        right, rng = [], np.random.default_rng((SEED, 778))
        for _ in range(max(1, QUESTIONS // len(images))):
            said = claims(about, kind, rng)
            truth, asked = torch.from_numpy(said.truth(about)), questions(said, rng)
            odds = [ask(part, asked[200 * i : 200 * i + len(part)]).total for i, part in enumerate(images.split(200))]
            right.append(((torch.cat(odds) > 0) == truth)[truth != 0.5])
        figures[column] = round(torch.cat(right).float().mean().item(), 4)
    return figures


@torch.no_grad()
def judged(judge: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([verdicts(judge(part * 2 - 1).logits) for part in images.split(200)])


def sampled(pipe: DiffusionPipeline, prompts: list[str], steps: int, guidance: float) -> Tensor:
    """One picture for each prompt, from noise of its own number; [n, 3, 64, 64] in [0, 1]."""
    made = []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        noise = [torch.Generator().manual_seed(SEED + start + i) for i in range(len(part))]
        made.append(
            pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt").images
        )
    return torch.cat(made).float()


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    tiles = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(tiles[i : i + columns]), axis=1) for i in range(0, len(tiles), columns)]
    shown = Image.fromarray(np.concatenate(rows))
    return shown.resize((2 * shown.width, 2 * shown.height), Image.Resampling.NEAREST)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=WORK / "weak", help="folder of the text-to-image model")
    parser.add_argument("--judge", type=Path, default=WORK / "judge")
    parser.add_argument("--scorer", type=Path, default=WORK / "scorer")
    parser.add_argument("--detector", type=Path, default=WORK / "detector")
    parser.add_argument("--answerer", type=Path, default=WORK / "answerer")
    parser.add_argument("--number", type=int, default=300, help="pictures to sample")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="where the .json and .png go (default: next to the model)")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    judge = AutoModelForImageClassification.from_pretrained(chosen.judge, dtype=torch.float32).eval()
    scorer = CLIPModel.from_pretrained(chosen.scorer, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(chosen.scorer)

    fresh = batch(2000, SEED, 777)
    truth = torch.from_numpy(fresh.labels)
    figures = {}
    for name, images in (
        ("rendered", pixels(fresh.images)),
        (
            "autoencoded",
            decoded(fresh.images, torch.Generator().manual_seed(SEED), most=0, dtype=torch.float32).float() / 255,
        ),
    ):
        figures[f"judge on {name}"] = shares(judged(judge, images), truth)
        figures[f"scorer on {name}"] = shares(best_prompts(scorer, tokens, images), truth)
        figures[f"detector on {name}"] = counted(chosen.detector, images, truth)
        figures[f"answerer on {name}"] = answered(chosen.answerer, images, truth)

    pipe = DiffusionPipeline.from_pretrained(chosen.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    labels = prompt_labels(chosen.number)
    plain = np.random.default_rng(SEED)
    prompts = [caption(label, plain, complete=True) for label in labels]
    began = time.monotonic()
    images = sampled(pipe, prompts, chosen.steps, chosen.guidance)
    figures["seconds for 8 pictures"] = round(8 * (time.monotonic() - began) / len(images), 2)
    verdict = judged(judge, images)
    figures["samples by the judge"] = shares(verdict, torch.from_numpy(labels))
    figures["scorer agrees with the judge"] = shares(best_prompts(scorer, tokens, images), verdict)
    figures["detector agrees with the judge"] = counted(chosen.detector, images, verdict)
    figures["answerer agrees with the judge"] = answered(chosen.answerer, images, verdict)

    out = chosen.out or chosen.model.with_name(f"{chosen.model.name}-measured")
    out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    grid(images[:64]).save(out.with_suffix(".png"))
    for name, figure in figures.items():
        print(f"{name}: {figure}")


if __name__ == "__main__":
    sys.exit(main())
