"""Pictures, grids and PNG bytes, below the command line."""

import io

import miniatures
import pytest
from PIL import Image

from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.diffusion.sample import noise_generator, sample_pictures
from alignprop_pipe.images import make_grid, png_bytes, side_by_side

FAST = SamplingOptions(num_inference_steps=2, guidance_scale=2.0)


def picture(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_picture_is_the_stock_call_with_its_own_noise() -> None:
    pipe = miniatures.sd15()
    made = list(sample_pictures(pipe, ["a dog", "a cat"], FAST, seed=5, num=2, batch_size=1))
    assert [(one.prompt, one.number) for one in made] == [("a dog", 0), ("a dog", 1), ("a cat", 0), ("a cat", 1)]
    stock = pipe("a cat", num_inference_steps=2, guidance_scale=2.0, generator=[noise_generator(5, "a cat", 1)])
    assert made[3].image.tobytes() == stock[0][0].tobytes()
    assert len({one.image.tobytes() for one in made}) == 4


def test_a_video_is_an_animated_png() -> None:
    pipe = miniatures.ltx()
    settings = SamplingOptions(num_inference_steps=2, height=32, width=32)
    (made,) = sample_pictures(pipe, ["a dog"], settings, num_frames=9)
    assert len(made.frames) > 1
    opened = Image.open(io.BytesIO(png_bytes(made.frames, {"prompt": "a dog"})))
    assert opened.n_frames == len(made.frames)  # type: ignore[attr-defined]
    assert opened.text["prompt"] == "a dog"  # type: ignore[attr-defined]


def test_a_grid_is_as_square_as_it_gets() -> None:
    sheet = make_grid([picture(name) for name in ("red", "lime", "blue", "black", "yellow")])
    assert sheet.size == (3 * 18 - 2, 2 * 18 - 2)
    assert [sheet.getpixel(place) for place in ((8, 8), (26, 8), (8, 26))] == [(255, 0, 0), (0, 255, 0), (0, 0, 0)]
    assert sheet.getpixel((44, 26)) == (255, 255, 255)
    with pytest.raises(ValueError, match="one picture"):
        make_grid([])


def test_side_by_side_enlarges_small_pictures_and_keeps_large_ones() -> None:
    small = side_by_side([picture("red"), picture("blue")], ["base", "aligned"])
    assert small.getpixel((128, 200)) == (255, 0, 0)
    assert small.getpixel((small.width - 128, 200)) == (0, 0, 255)
    large = side_by_side([picture("red", (512, 512))] * 2, ["a", "b"])
    assert 1024 <= large.width < 1060


def test_png_keeps_text_of_any_alphabet() -> None:
    opened = Image.open(io.BytesIO(png_bytes([picture("red")], {"prompt": "zwei Hunde 狐 🦊"})))
    assert opened.text["prompt"] == "zwei Hunde 狐 🦊"  # type: ignore[attr-defined]


def test_words_that_the_pipeline_does_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = miniatures.FAMILIES["sd15"].make()
    list(sample_pictures(pipe, ["a dog", " ".join(["dog"] * 100 + ["cat"])], SamplingOptions(num_inference_steps=1)))
    (said,) = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert said.startswith("1 of 2 prompts are longer")
    assert said.endswith("cat'")
