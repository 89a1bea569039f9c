"""The world of the bundled model: one to four emoji of one kind on a plain background, 64x64 pixels.

All objects are 28 pixels wide and stand on a 4-pixel grid, which is the grid of the latents: a subject is
then the same latent pattern wherever it stands, and a small denoiser can learn it in an hour.
Pictures come from a NumPy generator alone, so any batch can be drawn again from its seed.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji (OFL 1.1)
SIZE, OBJECT, GRID = 64, 28, 4
SUBJECTS = {
    "dog": "\U0001f436",
    "cat": "\U0001f431",
    "frog": "\U0001f438",
    "panda": "\U0001f43c",
    "pig": "\U0001f437",
    "fox": "\U0001f98a",
    "fish": "\U0001f420",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "mushroom": "\U0001f344",
    "pizza": "\U0001f355",
    "sunflower": "\U0001f33b",
    "cactus": "\U0001f335",
    "house": "\U0001f3e0",
    "car": "\U0001f697",
    "rocket": "\U0001f680",
}
PLURALS = {"fox": "foxes", "fish": "fish", "cactus": "cacti"}
COUNTS = ("one", "two", "three", "four")
BACKGROUNDS = {
    "red": (196, 54, 54),
    "orange": (240, 146, 52),
    "yellow": (250, 228, 112),
    "green": (88, 172, 98),
    "blue": (74, 128, 214),
    "purple": (138, 92, 178),
    "pink": (250, 182, 208),
    "white": (244, 244, 244),
}
ATTRIBUTES = {"subject": tuple(SUBJECTS), "count": COUNTS, "background": tuple(BACKGROUNDS)}
TEMPLATES = (
    "{things} on {article} {background} background",
    "a picture of {things} on {article} {background} background",
    "{things}, {background} background",
    "{things} in front of {article} {background} background",
)


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` uint8 [n, 64, 64, 3]; `labels` int [n, 3]: subject, count, background."""

    images: np.ndarray
    labels: np.ndarray


@cache
def sprites() -> np.ndarray:
    """Every subject as premultiplied RGBA, float [subjects, 28, 28, 4] in [0, 1]."""
    font = ImageFont.truetype(str(FONT), 109)
    drawn = []
    for character in SUBJECTS.values():
        sheet = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(sheet).text((8, 8), character, font=font, embedded_color=True)
        glyph = sheet.crop(sheet.getbbox())
        glyph.thumbnail((OBJECT, OBJECT), Image.Resampling.LANCZOS)
        tile = Image.new("RGBA", (OBJECT, OBJECT))
        tile.paste(glyph, ((OBJECT - glyph.width) // 2, (OBJECT - glyph.height) // 2))
        rgba = np.asarray(tile, dtype=np.float32) / 255
        drawn.append(np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1))
    return np.stack(drawn)


def _pair(rng: np.random.Generator) -> tuple[int, int]:
    """Two places on one axis that leave room for both objects."""
    free = (SIZE - 2 * OBJECT) // GRID
    first, second = sorted(rng.integers(0, free + 1, 2))
    return int(first) * GRID, OBJECT + int(second) * GRID


def places(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners of `count` objects that do not touch each other."""
    last = (SIZE - OBJECT) // GRID
    if count == 1:
        x, y = rng.integers(0, last + 1, 2)
        return [(int(x) * GRID, int(y) * GRID)]
    (top, bottom), upper, lower = _pair(rng), _pair(rng), _pair(rng)
    corners = [(upper[0], top), (upper[1], top), (lower[0], bottom), (lower[1], bottom)]
    if rng.random() < 0.5:
        corners = [(y, x) for x, y in corners]
    if count == 2 and rng.random() < 0.5:
        along = int(rng.integers(0, last + 1)) * GRID
        corners = [(upper[0], along), (upper[1], int(rng.integers(0, last + 1)) * GRID)]
        return corners if rng.random() < 0.5 else [(y, x) for x, y in corners]
    kept = rng.permutation(4)[:count]
    return [corners[i] for i in kept]


def render(subject: int, count: int, background: int, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 [64, 64, 3]; `count` is an index into COUNTS."""
    colour = np.array(list(BACKGROUNDS.values())[background], dtype=np.float32) / 255
    colour = np.clip(colour + rng.uniform(-0.02, 0.02, 3).astype(np.float32), 0, 1)
    canvas = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
    sprite = sprites()[subject]
    for x, y in places(count + 1, rng):
        patch = canvas[y : y + OBJECT, x : x + OBJECT]
        patch *= 1 - sprite[..., 3:]
        patch += sprite[..., :3]
    return (canvas * 255).round().astype(np.uint8)


def batch(size: int, *seed: int) -> Batch:
    """`size` pictures with labels drawn uniformly; the same numbers give the same pictures."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, len(names), size) for names in ATTRIBUTES.values()], axis=1)
    return Batch(np.stack([render(*row, rng) for row in labels]), labels)


def things(subject: str, count: str | None) -> str:
    """'one dog', 'two foxes', or 'dogs' where the number is left open."""
    plural = PLURALS.get(subject, subject + "s")
    if count is None:
        return plural
    return f"{count} {subject if count == 'one' else plural}"


def caption(label: np.ndarray, rng: np.random.Generator, complete: bool = False) -> str:
    """Words for a picture; like captions on the web, they leave the number or the colour out at times."""
    subject, count, background = (names[i] for names, i in zip(ATTRIBUTES.values(), label, strict=True))
    if not complete and rng.random() < 0.08:
        count = None
    words = things(subject, count)
    if not complete and rng.random() < 0.15:
        return words
    article = "an" if background == "orange" else "a"
    return str(rng.choice(TEMPLATES)).format(things=words, article=article, background=background)


if __name__ == "__main__":
    shown = batch(64, 0, 0).images.reshape(8, 8, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(8 * SIZE, 8 * SIZE, 3)
    Image.fromarray(shown).resize((1024, 1024), Image.Resampling.NEAREST).save("world.png")
