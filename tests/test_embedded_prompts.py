"""The prompt that a picture was drawn from, as programs write it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop_pipe.scoring.embedded_prompts import prompt_in

PARAMETERS = """a fox, (in the snow:1.2) <lora:fur:0.8>
second line
Negative prompt: ugly, Steps: 3
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


SAMPLER = node("KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0], seed=1)
GRAPHS = {
    "plain": {
        "7": node("CLIPTextEncode", text="ugly", clip=["4", 1]),
        "6": node("CLIPTextEncode", text="a fox", clip=["4", 1]),
        "3": SAMPLER,
        "9": node("SaveImage", images=["3", 0], filename_prefix="a"),
    },
    "a text of another node": {
        "3": SAMPLER,
        "6": node("CLIPTextEncode", text=["10", 0], clip=["4", 1]),
        "10": node("PrimitiveString", value="a fox"),
        "7": node("CLIPTextEncode", text="ugly"),
    },
    "guidance between": {
        "3": SAMPLER,
        "6": node("FluxGuidance", guidance=3.5, conditioning=["11", 0]),
        "11": node("CLIPTextEncodeFlux", clip_l="a fox", t5xxl="a fox", guidance=3.5),
    },
    "a guider": {
        "1": node("SamplerCustomAdvanced", noise=["2", 0], guider=["3", 0], sampler=["5", 0]),
        "3": node("BasicGuider", model=["4", 0], conditioning=["6", 0]),
        "6": node("CLIPTextEncode", text="a fox"),
        "4": node("LoraLoaderModelOnly", lora_name="text", model=["8", 0]),
    },
    "SDXL": {"3": SAMPLER, "6": node("CLIPTextEncodeSDXL", text_g="a fox", text_l="a fox", width=1024)},
    "a control net": {
        "3": node("KSampler", positive=["12", 0], negative=["12", 1]),
        "12": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["8", 0]),
        "7": node("CLIPTextEncode", text="ugly"),
        "6": node("CLIPTextEncode", text="a fox"),
    },
    "two samplers, one saved": {
        "1": node("KSampler", positive=["2", 0]),
        "2": node("CLIPTextEncode", text="another"),
        "3": SAMPLER,
        "6": node("CLIPTextEncode", text="a fox"),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0]),
    },
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_words_that_reach_the_sampler_of_comfyui(name: str) -> None:
    text = json.dumps(GRAPHS[name])
    assert prompt_in({"prompt": text, "workflow": "{}"}) == "a fox"
    assert prompt_in({"Model": f"prompt:{text}"}) == "a fox"  # a WebP's EXIF


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        ({"prompt": "two cäts "}, "two cäts"),
        ({"prompt": "{red|blue} cat"}, "{red|blue} cat"),
        ({"prompt": '{"a": 1}'}, '{"a": 1}'),  # an object, and no graph: somebody's words
        ({"prompt": '{"3": {"class_type": "KSampler"}}'}, None),
        ({"prompt": " "}, None),
        ({"parameters": PARAMETERS}, "a fox, (in the snow:1.2)\nsecond line"),
        ({"UserComment": PARAMETERS}, "a fox, (in the snow:1.2)\nsecond line"),
        ({"parameters": "a fox\nSteps: 20, Sampler: Euler"}, "a fox"),
        ({"parameters": "steps to heaven\nSteps: 20, Sampler: Euler"}, "steps to heaven"),
        ({"parameters": "Negative prompt: ugly\nSteps: 20, Sampler: Euler"}, None),
        ({"parameters": "a dog"}, None),
        ({"parameters": '{"prompt": "a fox", "negative_prompt": "ugly"}'}, "a fox"),  # Fooocus
        ({"invokeai_metadata": '{"positive_prompt": "a fox", "seed": 1}'}, "a fox"),
        ({"Software": "NovelAI", "Description": "a fox"}, "a fox"),
        ({"Software": "another", "Description": "a fox"}, None),
        ({"Model": "Canon EOS"}, None),
        ({}, None),
    ],
)
def test_the_prompt_of_each_program(texts: dict[str, str], prompt: str | None) -> None:
    assert prompt_in(texts) == prompt


def test_a_graph_in_a_circle_and_one_that_is_deep_end() -> None:
    circle = {"1": node("KSampler", positive=["2", 0])}
    circle |= {"2": node("A", conditioning=["3", 0]), "3": node("B", x=["2", 0])}
    assert prompt_in({"prompt": json.dumps(circle)}) is None
    chain = {str(i): node("A", x=[str(i + 1), 0]) for i in range(5000)}
    chain |= {"start": node("KSampler", positive=["0", 0]), "5000": node("CLIPTextEncode", text="a fox")}
    assert prompt_in({"prompt": json.dumps(chain)}) == "a fox"
    assert prompt_in({"prompt": '{"a":' * 100_000}) == '{"a":' * 100_000


@given(st.dictionaries(st.sampled_from(["prompt", "parameters", "UserComment", "Model"]), st.text()))
def test_any_text_is_read_or_none(texts: dict[str, str]) -> None:
    found = prompt_in(texts)
    assert found is None or found.strip()


KEYS = st.sampled_from(["class_type", "inputs", "1", "positive"])


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.just(["1", 0]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
        max_leaves=20,
    )
)
def test_any_graph_is_read_or_none(value: Any) -> None:
    found = prompt_in({"prompt": json.dumps(value)})
    assert found is None or found.strip()
