"""The files of a run folder and of a repository on the Hub, by name."""

from pathlib import Path

ADAPTER = "adapter.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
CURVE = "curve.png"
SHEET = "before-after.png"
REPORT = "report.html"

HUB_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name by which `load_lora_weights("me/name")` finds its file among several."""


def run_of(file: Path) -> Path | None:
    """The run folder that an adapter's file lies in, if it does."""
    beside = (file.with_name(name).is_file() for name in (CONFIG, METRICS))
    return file.parent if file.name.startswith("adapter") and all(beside) else None
