"""Stage 5: the detector, a small OWLv2 that finds the objects a picture holds: the rewards count, contains, without.

It learns by dense assignment: the patch that holds an object's centre answers for it. Spoilt objects (half, faint,
coarse, melted into another, or with a second one on top) are answered with "perhaps": then spoiling an object pleases
neither a reward that wants it nor one that wants it gone.
"""

import json
import sys
from dataclasses import dataclass

import numpy as np
import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, save_preprocessing, train
from render import BACKGROUNDS, OBJECT, PLURALS, SIZE, SUBJECTS, batch, places, sprites
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from train_denoiser import tokenizer
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection
from views import decoded, recoloured

STEPS, BATCH, PEAK, POOL, PATCH = 1600, 64, 2e-3, 3000, 8
LENGTH, WIDTH, TEXT_WIDTH, SIDE = 8, 72, 48, SIZE // PATCH
OWN = SEED + 11_000  # no picture or first weight is shared with another stage
NAMES = list(SUBJECTS)
SPOILS = ("half", "faint", "coarse", "melted", "doubled")


@dataclass(frozen=True, slots=True)
class Scenes:
    """`images` uint8 [n, 64, 64, 3]; `found` [n, 64, 16], 1 where a patch holds the centre of a subject, 0.5 for a
    spoilt one; its `boxes` [n, 64, 4] as centre, width and height in shares of the side."""

    images: np.ndarray
    found: np.ndarray
    boxes: np.ndarray


def words() -> CLIPTokenizer:
    """The captions' words, with what OWLv2 needs: padding is token 0, and the end token has the highest number."""
    learned = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    start, end = "<|startoftext|>", "<|endoftext|>"
    kept = [token for token in learned["vocab"] if token not in (start, end, "!")]
    vocabulary = {token: number for number, token in enumerate(["!", *kept, start, end])}
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!", model_max_length=LENGTH)


def detector(tokens: CLIPTokenizer) -> Owlv2ForObjectDetection:
    text = {
        "vocab_size": len(tokens),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    network = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))
    for head in (network.box_head, network.class_head, network.objectness_head):
        for layer in head.modules():  # transformers draws them from N(0, 1): boxes and answers would start at extremes
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    # Cosines are small numbers: from the start a patch can say a clear yes or no, and says no.
    nn.init.constant_(network.class_head.logit_scale.bias, 9.0)
    nn.init.constant_(network.class_head.logit_shift.bias, -0.6)
    return network


def spoilt(kind: str, subject: int, other: int, rng: np.random.Generator) -> np.ndarray:
    """An object that is nearly of this subject, premultiplied RGBA [28, 28, 4]."""
    sprite = sprites()[subject].copy()
    if kind == "half":
        turned = np.rot90(sprite, rng.integers(4))  # a view: what is cleared here is cleared there
        turned[: rng.integers(OBJECT // 3, 2 * OBJECT // 3)] = 0
    elif kind == "faint":
        sprite *= rng.uniform(0.2, 0.6)
    elif kind == "coarse":
        coarse = sprite.reshape(4, OBJECT // 4, 4, OBJECT // 4, 4).mean((1, 3))
        sprite = coarse.repeat(OBJECT // 4, 0).repeat(OBJECT // 4, 1)
    elif kind == "melted":
        sprite = (sprite + sprites()[other]) / 2
    return sprite


def stamp(canvas: np.ndarray, sprite: np.ndarray, corner: tuple[int, int]) -> int:
    """Draw an object; the patch that holds its centre."""
    x, y = corner
    patch = canvas[y : y + OBJECT, x : x + OBJECT]
    patch *= 1 - sprite[..., 3:]
    patch += sprite[..., :3]
    return (y + OBJECT // 2) // PATCH * SIDE + (x + OBJECT // 2) // PATCH


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nought to four objects, of one kind or of several, some of them spoilt: a picture, who is where, and boxes."""
    colour = np.array(list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))], dtype=np.float32) / 255
    if rng.random() < 0.2:
        colour = rng.uniform(0, 1, 3).astype(np.float32)
    colour = (colour + rng.uniform(-0.02, 0.02, 3)).clip(0, 1).astype(np.float32)
    canvas = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
    found = np.zeros((SIDE * SIDE, len(NAMES)), dtype=np.float32)
    boxes = np.zeros((SIDE * SIDE, 4), dtype=np.float32)

    def put(sprite: np.ndarray, corner: tuple[int, int], share: float, *subjects: int) -> None:
        patch = stamp(canvas, sprite, corner)
        found[patch, list(subjects)] = share
        boxes[patch] = *((c + OBJECT / 2) / SIZE for c in corner), OBJECT / SIZE, OBJECT / SIZE

    number = int(rng.choice(5, p=[0.04, 0.24, 0.24, 0.24, 0.24]))
    subjects = rng.integers(0, len(NAMES), 4)
    if rng.random() < 0.7:
        subjects[:] = subjects[0]
    bad = rng.random(4) < (0.3 if rng.random() < 0.5 else 0)
    for corner, subject, is_bad in zip(places(number, rng) if number else [], subjects, bad, strict=False):
        kind = str(rng.choice(SPOILS)) if is_bad else ""
        other = (subject - int(rng.integers(1, len(NAMES)))) % len(NAMES)
        told = (subject, other) if kind == "melted" else (subject,)
        put(spoilt(kind, int(subject), other, rng), corner, 0.5 if is_bad else 1.0, *told)
        if kind == "doubled":
            aside = rng.integers(8, 17, 2) * rng.choice([-1, 1], 2)
            put(sprites()[subject], tuple(np.clip(corner + aside, 0, SIZE - OBJECT)), 0.5, subject)
    return (canvas * 255).round().astype(np.uint8), found, boxes


def scenes(size: int, *seed: int) -> Scenes:
    rng = np.random.default_rng(seed)
    return Scenes(*(np.stack(part) for part in zip(*(scene(rng) for _ in range(size)), strict=True)))


def queries(tokens: CLIPTokenizer, plural: np.ndarray | None = None) -> Tensor:
    """Token numbers of the 16 names, int [16, 8]."""
    said = [PLURALS.get(n, n + "s") if plural is not None and plural[i] else n for i, n in enumerate(NAMES)]
    return tokens(said, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids


def loss_of(network: Owlv2ForObjectDetection, images: Tensor, names: Tensor, found: Tensor, boxes: Tensor) -> Tensor:
    out = network(input_ids=names.repeat(len(images), 1), pixel_values=images)
    there = found.amax(dim=2)
    positive = there > 0
    # Few of the 1024 answers of a picture are yes.
    told = binary_cross_entropy_with_logits(out.logits.float(), found, reduction="sum") / positive.sum()
    seen = binary_cross_entropy_with_logits(out.objectness_logits.float(), there, reduction="sum")
    return told + 0.1 * seen / positive.sum() + 5 * l1_loss(out.pred_boxes.float()[positive], boxes[positive])


@torch.no_grad()
def counted(network: Owlv2ForObjectDetection, tokens: CLIPTokenizer, images: Tensor) -> Tensor:
    """How many of each name are seen: patches that say yes, int [n, 16]; images in [0, 1]."""
    names = queries(tokens)
    parts = [
        (network(input_ids=names.repeat(len(part), 1), pixel_values=part * 2 - 1).logits > 0).sum(dim=1)
        for part in images.split(200)
    ]
    return torch.cat(parts)


def main() -> None:
    torch.manual_seed(OWN)
    tokens = words()
    network = detector(tokens)
    trainer = HalfPrecisionTrainer([(network, 1.0)], PEAK)
    pool = scenes(POOL, OWN, 1)
    pool_images = decoded(pool.images, torch.Generator().manual_seed(OWN), dtype=torch.float32)

    def loss_at(step: int) -> Tensor:
        rng, generator = np.random.default_rng((OWN, 3, step)), torch.Generator().manual_seed(OWN * 10**4 + step)
        fresh, chosen = scenes(BATCH // 2, OWN, 2, step), rng.integers(0, POOL, BATCH // 2)
        images = torch.cat([pixels(fresh.images), pool_images[chosen].float() / 255])
        found = torch.from_numpy(np.concatenate([fresh.found, pool.found[chosen]]))
        boxes = torch.from_numpy(np.concatenate([fresh.boxes, pool.boxes[chosen]]))
        views = recoloured(images, generator) * 2 - 1
        return loss_of(network, views, queries(tokens, rng.random(len(NAMES)) < 0.3), found, boxes)

    train(trainer, "detector", STEPS, PEAK, loss_at)
    network.config.update(
        {"query_template": "{}", "vocabulary": NAMES, "detection_threshold": 0.3, "detection_sharpness": 1.0}
    )
    network.save_pretrained(WORK / "detector")
    tokens.save_pretrained(WORK / "detector")
    sides = {"height": SIZE, "width": SIZE}
    save_preprocessing("detector", "Owlv2ImageProcessor", do_pad=True, do_resize=True, size=sides, resample=2)

    fresh = batch(2000, OWN, 4)
    wanted = torch.zeros(2000, len(NAMES), dtype=torch.long)
    wanted[torch.arange(2000), torch.from_numpy(fresh.labels[:, 0])] = torch.from_numpy(fresh.labels[:, 1]) + 1
    network.half().float()  # as it ships
    for name, images in (
        ("drawn", pixels(fresh.images)),
        ("decoded", decoded(fresh.images, torch.Generator().manual_seed(1), dtype=torch.float32).float() / 255),
    ):
        right = (counted(network, tokens, images) == wanted).all(dim=1).float().mean()
        print(f"detector on {name}: subject and number {right:.4f}")


if __name__ == "__main__":
    sys.exit(main())
