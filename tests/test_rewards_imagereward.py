"""ImageReward against the authors' own code, with the same random weights at small sizes.

`tests/data/imagereward.json` holds what the authors' code gave, with its commit. Where ALIGNPROP_ORIGINALS names a
folder, the authors' code runs again and the numbers are compared with the committed ones. The folder needs
`ImageReward` (a checkout of THUDM/ImageReward) and `ImageReward-venv`, a virtual environment with torch, pillow,
transformers==4.40.2, tokenizers==0.19.1, timm==0.6.13, fairscale and torchvision.
`ALIGNPROP_WRITE=1` next to it writes the file anew.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards import check_reward, parse_reward
from alignprop_pipe.rewards.scorers.imagereward import ImageReward, load_words, preprocessed

NUMBERS = Path(__file__).parent / "data" / "imagereward.json"
ORIGINALS = os.environ.get("ALIGNPROP_ORIGINALS")
PROMPTS = ["a dog on a red background", "Two CATS, and the sea!", "dog " * 60, "a café [ENC] sky", ""]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz!,",
    *(f"##{c}" for c in "abcdeftu"),
]
WORDS += ["dog", "dogs", "cat", "red", "sea", "two", "the", "and", "on", "background", "sky", "##s"]
SIDE = 224
# The first need no resizing; two of them are cut, where torchvision rounds half a pixel to even.
EXACT = [(224, 224)] * 5 + [(224, 227), (231, 224)]
SIZES = [*EXACT, (256, 256), (180, 301), (310, 229), (100, 100)]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# --- a miniature, written as the authors write theirs --------------------------------------------------------------


def shapes(side: int, vision: int = 192, text: int = 128, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, at small sizes."""
    made: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 1 + (side // 16) ** 2, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, text),
        "blip.vision_proj.weight": (8, vision),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, text),
        "blip.text_proj.bias": (8,),
    }

    def linear(name: str, out: int, into: int) -> None:
        made.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        made.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for block in (f"blip.visual_encoder.blocks.{n}" for n in range(layers)):
        norm(f"{block}.norm1", vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.attn.qkv", 3 * vision, vision)
        linear(f"{block}.attn.proj", vision, vision)
        linear(f"{block}.mlp.fc1", 4 * vision, vision)
        linear(f"{block}.mlp.fc2", vision, 4 * vision)
    norm("blip.visual_encoder.norm", vision)
    norm("blip.text_encoder.embeddings.LayerNorm", text)
    for layer in (f"blip.text_encoder.encoder.layer.{n}" for n in range(layers)):
        for kind, seen in (("attention", text), ("crossattention", vision)):
            linear(f"{layer}.{kind}.self.query", text, text)
            linear(f"{layer}.{kind}.self.key", text, seen)
            linear(f"{layer}.{kind}.self.value", text, seen)
            linear(f"{layer}.{kind}.output.dense", text, text)
            norm(f"{layer}.{kind}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", 2 * text, text)
        linear(f"{layer}.output.dense", text, 2 * text)
        norm(f"{layer}.output.LayerNorm", text)
    widths = [text, 1024, 128, 64, 16, 1]
    for place, into, out in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{place}", out, into)
    return made


def published(side: int = 32) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(0), {}
    for name, shape in shapes(side).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower():
            made[name] = 0.1 * noise + name.endswith("weight")
        else:
            made[name] = noise * (1 / np.sqrt(np.prod(shape[1:])) if len(shape) in (2, 4) else 0.3)
    # Smooth filters, as trained ones mostly are: white ones would hear nothing but how PIL rounds.
    patch = made["blip.visual_encoder.patch_embed.proj.weight"][..., ::4, ::4]
    made["blip.visual_encoder.patch_embed.proj.weight"] = patch.repeat_interleave(4, 2).repeat_interleave(4, 3)
    made["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return made


def save_miniature(folder: Path, *, layout: str = "pickle", heads: int = 2, side: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "pickle":
        torch.save(published(side), folder / "ImageReward.pt")
    else:
        save_file(published(side), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    med = {"hidden_size": 128, "num_attention_heads": heads, "num_hidden_layers": 2, "intermediate_size": 256}
    med |= {"vocab_size": len(WORDS) + 2, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    med |= {"add_cross_attention": True, "encoder_width": 192, "pad_token_id": 0, "type_vocab_size": 2}
    (folder / "med_config.json").write_text(json.dumps(med))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _converted(tmp_path_factory: pytest.TempPathFactory):
    """Converted pickles go to a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path_factory.mktemp("assets")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(tmp_path_factory.mktemp("imagereward"))


def picture(number: int) -> Image.Image:
    height, width = SIZES[number]
    coarse = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])


def prompt(number: int) -> str:
    return PROMPTS[number % len(PROMPTS)]


def ours(folder: Path) -> torch.Tensor:
    reward = ImageReward(folder)
    scores = [reward(tensor(picture(n)), [prompt(n)]).total for n in range(len(SIZES))]
    return torch.cat(scores)


# --- the authors' code ---------------------------------------------------------------------------------------------

ORIGINAL = """
import json, sys, types
from pathlib import Path
import torch
# A torchvision for GPUs asks for two operators that a torch for CPUs lacks; neither is called here.
for name in ("nms", "qnms"):
    try:
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
# Their __init__ files import the trainer and other scorers, with more dependencies: stand-ins with the same path.
for name in ("ImageReward", "ImageReward.models"):
    package = types.ModuleType(name)
    package.__path__ = [str(checkout / name.replace(".", "/"))]
    sys.modules[name] = package
from PIL import Image
from ImageReward import ImageReward as authors
from ImageReward.models.BLIP import blip, blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer
load = blip.BertTokenizer.from_pretrained
blip.BertTokenizer.from_pretrained = lambda name: load(str(folder))
vit = VisionTransformer(img_size=224, patch_size=16, embed_dim=192, depth=2, num_heads=3)
blip_pretrain.create_vit = lambda *args: (vit, 192)
model = authors.ImageReward(med_config=str(folder / "med_config.json"))
model.mlp, model.preprocess = authors.MLP(128), authors._transform(224)
# Theirs are 256 wide and unused; 8 here, so that all names of the file are checked.
model.blip.vision_proj, model.blip.text_proj = torch.nn.Linear(192, 8), torch.nn.Linear(128, 8)
model.load_state_dict(torch.load(folder / "ImageReward.pt", weights_only=True), strict=True)
model.eval()
prompts = json.loads((folder / "prompts.json").read_text())
with torch.no_grad():
    scores = [model.score(prompt, Image.open(folder / f"{n}.png")) for n, prompt in enumerate(prompts)]
print(json.dumps(scores))
"""


def by_authors(folder: Path, originals: Path) -> list[float]:
    """Scores from PIL to the end, by the checkout of the authors' repository."""
    for number in range(len(SIZES)):
        picture(number).save(folder / f"{number}.png")
    (folder / "prompts.json").write_text(json.dumps([prompt(n) for n in range(len(SIZES))]))
    python = originals / "ImageReward-venv" / "bin" / "python"
    run = subprocess.run(
        [python, "-c", ORIGINAL, originals / "ImageReward", folder], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(ORIGINALS is None, reason="ALIGNPROP_ORIGINALS names no folder with the authors' code")
def test_the_committed_numbers_are_what_the_authors_code_gives(tmp_path):
    folders = {n: save_miniature(tmp_path / str(n), heads=n, side=SIDE) for n in (2, 4)}
    got = {f"heads={n}": by_authors(folder, Path(str(ORIGINALS))) for n, folder in folders.items()}
    if os.environ.get("ALIGNPROP_WRITE"):
        source = {"repository": "THUDM/ImageReward", "commit": "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb"}
        NUMBERS.write_text(json.dumps({**source, "scores": got}, indent=1) + "\n")
    for name, scores in json.loads(NUMBERS.read_text())["scores"].items():
        torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(scores), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["pickle", "safetensors"])
@pytest.mark.parametrize("heads", [2, 4])
def test_it_equals_the_authors_code(tmp_path, layout, heads):
    expected = torch.tensor(json.loads(NUMBERS.read_text())["scores"][f"heads={heads}"])
    got = ours(save_miniature(tmp_path, layout=layout, heads=heads, side=SIDE))
    torch.testing.assert_close(got[: len(EXACT)], expected[: len(EXACT)], rtol=0, atol=1e-4)
    # Resizing differs from PIL's, which rounds to 8 bits: less than 1e-3 of the range of -2 to 2.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    assert expected.std() > 0.1


# --- preprocessing -------------------------------------------------------------------------------------------------


def by_torchvision(image: Image.Image, side: int) -> torch.Tensor:
    """The authors' Resize and CenterCrop, by PIL alone, with torchvision's rules for sizes."""
    width, height = image.size
    long = int(side * max(width, height) / min(width, height))
    image = image.resize((side, long) if width <= height else (long, side), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    return tensor(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 67), (71, 64), (40, 90), (123, 57), (200, 300), (512, 448)])
def test_preprocessing_is_that_of_the_authors(size):
    coarse = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = Image.fromarray(coarse.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    got = preprocessed(tensor(image), 64) * std + mean
    assert got.shape == (1, 3, 64, 64)
    assert (got - by_torchvision(image, 64)).abs().max() <= 2 / 255


# --- gradient, batches, number formats -----------------------------------------------------------------------------


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64) * 0.4 + 0.3


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (20, 24)])
def test_the_gradient_is_the_slope(folder, size):
    reward, images, generator = ImageReward(folder), noise(2, *size), torch.Generator().manual_seed(0)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).total.sum(), images)
    assert gradient.isfinite().all()
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, PROMPTS[:2]).total.sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_batch_is_its_pictures_one_by_one(folder):
    reward, images = ImageReward(folder), noise(3, 48, 56)
    single = torch.cat([reward(image[None], [text]).total for image, text in zip(images, PROMPTS[:3], strict=True)])
    torch.testing.assert_close(reward(images, PROMPTS[:3]).total, single, rtol=1e-10, atol=1e-10)
    assert single.std() > 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision(folder, dtype, tolerance):
    images = noise(3, 40, 40).float().requires_grad_(True)
    half = ImageReward(folder, dtype=dtype)(images, PROMPTS[:3]).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ImageReward(folder)(images, PROMPTS[:3]).total, rtol=0, atol=tolerance)
    (gradient,) = torch.autograd.grad(half.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_offloading_changes_nothing(folder):
    images = noise(2, 40, 48).requires_grad_(True)
    kept, offloaded = (ImageReward(folder, offload=offload)(images, PROMPTS[:2]).total for offload in (False, True))
    torch.testing.assert_close(kept, offloaded, rtol=0, atol=1e-12)
    weights = torch.tensor([2.0, -3.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * total).sum(), images)[0] for total in (kept, offloaded)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_it_can_train_and_only_the_pictures_get_a_gradient(folder):
    reward, images = ImageReward(folder), noise(2, 32, 32).float().requires_grad_(True)
    check_reward(reward, images, PROMPTS[:2], {})
    reward(images, PROMPTS[:2]).total.sum().backward()
    assert images.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in reward._network.parameters())
    assert not reward._network.training


def test_a_judge_needs_no_graph(folder):
    reward, images = ImageReward(folder), noise(2, 32, 32).requires_grad_(True)
    with torch.no_grad():
        watched = reward(images, PROMPTS[:2]).total
    assert not watched.requires_grad
    assert torch.equal(watched, reward(images, PROMPTS[:2]).total)


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ImageReward(folder)(torch.full((1, 3, 32, 32), 0.5), ["a dog"])
    assert torch.equal(torch.rand(4), expected)


def test_the_prompt_matters_up_to_its_35th_token(folder):
    reward, images = ImageReward(folder), noise(4, 32, 32)[:1].expand(4, -1, -1, -1)
    dogs = reward(images, ["dog " * 32 + "cat", "dog " * 33, "dog " * 33 + "cat", "dog " * 200]).total
    torch.testing.assert_close(dogs[1:], dogs[1].expand(3), rtol=0, atol=1e-12)
    assert (dogs[0] - dogs[1]).abs() > 1e-4


# --- loading -------------------------------------------------------------------------------------------------------


def score(model: str | Path, **kwargs) -> torch.Tensor:
    return ImageReward(model, **kwargs)(torch.full((1, 3, 32, 32), 0.5), ["a dog"]).total


def test_the_weights_alone_as_a_file(folder, tmp_path):
    weights = save_miniature(tmp_path / "weights", layout="safetensors")
    (weights / "vocab.txt").rename(tmp_path / "vocab.txt")
    expected = score(folder)
    assert torch.equal(score(weights / "model.safetensors", tokenizer=tmp_path), expected)
    with pytest.raises(
        RewardError, match=r"hf download google-bert/bert-base-uncased .*--local-dir FOLDER.*next to the weights"
    ):
        score(weights / "model.safetensors")


def test_heads_are_64_wide_unless_the_config_says_otherwise(folder, tmp_path):
    four = save_miniature(tmp_path / "four", heads=4)
    assert not torch.equal(score(four), score(folder))
    (four / "med_config.json").unlink()
    assert torch.equal(score(four), score(folder))


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("THUDM/ImageReward", "ImageReward.pt"),
        ("RE-N-Y/ImageReward", "model.safetensors"),
        ("nobody/x", "model.safetensors"),
    ],
)
def test_without_a_network_the_files_to_get_are_named(model, file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError, match=f"hf download {model} {file} .*--local-dir FOLDER"):
        score(model)


def test_an_empty_folder_says_what_it_needs(tmp_path):
    with pytest.raises(RewardError, match=r"model\.safetensors.*ImageReward\.pt"):
        score(tmp_path)


@pytest.mark.parametrize("layout", ["pickle", "safetensors"])
def test_a_truncated_file_is_named(tmp_path, layout):
    save_miniature(tmp_path, layout=layout)
    file = next(path for path in tmp_path.iterdir() if path.suffix in (".pt", ".safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(RewardError, match=f"{file.name}.*damaged"):
        score(tmp_path)


def test_a_truncated_config_is_named(tmp_path):
    save_miniature(tmp_path)
    (tmp_path / "med_config.json").write_text('{"hidden')
    with pytest.raises(RewardError, match=r"med_config\.json.*damaged"):
        score(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("blip.visual_encoder.norm.bias", None, "post_layernorm.bias is missing"),
        ("mlp.layers.7.bias", (3,), "mlp.7.bias has shape"),
        ("blip.text_encoder.encoder.layer.1.output.dense.weight", (128, 255), "output.dense.weight has shape"),
        ("blip.visual_encoder.blocks.0.mlp.fc3.weight", (2, 2), "fc3.weight is not known"),
        ("blip.visual_encoder.pos_embed", None, "holds no ImageReward"),
        ("mlp.layers.0.weight", None, "holds no ImageReward"),
    ],
)
def test_nothing_is_half_loaded(tmp_path, name, shape, said):
    save_miniature(tmp_path, layout="safetensors")
    weights = published()
    weights.pop(name, None)
    if shape is not None:
        weights[name] = torch.zeros(shape)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=said):
        score(tmp_path)


def test_another_model_is_refused(tmp_path):
    save_miniature(tmp_path, layout="safetensors")
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="holds no ImageReward"):
        score(tmp_path)


@pytest.mark.parametrize("words", [[*WORDS, "more"], [*WORDS[:-2], "[unused0]"], []])
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, words):
    save_miniature(tmp_path)
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    with pytest.raises(RewardError, match=r"the tokenizer .* is damaged, or belongs to other weights"):
        score(tmp_path)


def test_a_tokenizer_saved_by_transformers_gives_the_same(folder, tmp_path):
    load_words(str(folder)).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not (tmp_path / "vocab.txt").exists()
    assert torch.equal(score(folder, tokenizer=tmp_path), score(folder))


def test_no_pickle_is_executed(tmp_path):
    save_miniature(tmp_path)
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"mlp.layers.0.weight": torch.zeros(1), "x": Bomb()}, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match=r"ImageReward\.pt.*safetensors"):
        score(tmp_path)
    assert not marker.exists()


def test_it_is_named_in_an_expression(folder):
    reward = parse_reward(f'imagereward(model="{folder}", dtype="bfloat16")')
    assert reward == ImageReward(str(folder), dtype="bfloat16")
    assert str(reward) == f'imagereward(model="{folder}", dtype="bfloat16")'
