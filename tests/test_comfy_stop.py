"""The stop button of the Align node, without ComfyUI: stand-ins keep its flag and raise its exception as it does."""

import importlib
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from aligning import PROMPTS, QUICK, aligned, is_stock

from alignprop_pipe import Adapter
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Images, Rewards, Targets
from alignprop_pipe.rewards.base import Reward

NODES = ("comfy_nodes.host", "comfy_nodes.align")


class InterruptProcessingException(BaseException):
    """ComfyUI's own, which is no Exception in newer versions."""


class Memory(types.ModuleType):
    """`comfy.model_management`, as far as the nodes ask it."""

    def __init__(self) -> None:
        super().__init__("comfy.model_management")
        self.flag = False

    def processing_interrupted(self) -> bool:
        return self.flag

    def interrupt_current_processing(self, value: bool = True) -> None:
        self.flag = value

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.flag:
            self.flag = False
            raise InterruptProcessingException

    def get_torch_device(self) -> torch.device:
        return torch.device("cpu")

    intermediate_device = get_torch_device

    def unload_all_models(self) -> None: ...

    def soft_empty_cache(self) -> None: ...


class Comfy:
    """The node, the flag, and the folders."""

    def __init__(self, root: Path, memory: Memory, node: Any) -> None:
        self.root, self.memory, self.node = root, memory, node

    def train(self, reward: Reward, **changed: Any) -> Any:
        pipe = aligned()
        try:
            settings = {**QUICK, "steps": 9, "eval_prompts": 2, "eval_every": 0, **changed}
            return self.node.execute(pipe, reward, PromptSet.load([*PROMPTS, "snow", "the sea"]), "run", **settings)
        finally:
            assert is_stock(pipe)

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.root / "output" / "run_00001" / "config.json").read_text())["result"]

    @property
    def loras(self) -> list[Path]:
        return sorted((self.root / "loras").glob("*.safetensors"))


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Comfy]:
    memory = Memory()

    class ProgressBar:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def update_absolute(self, *_: Any) -> None:
            memory.throw_exception_if_processing_interrupted()

    folders: Any = types.ModuleType("folder_paths")
    folders.get_save_image_path = lambda prefix, root: (root, prefix, 1, "", prefix)
    folders.get_output_directory = lambda: str(tmp_path / "output")
    folders.get_folder_paths = lambda kind: [str(tmp_path / kind)]
    utils: Any = types.ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    latest: Any = types.ModuleType("comfy_api.latest")
    latest.io = MagicMock(ComfyNode=object)
    whole: Any = types.ModuleType("comfy")
    whole.model_management, whole.utils = memory, utils
    stand_ins = {"comfy": whole, "comfy.model_management": memory, "comfy.utils": utils, "folder_paths": folders}
    stand_ins |= {"server": MagicMock(), "comfy_api": MagicMock(), "comfy_api.latest": latest}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in NODES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    node = importlib.import_module("comfy_nodes.align").Align
    node.hidden = types.SimpleNamespace(unique_id="7")
    yield Comfy(tmp_path, memory, node)
    for name in NODES:
        sys.modules.pop(name, None)
        delattr(sys.modules["comfy_nodes"], name.rpartition(".")[2])


class Presses(Reward):
    """Brightness; the button is pressed at these calls. Call 0 is the dry call, call 1 the evaluation before
    training.
    """

    name = "presses"

    def __init__(self, at: set[int], press: Callable[[], None]) -> None:
        self.calls, self.at, self.press = -1, at, press

    def score(self, images: Images, prompts: list[str], targets: Targets) -> Rewards:
        self.calls += 1
        if self.calls in self.at:
            self.press()
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("keep_best", ["yes", "no"])
def test_a_stop_takes_the_evidence_after_and_reports_it(
    comfy: Comfy, keep_best: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "alignprop")
    reward = Presses({4}, comfy.memory.interrupt_current_processing)  # in the third step
    with pytest.raises(InterruptProcessingException):
        comfy.train(reward, keep_best=keep_best)
    assert not comfy.memory.flag  # as ComfyUI wants it before the next graph
    assert comfy.result["status"] in ("interrupted after 2 of 9 steps", "interrupted after 3 of 9 steps")
    assert "reward" in comfy.result["held_out"]
    (lora,) = comfy.loras
    assert len(Adapter.load(lora)) > 0
    assert "held-out reward: " in caplog.text
    assert "so far: models/loras/AlignProp-stopped" in caplog.text


def test_a_second_stop_ends_the_evidence_too(comfy: Comfy) -> None:
    reward = Presses({4, 5}, comfy.memory.interrupt_current_processing)  # call 5 is in the evaluation that follows
    with pytest.raises(InterruptProcessingException):
        comfy.train(reward, eval_batch_size=1)
    assert reward.calls == 5
    assert comfy.result["status"].startswith("interrupted after ")
    assert comfy.result["held_out"] == {}
    assert len(comfy.loras) == 1


def test_a_stop_in_the_last_step_keeps_its_lora_and_ends_the_graph(comfy: Comfy) -> None:
    reward = Presses({3}, comfy.memory.interrupt_current_processing)
    with pytest.raises(InterruptProcessingException):
        comfy.train(reward, steps=2)
    assert len(comfy.loras) == 1
    assert "reward" in comfy.result["held_out"]


def test_without_a_stop_the_node_gives_its_outputs(comfy: Comfy) -> None:
    made = comfy.train(Presses(set(), comfy.memory.interrupt_current_processing), steps=2)
    assert made is not None
    assert comfy.result["status"] == "completed"
    assert comfy.loras == []
