"""The aesthetic predictors against their authors' code; heads as they are published, and files that are no heads."""

import shutil
from pathlib import Path

import clip_family as family
import pytest
import torch
from clip_family import PROMPTS, SIZES, picture, tensor
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessorPil

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import Aesthetic, Aesthetic25, Reward, as_reward, parse_reward
from alignprop_pipe.rewards.networks import weights


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted pickles go here."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(weights, "cached_assets_path", lambda *_: folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    family.write_heads(folder / "heads")
    family.write_clip(folder / "trunk", 4, "quick_gelu", width=64, heads=1)
    family.write_siglip(folder / "siglip")
    return folder


def v2(folder: Path, **settings) -> Reward:
    return Aesthetic(folder / "heads", trunk=folder / "trunk", **settings)


def v2_5(folder: Path, **settings) -> Reward:
    return Aesthetic25(folder / "heads", trunk=folder / "siglip", accept_license=True, **settings)


SCORERS = pytest.mark.parametrize("make", [v2, v2_5])


@pytest.mark.parametrize(("make", "name"), [(v2, "aesthetic"), (v2_5, "aesthetic2.5")])
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_scores_are_those_of_the_authors_code(folder, make, name, number):
    expected = torch.tensor([family.originals(name)["scores"][number]])
    # PIL rounds resized pictures to 8 bits, which is left; the first is not resized.
    tolerance = 1e-5 if number == 0 else 9e-3  # a thousandth of the range from 1 to 10
    got = make(folder)(tensor(picture(*SIZES[number], seed=number)), ["any"]).total
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_pixels_are_those_of_the_authors_code(folder, number):
    """LAION's: torchvision's resize and crop of PIL pictures."""
    reward = v2(folder)
    reward(tensor(picture(30, 30)), ["any"])
    pixels = reward.preprocess(tensor(picture(*SIZES[number], seed=number)))
    green = (pixels[0, 1] * reward.preprocess.std[1] + reward.preprocess.mean[1]) * 255
    expected = torch.tensor(family.originals("aesthetic")["pixels"][number]).float()
    torch.testing.assert_close(green, expected, rtol=0, atol=2)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_v2_with_the_pixels_of_pil_gives_equal_scores(folder, number):
    """Pictures that PIL has resized already, to the last 8 bits: nothing but the network is left."""
    image = picture(*SIZES[number], seed=number)
    scale = family.SIDE / min(image.size)
    small = image.resize(tuple(int(side * scale + 1e-9) for side in image.size), Image.Resampling.BICUBIC)
    expected = torch.tensor([family.originals("aesthetic")["scores"][number]])
    torch.testing.assert_close(v2(folder)(tensor(small), ["any"]).total, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_v2_5_with_the_pixels_of_pil_gives_equal_scores(folder, number):
    processor = SiglipImageProcessorPil.from_pretrained(folder / "siglip")
    prepared = processor(picture(*SIZES[number], seed=number), do_normalize=False)["pixel_values"][0]
    small = Image.fromarray((prepared.transpose(1, 2, 0) * 255).round().astype("uint8"))
    expected = torch.tensor([family.originals("aesthetic2.5")["scores"][number]])
    torch.testing.assert_close(v2_5(folder)(tensor(small), ["any"]).total, expected, rtol=0, atol=1e-5)


@SCORERS
@pytest.mark.parametrize("size", [(28, 28), (40, 37), (16, 20)])
def test_the_gradient_is_the_slope(folder, make, size):
    family.check_slope(make(folder), size)


@SCORERS
def test_batch_offload_and_judging(folder, make):
    family.check_batch(make(folder))
    family.check_offload(make(folder), make(folder, offload=True))
    family.check_judging(make(folder))


@SCORERS
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_is_near(folder, make, dtype, tolerance):
    """Of scores from 1 to 10."""
    assert family.half_error(make(folder), make(folder, dtype=dtype)) < tolerance


@SCORERS
def test_prompts_make_no_difference(folder, make):
    reward, images = make(folder), torch.rand(2, 3, 30, 30)
    assert not reward.reads_prompts
    assert torch.equal(reward(images, PROMPTS[:2]).total, reward(images, ["", ""]).total)


@SCORERS
def test_only_the_picture_tower_is_kept(folder, make):
    reward = make(folder)
    reward(torch.rand(1, 3, 28, 28), ["any"])
    assert not any("text" in name for name, _ in reward._network.named_parameters())
    assert not any(weight.requires_grad for weight in reward._network.parameters())


def test_a_pickle_is_converted_once(folder, cache):
    images = torch.rand(1, 3, 28, 28)
    first = v2(folder)(images, ["any"]).total
    (kept,) = cache.glob("*.safetensors")
    assert set(load_file(kept)) == {f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    before = kept.stat().st_mtime_ns
    assert torch.equal(v2(folder)(images, ["any"]).total, first)
    assert kept.stat().st_mtime_ns == before
    assert torch.equal(Aesthetic(kept, trunk=folder / "trunk")(images, ["any"]).total, first)


def score_head(folder: Path, state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "aesthetic-model.pth")
    Aesthetic(tmp_path, trunk=folder / "trunk")(torch.rand(1, 3, 28, 28), ["any"])


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ([32, 8, 1], "takes embeddings of 32 numbers; .*gives 16"),
        ([16, 8, 2], "down to one number"),
    ],
)
def test_a_head_of_another_size_is_refused(folder, tmp_path, sizes, complaint):
    with pytest.raises(RewardError, match=complaint):
        score_head(folder, family.head_state("layers", [0, 2], sizes, 0), tmp_path)


def test_a_head_with_a_gap_is_refused(folder, tmp_path):
    state = family.head_state("layers", [0, 2, 4], [16, 8, 4, 1], 0)
    with pytest.raises(RewardError, match="do not follow each other"):
        score_head(folder, {name: t for name, t in state.items() if "layers.2" not in name}, tmp_path)
    with pytest.raises(RewardError, match=r"layers\.2\.bias is missing"):
        score_head(folder, {name: t for name, t in state.items() if name != "layers.2.bias"}, tmp_path / "..")


def test_what_is_no_head_is_refused(folder, tmp_path):
    with pytest.raises(RewardError, match=r"layers\.0\.weight and so on are needed; it holds weight"):
        score_head(folder, {"weight": torch.zeros(1, 16)}, tmp_path)


def test_no_code_in_a_pickle_runs(folder, tmp_path):
    with pytest.raises(RewardError, match="can run code"):
        score_head(folder, {"layers.0.weight": family.Bomb(tmp_path / "executed")}, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_missing_files_are_named(folder, tmp_path):
    images = torch.rand(1, 3, 28, 28)
    with pytest.raises(RewardError, match=r"trl-lib/ddpo-aesthetic-predictor aesthetic-model\.pth.*trunk=FOLDER"):
        parse_reward("aesthetic")(images, ["any"])
    with pytest.raises(RewardError, match="hf download nobody/nothing"):
        Aesthetic(folder / "heads", trunk="nobody/nothing")(images, ["any"])
    with pytest.raises(RewardError, match="'aesthetic' needs a CLIPModel"):
        Aesthetic(folder / "heads", trunk=folder / "siglip")(images, ["any"])
    copy = Path(shutil.copytree(folder / "trunk", tmp_path / "copy"))
    state = load_file(copy / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, copy / "model.safetensors")
    with pytest.raises(RewardError, match=r"visual_projection\.weight"):
        Aesthetic(folder / "heads", trunk=copy)(images, ["any"])


def test_v2_5_is_refused_without_consent():
    for refused in ("aesthetic2.5", "clip + aesthetic2.5(accept_license=False)", 'aesthetic2.5("head.pth")'):
        with pytest.raises(RewardError, match=r"AGPL-3\.0.*accept_license=True.*--accept-license"):
            parse_reward(refused)
    with pytest.raises(RewardError, match="AGPL-3"):
        as_reward(Aesthetic25)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_only_true_is_consent(unchecked, value):
    with pytest.raises(RewardError, match="AGPL-3"):
        Aesthetic25(accept_license=value)


def test_consent_stands_in_the_text():
    reward = parse_reward("clip + 0.5*aesthetic2.5", accept_license=True)
    assert str(reward) == "clip + 0.5*aesthetic2.5(accept_license=True)"
    assert parse_reward(str(reward)) == reward
    assert str(parse_reward("clip + jpeg", accept_license=True)) == "clip + jpeg"
    with pytest.raises(RewardError, match="AGPL-3"):
        parse_reward("aesthetic2.5(accept_license=False)", accept_license=True)


def test_v2_5_says_where_its_head_is():
    with pytest.raises(RewardError, match=r"models/aesthetic_predictor_v2_5\.pth.*discus0434/aesthetic-predictor-v2-5"):
        parse_reward("aesthetic2.5", accept_license=True)(torch.rand(1, 3, 28, 28), ["any"])
