"""Which file may import which: only those below it. A new file needs a number here, which is a decision."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignprop_pipe

PACKAGE = Path(alignprop_pipe.__file__).parent

# An import points to a lower number. After the dot: the order inside a folder or a group of files.
LAYERS = {
    "errors": 0,
    "escaping": 0,
    "layout": 0,
    "images": 1,
    "embedded_prompts": 0,
    "picture_files": 1.05,
    "hub_client": 1,
    "resolve": 2.05,
    "choices": 1.0,
    "config_fields": 1.1,
    "config": 1.2,
    "records": 1,
    "summary": 1.3,
    "seeds": 1,
    "files": 1,
    "bundled": 1,
    "sources": 0.5,
    "prompts": 2,
    "stock": 2,
    "text_encoders": 2.1,
    "truncation": 2,
    "memory": 2,
    "rewards.base": 2.0,
    "rewards.expression": 1.0,
    "rewards.code": 1.1,
    "rewards.preprocess": 2.1,
    "rewards.pretrained": 2.12,
    "rewards.guard": 2.1,
    "rewards.weights": 2.11,
    "rewards.network": 2.12,
    "rewards.aesthetic": 2.21,
    "rewards.ask": 2.2,
    "rewards.english": 2.0,
    "rewards.wanted": 2.1,
    "rewards.detector": 2.15,
    "rewards.clip": 2.2,
    "rewards.combine": 2.2,
    "rewards.hpsv2": 2.21,
    "rewards.open_clip": 2.1,
    "rewards.pickscore": 2.21,
    "rewards.imagereward": 2.2,
    "rewards.jpeg": 2.2,
    "rewards.likeness": 2.21,
    "rewards.judge": 2.2,
    "rewards.objects": 2.2,
    "rewards.python": 2.2,
    "rewards.simple": 2.2,
    "rewards.smooth": 2.21,
    "rewards.entries": 2.1,
    "rewards.registry": 2.3,
    "rewards": 2.4,
    "loss": 2,
    "trackers": 2,
    "lora": 2.1,
    "states": 2.1,
    "windows": 2.2,
    "single_file": 2,
    "model_layers": 2.1,
    "naming": 2.2,
    "export_header": 2,
    "pairs": 1.5,
    "drawings": 2,
    "report": 2,
    "rollout": 3,
    "evidence": 3,
    "export_keys": 3.0,
    "file_kinds": 0,
    "adapter_keys": 1.1,
    "strength": 1.2,
    "programs": 2,
    "stock_loading": 3.1,
    "inspection": 3.15,
    "merging": 3.15,
    "factors": 1,
    "kohya_transformers": 2,
    "adapter_files": 2,
    "privacy": 2.1,
    "licences": 2.4,
    "card_facts": 3.22,
    "card": 3.23,
    "hub_folder": 3.25,
    "hub": 3.26,
    "adapter": 3.1,
    "export": 3.2,
    "mixing": 3.2,
    "sweep": 3.3,
    "checkpoint": 3,
    "comfyui": 3,
    "runs": 3,
    "run_facts": 1,
    "sampling": 3.2,
    "progress": 3.3,
    "room": 3.1,
    "effects": 3.1,
    "scoring": 3,
    "align": 4,
    "forecast": 4,
    "result": 4,
    "repeating": 4,
    "pipeline": 5,
    "cli": 6.0,
    "cli.console": 6.0,
    "cli.options": 6.1,
    "cli.comfy": 6.1,
    "cli.usage": 6.0,
    "cli.drawing": 6.2,
    "cli.opening": 6.2,
    "cli.planning": 6.3,
    "cli.pushing": 6.3,
    "cli.scores": 6.3,
    "cli.exporting": 6.3,
    "cli.mixing": 6.3,
    "cli.app": 6.4,
    "__main__": 7,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE / "models"}
FILES.pop("")  # the package itself names everything and imports it on demand


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also in a function or for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            base = node.module or ""
            for alias in node.names:
                home = alignprop_pipe._HOME.get(alias.name, "") if base == "alignprop_pipe" else ""
                if base == "alignprop_pipe" and alias.name in LAYERS:
                    yield alias.name
                elif base == "alignprop_pipe" and home:
                    yield home.removeprefix("alignprop_pipe").removeprefix(".") or alias.name
                elif base.startswith("alignprop_pipe."):
                    inside = base.removeprefix("alignprop_pipe.")
                    yield f"{inside}.{alias.name}" if f"{inside}.{alias.name}" in LAYERS else inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("alignprop_pipe."):
                    yield alias.name.removeprefix("alignprop_pipe.")


def test_every_file_has_a_layer() -> None:
    assert set(FILES) == set(LAYERS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_below(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    upward = {
        f"{name} ({LAYERS[name]}) imports {other} ({LAYERS[other]})"
        for other in imported(tree)
        if LAYERS[other] >= LAYERS[name]
        and not (name == "rewards" and other.startswith("rewards."))
        and (name, other) != ("adapter", "hub")  # push_to_hub hands over
    }
    assert not upward


def test_the_test_would_see_an_import_from_above() -> None:
    source = "from alignprop_pipe import lora, AlignPropPipeline\ndef f():\n    from alignprop_pipe.cli import app\n"
    assert list(imported(ast.parse(source))) == ["lora", "pipeline", "cli.app"]
