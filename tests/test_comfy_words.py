"""What the nodes that train and load say, without ComfyUI: its modules are stand-ins that only give names."""

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import adapters
import hostile
import pytest
from test_summary import EVEN, look, record, shifted

from alignprop_pipe.config.settings import AlignConfig
from alignprop_pipe.prompts import PromptSet

STAND_INS = ("comfy", "comfy.model_management", "comfy.utils", "folder_paths", "comfy_api", "server")
NODES = ("comfy_nodes.host", "comfy_nodes.align", "comfy_nodes.adapters")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    latest: Any = types.ModuleType("comfy_api.latest")
    latest.io = MagicMock(ComfyNode=object)
    for name in STAND_INS:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    for name in NODES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name.rpartition(".")[2]: importlib.import_module(name) for name in NODES}
    for name in NODES:
        sys.modules.pop(name, None)
        delattr(sys.modules["comfy_nodes"], name.rpartition(".")[2])


def test_the_node_says_what_its_newest_look_warns_of(nodes: dict[str, Any]) -> None:
    prompts = PromptSet(tuple(f"prompt {number}" for number in range(32)))
    run = nodes["align"].Run("7", AlignConfig().replace(eval_every=2), prompts)
    rose, fell = shifted(EVEN, 0.2), shifted(EVEN, -0.2)
    course = [
        (0, look(0, judge=EVEN), 1),
        (2, look(2, rose, judge=fell), 2),
        (3, None, 2),
        (4, look(4, rose, judge=EVEN), 1),
    ]
    for step, evidence, lines in course:
        run.on_step(record(step, evidence))
        text = run.text(record(step, evidence)).splitlines()
        assert len(text) == lines
        assert text[0].startswith(f"step {step}/60")
        assert all(line.startswith("warning: The judge judge, which was never trained on, fell") for line in text[1:])


@pytest.mark.parametrize("text", hostile.ALL)
def test_what_a_header_says_is_a_line_for_each_text(nodes: dict[str, Any], text: str) -> None:
    header = {f"alignprop.{name}": text for name in ("base_model", "reward", "step", "prompts", "scores")}
    theirs = adapters.made("sd15")
    theirs = type(theirs)(theirs.layers, theirs.base, header)
    said = nodes["adapters"].about(theirs)
    assert len(said.splitlines()) == 6
    assert not set(said) & set(hostile.UNSEEN)
