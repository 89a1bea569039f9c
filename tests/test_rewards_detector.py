"""Detectors against transformers' own preprocessing and forward pass, on random miniatures."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniatures import clip_tokenizer
from tiny_detectors import LABELS, picture, save_owl, save_yolos, tensor
from transformers import (
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)
from transformers.image_transforms import center_to_corners_format

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.objects.detector import EdgePixels, SquarePixels, axis_weights, corners, load_detector

PIXELS = json.loads((Path(__file__).parent / "data" / "owlv2_pixels.json").read_text())["rows"]
NAMES = ["dog", "red fox", "car"]


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_owl(tmp_path_factory.mktemp("owl"))


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_yolos(tmp_path_factory.mktemp("yolos"))


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PIXELS, ids=lambda row: f"{row['picture']}-{row['size']}")
def test_owl_pixels_equal_transformers_own(row):
    """Committed numbers: its PIL path needs scipy, which is not installed here."""
    processor = Owlv2ImageProcessorPil(size=dict(zip(("height", "width"), row["size"], strict=True)))
    got = SquarePixels.from_config(processor.to_dict())(tensor(picture(*row["picture"])))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    expected = torch.tensor(row["pixels"]).view(1, 3, *row["size"])
    # Far inside the 2/255 that are allowed: what is left is the rounding of the committed numbers.
    torch.testing.assert_close(got * std + mean, expected, rtol=0, atol=1e-4)


def test_owl_pixels_of_the_right_size_are_only_normalised():
    processor = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    expected = processor(picture(32, 32), return_tensors="pt", do_resize=False)["pixel_values"]
    got = SquarePixels.from_config(processor.to_dict())(tensor(picture(32, 32)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60))
def test_an_axis_keeps_what_is_even(length, new_length):
    weights = axis_weights(length, new_length)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(new_length, dtype=torch.float64))
    assert (weights >= 0).all()


@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 128}, {"height": 48, "width": 80}])
@pytest.mark.parametrize(
    "shape", [(64, 64), (30, 30), (100, 100), (200, 150), (37, 91), (300, 90), (64, 130), (64, 129)]
)
def test_yolos_pixels_equal_transformers_on_pil(size, shape):
    processor = YolosImageProcessorPil(size=size)
    expected = processor(picture(*shape), return_tensors="pt")["pixel_values"]
    got = EdgePixels.from_config(processor.to_dict())(tensor(picture(*shape)))
    difference = (got - expected) * torch.tensor(processor.image_std).view(1, 3, 1, 1)
    assert difference.abs().max() < 1.1 / 255


@given(st.integers(16, 2000), st.integers(16, 2000), st.sampled_from([(64, 96), (512, 864), (800, 1333)]))
def test_yolos_sizes_equal_transformers(height, width, edges):
    from transformers.models.yolos.image_processing_pil_yolos import get_size_with_aspect_ratio_yolos

    processor = YolosImageProcessorPil(size={"shortest_edge": edges[0], "longest_edge": edges[1]})
    recipe = EdgePixels.from_config(processor.to_dict())
    expected = get_size_with_aspect_ratio_yolos((height, width), *edges)
    assert recipe.target(height, width) == tuple(max(side, 16) for side in expected)  # a picture has some pixels


def test_the_older_layout_of_yolos_is_read():
    """hustvl/yolos-tiny: a plain number next to max_size, and no resample."""
    config = {"size": 512, "max_size": 864, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True}
    recipe = EdgePixels.from_config(config)
    assert (recipe.shortest, recipe.longest, recipe.recipe.resample) == (512, 864, "bilinear")


def test_a_size_that_owl_cannot_have_is_refused():
    with pytest.raises(RewardError, match="height and width"):
        SquarePixels.from_config({"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})


# --- detection -------------------------------------------------------------------------------------------------------


def test_owl_equals_transformers(owl):
    images = [picture(32, 32), picture(32, 32, 2.0)]
    model, tokenizer = Owlv2ForObjectDetection.from_pretrained(owl), clip_tokenizer()
    tokens = tokenizer([f"a photo of a {n}" for n in NAMES], padding="max_length", max_length=16, return_tensors="pt")
    pixels = Owlv2ImageProcessorPil.from_pretrained(owl)(images, return_tensors="pt", do_resize=False)["pixel_values"]
    out = model(pixel_values=pixels, **{key: value.repeat(2, 1) for key, value in tokens.items()})
    got = load_detector(str(owl))(tensor(*images), NAMES)
    torch.testing.assert_close(got.logits, out.logits.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.boxes, center_to_corners_format(out.pred_boxes), rtol=0, atol=1e-5)
    assert got.logits.std() > 0.5
    assert got.boxes.std(dim=1).min() > 0.05


@pytest.mark.parametrize("shape", [(32, 32), (50, 80), (90, 40)])
def test_yolos_equals_transformers(yolos, shape):
    images = [picture(*shape), picture(*shape, 2.0)]
    processor = YolosImageProcessorPil.from_pretrained(yolos)
    out = YolosForObjectDetection.from_pretrained(yolos)(**processor(images, return_tensors="pt"))
    got = load_detector(str(yolos))(tensor(*images), ["dog", "person", "cell phone"])
    tolerance = 1e-5 if shape == (32, 32) else 2e-2  # a resize differs from PIL's 8 bits by up to 1/255
    expected = out.logits.softmax(dim=-1)[..., [2, 1, 4]].mT
    torch.testing.assert_close(got.logits.sigmoid(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(got.boxes, center_to_corners_format(out.pred_boxes), rtol=0, atol=tolerance)
    assert got.logits.std() > 0.3


def test_a_name_is_told_as_yolos_says_it(yolos):
    detector, images = load_detector(str(yolos)), tensor(picture(32, 32))
    assert detector.vocabulary == ("person", "dog", "cell phone")
    asked = [detector.known(name) for name in ("two women", "red dogs", "phone")]
    assert asked == ["person", "dog", "cell phone"]
    assert torch.equal(detector(images, ["woman"]).logits, detector(images, ["person"]).logits)
    with pytest.raises(RewardError, match="knows no 'dgo'; did you mean dog"):
        detector(images, ["dgo"])
    with pytest.raises(RewardError, match="it knows: cell phone, dog, person"):
        detector.known("zeppelin")


def test_log_odds_stay_exact_where_probabilities_round_to_one(yolos):
    detector = load_detector(str(yolos))
    detector.network.class_labels_classifier.layers[-1].bias[2] += 40
    logits = detector(tensor(picture(32, 32)), ["dog"]).logits
    assert logits.isfinite().all()
    assert logits.unique().numel() == 10


def test_one_query_does_not_depend_on_the_others(owl):
    detector, images = load_detector(str(owl)).double(), tensor(picture(40, 60), picture(40, 60, 1.0)).double()
    together = detector(images, NAMES)
    for place, name in enumerate(NAMES):
        alone = detector(images, [name])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, place], rtol=1e-10, atol=1e-10)


def test_texts_are_kept_up_to_a_limit(owl, monkeypatch):
    from alignprop_pipe.rewards.objects import detector as module

    monkeypatch.setattr(module, "KEPT_NAMES", 2)
    detector, images = load_detector(str(owl)), tensor(picture(32, 32))
    first = detector(images, NAMES).logits
    assert len(detector._texts) == 2  # pyright: ignore[reportArgumentType]
    assert torch.equal(detector(images, NAMES).logits, first)


def test_config_json_sets_query_threshold_sharpness_and_names(tmp_path):
    about = {
        "query_template": "{}",
        "detection_threshold": 0.5,
        "detection_sharpness": 1.0,
        "vocabulary": ["dog", "fox"],
    }
    named = load_detector(str(save_owl(tmp_path / "named", **about)))
    plain = load_detector(str(save_owl(tmp_path / "plain")))
    assert (named.threshold, named.sharpness, named.vocabulary) == (0.5, 1.0, ("dog", "fox"))
    assert (plain.threshold, plain.sharpness, plain.vocabulary) == (0.2, 2.0, None)
    images = tensor(picture(32, 32))
    assert torch.equal(named(images, ["a photo of a dog"]).logits, plain(images, ["dog"]).logits)
    given_template = load_detector(str(tmp_path / "plain"), template="{}")
    assert torch.equal(named(images, ["dog"]).logits, given_template(images, ["dog"]).logits)
    assert named.known("two foxes") == "fox"


@pytest.mark.parametrize("about", [{"detection_threshold": 1.5}, {"detection_sharpness": 0}])
def test_a_config_that_makes_no_sense_is_refused(tmp_path, about):
    with pytest.raises(RewardError, match=next(iter(about))):
        load_detector(str(save_owl(tmp_path, **about)))


def test_a_template_without_a_place_for_the_name_is_refused(owl, yolos):
    with pytest.raises(RewardError, match="no place for the name"):
        load_detector(str(owl), template="a photo")
    with pytest.raises(RewardError, match="reads no text"):
        load_detector(str(yolos), template="a photo of a {}")


def test_a_name_that_is_too_long_is_refused(owl):
    with pytest.raises(RewardError, match="longer than the 16 tokens"):
        load_detector(str(owl))(tensor(picture(32, 32)), ["very " * 20 + "long dog"])


def test_corners():
    assert torch.equal(corners(torch.tensor([0.5, 0.25, 0.5, 0.25])), torch.tensor([0.25, 0.125, 0.75, 0.375]))


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["owl", "yolos"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(RewardError, match=f"it needs.*{file}"):
        load_detector(str(copy))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_truncated_file_is_named(copy, file):
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RewardError, match=f"{file} is damaged"):
        load_detector(str(copy))


def test_nothing_is_half_loaded(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "box" in name or "bbox" in name)
    save_file({key: value for key, value in weights.items() if key != name}, copy / "model.safetensors")
    with pytest.raises(RewardError, match=f"1 are missing.*{name}"):
        load_detector(str(copy))
    save_file({**weights, name: torch.zeros(7)}, copy / "model.safetensors")
    with pytest.raises(RewardError, match=name):
        load_detector(str(copy))


def test_no_pickle_is_loaded(copy):
    marker = copy / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(RewardError, match="safetensors"):
        load_detector(str(copy))
    assert not marker.exists()


def test_another_kind_of_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "vit"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match=r"type 'vit'; a detector is needed: OWLv2.*YOLOS"):
        load_detector(str(copy))


def test_a_missing_model_says_what_to_do():
    with pytest.raises(RewardError, match="hf download nobody/nothing --local-dir FOLDER"):
        load_detector("nobody/nothing")


def test_a_tokenizer_without_its_words_is_refused(owl, tmp_path):
    folder = Path(shutil.copytree(owl, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RewardError, match=r"tokenizer\.json, or vocab\.json .* is missing"):
        load_detector(str(folder))
    shutil.copy(owl / "tokenizer.json", folder)
    os.truncate(folder / "tokenizer.json", 500)
    with pytest.raises(RewardError, match=r"tokenizer\.json is damaged"):
        load_detector(str(folder))


def test_only_labels_that_name_something_count(yolos):
    assert "N/A" in LABELS.values()
    with pytest.raises(RewardError, match="knows no 'n/a'"):
        load_detector(str(yolos)).known("n/a")
