"""Miniatures of the CLIP family, the same on every machine: pictures and weights come from whole numbers.

`write_inputs` puts them into a folder, from where the originals read them too (originals_clip.py).
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from miniatures import WORDS, clip_tokenizer
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

from alignprop_pipe.rewards import Reward, check_reward
from alignprop_pipe.rewards.networks.open_clip import clip_names

PROMPTS = [
    "a dog on a red background",
    "two cats",
    "three foxes in the snow, a photo of the sea and the sky",
    "Horses!",
]
SIZES = [(28, 28), (64, 64), (40, 90), (90, 41), (27, 50), (20, 20), (28, 15), (121, 33)]
SIDE, PATCH = 28, 14


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Ramps, blocks with hard edges, and a little noise."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width]
    ramps = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x // 7 + y // 5 + seed) % 2 * 200]
    noise = rng.integers(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(np.roll(ramps, seed, axis=0), axis=2) + noise, 0, 255).astype(np.uint8))


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights between -1/4 and 1/4 (1 more for those of norms) that half precision holds exactly."""
    rng = np.random.default_rng(seed)
    state = {}
    for name in sorted(shapes):
        values = torch.from_numpy(rng.integers(-512, 513, shapes[name])).float() / 2048
        is_norm = name.endswith("weight") and ("ln_" in name or "norm" in name)
        state[name] = values.round(decimals=1) + 1 if is_norm else values
    if "logit_scale" in state:
        state["logit_scale"] = torch.full(shapes["logit_scale"], 4.5)
    return state


def open_clip_shapes(width: int, embedding: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIP as OpenAI's code and open_clip save it."""
    tokens, patches = len(clip_tokenizer()), (SIDE // PATCH) ** 2 + 1
    shapes = {
        "logit_scale": (),
        "positional_embedding": (77, width),
        "text_projection": (width, embedding),
        "token_embedding.weight": (tokens, width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (patches, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, PATCH, PATCH),
    }
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    block = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
    block |= {"mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}
    for tower in ("transformer", "visual.transformer"):
        for layer in range(layers):
            front = f"{tower}.resblocks.{layer}."
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{front}{norm}.weight": (width,), f"{front}{norm}.bias": (width,)}
            for name, shape in block.items():
                shapes |= {f"{front}{name}weight": shape, f"{front}{name}bias": shape[:1]}
    return shapes


def clip_config(width: int, embedding: int, heads: int, activation: str = "gelu", layers: int = 2) -> CLIPConfig:
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    tower |= {"num_hidden_layers": layers, "hidden_act": activation, "projection_dim": embedding}
    # eos_token_id 2: what the published configurations say, whatever the tokenizer
    text = {**tower, "vocab_size": len(clip_tokenizer()), "bos_token_id": 0, "eos_token_id": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": PATCH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=embedding)


def save_clip_processor(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)


def write_hps(folder: Path) -> Path:
    """Both published layouts, the configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = drawn(open_clip_shapes(32, 16), 1)
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2_compressed.pt")
    save_file(clip_names(state), folder / "model.safetensors")
    clip_config(32, 16, heads=2).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int, activation: str = "gelu", width: int = 32, heads: int = 2) -> Path:
    """A CLIPModel with all its files, and the same weights as OpenAI's code has them."""
    state = drawn(open_clip_shapes(width, 16), seed)
    network = CLIPModel(clip_config(width, 16, heads, activation))
    network.load_state_dict(clip_names(state))
    network.save_pretrained(folder)
    torch.save(state, folder / "openai.pt")
    save_clip_processor(folder)
    return folder


def siglip_tokenizer() -> Siglip2Tokenizer:
    """Byte-level where a letter is not known; whole words are single pieces."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "<>"] + ["▁"]
    merges = {(word[:end], word[end]): None for word in WORDS for end in range(1, len(word))}
    pieces += letters + [left + right for left, right in merges]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return Siglip2Tokenizer(
        vocab=vocab, merges=list(merges), padding_side="right", model_max_length=24, model_input_names=["input_ids"]
    )


def write_siglip(folder: Path, seed: int = 3) -> Path:
    tokenizer = siglip_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": SIDE, "patch_size": PATCH})
    network = SiglipModel(config)
    network.load_state_dict(drawn({name: tuple(t.shape) for name, t in network.state_dict().items()}, seed))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def head_state(part: str, numbers: list[int], sizes: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Linear layers `part.N`, from each of `sizes` to the next."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, takes, gives in zip(numbers, sizes[:-1], sizes[1:], strict=True):
        shapes |= {f"{part}.{number}.weight": (gives, takes), f"{part}.{number}.bias": (gives,)}
    return drawn(shapes, seed)


def write_heads(folder: Path) -> Path:
    """The heads of both aesthetic predictors, at their true widths after the first layer."""
    folder.mkdir(parents=True, exist_ok=True)
    v2 = head_state("layers", [0, 2, 4, 6, 7], [16, 1024, 128, 64, 16, 1], 5)
    torch.save(v2, folder / "aesthetic-model.pth")
    v2_5 = head_state("scoring_head", [0, 2, 4, 6, 8], [32, 1024, 128, 64, 16, 1], 6)
    torch.save(OrderedDict(v2_5), folder / "aesthetic_predictor_v2_5.pth")  # the original asks for this class
    return folder


def padded_ids(prompt: str) -> list[int]:
    """Tokens as open_clip gives them: zeros up to 77."""
    ids = clip_tokenizer()(prompt)["input_ids"]
    return ids + [0] * (77 - len(ids))


def write_inputs(folder: Path) -> Path:
    """All models, pictures and tokens that the originals are run with."""
    write_hps(folder / "hps")
    write_clip(folder / "pick", 2)
    write_clip(folder / "trunk", 4, "quick_gelu", width=64, heads=1)  # OpenAI's code makes heads of 64
    write_siglip(folder / "siglip")
    write_heads(folder / "heads")
    for number, size in enumerate(SIZES):
        picture(*size, seed=number).save(folder / f"{number}.png")
    rows = [{"ids": padded_ids(prompt), "prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.json").write_text(json.dumps({"prompts": rows, "side": SIDE}))
    return folder


# --- what every scorer must do -----------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Pictures in float64, away from 0 and 1, where preprocessing has kinks."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.4 + 0.3


def check_slope(reward: Reward, size: tuple[int, int]) -> None:
    """The gradient is finite and predicts small changes, in float64."""
    images, generator = noise(2, 3, *size).requires_grad_(True), torch.Generator().manual_seed(1)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).total.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    for _ in range(2):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + h * direction, PROMPTS[:2]).total.sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def check_batch(reward: Reward) -> None:
    """A batch is its pictures one by one."""
    images = noise(3, 3, 40, 37)
    single = [reward(image[None], [prompt]).total for image, prompt in zip(images, PROMPTS, strict=False)]
    torch.testing.assert_close(reward(images, PROMPTS[:3]).total, torch.cat(single), rtol=1e-9, atol=1e-9)


def check_offload(resident: Reward, offloaded: Reward) -> None:
    """The same values and gradients, and no network that waits for the backward pass."""
    sides = []
    for reward in (resident, offloaded):
        images = noise(2, 3, 40, 37).requires_grad_(True)
        total = reward(images, PROMPTS[:2]).total
        (gradient,) = torch.autograd.grad((total * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum(), images)
        sides.append((total.detach(), gradient))
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-9, atol=1e-12)


def half_error(full: Reward, half: Reward) -> float:
    """The largest difference of the scores of pictures, which stay float32 in either case."""
    images = tensor(*(picture(40, 37, seed) for seed in range(4)))
    scores = half(images, PROMPTS).total
    assert scores.dtype == torch.float32
    return float((scores - full(images, PROMPTS).total).abs().max())


def check_judging(reward: Reward) -> None:
    """Under no_grad, and with pictures that need no gradient, nothing is kept for a backward pass."""
    images = tensor(picture(30, 30), picture(30, 30, 1))
    assert not reward(images, PROMPTS[:2]).total.requires_grad
    with torch.no_grad():
        assert not reward(images.clone().requires_grad_(True), PROMPTS[:2]).total.requires_grad
    check_reward(reward, images, PROMPTS[:2], {})


class Bomb:
    """A pickle of it makes a file when it is opened by a reader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def originals(name: str) -> dict:
    """The numbers of the original code; see originals_clip.py."""
    return json.loads((Path(__file__).parent / "data" / "originals_clip.json").read_text())[name]
