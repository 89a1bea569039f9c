"""The nodes in a real ComfyUI on the CPU. `COMFYUI_PATH=/path pytest -n0 -m comfy tests/test_comfy.py`

One server for the file; the tests stand in the order in which they need its console: quiet ones first.
"""

import getpass
import itertools
import json
import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_server
import numpy as np
import pytest
from comfy_server import API, COMFYUI, PACK, ROOT, SECRET, Client, Refused, Run, Server, as_prompt
from PIL import Image
from safetensors import safe_open

pytest.importorskip("aiohttp", reason="comes with ComfyUI's requirements")
pytestmark = [pytest.mark.comfy, pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI")]

NODES = {
    "AlignPropLoadPipeline", "AlignPropReward", "AlignPropRewardText", "AlignPropCombineRewards", "AlignPropPrompts",
    "AlignPropAlign", "AlignPropSample", "AlignPropScore", "AlignPropSaveAdapter", "AlignPropLoadAdapter",
    "AlignPropMixAdapters", "AlignPropApply", "AlignPropPushToHub",
}  # fmt: skip
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PROMPTS = "a red apple\na blue car\na green tree\na yellow star"
QUICK = {
    "steps": 2,
    "batch_size": 2,
    "num_inference_steps": 4,
    "eval_prompts": 2,
    "eval_every": 1,
    "truncation": "last:1",
}
WORRIES = r"Traceback|[A-Za-z]*Warning\b|WARNING|IMPORT FAILED|lora key not loaded|Exception"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with comfy_server.running(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server) as client:
        yield client


@pytest.fixture(scope="module")
def first_run(client: Client) -> Run:
    return client.run(graph(), {"nodes": [], "links": []})


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(seed: int = 0, **align: Any) -> API:
    """The bundled model, aligned in two steps, saved, and drawn with."""
    settings = {**QUICK, "guidance_scale": 1.0, "seed": seed, **align}
    return {
        "pipe": node("AlignPropLoadPipeline", model="emoji (bundled)"),
        "reward": node("AlignPropReward", reward="jpeg", parameters='{"quality": 60}'),
        "prompts": node("AlignPropPrompts", source="text", text=PROMPTS),
        "align": node("AlignPropAlign", pipe=["pipe", 0], reward=["reward", 0], prompts=["prompts", 0], **settings),
        "save": node("AlignPropSaveAdapter", adapter=["align", 0], filename_prefix="AlignProp"),
        "draw": drawing(["align", 0]),
        "picture": node("SaveImage", images=["draw", 0], filename_prefix="drawn"),
        "score": node("AlignPropScore", images=["draw", 0], reward=["reward", 0], prompts=["prompts", 0]),
        "curve": node("PreviewImage", images=["align", 5]),
    }


def drawing(adapter: list[Any]) -> dict[str, Any]:
    sockets = {"pipe": ["pipe", 0], "prompts": ["prompts", 0], "adapter": adapter}
    return node("AlignPropSample", **sockets, num_inference_steps=4, guidance_scale=1.0, first=2)


def small_graph() -> API:
    """A graph that draws, to see that the server is fine after something went wrong."""
    parts = {name: graph()[name] for name in ("pipe", "prompts", "draw", "picture")}
    del parts["draw"]["inputs"]["adapter"]
    parts["draw"]["inputs"]["seed"] = time.monotonic_ns() % 2**31
    return parts


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def shown(server: Server, run: Run, name: str) -> list[np.ndarray]:
    return [pixels(server.view(one)) for one in run.outputs[name]["images"]]


def loras(server: Server) -> list[str]:
    """What the core's own LoRA loader lists, which the page reads anew when R is pressed."""
    return server.object_info("LoraLoader")["input"]["required"]["lora_name"][0]


# --- the nodes as the page gets them ---------------------------------------------------------------------------------


def test_every_node_is_there(server: Server) -> None:
    ours = {name: about for name, about in server.object_info().items() if PACK in about["python_module"]}
    assert set(ours) == NODES
    assert {about["category"].partition("/")[0] for about in ours.values()} == {"AlignProp"}
    assert all(about["description"] for about in ours.values())


@pytest.mark.parametrize("name", sorted(NODES))
def test_every_socket_and_widget_is_explained_and_bounded(server: Server, name: str) -> None:
    about = server.object_info(name)
    inputs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
    for socket_, (kind, settings) in inputs.items():
        assert settings.get("tooltip"), socket_
        if kind in ("INT", "FLOAT"):
            assert settings["min"] <= settings["default"] <= settings["max"], socket_
            assert settings["step"] > 0, socket_
        if kind == "COMBO" and "default" in settings:
            assert settings["default"] in settings["options"], socket_
    assert len(about["output_tooltips"]) == len(about["output"])
    assert all(about["output_tooltips"])
    assert len(set(about["output_name"])) == len(about["output"])


@pytest.mark.parametrize("name", sorted(NODES))
def test_every_node_has_a_help_page(server: Server, name: str) -> None:
    page = server.get(f"/extensions/{PACK}/docs/{name}.md").decode()
    about = server.object_info(name)
    widgets = [*about["input"].get("required", {}), *about["input"].get("optional", {})]
    unnamed = [one for one in widgets if not re.search(rf"\b{re.sub('_[0-9]$', '', one)}", page)]
    assert not unnamed


def test_the_page_gets_our_script_once(server: Server) -> None:
    ours = [one for one in server.json("/extensions") if PACK in one]
    assert ours == [f"/extensions/{PACK}/alignprop.js"]


def test_the_examples_are_in_browse_templates_with_pictures(server: Server) -> None:
    names = server.json("/workflow_templates").get(PACK, [])
    assert len(names) >= 5
    for name in names:
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.jpg".replace(" ", "%20"))[:2] == b"\xff\xd8"


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_is_seen_while_it_goes(first_run: Run) -> None:
    assert first_run.ended == "execution_success", first_run.error
    bar = first_run.progress("align")
    assert len(bar) > 3
    assert bar == sorted(bar)
    assert bar[-1][0] == bar[-1][1]
    points = [data["point"] for data in first_run.of("alignprop.step")]
    assert [point["step"] for point in points] == [0, 1, 2]
    assert all(point["reward"] < 0 and point["held_out"] < 0 for point in points[1:])
    previews = [pixels(one) for one in first_run.previews]
    assert len(previews) >= 3
    assert all(one.std() > 5 for one in previews)
    assert any((one != two).any() for one, two in itertools.pairwise(previews))
    assert any(re.search(r"step 1/2 .*reward.* left", data["text"]) for data in first_run.of("text"))


def test_a_run_gives_pictures_scores_and_a_report(server: Server, first_run: Run) -> None:
    drawn = shown(server, first_run, "picture")
    assert [one.shape for one in drawn] == [drawn[0].shape] * 2
    assert all(one.std() > 5 for one in drawn)
    (curve,) = shown(server, first_run, "curve")
    (before_after,) = shown(server, first_run, "align")
    assert min(curve.std(), before_after.std()) > 5
    assert re.search(r"reward: -0\.\d+ (->|→) -0\.\d+", first_run.outputs["align"]["text"][0])
    assert re.match(r"mean -0\.\d+\n1: .*\n2: ", first_run.outputs["score"]["text"][0])


def test_the_lora_is_in_the_core_loaders_list_without_a_restart(server: Server, first_run: Run) -> None:
    name = "AlignProp_00001_.safetensors"
    assert name in loras(server)
    assert name in server.object_info("AlignPropLoadAdapter")["input"]["required"]["lora_name"][1]["options"]
    with safe_open(server.base / "models" / "loras" / name, framework="np") as file:
        ups = [key for key in file.keys() if key.endswith((".lora_up.weight", ".lora_B.weight"))]  # noqa: SIM118
        assert any(np.abs(file.get_tensor(key)).max() > 0 for key in ups)
        about = file.metadata()
    assert (about["alignprop.reward"], about["ss_output_name"]) == ("jpeg(quality=60)", "AlignProp_00001_")


def test_nothing_runs_again_when_nothing_changed(client: Client, first_run: Run) -> None:
    again = client.run(graph())
    assert again.ended == "execution_success"
    assert again.cached == set(graph())
    assert not again.progress("align")


def test_the_cores_own_nodes_take_the_lora_and_the_losses(server: Server, client: Client, first_run: Run) -> None:
    known = server.object_info()
    save = "SaveLoRA" if "SaveLoRA" in known else "SaveLoRANode"
    more = {
        "losses": node("LossGraphNode", loss=["align", 2], filename_prefix="losses"),
        "native": node(save, lora=["align", 1], prefix="loras/native"),
    }
    run = client.run({**graph(), **more})
    assert run.ended == "execution_success", run.error
    assert run.outputs["losses"]["images"]
    assert [name for name in loras(server) if "native" in name]


def test_another_seed_trains_again_and_loads_nothing_again(client: Client, first_run: Run) -> None:
    again = client.run(graph(seed=1))
    assert again.ended == "execution_success"
    assert again.cached == {"pipe", "reward", "prompts"}
    assert again.progress("align")


def test_a_saved_adapter_draws_as_the_one_in_the_graph(server: Server, client: Client, first_run: Run) -> None:
    parts = {name: graph()[name] for name in ("pipe", "prompts", "picture")}
    loaded = node("AlignPropLoadAdapter", lora_name="AlignProp_00001_.safetensors")
    with_it = client.run({**parts, "load": loaded, "draw": drawing(["load", 0])})
    without = client.run({**parts, "draw": {**drawing([]), "inputs": {**drawing([])["inputs"], "adapter": None}}})
    ours, theirs = shown(server, with_it, "picture"), shown(server, first_run, "picture")
    assert max(abs(one - two).max() for one, two in zip(ours, theirs, strict=True)) <= 1
    assert any((one != two).any() for one, two in zip(shown(server, without, "picture"), ours, strict=True))


def test_rewards_are_combined_and_adapters_mixed(client: Client) -> None:
    parts = graph(steps=1, eval_every=0)
    parts["calm"] = node("AlignPropRewardText", expression="-tv")
    parts["both"] = node("AlignPropCombineRewards", reward_1=["reward", 0], weight_1=0.5, reward_3=["calm", 0])
    parts["align"]["inputs"]["reward"] = ["both", 0]
    parts["mix"] = node(
        "AlignPropMixAdapters", adapter_1=["align", 0], weight_1=0.7, adapter_2=["align", 0], weight_2=0.3
    )
    parts["draw"] = drawing(["mix", 0])
    run = client.run(parts)
    assert run.ended == "execution_success", run.error
    assert "jpeg" in run.outputs["align"]["text"][0]
    assert "tv" in run.outputs["align"]["text"][0]


# --- the example workflows -------------------------------------------------------------------------------------------


def offline(workflow: dict[str, Any]) -> bool:
    """It needs no file that a user has to have: the bundled model, and no checkpoint of ComfyUI's own."""
    text = json.dumps(workflow)
    return "Checkpoint" not in text and "checkpoints/" not in text and "emoji (bundled)" in text


def quick(prompt: API) -> API:
    """The same graph with few steps."""
    sizes = {"AlignPropAlign": {**QUICK, "judges": ""}, "AlignPropSample": {"num_inference_steps": 4, "first": 2}}
    for part in prompt.values():
        few = {name: value for name, value in sizes.get(part["class_type"], {}).items() if name in part["inputs"]}
        part["inputs"].update(few)
    return prompt


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_example_is_whole(server: Server, path: Path) -> None:
    workflow, known = json.loads(path.read_text(encoding="utf-8")), server.object_info()
    assert [one["type"] for one in workflow["nodes"] if one["type"] not in {*known, "Note", "MarkdownNote"}] == []
    for name, part in as_prompt(workflow, known).items():
        missing = set(known[part["class_type"]]["input"].get("required", {})) - set(part["inputs"])
        assert not missing, f"{name} {part['class_type']}"
    assert not traces(path.read_bytes(), server)
    assert path.with_suffix(".jpg").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_example_runs_that_needs_no_download(server: Server, client: Client, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    if not offline(workflow):
        pytest.skip("needs a checkpoint")
    prompt = quick(as_prompt(workflow, server.object_info()))
    trainers = [name for name, part in prompt.items() if part["class_type"] == "AlignPropAlign"]
    known = set(loras(server))
    run = client.run(prompt, workflow, seconds=300)
    assert run.ended == "execution_success", run.error
    assert all(run.progress(name) for name in trainers)
    assert run.previews or not trainers
    for name, output in run.outputs.items():
        assert all(pixels(server.view(one)).std() > 5 for one in output.get("images", [])), name
    if any(part["class_type"] == "AlignPropSaveAdapter" for part in prompt.values()):
        assert set(loras(server)) > known


def test_the_examples_include_one_that_needs_nothing() -> None:
    assert any(offline(json.loads(path.read_text(encoding="utf-8"))) for path in WORKFLOWS)


# --- what is left behind ---------------------------------------------------------------------------------------------


def traces(data: bytes, server: Server) -> list[str]:
    """What a file tells about the machine: its folders, its name, its user, a token."""
    names = [one for one in (socket.gethostname(), getpass.getuser()) if len(one) > 4]  # shorter ones come by chance
    secrets = [SECRET, str(server.base), str(ROOT), f"{Path.home()}/", *names]
    return [one for one in secrets if one.encode() in data]


def test_no_file_tells_of_the_machine(server: Server, first_run: Run) -> None:
    """Pictures carry the graph in their metadata, LoRAs what they were trained with; both are made to be passed on."""
    written = [path for folder in ("output", "models", "temp") for path in (server.base / folder).rglob("*.*")]
    # A report says where its run is, and config.json where it was started; neither is ever published.
    written = [path for path in written if path.suffix != ".html" and path.name != "config.json"]
    assert {path.suffix for path in written} >= {".png", ".safetensors", ".jsonl"}
    assert {str(path): found for path in written if (found := traces(path.read_bytes(), server))} == {}
    with Image.open(server.base / "output" / "drawn_00001_.png") as picture:
        told = json.loads(picture.info["prompt"])
    for part in told.values():
        part.pop("is_changed", "")  # ComfyUI puts there what fingerprint_inputs gave
    assert told == graph()


def test_the_console_is_quiet(server: Server, first_run: Run) -> None:
    """Up to here nothing was to warn about, but that two pictures of evidence are few."""
    worries = [line for line in server.log.splitlines() if re.search(WORRIES, line)]
    assert [line for line in worries if "The evidence is of 2 pictures" not in line] == []


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", ["last:1", "full"])
def test_stop_ends_within_a_denoising_step_and_keeps_the_adapter(
    server: Server, client: Client, truncation: str
) -> None:
    known = set(loras(server))
    prompt_id = client.post(graph(seed=7, steps=500, eval_prompts=0, truncation=truncation, checkpointing="none"))
    run = client.follow(prompt_id, until=lambda run: len(run.of("alignprop.step")) >= 3)
    moved = [event.at for event in run.events if event.kind == "progress"]
    between = [later - earlier for earlier, later in itertools.pairwise(moved)]
    asked = time.monotonic()
    server.interrupt(prompt_id)
    run = client.follow(prompt_id)
    assert run.ended == "execution_interrupted", run.error
    # The bar moves at most every 0.2 s; saving what there is takes its time too.
    assert run.events[-1].at - asked < 3 * statistics.median(between) + 2
    (kept,) = set(loras(server)) - known
    assert "stopped" in kept
    parts = {name: graph()[name] for name in ("pipe", "prompts", "picture")}
    load = node("AlignPropLoadAdapter", lora_name=kept)
    after = client.run({**parts, "load": load, "draw": drawing(["load", 0])})
    assert after.ended == "execution_success", after.error


def test_after_a_stop_the_same_graph_trains_again(client: Client) -> None:
    prompt_id = client.post(graph(seed=8, steps=500))
    client.follow(prompt_id, until=lambda run: len(run.progress("align")) > 1)
    client.server.interrupt(prompt_id)
    assert client.follow(prompt_id).ended == "execution_interrupted"
    again = client.run(graph(seed=8, steps=1))
    assert again.ended == "execution_success", again.error


# --- errors ----------------------------------------------------------------------------------------------------------


def refusal(client: Client, prompt: API, name: str) -> str:
    """What the page says at a node that the server refused to run."""
    with pytest.raises(Refused) as refused:
        client.run(prompt)
    errors = refused.value.answer["node_errors"][name]["errors"]
    (told,) = {error["details"].partition(" - ")[2] or error["details"] for error in errors}
    return told


def is_readable(text: str) -> bool:
    """One line says it; a second and a third may point at the place in an expression."""
    first, *more = text.strip().splitlines()
    return 20 < len(first) < 300 and (not more or more[-1].strip() == "^") and "Traceback" not in text


@pytest.fixture
def fine_afterwards(client: Client) -> Iterator[None]:
    yield
    after = client.run(small_graph())
    assert after.ended == "execution_success", after.error


@pytest.mark.usefixtures("fine_afterwards")
def test_a_wrong_expression_is_refused_with_the_nearest_right_name(client: Client) -> None:
    prompt = graph()
    prompt["reward"] = node("AlignPropRewardText", expression="jpge(quality=60)")
    told = refusal(client, prompt, "reward")
    assert is_readable(told)
    assert "jpeg" in told


@pytest.mark.usefixtures("fine_afterwards")
def test_a_missing_file_is_refused_by_name(client: Client) -> None:
    prompt = graph()
    prompt["prompts"] = node("AlignPropPrompts", source="file", text="", file="/nowhere/prompts.txt")
    run = client.run(prompt)
    assert run.ended == "execution_error"
    assert is_readable(run.error)
    assert "/nowhere/prompts.txt" in run.error


@pytest.mark.usefixtures("fine_afterwards")
def test_a_reward_that_loses_its_gradient_is_told(client: Client, tmp_path: Path) -> None:
    source = "def score(images, prompts):\n    return images.detach().mean(dim=(1, 2, 3))\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    prompt = graph()
    source_name = json.dumps({"source": f"{tmp_path / 'mine.py'}:score"})
    prompt["reward"] = node("AlignPropReward", reward="python", parameters=source_name)
    run = client.run(prompt)
    assert run.ended == "execution_error"
    assert is_readable(run.error)
    assert "gradient" in run.error


@pytest.mark.usefixtures("fine_afterwards")
def test_out_of_memory_is_told_with_what_to_change(client: Client, tmp_path: Path) -> None:
    source = """import torch
def score(images, prompts):
    if len(images) > 2:  # the dry call before the training has two
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return images.mean(dim=(1, 2, 3))
"""
    (tmp_path / "large.py").write_text(source, encoding="utf-8")
    prompt = graph(batch_size=3)
    prompt["reward"] = node("AlignPropRewardText", expression=f"{tmp_path / 'large.py'}:score")
    run = client.run(prompt)
    assert run.ended == "execution_error"
    assert "batch_size 1" in run.error
    assert run.of("execution_error")[0]["exception_type"].endswith("OutOfMemoryError")


def test_a_refused_value_names_its_widget(client: Client) -> None:
    for name, value in {"truncation": "lsat:5", "steps": 0}.items():
        with pytest.raises(Refused, match=rf'"details": "{name}'):
            client.run(graph(**{name: value}))


# --- an installation that lacks something ----------------------------------------------------------------------------


def test_a_missing_dependency_is_one_clear_line_and_an_entry_in_the_list(tmp_path: Path) -> None:
    with comfy_server.running(tmp_path, missing=("peft",)) as server, Client(server) as client:
        (name, about), *others = [one for one in server.object_info().items() if PACK in one[1]["python_module"]]
        assert not others
        assert "peft" in about["display_name"]
        assert "pip install" in about["description"]
        told = [line for line in server.log.splitlines() if "peft" in line]
        assert len(told) == 1
        assert "pip install" in told[0]
        assert "Traceback" not in server.log
        run = client.run({"1": node(name)})
        assert (run.ended, "pip install" in run.error) == ("execution_error", True)
