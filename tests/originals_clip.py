"""Runs the scorers' original code on the miniatures of clip_family.py, and writes its numbers.

    python tests/originals_clip.py INPUTS ORIGINALS OUT.json

INPUTS is what `clip_family.write_inputs` wrote. ORIGINALS holds checkouts named as in `COMMITS`. It runs in an
environment of its own: torch, torchvision, transformers 4, ftfy, regex, timm, and what else they import. Nothing of
this repository is imported. test_originals_clip.py compares the numbers with tests/data/originals_clip.json.
"""

# pyright: reportMissingImports=false

import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from PIL import Image

TEXTS = [
    "A photo of TWO dogs, 3 cats & a fox's tail!",
    "  spaces   and\nlines ",
    "caf\u00e9 na\u00efve \u732b \U0001f43e",
    "don't we'll 12345 x+y=z (very) [odd] #1 half-timbered",
    "word " * 100,
    "",
]
COMMITS = {
    "HPSv2": "866735ecaae999fa714bd9edfa05aa2672669ee3",
    "PickScore": "f79607ff68609c1e6dfa78cba38afeea4c248df1",
    "improved-aesthetic-predictor": "6934dd81792f086e613a121dbce43082cb8be85e",
    "aesthetic-predictor-v2-5": "c0e15567fa61252cbff43d70c49a8bd27202ca9a",
    "CLIP": "d05afc436d78f1c48dc0dbf8e5980a9d471f35f6",
}

GREEN = (0.4578275, 0.26130258)  # mean and deviation, CLIP's


def hpsv2(inputs, prompts, pictures):
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    state = torch.load(inputs / "hps" / "HPS_v2_compressed.pt")["state_dict"]
    tokens, width = state["token_embedding.weight"].shape
    vision = {"image_size": prompts["side"], "layers": 2, "width": width, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": tokens, "width": width, "heads": 2, "layers": 2}
    model = CLIP(state["text_projection"].shape[1], vision, text, output_dict=True).eval()
    model.load_state_dict(state)
    prepare = image_transform(prompts["side"], is_train=False, resize_longest_max=True)
    ids = torch.tensor([row["ids"] for row in prompts["prompts"]])
    pixels = [prepare(picture) for picture in pictures]
    # A picture whose longer side is right already is not padded there, and then does not fit the network.
    fitting = [number for number, image in enumerate(pixels) if image.shape[1:] == (prompts["side"],) * 2]
    out = model(torch.stack([pixels[number] for number in fitting]), ids)
    scores = dict(zip(fitting, (out["image_features"] @ out["text_features"].T).tolist(), strict=True))
    return {
        "scores": [scores.get(number) for number in range(len(pixels))],
        "pixels": [levels(image) for image in pixels],
    }


def pieces():
    """What HPSv2's tokenizer makes of texts; padding left out."""
    from hpsv2.src.open_clip.tokenizer import _tokenizer, tokenize

    rows = tokenize(TEXTS).tolist()
    return [[_tokenizer.decoder[token] for number, token in enumerate(row) if any(row[number:])] for row in rows]


def pickscore(inputs, prompts, pictures):
    for name, attribute in (("datasets", "load_from_disk"), ("fire", "Fire")):  # imported there, not needed here
        sys.modules.setdefault(name, types.ModuleType(name))
        setattr(sys.modules[name], attribute, None)
    sys.modules["datasets"].load_dataset = None
    from trainer.scripts.eval_preference_predictor import infer_example
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    model = CLIPModel.from_pretrained(inputs / "pick").eval()
    processor = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(inputs / "pick"), CLIPTokenizerFast.from_pretrained(inputs / "pick")
    )
    texts = [row["prompt"] for row in prompts["prompts"]]
    both = processor(text=texts, images=pictures, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return {
        "shares": [infer_example(pictures, text, model, processor, "cpu") for text in texts],
        "scores": model(**both).logits_per_image.tolist(),
    }


def aesthetic(inputs, originals, pictures, side):
    from clip.clip import _transform
    from clip.model import build_model

    script = ast.parse((originals / "improved-aesthetic-predictor" / "simple_inference.py").read_text())
    wanted = [node for node in script.body if getattr(node, "name", "") in ("MLP", "normalized")]
    import numpy as np

    scope = {"pl": types.SimpleNamespace(LightningModule=torch.nn.Module), "nn": torch.nn, "np": np}
    exec(compile(ast.Module(wanted, []), "simple_inference.py", "exec"), scope)
    trunk = build_model(torch.load(inputs / "trunk" / "openai.pt")).float().eval()
    head = scope["MLP"](16).eval()
    head.load_state_dict(torch.load(inputs / "heads" / "aesthetic-model.pth"))
    pixels = torch.stack([_transform(side)(picture) for picture in pictures])
    embedding = scope["normalized"](trunk.encode_image(pixels).numpy())
    scores = head(torch.from_numpy(embedding).float()).flatten().tolist()
    return {"scores": scores, "pixels": [levels(image) for image in pixels]}


def aesthetic2_5(inputs, pictures):
    from aesthetic_predictor_v2_5 import convert_v2_5_from_siglip

    model, processor = convert_v2_5_from_siglip(
        predictor_name_or_path=str(inputs / "heads" / "aesthetic_predictor_v2_5.pth"),
        encoder_model_name=str(inputs / "siglip"),
    )
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    return {"scores": model.eval()(pixels).logits.flatten().tolist()}


def levels(pixels):
    """The green channel before normalising, in 8-bit levels (some lie outside 0 to 255): rows of whole numbers."""
    return ((pixels[1] * GREEN[1] + GREEN[0]) * 255).round().int().tolist()


def main(inputs, originals, out):
    for name, commit in COMMITS.items():
        found = subprocess.run(
            ["git", "-C", originals / name, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == commit, f"{name} is at {found.stdout.strip()}, not at {commit}"
    folders = ("transformers4", "HPSv2", "PickScore", "CLIP", "aesthetic-predictor-v2-5/src")
    sys.path[:0] = [str(originals / folder) for folder in folders]
    torch.set_num_threads(1)
    prompts = json.loads((inputs / "prompts.json").read_text())
    pictures = [Image.open(path) for path in sorted(inputs.glob("*.png"), key=lambda path: int(path.stem))]
    with torch.no_grad():
        numbers = {
            "commits": COMMITS,
            "pieces": pieces(),
            "hpsv2": hpsv2(inputs, prompts, pictures),
            "pickscore": pickscore(inputs, prompts, pictures),
            "aesthetic": aesthetic(inputs, originals, pictures, prompts["side"]),
            "aesthetic2.5": aesthetic2_5(inputs, pictures),
        }
    out.write_text(json.dumps(numbers, separators=(",", ":")).replace("]],", "]],\n"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
