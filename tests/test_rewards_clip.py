"""ClipScore against transformers' own computation, on a random miniature and on the bundled scorer."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import clip_family as family
import numpy as np
import pytest
import torch
from miniatures import clip_tokenizer
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from alignprop_pipe import AlignPropPipeline
from alignprop_pipe.bundled import MODELS_DIR
from alignprop_pipe.errors import AlignError, RewardError
from alignprop_pipe.rewards import ClipScore, check_reward, parse_reward
from alignprop_pipe.rewards.networks import clip

PROMPTS = ["a dog on a red background", "two cats", "three foxes in the snow, a photo of the sea and the sky"]


def save_miniature(folder: Path, size: int = 32, seed: int = 0) -> Path:
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
        for name, weight in model.named_parameters():
            if "layer_norm" not in name and "layernorm" not in name and weight.ndim > 0:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(tmp_path_factory.mktemp("clip"))


def picture(height: int, width: int) -> Image.Image:
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(height + width))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return Image.fromarray((smooth[0] * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])


def by_transformers(folder: Path, image: Image.Image, prompt: str) -> float:
    """The cosine, from PIL to the end, with none of our code."""
    model, tokenizer = CLIPModel.from_pretrained(folder), clip_tokenizer()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")
    tokens = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=77)
    out = model(pixel_values=pixels["pixel_values"], **tokens)
    return float((out.image_embeds * out.text_embeds).sum().detach())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 90), (90, 40), (20, 20)])
def test_it_equals_transformers_on_pil_images(folder, size):
    images = [picture(*size), picture(*size).transpose(Image.Transpose.ROTATE_180), picture(*size)]
    expected = [by_transformers(folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    got = ClipScore(model=folder)(tensor(*images), PROMPTS).total
    # Where nothing is resized only rounding is left; a resize differs from PIL's 8 bits by up to 1/255.
    tolerance = 1e-5 if size == (32, 32) else 2e-2
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=tolerance)
    assert got.std() > 0.02


def test_scale_multiplies(folder):
    images = tensor(picture(32, 32))
    plain = ClipScore(folder)(images, PROMPTS[:1]).total
    torch.testing.assert_close(ClipScore(folder, scale=100)(images, PROMPTS[:1]).total, 100 * plain)


def test_a_batch_is_its_pictures_one_by_one(folder):
    reward = ClipScore(folder)
    images = torch.rand(3, 3, 48, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single = torch.cat([reward(image[None], [prompt]).total for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(reward(images, PROMPTS).total, single, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (16, 20)])
def test_the_gradient_is_the_slope(folder, size):
    reward, generator = ClipScore(folder), torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) * 0.4 + 0.3
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).total.sum(), images)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, PROMPTS[:2]).total.sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_only_the_images_get_a_gradient(folder):
    reward = ClipScore(folder)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    reward(images, PROMPTS[:2]).total.sum().backward()
    assert images.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in reward._network.parameters())
    assert not reward._network.training
    assert not any(text.requires_grad for text in reward._texts.values())
    check_reward(reward, images, PROMPTS[:2], {})


def test_texts_are_kept_up_to_a_limit(folder, monkeypatch):
    monkeypatch.setattr(clip, "KEPT_PROMPTS", 2)
    reward, images = ClipScore(folder), torch.rand(3, 3, 32, 32)
    first = reward(images, PROMPTS).total
    assert len(reward._texts) == 2
    assert torch.equal(reward(images, PROMPTS).total, first)


def test_history_leaves_no_trace(folder):
    """The score does not depend on what was scored before: with whom a prompt was embedded, or in which precision."""
    images, fresh, used = torch.rand(3, 3, 32, 32), ClipScore(folder), ClipScore(folder)
    used(images.double(), PROMPTS)
    used(images[:1], PROMPTS[2:])
    used(images.half(), PROMPTS)
    assert torch.equal(used(images, PROMPTS).total, fresh(images, PROMPTS).total)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_it_computes_in_float32_or_float64(folder, dtype, expected):
    images = torch.rand(2, 3, 32, 32)
    got = ClipScore(folder)(images.to(dtype), PROMPTS[:2]).total
    assert got.dtype == expected
    torch.testing.assert_close(got.float(), ClipScore(folder)(images, PROMPTS[:2]).total, rtol=0, atol=2e-2)


def test_a_scorer_first_used_in_inference_mode_can_train_later(folder):
    reward, images = ClipScore(folder), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        reward(images, PROMPTS[:1])
    images.requires_grad_(True)
    reward(images, PROMPTS[:1]).total.sum().backward()
    assert images.grad is not None


def test_a_long_prompt_is_cut(folder):
    assert ClipScore(folder)(torch.rand(1, 3, 32, 32), ["dog " * 200]).total.isfinite().all()


def test_to_moves_a_loaded_network_and_the_next_score_brings_it_back(folder):
    reward, images = ClipScore(folder), torch.rand(1, 3, 32, 32)
    before = reward(images, PROMPTS[:1]).total
    reward.to(torch.device("cpu"))
    assert torch.equal(reward(images, PROMPTS[:1]).total, before)


def score(model: str | Path) -> torch.Tensor:
    return ClipScore(model)(torch.rand(1, 3, 32, 32), ["a dog"]).total


def test_a_missing_model_says_what_to_do():
    with pytest.raises(RewardError, match=r"hf download nobody/nothing --local-dir FOLDER"):
        score("nobody/nothing")


def test_a_name_that_can_be_no_id_says_what_to_do():
    with pytest.raises(RewardError, match="there is no file or folder './no/such/folder at all' here"):
        score("./no/such/folder at all")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(RewardError, match=f"it needs.*{file}"):
        score(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_truncated_file_is_named(copy, file):
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RewardError, match=f"{file} is damaged"):
        score(copy)


def test_nothing_is_half_loaded(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "visual_projection" not in k}, copy / "model.safetensors")
    with pytest.raises(RewardError, match=r"1 are missing.*visual_projection"):
        score(copy)
    weights["visual_projection.weight"] = torch.zeros(3, 16)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(RewardError, match="visual_projection"):
        score(copy)


def test_no_pickle_is_loaded(copy):
    marker = copy / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(RewardError, match="safetensors"):
        score(copy)
    assert not marker.exists()


def test_another_kind_of_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())["text_config"] | {"model_type": "clip_text_model"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError):
        score(copy)


def test_a_folder_is_named_in_an_expression(folder):
    reward = parse_reward(f'clip(model="{folder}", scale=2.5)')
    assert str(reward) == f'clip(model="{folder}", scale=2.5)'
    assert reward == ClipScore(str(folder), scale=2.5)
    assert str(ClipScore(folder)) == f'clip("{folder}")'


# --- what every scorer must do, and SigLIP ---


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.mark.parametrize("size", family.SIZES)
def test_siglip_equals_transformers_on_pil_images(siglip, size):
    images = [family.picture(*size, seed=number) for number in range(4)]
    model, processor = SiglipModel.from_pretrained(siglip), SiglipImageProcessorPil.from_pretrained(siglip)
    prompts = [prompt.lower() for prompt in family.PROMPTS]
    tokens = AutoTokenizer.from_pretrained(siglip)(
        prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    out = model(**tokens, **processor(images, return_tensors="pt"))
    expected = (out.image_embeds * out.text_embeds).sum(dim=1).detach()
    reward = ClipScore(siglip)
    got = reward(tensor(*images), family.PROMPTS).total
    # PIL rounds resized pictures to 8 bits, which this network of large random weights makes much of.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if size == (28, 28) else 4e-3)
    assert got.std() > 0.02
    pil = torch.from_numpy(np.stack(processor(images, do_normalize=False)["pixel_values"])).float()
    torch.testing.assert_close(reward(pil, family.PROMPTS).total, expected, rtol=0, atol=1e-5)
    difference = (reward.preprocess(tensor(*images)) * 0.5 + 0.5 - pil).abs().max()
    assert difference <= 2.01 / 255


def test_siglip_reads_padding_and_small_letters(siglip):
    reward, images = ClipScore(siglip), torch.rand(2, 3, 28, 28)
    upper, lower = (reward(images, [text] * 2).total for text in ("Two DOGS", "two dogs"))
    assert torch.equal(upper, lower)
    inputs = reward.read(reward._network.config, "two dogs")
    assert list(inputs) == ["input_ids"]
    assert inputs["input_ids"].shape == (1, 24)
    assert inputs["input_ids"][0, -1] == 0
    assert reward(images, ["dog " * 200] * 2).total.isfinite().all()


def test_a_package_that_the_tokenizer_needs_is_named(siglip, tmp_path):
    """The first SigLIP models come with a SentencePiece tokenizer, which is no dependency of ours."""
    copy = Path(shutil.copytree(siglip, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    is_here = importlib.util.find_spec("sentencepiece") is not None
    with pytest.raises(RewardError, match="tokenizer" if is_here else "pip install sentencepiece"):
        score(copy)


def test_a_model_for_other_pictures_is_refused(siglip, tmp_path):
    """SigLIP 2 of any size (NaFlex) takes pictures as lists of patches."""
    from transformers import Siglip2Config, Siglip2Model

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 9, "projection_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Siglip2Config(text_config=text, vision_config={**small, "num_patches": 16})
    Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="is a Siglip2Model; the reward 'clip' needs a CLIPModel or a SiglipModel"):
        score(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "siglip"])
def test_slope_batch_offload_and_judging(request, kind):
    source = request.getfixturevalue(kind)
    family.check_slope(ClipScore(source), (40, 37))
    family.check_batch(ClipScore(source))
    family.check_offload(ClipScore(source, scale=3), ClipScore(source, scale=3, offload=True))
    family.check_judging(ClipScore(source))


@pytest.mark.parametrize("kind", ["folder", "siglip"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.006)])
def test_half_precision_is_near(request, kind, dtype, tolerance):
    """Of a cosine, -1 to 1."""
    source = request.getfixturevalue(kind)
    assert family.half_error(ClipScore(source), ClipScore(source, dtype=dtype)) < tolerance


def test_a_wrong_dtype_is_named(folder):
    with pytest.raises(RewardError, match="one of float32, bfloat16, float16"):
        ClipScore(folder, dtype="int8")


BUNDLED = MODELS_DIR / "emoji-scorer"


@pytest.mark.skipif(BUNDLED.exists(), reason="the bundled scorer is here")
def test_a_missing_bundled_scorer_is_named():
    with pytest.raises(AlignError, match="emoji-scorer"):
        score("emoji")


@pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled scorer has not been trained yet")
def test_the_bundled_scorer_scores_and_has_a_slope():
    images = torch.rand(2, 3, 64, 64)
    prompts = ["one dog on a red background", "two cats on a blue background"]
    check_reward(parse_reward("clip"), images, prompts, {})


DRAWN = ["two dogs on a red background", "three foxes on a blue background", "one rocket on a white background"]


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    """Pictures that the bundled model makes, 64x64."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(DRAWN))]
    pipe = AlignPropPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe(DRAWN, num_inference_steps=6, guidance_scale=1.0, generator=noise).images


@pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled scorer has not been trained yet")
@pytest.mark.parametrize(
    "size",
    [
        (40, 40), (64, 64), (64, 96), (91, 53), (128, 128), (100, 300), (333, 200), (512, 512), (480, 640), (720, 1280),
        (1280, 720),
    ],
)  # fmt: skip
def test_trained_weights_score_as_after_pils_own_resize(drawn, size):
    """To 1e-3 of the range of a cosine, which is 2."""
    height, width = size
    images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in drawn] + [picture(height, width)]
    prompts = [*DRAWN, "a dog on a red background"]
    network, tokenizer = CLIPModel.from_pretrained(BUNDLED, dtype=torch.float32), AutoTokenizer.from_pretrained(BUNDLED)
    pixels = CLIPImageProcessorPil.from_pretrained(BUNDLED)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = [tokenizer([prompt], return_tensors="pt") for prompt in prompts]
        pairs = zip(pixels, tokens, strict=True)
        out = [network(pixel_values=image[None], **words) for image, words in pairs]
    expected = torch.cat([(one.image_embeds * one.text_embeds).sum(dim=1) for one in out])
    got = ClipScore()(tensor(*images), prompts).total
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    assert expected.max() - expected.min() > 0.3
