"""Tiny detectors of the real transformers classes with seeded random weights, and pictures to show them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniatures import clip_tokenizer
from PIL import Image
from torch import nn
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

LABELS = {0: "N/A", 1: "person", 2: "Dog", 3: "N/A", 4: "cell phone"}


def save_owl(folder: Path, size: int = 32, seed: int = 0, **about: Any) -> Path:
    """OWLv2 with size/8 x size/8 boxes; the log-odds of its random boxes lie round that of its threshold."""
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": 8,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16, **about))
        for name, weight in model.named_parameters():
            if "norm" not in name and weight.ndim > 0:
                nn.init.normal_(weight, std=0.3)
        nn.init.normal_(model.class_head.logit_scale.weight, std=0.02)
        nn.init.normal_(model.class_head.logit_shift.weight, std=0.05)
        nn.init.constant_(model.class_head.logit_scale.bias, 4.0)
        nn.init.constant_(model.class_head.logit_shift.bias, -0.65)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def save_yolos(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = YolosForObjectDetection(
            YolosConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=[32, 48],
                patch_size=16,
                num_detection_tokens=10,
                id2label=LABELS,
                label2id={v: k for k, v in LABELS.items()},
            )
        )
        for name, weight in model.named_parameters():
            if "norm" not in name and weight.ndim > 0:
                nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def picture(height: int, width: int, shift: float = 0.0) -> Image.Image:
    """Smooth waves of colour, by a formula: the committed numbers were computed from these."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 127 * np.sin(x * (3 + c) / width * 3.1 + y * (2 + c) / height * 4 + c + shift) for c in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).round().astype(np.uint8))


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])
