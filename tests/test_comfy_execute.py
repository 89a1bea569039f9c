"""What the nodes do, each by its own `execute`, in a graph without ComfyUI: see comfy_stand_in.py."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_stand_in
import pytest
import torch
from comfy_stand_in import Host

import comfy_nodes
from alignprop_pipe import Adapter, PromptSet
from alignprop_pipe.bundled import MODELS
from alignprop_pipe.errors import AlignError

pytestmark = pytest.mark.skipif(any(model.missing for model in MODELS), reason="the bundled models are not here")

FEW = {
    "steps": 2, "batch_size": 2, "num_inference_steps": 2, "eval_prompts": 2, "eval_every": 1, "truncation": "last:1",
    "rank": 2, "target_modules": "to_q, to_v", "judges": "emoji_judge",
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with comfy_stand_in.running(tmp_path_factory.mktemp("comfyui")) as host:
        yield host


@pytest.fixture(scope="module")
def nodes(host: Host) -> dict[str, Any]:
    """Every node's class by its name in a graph."""
    return {node.define_schema().node_id.removeprefix("AlignProp"): node for node in comfy_nodes.nodes()}


@pytest.fixture(scope="module")
def graph(nodes: dict[str, Any], host: Host) -> dict[str, Any]:
    """The outputs of a graph: a pipeline, prompts, a reward, and what Align makes of them."""
    (pipe,) = nodes["LoadPipeline"].execute(model="emoji (bundled)").values
    (prompts,) = nodes["Prompts"].execute(source="emoji").values
    (reward,) = nodes["Reward"].execute(reward="clip", parameters=json.dumps({"scale": 2.0})).values
    made = nodes["Align"].execute(pipe, reward, prompts, run_name="alignprop/run", **FEW)
    names = [output.about["display_name"] for output in nodes["Align"].define_schema().outputs]
    return {"pipe": pipe, "prompts": prompts, "reward": reward, "ui": made.ui} | dict(
        zip(names, made.values, strict=True)
    )


def test_every_node_has_a_schema_with_words_for_each_input(nodes: dict[str, Any]) -> None:
    assert len(nodes) == 13
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.category == "AlignProp"
        assert len(schema.description) > 20
        assert [one.name for one in schema.inputs if not one.about.get("tooltip")] == []


def test_align_trains_and_hands_out_its_evidence(graph: dict[str, Any], host: Host) -> None:
    adapter = graph["adapter"]
    assert isinstance(adapter, Adapter)
    assert {rank for rank, _ in adapter.shapes.values()} == {2}
    assert {key.rpartition(".")[2] for key in graph["lora"]} >= {"alpha"}
    assert [len(values) for values in graph["loss_map"].values()] == [2, 2]
    assert graph["before"].shape == graph["after"].shape == (2, 64, 64, 3)
    assert not torch.equal(graph["before"], graph["after"])
    for sheet in ("curve", "before_after"):
        assert graph[sheet].ndim == 4
        assert graph[sheet].std() > 0.05
    assert re.search(r"held-out reward: .* -> |held-out reward: .* → ", graph["report"])
    assert graph["ui"]["images"][0]["filename"] == "before-after.png"
    assert (host.folder / "output" / "alignprop" / "run_00001" / "report.html").is_file()


def test_align_tells_the_page_how_far_it_is(graph: dict[str, Any], host: Host) -> None:
    points = [data["point"] for event, data in host.told if event == "alignprop.step"]
    assert [point["step"] for point in points] == [0, 1, 2]
    assert all(isinstance(point["held_out"], float) for point in points)
    assert any(re.match(r"step 1/2 .*left", text) for event, text in host.told if event == "text")
    assert host.bars[-1][0] <= host.bars[-1][1]


def test_the_pipeline_goes_on_as_the_base_model(graph: dict[str, Any]) -> None:
    assert not any("lora_" in name for name, _ in graph["pipe"].unet.named_parameters())


def test_sample_draws_with_and_without_the_adapter(nodes: dict[str, Any], graph: dict[str, Any]) -> None:
    drawing = {"first": 2, "num_inference_steps": 2}
    base, again, ours = (
        nodes["Sample"].execute(graph["pipe"], graph["prompts"], adapter=adapter, **drawing).values[0]
        for adapter in (None, None, graph["adapter"])
    )
    assert base.shape == (2, 64, 64, 3)
    assert torch.equal(base, again)
    assert not torch.equal(base, ours)


def test_a_saved_adapter_is_loaded_and_mixed(nodes: dict[str, Any], graph: dict[str, Any]) -> None:
    (listed,) = nodes["SaveAdapter"].execute(graph["adapter"], "cats/mine").values
    assert listed == "cats/mine_00001_.safetensors"
    loaded, about = nodes["LoadAdapter"].execute(listed).values
    assert "clip" in about
    (mixed,) = nodes["MixAdapters"].execute(adapter_1=loaded, weight_1=0.5, adapter_2=graph["adapter"]).values
    ours, twice = (adapter.comfyui_tensors() for adapter in (graph["adapter"], mixed))
    assert {key.rpartition(".lora")[0] for key in ours} == {key.rpartition(".lora")[0] for key in twice}
    assert {rank for rank, _ in mixed.shapes.values()} == {4}


def test_rewards_are_combined_and_score_pictures(nodes: dict[str, Any], graph: dict[str, Any]) -> None:
    (text,) = nodes["RewardText"].execute("jpeg(quality=60)").values
    (both,) = (
        nodes["CombineRewards"]
        .execute(reward_1=graph["reward"], weight_1=2.0, reward_2=text, weight_2=0.5, same_scale=False)
        .values
    )
    pictures = graph["before"]
    prompts = PromptSet(("a fox", "two cats"))
    mean, words = nodes["Score"].execute(pictures, both, prompts=prompts).values
    one, two = (
        nodes["Score"].execute(pictures, reward, prompts=prompts).values[0] for reward in (graph["reward"], text)
    )
    assert mean == pytest.approx(2 * one + 0.5 * two, rel=1e-4)
    assert words.count("\n") >= 2


def test_stop_leaves_a_lora_and_ends_as_comfyui_ends(
    nodes: dict[str, Any], graph: dict[str, Any], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    align = importlib.import_module("comfy_nodes.align")
    heard = align.Run.on_step

    def press_stop(self: Any, record: Any) -> None:
        heard(self, record)
        host.stopped = host.stopped or record.step == 1

    monkeypatch.setattr(align.Run, "on_step", press_stop)
    settings = {**FEW, "steps": 50, "eval_prompts": 0, "judges": ""}
    with pytest.raises(comfy_stand_in.InterruptProcessingException):
        nodes["Align"].execute(graph["pipe"], graph["reward"], graph["prompts"], **settings)
    assert (host.models("loras") / "AlignProp-stopped_00001_.safetensors").is_file()
    assert not host.stopped


def bad(nodes: dict[str, Any], graph: dict[str, Any], node: str) -> Any:
    """A call of the node with one value that is wrong."""
    execute, pipe, prompts, reward = nodes[node].execute, graph["pipe"], graph["prompts"], graph["reward"]
    return {
        "LoadPipeline": lambda: execute(id_or_folder="/no/such/folder"),
        "Reward": lambda: execute(reward="jpeg", parameters='{"quality": 1000}'),
        "RewardText": lambda: execute("clap"),
        "CombineRewards": lambda: execute(),
        "Prompts": lambda: execute(source="text", text=" \n "),
        "Align": lambda: execute(pipe, reward, prompts, **{**FEW, "lr": -1.0}),
        "Sample": lambda: execute(pipe, prompts, num_inference_steps=0),
        "Score": lambda: execute(graph["before"], reward, prompt="one\ntwo\nthree"),
        "SaveAdapter": lambda: execute(graph["adapter"], "../../evil"),
        "LoadAdapter": lambda: execute("none.safetensors"),
        "MixAdapters": lambda: execute(),
        "PushToHub": lambda: execute(graph["adapter"], "no such name!"),
    }[node]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("LoadPipeline", "/no/such/folder"),
        ("Reward", "1 to 100"),
        ("RewardText", "clip"),
        ("CombineRewards", "connect"),
        ("Prompts", "at least one"),
        ("Align", "lr"),
        ("Sample", "num_inference_steps"),
        ("Score", "3 prompts for 2 pictures"),
        ("SaveAdapter", "models/loras"),
        ("LoadAdapter", "press R|Press R"),
        ("MixAdapters", "connect"),
        ("PushToHub", "no such name!"),
    ],
)
def test_a_wrong_value_is_told_in_words(nodes: dict[str, Any], graph: dict[str, Any], node: str, words: str) -> None:
    with pytest.raises((AlignError, ValueError, FileNotFoundError), match=words):
        bad(nodes, graph, node)()
    assert not list(Path.cwd().glob("evil*"))
