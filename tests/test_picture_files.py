"""Picture files: which are found, what their heads say, and their pixels as people see them."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from alignprop_pipe.errors import PromptError
from alignprop_pipe.images import png_bytes
from alignprop_pipe.scoring import picture_files
from alignprop_pipe.scoring.picture_files import Found, Skipped


def picture(seed: int = 0, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def pixels(path: Path) -> Tensor:
    found = picture_files.read_pixels(path)
    assert isinstance(found, Tensor), found
    return found


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_folders_are_searched_to_the_bottom_and_each_file_counts_once(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "d.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    for name in ("notes.txt", ".hidden.png", ".cache/e.png", "f.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing to see")
    found = picture_files.find_pictures([tmp_path / "b.png", tmp_path, tmp_path / "deep" / ".." / "d.jpeg"])
    assert [one.path.name for one in found] == ["b.png", "a.JPG", "d.jpeg", "c.webp"]
    assert all(isinstance(one, Found) for one in found)


def test_places_without_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="nowhere"):
        picture_files.find_pictures([tmp_path / "nowhere"])
    with pytest.raises(PromptError, match=r"no .*\.png.* in .*" + tmp_path.name):
        picture_files.find_pictures([tmp_path])


def test_a_whole_file_system_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []
    monkeypatch.setattr(os, "walk", lambda folder: visited.append(folder) or iter(()))
    monkeypatch.chdir(tmp_path)
    for place in ("/", "../" * 40, "/usr/.."):
        with pytest.raises(PromptError, match="whole file system"):
            picture_files.find_pictures([Path(place)])
    assert visited == []


def test_a_folder_that_is_not_one_of_pictures_is_looked_through_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files, "MOST_OTHERS", 5)
    for number in range(5):
        (tmp_path / f"{number}.txt").touch()
    for number in range(9):
        picture().save(tmp_path / f"{number}.png")
    assert len(picture_files.find_pictures([tmp_path])) == 9
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "6.txt").touch()
    with pytest.raises(PromptError, match="more than 5 files that are no pictures"):
        picture_files.find_pictures([tmp_path])


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x04\0\0\0WEBP"])
def test_what_is_no_picture_is_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    (found,) = picture_files.find_pictures([tmp_path])
    assert isinstance(found, Skipped)
    assert found.failed
    assert "damaged" in found.reason


def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", format="PPM")
    found = picture_files.read_head(tmp_path / "a.png")
    assert isinstance(found, Skipped)
    assert "no picture of a kind that is read here (PNG, JPEG" in found.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_short_is_skipped_with_the_reason(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.png"
    picture(size=(64, 64)).save(path, format=format)
    path.write_bytes(path.read_bytes()[:-500])
    results = [picture_files.read_head(path), picture_files.read_pixels(path)]
    skipped = [one for one in results if isinstance(one, Skipped)]
    assert skipped
    assert all(one.reason for one in skipped)


def test_a_folder_that_cannot_be_a_picture_and_a_file_that_went_away(tmp_path: Path) -> None:
    gone = picture_files.read_pixels(tmp_path / "gone.png")
    assert isinstance(gone, Skipped)
    assert "No such file" in gone.reason


def test_sheets_are_left_out_of_folders_and_kept_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(png_bytes([picture()], {"sheet": "grid"}))
    (tmp_path / "a.png").write_bytes(png_bytes([picture()], {"prompt": "a dog"}))
    named, inside = picture_files.find_pictures([tmp_path / "a.png", tmp_path])
    assert named == Found(tmp_path / "a.png", "a dog")
    assert isinstance(inside, Skipped)
    assert not inside.failed
    assert isinstance(picture_files.find_pictures([tmp_path / "grid.png"])[0], Found)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(size=(8, 6)).save(tmp_path / "a.png", format=format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert upright.size == ((8, 6) if orientation < 5 else (6, 8))
    assert torch.equal(pixels(tmp_path / "a.png"), as_tensor(upright))


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str, format: str) -> None:
    image = picture(mode=mode)
    image.save(tmp_path / "a.png", format=format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    values = np.asarray(image).astype(float)
    colour, alpha = values[..., :-1], values[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (6, 8, 3)).transpose(2, 0, 1)
    assert np.abs(pixels(tmp_path / "a.png").numpy() - expected).max() <= 1


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 10, 10, 0, 0, 250])
    image.paste(1, (2, 0, 4, 2))
    image.save(tmp_path / "a.png", transparency=0)
    found = pixels(tmp_path / "a.png")
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    assert found[:, 0, 3].tolist() == [0, 0, 250]


def test_grey_of_16_bits_and_colours_for_print(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "grey.png")
    assert pixels(tmp_path / "grey.png")[:, 0].tolist() == [[0, 128, 255]] * 3
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert pixels(tmp_path / "bit.png").unique().tolist() == [255]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert pixels(tmp_path / "print.jpg").min() >= 254


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    first, second = picture(1), picture(2)
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    (tmp_path / "a.png").write_bytes(png_bytes([first, second], {"prompt": "a dog"}))
    assert torch.equal(pixels(tmp_path / "a.webp"), as_tensor(first))
    assert torch.equal(pixels(tmp_path / "a.png"), as_tensor(first))


# --- what other programs write ---------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def with_chunks(path: Path, *, before: bytes = b"", after: bytes = b"") -> Path:
    """A PNG with chunks put before its pixels, and behind them."""
    plain = png_bytes(picture())
    first, end = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
    path.write_bytes(plain[:first] + before + plain[first:end] + after + plain[end:])
    return path


def test_large_texts_and_colour_profiles_are_no_damage(tmp_path: Path) -> None:
    usual = PngImagePlugin.MAX_TEXT_CHUNK
    large = zlib.compress(b"x" * (3 * 2**20))
    chunks = [chunk(b"zTXt", b"workflow\0\0" + large), chunk(b"iCCP", b"profile\0\0" + large)]
    chunks += [chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"a fox"))]
    path = with_chunks(tmp_path / "a.png", before=b"".join(chunks))
    assert picture_files.read_head(path) == Found(path, "a fox")
    assert torch.equal(pixels(path), as_tensor(picture()))
    assert usual == PngImagePlugin.MAX_TEXT_CHUNK


def test_a_bomb_of_text_is_called_one(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "a.png", before=chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2**27)))
    skipped = picture_files.read_head(path)
    assert isinstance(skipped, Skipped)
    assert "larger than 64 MiB" in skipped.reason


def test_a_text_behind_the_pixels_is_read(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "a.png", after=chunk(b"tEXt", b"prompt\0a fox"))
    assert picture_files.read_head(path) == Found(path, "a fox")


def test_too_many_pixels_are_called_too_many(tmp_path: Path) -> None:
    head = (20000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    plain = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(plain)
    for found in (picture_files.read_head(tmp_path / "a.png"), picture_files.read_pixels(tmp_path / "a.png")):
        assert isinstance(found, Skipped)
        assert "too large (400 megapixels)" in found.reason
        assert "damaged" not in found.reason


def test_pictures_that_pillow_only_warns_of_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # 48 pixels: between once and twice as many
    assert torch.equal(pixels(tmp_path / "a.png"), as_tensor(picture()))


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.bmp", "a.gif", "a.tif", "a.tiff", "a.avif", "a.JFIF"])
def test_every_kind_is_found_in_a_folder_and_read(tmp_path: Path, name: str) -> None:
    kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(name.lower()[2:])
    picture(size=(64, 48)).save(tmp_path / name, format=kind)
    (found,) = picture_files.find_pictures([tmp_path])
    assert found == Found(tmp_path / name)
    assert isinstance(found, Found)
    assert found.size == (64, 48)
    assert pixels(tmp_path / name).shape == (3, 48, 64)


@pytest.mark.parametrize("charset", ["UNICODE", "ASCII", ""])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_automatic1111_in_exif(tmp_path: Path, format: str, charset: str) -> None:
    text = "a fox\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a"
    exif = Image.Exif()
    exif[0x0112] = 1  # Pillow writes none into a PNG where this is all
    encoded = text.encode("utf-16-be" if charset == "UNICODE" else "utf-8")
    exif.get_ifd(0x8769)[0x9286] = charset.encode().ljust(8, b"\0") + encoded
    picture().save(tmp_path / "a", format=format, exif=exif)
    assert picture_files.read_head(tmp_path / "a") == Found(tmp_path / "a", "a fox")


def test_floating_point_pixels_are_refused_in_words(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    skipped = picture_files.read_pixels(tmp_path / "a.tif")
    assert isinstance(skipped, Skipped)
    assert "floating-point" in skipped.reason


def test_of_several_pages_the_first_counts(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.tif", save_all=True, append_images=[picture(2)])
    assert torch.equal(pixels(tmp_path / "a.tif"), as_tensor(picture(1)))
