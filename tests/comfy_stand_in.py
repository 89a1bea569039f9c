"""As much of ComfyUI as the nodes ask for: its schema classes, folders, progress bar and stop button, without a server.

What needs the real program (models, samplers, the page) is in the tests marked `comfy`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class InterruptProcessingException(Exception):
    """What ComfyUI raises where the user pressed stop."""


class Socket:
    """A type of input or output, such as IMAGE."""

    class Input:
        def __init__(self, name: str, **about: Any) -> None:
            self.name, self.about, self.extra_dict = name, about, {}

    class Output:
        def __init__(self, **about: Any) -> None:
            self.about = about


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None) -> None:
        self.values, self.ui = values, ui


@dataclass(kw_only=True)
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    is_output_node: bool = False


@dataclass
class Host:
    """The running program: its folder, what nodes told the page, and whether stop was pressed."""

    folder: Path
    told: list[tuple[str, Any]] = field(default_factory=list)
    bars: list[tuple[int, int]] = field(default_factory=list)
    stopped: bool = False

    def modules(self) -> dict[str, ModuleType]:
        """The modules that nodes import, by name."""
        kinds = ("Int", "Float", "String", "Boolean", "Combo", "Image", "Model", "Clip", "Vae")
        io = SimpleNamespace(
            ComfyNode=type("ComfyNode", (), {"hidden": SimpleNamespace(unique_id="7")}), Schema=Schema,
            NodeOutput=NodeOutput, Custom=lambda name: type(name, (Socket,), {}),
            Hidden=SimpleNamespace(unique_id="id"),
            **{kind: type(kind, (Socket,), {}) for kind in kinds},
        )  # fmt: skip
        memory = {
            "get_torch_device": lambda: torch.device("cpu"), "intermediate_device": lambda: torch.device("cpu"),
            "unload_all_models": lambda: None, "soft_empty_cache": lambda: None,
            "processing_interrupted": lambda: self.stopped, "interrupt_current_processing": self._interrupt,
            "throw_exception_if_processing_interrupted": self._throw,
        }  # fmt: skip
        folders = {
            "get_filename_list": lambda kind: sorted(path.name for path in self.models(kind).iterdir()),
            "get_full_path": lambda kind, name: str(path) if (path := self.models(kind) / name).is_file() else None,
            "get_folder_paths": lambda kind: [str(self.models(kind))],
            "get_output_directory": lambda: str(self.folder / "output"), "get_save_image_path": self._save_path,
        }  # fmt: skip
        page = SimpleNamespace(
            send_progress_text=lambda text, node: self.told.append(("text", text)), client_id="page",
            send_sync=lambda event, data, client: self.told.append((event, data)),
        )  # fmt: skip
        bar = type("ProgressBar", (), {"__init__": lambda *_, **__: None, "update_absolute": self._update})
        contents: dict[str, dict[str, Any]] = {
            "comfy": {}, "comfy.model_management": memory, "comfy.utils": {"ProgressBar": bar}, "comfy.lora": {},
            "comfy.sd": {}, "folder_paths": folders, "comfy_api": {},
            "server": {"PromptServer": SimpleNamespace(instance=page)},
            "comfy_api.latest": {"io": io, "ComfyExtension": object},
        }  # fmt: skip
        made = {name: ModuleType(name) for name in contents}
        for name, inside in contents.items():
            vars(made[name]).update(inside)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, made[name])
        return made

    def models(self, kind: str) -> Path:
        path = self.folder / "models" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _update(self, value: int, total: int, _preview: Any = None) -> None:
        self.bars.append((value, total))

    def _interrupt(self, value: bool = True) -> None:
        self.stopped = value

    def _throw(self) -> None:
        if self.stopped:
            self.stopped = False
            raise InterruptProcessingException

    def _save_path(self, prefix: str, root: str) -> tuple[str, str, int, str, str]:
        folder = (Path(root) / prefix).resolve().parent
        if not folder.is_relative_to(Path(root).resolve()):
            raise Exception("Saving image outside the output folder is not allowed.")
        folder.mkdir(parents=True, exist_ok=True)
        name = Path(prefix).name
        return str(folder), name, 1 + len(list(folder.glob(f"{name}_*"))), str(Path(prefix).parent), prefix


@contextmanager
def running(folder: Path) -> Iterator[Host]:
    """Inside, `comfy_nodes` finds this in the place of ComfyUI; its modules are imported anew, and forgotten after."""
    host = Host(folder)
    (folder / "output").mkdir()
    kept = {name: module for name, module in sys.modules.items() if name.startswith("comfy_nodes.")}
    made = host.modules()
    before = {name: sys.modules.get(name) for name in made}
    for name in kept:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        yield host
    finally:
        package = sys.modules["comfy_nodes"]
        for name in [name for name in sys.modules if name.startswith("comfy_nodes.")]:
            del sys.modules[name]
            vars(package).pop(name.rpartition(".")[2], None)
        for name, module in kept.items():
            setattr(package, name.rpartition(".")[2], module)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        sys.modules.update(kept)
