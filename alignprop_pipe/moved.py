"""Modules of 0.1.0 under the names that they had: an import of one warns with the name of today, and works."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "alignprop_pipe."
MOVED = {
    "adapter": "adapters.adapter",
    "adapter_files": "adapters.files",
    "adapter_keys": "adapters.keys",
    "align": "training.loop",
    "card": "hub.card",
    "card_facts": "hub.card_facts",
    "checkpoint": "adapters.checkpoint",
    "choices": "config.choices",
    "comfyui": "comfy_install",
    "config_fields": "config.fields",
    "drawings": "runs.drawings",
    "effects": "diffusion.effects",
    "evidence": "training.evidence",
    "export": "adapters.apply",
    "export_header": "adapters.header",
    "export_keys": "adapters.export_keys",
    "factors": "adapters.factors",
    "file_kinds": "adapters.file_kinds",
    "forecast": "training.forecast",
    "hub_folder": "hub.stage",
    "inspection": "adapters.inspect",
    "kohya_transformers": "adapters.kohya",
    "licences": "hub.licences",
    "lora": "diffusion.lora",
    "loss": "training.loss",
    "memory": "diffusion.checkpointing",
    "merging": "adapters.merge",
    "mixing": "adapters.mix",
    "model_layers": "adapters.model_layers",
    "naming": "adapters.naming",
    "pairs": "runs.pairs",
    "privacy": "hub.redact",
    "programs": "adapters.programs",
    "progress": "training.progress",
    "repeating": "runs.repeating",
    "report": "runs.report",
    "result": "training.result",
    "rewards.aesthetic": "rewards.scorers.aesthetic",
    "rewards.ask": "rewards.scorers.ask",
    "rewards.clip": "rewards.networks.clip",
    "rewards.code": "config.code",
    "rewards.detector": "rewards.objects.detector",
    "rewards.english": "rewards.objects.english",
    "rewards.expression": "config.expression",
    "rewards.hpsv2": "rewards.scorers.hpsv2",
    "rewards.imagereward": "rewards.scorers.imagereward",
    "rewards.jpeg": "rewards.scorers.jpeg",
    "rewards.judge": "rewards.scorers.judge",
    "rewards.likeness": "rewards.scorers.likeness",
    "rewards.network": "rewards.networks.network",
    "rewards.open_clip": "rewards.networks.open_clip",
    "rewards.pickscore": "rewards.scorers.pickscore",
    "rewards.preprocess": "rewards.networks.preprocess",
    "rewards.pretrained": "rewards.networks.pretrained",
    "rewards.python": "rewards.scorers.python",
    "rewards.simple": "rewards.scorers.simple",
    "rewards.wanted": "rewards.objects.targets",
    "rewards.weights": "rewards.networks.weights",
    "rollout": "diffusion.rollout",
    "room": "diffusion.memory",
    "run_facts": "runs.facts",
    "sampling": "diffusion.sample",
    "single_file": "diffusion.single_file",
    "states": "diffusion.refusals",
    "stock": "diffusion.pipeline_parts",
    "stock_loading": "adapters.stock_loading",
    "strength": "adapters.strength",
    "summary": "runs.summary",
    "sweep": "training.sweep",
    "text_encoders": "diffusion.text_encoders",
    "trackers": "runs.trackers",
    "truncation": "config.truncation",
    "windows": "diffusion.window",
}


class Moved(MetaPathFinder, Loader):
    """Finds a module under its old name; what is imported is the module of today itself."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for every name that did not move."""
        inside = fullname.removeprefix(PACKAGE)
        return ModuleSpec(fullname, self) if fullname.startswith(PACKAGE) and inside in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today, with a warning."""
        today = PACKAGE + MOVED[spec.name.removeprefix(PACKAGE)]
        warnings.warn(f"{spec.name} is called {today} now", DeprecationWarning, stacklevel=2)
        module = import_module(today)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs twice; the import has put the old name's spec on the module, and it gets its own again."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let old names be found, after all others."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
