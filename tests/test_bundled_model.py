"""The model that ships inside, for real: what the README's first command does, shortened, and what the card claims."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from alignprop_pipe import AlignConfig, AlignPropPipeline, PromptSet, evaluate, parse_reward
from alignprop_pipe.bundled import MODELS, MODELS_DIR, bundled_path


@pytest.fixture(scope="module")
def pipe() -> AlignPropPipeline:
    return AlignPropPipeline.from_pretrained("emoji")


def test_it_opens_in_stock_diffusers_and_draws_the_same(pipe: AlignPropPipeline) -> None:
    stock = DiffusionPipeline.from_pretrained(bundled_path("emoji"))
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is StableDiffusionPipeline
    assert isinstance(pipe, StableDiffusionPipeline)
    drawn = [
        p(
            "two dogs on a blue background",
            num_inference_steps=3,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for p in (stock, pipe)
    ]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (1, 3, 64, 64)


def test_what_ships_is_small_and_names_no_path() -> None:
    assert sum(model.size_mb for model in MODELS) < 12.5
    for path in MODELS_DIR.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(/|[A-Z]:\\\\)\w', text), "an absolute path"
        assert "_name_or_path" not in text
    card = (MODELS_DIR / "README.md").read_text(encoding="utf-8")
    assert "Noto Color Emoji" in card
    assert "Open Font License" in card


def test_the_base_is_crisp_but_often_wrong_and_the_rewards_see_it(pipe: AlignPropPipeline) -> None:
    config = AlignConfig.preset("emoji")
    held_out = PromptSet.load("emoji").split(48, seed=3)[1]
    judges = [parse_reward(text) for text in ("emoji_judge", "count", "contains")]
    look = evaluate(pipe, parse_reward("clip"), judges, held_out, config, 0)
    assert 0.35 < look.judges["emoji_judge"] < 0.8
    right = torch.tensor(look.per_prompt["emoji_judge"]) > 0
    scores = torch.tensor(look.per_prompt["clip"])
    assert scores[right].mean() > scores[~right].mean() + 0.2
    values = {name: torch.tensor(column) for name, column in look.per_prompt.items()}
    assert (values["contains.right"] == values["emoji_judge.subject"]).float().mean() >= 0.95
    counted = values["emoji_judge.subject"] * values["emoji_judge.count"]  # `count` counts the prompt's subject alone
    assert (values["count.right"] == counted).float().mean() >= 0.8


def test_the_first_command_shortened(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alignprop_pipe"]
    short = ["--steps", "2", "--batch-size", "2", "--eval-prompts", "4", "--json", "--out", "run"]
    done = subprocess.run(
        [*command, "train", *short], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert all(json.loads(line) for line in done.stdout.splitlines())
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "adapter.safetensors",
        "adapter-comfyui.safetensors",
        "before-after.png",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "report.html",
        "samples",
    } <= made
    stock = DiffusionPipeline.from_pretrained(bundled_path("emoji"))
    stock.load_lora_weights(str(tmp_path / "run"), weight_name="adapter-comfyui.safetensors")
    assert stock.get_list_adapters()["unet"]


def test_opening_it_says_nothing_of_what_other_libraries_lack() -> None:
    code = "from alignprop_pipe import AlignPropPipeline; AlignPropPipeline.from_pretrained('emoji')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout + done.stderr
