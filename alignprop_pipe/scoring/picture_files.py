"""Picture files: which there are, what each says of itself, and its pixels as people see them."""

import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from alignprop_pipe.errors import PromptError
from alignprop_pipe.files import SHEET_CHUNK
from alignprop_pipe.scoring.embedded_prompts import prompt_in
from alignprop_pipe.sources import exists, expanded, is_folder

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
LARGEST_TEXT = 64 * 2**20
"""Bytes of a compressed text or colour profile in a PNG: a ComfyUI graph has more than the 1 MiB that Pillow takes."""
CHARSETS = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16-be", b"JIS\0\0\0\0\0": "iso2022_jp", b"\0" * 8: "utf-8"}
"""How the comment in EXIF begins -> its encoding."""
MOST_OTHERS = 200_000
"""Files that are no pictures, in the folders of one place; a folder with more was hardly meant (a home, a system)."""
_LIMITS = threading.Lock()

Pixels = UInt8[Tensor, "3 height width"]


@dataclass(frozen=True, slots=True)
class Found:
    """A picture file whose head could be read. `prompt` is what it was drawn from, where it says so; `size` in pixels.

    The size is width and height, as in PIL.
    """

    path: Path
    prompt: str | None = None
    size: tuple[int, int] = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file without a score. `failed` is False for one that is no single picture, but a sheet of several."""

    path: Path
    reason: str
    failed: bool = True


def find_pictures(places: Iterable[Path]) -> list[Found | Skipped]:
    """Every file among `places`, and all picture files in the folders among them, at any depth.

    A file counts once. Sheets of several pictures (`grid.png` of `alignprop sample`) are left out of folders. Raises
    PromptError for a place that is not there or a whole file system, and where there is no picture at all.
    """
    found: dict[Path, Found | Skipped] = {}
    places = [expanded(place) for place in places]
    for place in places:
        if not exists(place):
            raise PromptError(f"there is no file or folder {str(place)!r}")
        for path in _inside(place) if is_folder(place) else (place,):
            if path.resolve() not in found:
                found[path.resolve()] = read_head(path, sheets=not is_folder(place))
    if not found:
        raise PromptError(f"there is no {', '.join(SUFFIXES)} file in {', '.join(map(str, places))}")
    return list(found.values())


def _inside(folder: Path) -> Iterator[Path]:
    whole = folder.resolve()
    if whole == Path(whole.anchor):
        raise PromptError(f"{str(folder)!r} is a whole file system; name a folder of pictures in it")
    others = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = [name for name in sorted(files) if _is_picture(name)]
        others += len(files) - len(pictures)
        if others > MOST_OTHERS:
            raise PromptError(
                f"{str(folder)!r} holds more than {MOST_OTHERS} files that are no pictures; name the folders of "
                "pictures in it"
            )
        yield from (Path(where, name) for name in pictures)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_head(path: Path, *, sheets: bool = True) -> Found | Skipped:
    """What a file says about itself; with `sheets=False`, sheets of pictures are skipped."""
    try:
        with _opened(path) as image:
            size, texts = image.size, _texts(image)
            prompt = prompt_in(texts)
            if prompt is None and isinstance(image, PngImagePlugin.PngImageFile):
                prompt = prompt_in(image.text)  # texts behind the pixels, which are decoded for it
    except Exception as error:
        return Skipped(path, _trouble(error))
    if SHEET_CHUNK in texts and not sheets:
        return Skipped(path, f"it is no single picture, but a sheet ({texts[SHEET_CHUNK]})", failed=False)
    return Found(path, prompt, size)


def read_pixels(path: Path) -> Pixels | Skipped:
    """A picture as people see it: turned as its EXIF says, transparency over white, the first frame of several."""
    try:
        with _opened(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                return Skipped(path, "its pixels are floating-point numbers, of which it is not known what is white")
            if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:
        return Skipped(path, _trouble(error))
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file under Pillow's bound on pixels, with a wider one on texts."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is left out of some builds
    with _LIMITS:
        usual = PngImagePlugin.MAX_TEXT_CHUNK
        PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_TEXT
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many are an error
                with Image.open(path, formats=formats) as image:
                    yield image
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = usual


def _texts(image: Image.Image) -> dict[str, str]:
    """The texts in a file's head, and those of its EXIF by their tags' names."""
    found = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    exif = image.getexif()
    for tag in (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.ImageDescription):
        if isinstance(text := exif.get(tag), str):
            found.setdefault(tag.name, text)
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes):
        comment = comment[8:].decode(CHARSETS.get(comment[:8], "utf-8"), errors="ignore")
    if isinstance(comment, str):
        found.setdefault("UserComment", comment.strip("\0"))
    return found


def _trouble(error: Exception) -> str:
    """Why a file cannot be read. PIL raises errors of many kinds for damaged files."""
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d{7,}", str(error))
        millions = f" ({int(pixels[0]) / 1e6:.0f} megapixels)" if pixels else ""
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"it is too large{millions}: at most {most:.0f} megapixels are decoded; make a smaller copy"
    if "MAX_TEXT_CHUNK" in str(error) or "Decompressed data too large" in str(error):
        return f"a text or colour profile in it is larger than {LARGEST_TEXT // 2**20} MiB; save it without"
    if isinstance(error, UnidentifiedImageError):
        return f"this is no picture of a kind that is read here ({', '.join(FORMATS)}), or it is damaged"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read: {error.strerror}"
    return f"it is damaged or cut short ({error})"
