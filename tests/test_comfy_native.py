"""A LoRA made by our nodes on ComfyUI's own models: a miniature of SD 1.5. Run as tests/test_comfy.py is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_server
import numpy as np
import pytest
from comfy_server import API, COMFYUI, ROOT, Client, Server, as_prompt
from safetensors.numpy import load_file

pytest.importorskip("aiohttp", reason="comes with ComfyUI's requirements")
pytestmark = [pytest.mark.comfy, pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI")]

LORA = "small_00001_.safetensors"
TRAINING = {"steps": 1, "batch_size": 1, "num_inference_steps": 2, "lr": 0.01, "truncation": "full", "eval_prompts": 0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The miniature in both forms, in the folders of a ComfyUI that is not started yet."""
    from checkpoints import comfyui_checkpoint
    from torch import float32
    from transformers import CLIPTokenizer

    base = tmp_path_factory.mktemp("comfyui")
    words = CLIPTokenizer.from_pretrained(Path(COMFYUI) / "comfy" / "sd1_tokenizer", model_max_length=77)
    pipe = comfyui_checkpoint(base / "models" / "checkpoints" / "small.safetensors", words, dtype=float32)
    pipe.save_pretrained(base / "models" / "diffusers" / "small")
    pipe.base = base
    return pipe


@pytest.fixture(scope="module")
def server(pipe: Any) -> Iterator[Server]:
    with comfy_server.running(pipe.base) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server) as client:
        run = client.run(training())
        assert run.ended == "execution_success", run.error
        yield client


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def training() -> API:
    sockets = {"pipe": ["pipe", 0], "reward": ["reward", 0], "prompts": ["prompts", 0]}
    return {
        "pipe": node("AlignPropLoadPipeline", model="diffusers/small"),
        "reward": node("AlignPropReward", reward="colour"),
        "prompts": node("AlignPropPrompts", source="text", text="a fox\na dog"),
        "align": node("AlignPropAlign", **sockets, **TRAINING, height=64, width=64),
        "save": node("AlignPropSaveAdapter", adapter=["align", 0], filename_prefix="small"),
    }


def graph(name: str, **between: dict[str, Any]) -> API:
    """ComfyUI's usual graph, with its model through the node `lora` where there is one; also writes the weights."""
    model = ["lora", 0] if between else ["checkpoint", 0]
    sockets = {"model": model, "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    numbers = {"seed": 3, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="small.safetensors"),
        **between,
        "text": node("CLIPTextEncode", text="a fox", clip=["checkpoint", 1]),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node("KSampler", **sockets, **numbers),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix=name),
        "weights": node("ModelSave", model=model, filename_prefix=name),
    }


def core_loader(**more: Any) -> dict[str, Any]:
    return {"lora": node("LoraLoaderModelOnly", model=["checkpoint", 0], lora_name=LORA, strength_model=1.0, **more)}


def apply_node() -> dict[str, Any]:
    apply = node("AlignPropApply", model=["checkpoint", 0], adapter=["load", 0])
    return {"load": node("AlignPropLoadAdapter", lora_name=LORA), "lora": apply}


@pytest.fixture(scope="module")
def drawn(client: Client) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The picture and the denoiser's weights: of the model alone, by the core's loader, and by our Apply node."""
    found = {}
    for name, between in {"alone": {}, "core": core_loader(), "apply": apply_node()}.items():
        run = client.run(graph(name, **between), seconds=300)
        assert run.ended == "execution_success", run.error
        picture = np.asarray(client.server.view(run.outputs["picture"]["images"][0]), dtype=np.int16)
        found[name] = picture, load_file(client.server.base / "output" / f"{name}_00001_.safetensors")
    return found


def test_the_cores_loader_changes_the_picture_and_warns_of_nothing(server: Server, drawn: Any) -> None:
    assert np.abs(drawn["core"][0] - drawn["alone"][0]).mean() > 1
    assert "lora key not loaded" not in server.log


def test_apply_does_what_the_cores_loader_does(drawn: Any) -> None:
    assert np.array_equal(drawn["core"][0], drawn["apply"][0])
    assert all(np.array_equal(weight, drawn["apply"][1][key]) for key, weight in drawn["core"][1].items())


def test_the_change_is_that_of_our_own_pipeline(pipe: Any, server: Server, drawn: Any) -> None:
    from alignprop_pipe import Adapter
    from alignprop_pipe.adapters.checkpoint import original_checkpoint

    pipe.load_lora_weights(dict(Adapter.load(server.base / "models" / "loras" / LORA)))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    ours = {
        key: weight.numpy() for key, weight in original_checkpoint(pipe).items() if key.startswith("model.diffusion")
    }
    alone, theirs = drawn["alone"][1], drawn["core"][1]
    assert ours.keys() == alone.keys()
    changed = [key for key in ours if not np.array_equal(theirs[key], alone[key])]
    assert len(changed) == 32  # eight projections in each of four transformer blocks
    assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 1e-5
    assert min(np.abs(theirs[key] - alone[key]).max() for key in changed) > 1e-4


def test_an_adapter_of_another_model_is_refused_with_a_reason(client: Client) -> None:
    """The bundled model's layers are named as those of Stable Diffusion and are smaller: the core then only logs."""
    sockets = {"pipe": ["pipe", 0], "reward": ["reward", 0], "prompts": ["prompts", 0]}
    other = training()
    other["pipe"] = node("AlignPropLoadPipeline", model="emoji (bundled)")
    other["align"] = node("AlignPropAlign", **sockets, **TRAINING, guidance_scale=1.0)
    apply = node("AlignPropApply", model=["checkpoint", 0], adapter=["align", 0])
    run = client.run({**other, **graph("other", lora=apply)})
    assert run.ended == "execution_error"
    assert "fit" in run.error
    assert "\n" not in run.error.strip()


def test_the_example_of_a_normal_graph_runs(client: Client) -> None:
    workflow = json.loads((ROOT / "example_workflows" / "lora-in-a-normal-graph.json").read_text(encoding="utf-8"))
    prompt = as_prompt(workflow, client.server.object_info())
    small = {"ckpt_name": "small.safetensors", "lora_name": LORA, "width": 64, "height": 64, "steps": 2}
    for part in prompt.values():
        part["inputs"].update({name: value for name, value in small.items() if name in part["inputs"]})
    run = client.run(prompt, workflow)
    assert run.ended == "execution_success", run.error
    assert [part["class_type"] for name, part in prompt.items() if name in run.outputs] == ["SaveImage"]
