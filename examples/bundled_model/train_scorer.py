"""Stage 4: the scorer, a small CLIP whose cosine between picture and prompt is the default reward.

A reward is only worth what it takes to please it. So captions compete with pictures that differ in one thing
alone, and with junk that matches no caption: half, faint, merged, mixed and melted objects.
"""

import math
import sys

import numpy as np
import torch
from common import SEED, WORK, HalfPrecisionTrainer, pixels, save_preprocessing, train
from render import ATTRIBUTES, BACKGROUNDS, COUNTS, OBJECT, SIZE, batch, caption, places, sprites
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, softplus
from train_denoiser import LENGTH, ids, tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from views import augment, decoded, draw, every_label

STEPS, PEAK, JUNK, COPIES = 2000, 1e-3, 24, 12
FAMILIES = {0: 4, 1: 8, 2: 4}  # of four pictures each, alike but for subject (0), count (1) or background (2)
WIDTH, SHARED, SCALE = 96, 64, 16.0
OWN = SEED + 9_000


def scorer(tokens: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **tower,
        num_hidden_layers=2,
        vocab_size=len(tokens),
        max_position_embeddings=LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    vision = CLIPVisionConfig(**tower, num_hidden_layers=4, image_size=SIZE, patch_size=8)
    network = CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=SHARED,
            logit_scale_init_value=math.log(SCALE),
        )
    )
    network.logit_scale.requires_grad_(False)
    return network


def families(rng: np.random.Generator) -> np.ndarray:
    """Labels of one step, int [4 * families, 3]."""
    sizes = [len(names) for names in ATTRIBUTES.values()]
    groups = []
    for varied, number in FAMILIES.items():
        for _ in range(number):
            group = np.tile(rng.integers(0, sizes), (4, 1))
            group[:, varied] = rng.choice(sizes[varied], 4, replace=False)
            groups.append(group)
    return np.concatenate(groups)


def junk(subject: int, count: int, background: int, rng: np.random.Generator) -> np.ndarray:
    """A picture that is nearly of this label and matches no caption, uint8 [64, 64, 3]."""
    canvas = np.array(list(BACKGROUNDS.values())[background], dtype=np.float32) / 255 * np.ones((SIZE, SIZE, 1))
    sprite, other = sprites()[subject], sprites()[subject - int(rng.integers(1, len(sprites())))]
    corners = places(count + 1, rng)
    objects = [sprite.copy() for _ in corners]
    kind = rng.choice(["empty", "half", "faint", "mixed", "melted", "lump", "merged"])
    if kind == "empty":
        objects = []
    elif kind == "half":
        turned = np.rot90(objects[0], rng.integers(4))  # a view: what is cleared here is cleared there
        turned[: rng.integers(OBJECT // 3, 2 * OBJECT // 3)] = 0
    elif kind == "faint":
        objects[0] *= rng.uniform(0.25, 0.5)
    elif kind == "mixed" and count > 0:
        objects[0] = other
    elif kind == "lump":
        coarse = sprite.reshape(4, OBJECT // 4, 4, OBJECT // 4, 4).mean((1, 3))
        objects[0] = coarse.repeat(OBJECT // 4, 0).repeat(OBJECT // 4, 1)
    elif kind == "merged":
        aside = rng.integers(8, 17, 2) * rng.choice([-1, 1], 2)
        corners.append(tuple(np.clip(corners[0] + aside, 0, SIZE - OBJECT)))
        objects.append(sprite)
    else:
        objects = [(sprite + other) / 2 for _ in corners]
    for (x, y), drawn in zip(corners, objects, strict=False):
        patch = canvas[y : y + OBJECT, x : x + OBJECT]
        patch[:] = patch * (1 - drawn[..., 3:]) + drawn[..., :3]
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def fits(labels: np.ndarray, texts: list[str]) -> Tensor:
    """Whether text j is true of picture i, bool [pictures, texts], when text i was written for label i."""
    same = labels[:, None] == labels[None]
    uncounted = np.array([text.removeprefix("a picture of ").split()[0] not in COUNTS for text in texts])
    colourless = np.array(["background" not in text for text in texts])
    return torch.from_numpy(same[..., 0] & (same[..., 1] | uncounted) & (same[..., 2] | colourless))


def contrast(logits: Tensor, match: Tensor) -> Tensor:
    """CLIP's loss both ways with many true pairs: each competes with the false pairs of its row and its column."""
    false = logits.masked_fill(match, -torch.inf)
    by_picture, by_text = false.logsumexp(1, keepdim=True), false.logsumexp(0, keepdim=True)
    return (softplus(by_picture - logits) + softplus(by_text - logits))[match].mean()


@torch.no_grad()
def best_prompts(network: CLIPModel, tokens: CLIPTokenizer, images: Tensor) -> Tensor:
    """Labels of the prompt with the highest cosine out of all 512, int [n, 3]; images in [0, 1]."""
    labels = every_label()
    rng = np.random.default_rng(0)
    words = ids(tokens, [caption(label, rng, complete=True) for label in labels])
    found = [
        network(input_ids=words, pixel_values=part * 2 - 1).logits_per_image.argmax(dim=1) for part in images.split(500)
    ]
    return torch.from_numpy(labels)[torch.cat(found)]


def main() -> None:
    torch.manual_seed(OWN)
    tokens = tokenizer()
    network, heads = scorer(tokens), nn.ModuleList(nn.Linear(SHARED, len(names)) for names in ATTRIBUTES.values())
    network.to(torch.bfloat16)
    trainer = HalfPrecisionTrainer([(network, 1.0), (heads, 1.0)], PEAK)
    kinds = np.repeat(every_label(), COPIES, axis=0)
    pool = decoded(draw(kinds, np.random.default_rng((OWN, 1))), torch.Generator().manual_seed(OWN))
    pool = pool.unflatten(0, (len(COUNTS) * len(BACKGROUNDS) * len(ATTRIBUTES["subject"]), COPIES))
    strides = np.array([len(COUNTS) * len(BACKGROUNDS), len(BACKGROUNDS), 1])

    def pictures(labels: np.ndarray, rng: np.random.Generator) -> Tensor:
        """One for each label, freshly drawn or decoded by turns."""
        images = pixels(draw(labels, rng))
        taken = pool[labels @ strides, rng.integers(0, COPIES, len(labels))].float() / 255
        return torch.where(torch.from_numpy(rng.random((len(labels), 1, 1, 1)) < 0.5), images, taken)

    def loss_at(step: int) -> Tensor:
        rng, generator = np.random.default_rng((OWN, 2, step)), torch.Generator().manual_seed(OWN * 10**4 + step)
        labels = families(rng)
        texts = [caption(label, rng, complete=rng.random() < 0.7) for label in labels]
        spoilt = pixels(np.stack([junk(*label, rng) for label in rng.permutation(labels)[:JUNK]]))
        images = augment(torch.cat([pictures(labels, rng), spoilt]), generator)
        with sdpa_kernel(SDPBackend.MATH):
            out = network(input_ids=ids(tokens, texts), pixel_values=(images * 2 - 1).bfloat16())
        seen, read = out.image_embeds.float(), out.text_embeds.float()
        match = torch.cat([fits(labels, texts), torch.zeros(JUNK, len(texts), dtype=torch.bool)])
        wanted = torch.from_numpy(labels)
        told = [cross_entropy(SCALE * head(seen[: len(labels)]), wanted[:, i]) for i, head in enumerate(heads)]
        return contrast(SCALE * seen @ read.T, match) + 0.5 * torch.stack(told).sum()

    train(trainer, "scorer", STEPS, PEAK, loss_at)
    network.save_pretrained(WORK / "scorer")
    tokens.save_pretrained(WORK / "scorer")
    sides = {"height": SIZE, "width": SIZE}
    save_preprocessing(
        "scorer",
        "CLIPImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": SIZE},
        resample=3,
        do_center_crop=True,
        crop_size=sides,
    )

    fresh = batch(2000, OWN, 4)
    network.half().float()  # as it ships
    for name, images in (
        ("drawn", pixels(fresh.images)),
        ("decoded", decoded(fresh.images, torch.Generator().manual_seed(1)).float() / 255),
    ):
        right = (best_prompts(network, tokens, images) == torch.from_numpy(fresh.labels)).float().mean(0)
        print(f"scorer on {name}: " + ", ".join(f"{a} {r:.4f}" for a, r in zip(ATTRIBUTES, right, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
