"""The nodes for ComfyUI. `comfy_api` exists only inside ComfyUI, so it is imported when ComfyUI asks, not before."""

import importlib.metadata
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WEB_DIRECTORY = str(Path(__file__).parent / "web")
NEEDED = {
    "alignprop_pipe": "",
    "diffusers": "0.38",
    "transformers": "5.10",
    "peft": "0.18",
    "accelerate": "1.10",
    "huggingface_hub": "1.22",
    "kornia": "0.8.2",
    "matplotlib": "3.8",
    "jaxtyping": "0.3.7",
    "psutil": "5.9",
}
"""What a ComfyUI may lack or have too old: of requirements.txt, module -> oldest version."""


async def comfy_entrypoint() -> Any:
    """The extension, with its list of nodes; what is missing is said in the console and in the list."""
    from comfy_api.latest import ComfyExtension

    missing = lacking()
    if missing:
        logging.getLogger("alignprop").warning("alignprop: %s", way_out(missing))

    class AlignPropExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return [missing_node(missing)] if missing else nodes()

    return AlignPropExtension()


def lacking() -> list[str]:
    """What is not installed, or too old, in words."""
    found = []
    for name, oldest in NEEDED.items():
        if find_spec(name) is None:
            found.append(name)
        elif oldest and _numbers(version := importlib.metadata.version(name)) < _numbers(oldest):
            found.append(f"{name} {oldest} or newer (here: {version})")
    return found


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def nodes() -> list[Any]:
    """Every node, in the order of a graph."""
    from .adapters import ApplyAdapter, LoadAdapter, MixAdapters, PushToHub, SaveAdapter
    from .align import Align
    from .load_pipeline import LoadPipeline
    from .prompts import Prompts
    from .rewards import CombineRewards, Reward, RewardText, Score
    from .sample import Sample

    return [
        LoadPipeline, Reward, RewardText, CombineRewards, Prompts, Align, Sample, Score, SaveAdapter, LoadAdapter,
        MixAdapters, ApplyAdapter, PushToHub,
    ]  # fmt: skip


def way_out(missing: list[str]) -> str:
    """What to type, in the Python that runs ComfyUI."""
    requirements = Path(__file__).parent.parent / "requirements.txt"
    wanted = f'-r "{requirements}"' if requirements.is_file() else "alignprop-pipe"
    return f'{", ".join(missing)} not installed: run "{sys.executable}" -m pip install {wanted} and start ComfyUI again'


def missing_node(missing: list[str]) -> Any:
    """A node that stands for the others while something is not installed."""
    from comfy_api.latest import io

    class NotInstalled(io.ComfyNode):
        """Says how to mend the installation."""

        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id="AlignPropNotInstalled",
                display_name=f"AlignProp is not installed: {', '.join(missing)} missing",
                category="AlignProp",
                description=way_out(missing),
                inputs=[],
                outputs=[],
                is_output_node=True,
            )

        @classmethod
        def execute(cls) -> Any:
            raise RuntimeError(way_out(missing))

    return NotInstalled
