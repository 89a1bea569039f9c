"""The model card: its code runs, its metadata is read back, and it says what fell as plainly as what rose."""

import ast
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard
from PIL import Image

from alignprop_pipe import Adapter, AlignConfig, AlignPropPipeline, mix
from alignprop_pipe.hub import stage
from alignprop_pipe.hub.card import Facts, model_card, warnings_in
from alignprop_pipe.hub.licences import base_licence, overall, reward_licences
from alignprop_pipe.hub.redact import Private
from alignprop_pipe.layout import HUB_WEIGHTS
from alignprop_pipe.records import Change, Evidence

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FACTS = Facts(
    repo_id="me/foxes",
    base=BASE,
    base_class="StableDiffusionPipeline",
    reward="aesthetic + 0.5*hpsv2.1",
    source="the set 'animals' that ships with alignprop-pipe",
    prompts=("a fox in the snow", "a | pipe and `ticks` and <b>html</b>"),
    num_prompts=45,
    held_out=16,
    config=AlignConfig().replace(judges=("pickscore",)).to_dict(),
    changes={
        "reward": Change(5.0, 6.0, 1.0, 0.2),
        "aesthetic": Change(4.9, 5.8, 0.9, 0.2),
        "pickscore": Change(21.0, 21.5, 0.5, 0.2),
    },
    judges=("pickscore",),
    diversity=Change(0.3, 0.31, 0.01, 0.02),
    status="completed",
    steps=60,
    kept_step=40,
    seconds=5400.0,
    device="NVIDIA H100",
    command="alignprop train MODEL --config config.json",
    size="LoRA of rank 4, alpha 4, on 32 layers of the unet",
    files=(HUB_WEIGHTS, "foxes-comfyui.safetensors", "config.json", "metrics.jsonl", "curve.png", "before-after.png"),
    widgets=(("a fox in the snow", "images/after-1.png"),),
)


def text(**changed: Any) -> str:
    return str(model_card(dataclasses.replace(FACTS, **changed)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the bundled model."""
    folder = tmp_path_factory.mktemp("runs") / "cute"
    pipe = AlignPropPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    small = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "num_inference_steps": 2}
    result = pipe.align("clip", "emoji", out=folder, **small, truncation="last:1", eval_prompts=5)
    assert result.adapter.run_folder == folder
    return folder


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    dry = Adapter.load(run).push_to_hub("me/cute", dry_run=run / "hub")
    assert dry.folder is not None
    return dry.folder


# --- the code in it --------------------------------------------------------------------------------------------------


def test_the_code_of_the_card_runs(folder: Path) -> None:
    """As it stands, but for the repository's name: the folder that would be there takes its place."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert 'load_lora_weights("me/cute")' in code
    space: dict[str, Any] = {}
    exec(code.replace("me/cute", folder.as_posix()), space)
    assert isinstance(space["image"], Image.Image)
    assert space["image"].size == (64, 64)
    assert space["pipe"].get_active_adapters()


def test_stock_diffusers_finds_its_file_among_the_two(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = AlignPropPipeline.from_pretrained("emoji")
    pipe.load_lora_weights(str(folder), adapter_name="there")
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert "more than one weights file" not in caplog.text
    held = Adapter.load(folder / HUB_WEIGHTS)
    assert held.keys() == Adapter.load(folder.parent).keys()


@pytest.mark.parametrize(
    ("changed", "has"),
    [
        ({}, f'DiffusionPipeline.from_pretrained("{BASE}")'),
        ({"base": ""}, "a local model: put yours"),
        ({"base": "emoji"}, 'AlignPropPipeline.from_pretrained("emoji")'),
        ({"base_class": "WanPipeline", "base": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, ".frames[0]"),
        ({"base_class": "StableDiffusionImg2ImgPipeline"}, 'image=load_image("picture.png")'),
        ({"widgets": (), "prompts": ('a "quoted" \\ prompt\n$HOME',)}, r'pipe("a \"quoted\" \\ prompt\n$HOME", '),
        ({"base_class": "NoSuchPipeline"}, 'pipe("a fox in the snow").images[0]'),
    ],
)
def test_code_for_every_kind_of_base(changed: dict[str, Any], has: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", text(**changed), re.DOTALL)
    ast.parse(code)
    assert has in code
    assert 'load_lora_weights("me/foxes")' in code


def test_settings_that_its_call_takes_are_in_the_code() -> None:
    config = AlignConfig().replace(num_inference_steps=20, guidance_scale=5.0, height=512, negative_prompt="a blur")
    (code,) = re.findall(r"```python\n(.*?)```", text(config=config.to_dict()), re.DOTALL)
    assert 'num_inference_steps=20, guidance_scale=5.0, height=512, negative_prompt="a blur")' in code
    assert "width" not in code


# --- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_is_read_back() -> None:
    data = ModelCard(text()).data.to_dict()
    assert data["base_model"] == BASE
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"lora", "alignprop", "text-to-image", "diffusers", "reward:aesthetic", "reward:hpsv2.1"} <= set(
        data["tags"]
    )
    assert data["widget"] == [{"text": "a fox in the snow", "output": {"url": "images/after-1.png"}}]
    results = {one.metric_type: one for one in ModelCard(text()).data.eval_results or []}  # pyright: ignore[reportAttributeAccessIssue]
    assert results.keys() == {"reward", "aesthetic", "pickscore", "diversity"}
    assert results["pickscore"].metric_value == 21.5
    assert results["pickscore"].metric_args == {"before": 21.0, "standard_error_of_change": 0.2}
    assert "never trained on" in str(results["pickscore"].metric_name)


@pytest.mark.parametrize("base", ["", "emoji"])
def test_a_base_that_is_not_on_the_hub_is_no_link(base: str) -> None:
    data = ModelCard(text(base=base)).data.to_dict()
    assert "base_model" not in data
    assert "huggingface.co/emoji" not in text(base=base)


def test_the_yaml_holds_anything() -> None:
    odd = 'a: "b" #c\n- [x] {y} 🦊 é'
    content = text(widgets=((odd, "images/after-1.png"),), prompts=(odd,), reward='ask("is it: #1?")')
    data = yaml.safe_load(content.split("---\n")[1])
    assert data["widget"][0]["text"] == odd


def test_numbers_that_are_not_finite_are_left_out() -> None:
    content = text(changes={"reward": Change(1.0, math.nan, math.nan, math.nan), "x": Change(1, 2, 1, math.nan)})
    results = ModelCard(content).data.eval_results  # pyright: ignore[reportAttributeAccessIssue]
    assert [one.metric_type for one in results or []] == ["x", "diversity"]
    assert "nan" not in content.lower()


# --- what it says ----------------------------------------------------------------------------------------------------


def test_all_of_the_sections() -> None:
    content = text()
    for words in (
        "# foxes",
        "<Gallery />",
        f"[{BASE}](https://huggingface.co/{BASE})",
        "`aesthetic + 0.5*hpsv2.1`",
        "| `reward` | the trained reward | 5 | 6 | +1 ± 0.2 |",
        "| `aesthetic` | part of the reward | 4.9 | 5.8 | +0.9 ± 0.2 |",
        "| `pickscore` | judge, never trained on | 21 | 21.5 | +0.5 ± 0.2 |",
        "| `diversity` | mean distance of two pictures | 0.3 | 0.31 | +0.01 ± 0.02 |",
        "16 held-out prompts of the set 'animals'",
        "| optimizer steps | 60, of which that of step 40 was kept |",
        "| pictures trained on | 240 (4 a step) |",
        "| time | 90 min |",
        "| device | NVIDIA H100 |",
        "16 held-out prompts can show a large change and not a small one",
        "`foxes-comfyui.safetensors` into `models/loras`",
        "--adapter me/foxes --compare",
        "![Held-out prompts before and after",
        "(curve.png)",
        "```bash\nalignprop train MODEL --config config.json\n```",
        "| prompts | 45 of the set 'animals' that ships with alignprop-pipe |",
    ):
        assert words in content
    assert "[!WARNING]" not in content
    assert content == text()


def test_nothing_in_a_prompt_is_markup() -> None:
    content = text(prompts=("a | pipe and `ticks` and <b>html</b>",))
    assert "- `` a | pipe and `ticks` and <b>html</b> ``" in content


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pickscore": Change(21.0, 19.7, -1.3, 0.2)}, r"The judge `pickscore`, which was never trained on, fell"),
        ({"pickscore": Change(21.0, 19.7, -1.3, 1.0)}, ""),  # it may be chance
        ({"pickscore": Change(21.0, 20.9, -0.1, 0.01)}, ""),  # it is none, and does not matter
        ({"pickscore": Change(21.0, 20.9, -0.1, math.nan)}, ""),
        ({"pickscore": Change(21.0, 10.0, -11.0, math.nan)}, "fell"),
        ({"pickscore.part": Change(1.0, 0.7, -0.3, 0.2)}, ""),
        ({"pickscore.part": Change(1.0, 0.5, -0.5, 0.2)}, "`pickscore.part`"),
        ({"aesthetic": Change(5.0, 4.0, -1.0, 0.2)}, ""),
        ({"reward": Change(5.0, 4.0, -1.0, 0.2)}, "worse than the base model.*the trained reward itself fell"),
        (
            {"pickscore": Change(0.5, 0.25, -0.25, 0.12500000000000003)},
            "`pickscore`, which was never trained on, fell",
        ),
        ({"pickscore": Change(0.5, 0.5, 0.0, 0.0)}, ""),
    ],
)
def test_a_score_that_fell_is_said_at_the_top(changed: dict[str, Change], said: str) -> None:
    facts = dataclasses.replace(FACTS, changes={**FACTS.changes, **changed}, judges=("pickscore", "pickscore.part"))
    content = str(model_card(facts))
    if not said:
        assert "[!WARNING]" not in content
        return
    assert re.search(said, content[: content.index("## Use it")])
    rose = facts.changes["reward"].difference > 0
    assert ("may please the reward without making better pictures" in content) is rose


def test_diversity_that_fell_is_said() -> None:
    assert "Diversity fell by 20%" in text(diversity=Change(0.3, 0.24, -0.06, 0.02))
    assert "Diversity fell" not in text(diversity=Change(0.3, 0.29, -0.01, 0.02))
    assert "Diversity fell" not in text(diversity=Change(0.3, 0.2979, -0.0021, 0.0001))  # 0.7 %, and no chance
    assert warnings_in(FACTS) == ()


def test_no_evidence_is_said() -> None:
    content = text(changes={}, diversity=None, held_out=0)
    assert "> Nothing was measured on held-out prompts" in content
    assert "## Results" not in content
    assert ModelCard(content).data.eval_results is None  # pyright: ignore[reportAttributeAccessIssue]


def test_evidence_that_is_not_held_out_is_called_what_it_is() -> None:
    look = Evidence(9, ("a dog",) * 5, 6.0, {}, {"pickscore": 21.5}, 0.3, {}, held_out=False)
    content = text(before=look, after=look, held_out=5)
    assert "## Results on training prompts" in content
    assert "5 pictures of training prompts, fresh noise, of the set 'animals'" in content
    assert "held-out" not in content.replace("held-out score", "")


def test_how_the_adapter_was_chosen_is_said() -> None:
    content = text(choice="the adapter of step 40, the best of 6 evaluations by the judge a_b")
    assert "Kept: the adapter of step 40, the best of 6 evaluations by the judge a\\_b." in content


def test_a_run_that_was_stopped_is_said() -> None:
    assert "did not go to its end: interrupted after 12 of 60 steps" in text(status="interrupted after 12 of 60 steps")


def test_a_window_is_said() -> None:
    assert "`0.0-0.6` of them" in text(window="0.0-0.6")


def test_a_mix_says_of_what(folder: Path, tmp_path: Path) -> None:
    adapter = dataclasses.replace(Adapter.load(folder / HUB_WEIGHTS), metadata={})
    mix([(adapter, 0.6), (adapter, 0.4)]).push_to_hub("me/mixed", dry_run=tmp_path / "hub")
    content = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"that was mixed by alignprop-pipe of 0\.6 of .+ and 0\.4 of .+\. No trigger", content)
    assert "optimizer steps" not in content


def test_no_judge_is_said() -> None:
    assert "No judge watched this run" in text(judges=(), changes={"reward": Change(1, 2, 1, 0.1)})


# --- licences --------------------------------------------------------------------------------------------------------


def test_licences_of_base_and_rewards_are_carried_over() -> None:
    content = text()
    assert f"- base model {BASE}: [creativeml-openrail-m](https://huggingface.co/{BASE})" in content
    assert "- reward aesthetic: [head: Apache-2.0; CLIP: MIT](https://huggingface.co/trl-lib/" in content
    assert "- reward hpsv2.1: [Apache-2.0](https://huggingface.co/xswu/HPSv2)" in content
    assert "(only watched)" in content
    data = ModelCard(content).data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "creativeml-openrail-m-and-apache-2.0-and-mit"
    assert data["license_link"] == "https://huggingface.co/me/foxes#licences"


@pytest.mark.parametrize(
    ("base", "reward", "filed"),
    [
        ("emoji", "clip", {"license": "apache-2.0"}),
        (BASE, "jpeg - tv", {"license": "creativeml-openrail-m"}),
        (BASE, "my.py:warmth", {"license": "creativeml-openrail-m"}),
        ("stabilityai/stable-diffusion-xl-base-1.0", "jpeg", {"license": "openrail++"}),
        ("black-forest-labs/FLUX.1-schnell", "hpsv2.1", {"license": "apache-2.0"}),
        (
            "black-forest-labs/FLUX.1-dev",
            "jpeg",
            {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
        ),
        ("you/unheard-of", "jpeg", {"license": "other", "license_name": "see-licences-in-the-card"}),
        ("", "jpeg", {"license": "other", "license_name": "see-licences-in-the-card"}),
        (
            "emoji",
            'clip(model="openai/clip-vit-large-patch14")',
            {"license": "other", "license_name": "see-licences-in-the-card"},
        ),
        (
            "emoji",
            "min(zscore(clip), aesthetic2.5(accept_license=True))",
            {"license": "other", "license_name": "apache-2.0-and-agpl-3.0"},
        ),
    ],
)
def test_one_licence_or_a_name_for_the_mixture(base: str, reward: str, filed: dict[str, str]) -> None:
    found = [base_licence(base), *reward_licences(reward), *reward_licences("aesthetic2.5", judge=True)]
    assert overall(found) == filed
    assert re.fullmatch(r"[a-z0-9.-]+", filed.get("license_name", "x"))


def test_an_expression_that_cannot_be_read() -> None:
    (one,) = reward_licences("clip +")
    assert one.name == "unknown"


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_real_run_has_it_all(folder: Path) -> None:
    content = (folder / "README.md").read_text(encoding="utf-8")
    for words in (
        "`emoji_judge` | judge, never trained on",
        "| device | cpu, 1 thread |",
        "5 held-out prompts of the",
    ):
        assert words in content
    for _, path in re.findall(r"(!?)\[[^\]]*\]\((?!http)([^)#]+)\)", content):
        assert (folder / path).is_file()
    about = json.loads((folder / "config.json").read_text())
    assert about["command"] == "alignprop train emoji --reward clip --prompts emoji --config config.json"
    assert about["started"].endswith("+00:00")
    assert AlignConfig.from_dict(about["config"]).steps == 1
    widgets = ModelCard(content).data.to_dict()["widget"]
    assert len(widgets) == 4
    with Image.open(folder / widgets[0]["output"]["url"]) as shown:
        assert shown.size == (256, 256)
        assert shown.info == {"prompt": widgets[0]["text"]}


def test_large_pictures_are_made_smaller_for_pages(tmp_path: Path) -> None:
    Image.new("RGB", (1536, 1024)).save(tmp_path / "x.png")
    made = stage._redone(tmp_path / "x.png", {}, widget=True)
    (tmp_path / "y.png").write_bytes(made)
    with Image.open(tmp_path / "y.png") as shown:
        assert shown.size == (768, 512)


# --- what is private -------------------------------------------------------------------------------------------------

HERE = Private(("/home/jack black", "/work"), ("jack", "black.j"), ("s3cr3t-token",), ("jack/foxes",))


@pytest.mark.parametrize(
    ("typed", "cleaned"),
    [
        ("/home/jack black/my models/tiny", "tiny"),
        ('clip(model="/home/jack black/my models/tiny")', 'clip(model="tiny")'),
        ("0.5*/work/rewards/a.py:glow - jpeg", "0.5*a.py:glow - jpeg"),
        ("~/x/prompts.txt", "prompts.txt"),
        ("../jack/prompts.txt", "prompts.txt"),
        ("C:\\Users\\jack\\prompts.txt", "prompts.txt"),
        ("made by jack", "made by user"),
        ("pushed to jack/foxes", "pushed to jack/foxes"),
        ("the s3cr3t-token and hf_abcdefghijklmnopqrst", "the *** and ***"),
        ("a jackdaw", "a jackdaw"),
        ("clip + 0.1*jpeg(quality=80)", "clip + 0.1*jpeg(quality=80)"),
        (BASE, BASE),
    ],
)
def test_cleaning(typed: str, cleaned: str) -> None:
    assert HERE.cleaned(typed) == cleaned


def test_prompts_keep_their_words() -> None:
    said = {"prompts": ["jack in a box, /home/jack black/x"], "reward": "jack"}
    assert HERE.cleaned_values(said) == {"prompts": ["jack in a box, x"], "reward": "user"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x00/home/jack black/x", "the path of a folder on this machine"),
        (b"s3cr3t-token", "a token"),
        (b"/mnt/jack/x", "the user's name in a path"),
        (b"https://huggingface.co/jack/foxes/x", ""),
        (b"[of jack](https://huggingface.co/jack/reward)", ""),
        (b"jack in a box", ""),
    ],
)
def test_looking_for_what_was_missed(content: bytes, found: str) -> None:
    assert HERE.found_in(content) == found


def test_the_name_on_the_hub_is_that_of_diffusers() -> None:
    assert HUB_WEIGHTS == LORA_WEIGHT_NAME_SAFE


def test_a_value_that_looks_like_a_template_stays_text() -> None:
    card = text(reward="{{ 7 * 7 }}", source="{% raw %}", prompts=("{{ facts }}",))
    assert "`{{ 7 * 7 }}`" in card
    assert "{% raw %}" in card
    assert "- `{{ facts }}`" in card
