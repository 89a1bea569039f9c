"""The command `doctor`: what is installed here, what this machine can do, what is missing and how to get it."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import typer
from packaging.requirements import Requirement

import alignprop_pipe
from alignprop_pipe.bundled import MODELS
from alignprop_pipe.cli import console
from alignprop_pipe.cli.options import ListRequest

DOCTOR_EXAMPLES = """[bold]Examples[/]

alignprop doctor

alignprop doctor --json          [dim]# for a report of a fault[/]"""

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "kornia")
"""What is looked for where the package itself is not installed, as in a clone among ComfyUI's custom nodes."""
OPTIONAL = {
    "tensorboard": ("--log tensorboard", "pip install 'alignprop-pipe[tensorboard]'"),
    "wandb": ("--log wandb", "pip install 'alignprop-pipe[wandb]'"),
    "sentencepiece": ("tokenizers of T5 and SigLIP", "pip install sentencepiece"),
}
"""Packages that not everybody needs -> what for, and how to get them."""
MISSING = "missing"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
LEAST_FREE_GB = 5
"""Of the disk that holds the Hub's cache: less does not take one model."""
COMFY_FOLDERS = ("ComfyUI", "comfyui", "Documents/ComfyUI", "comfy/ComfyUI")
"""Where installers put ComfyUI, below the home folder."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` says what to do about it and is empty where all is well."""

    name: str
    found: str
    advice: str = ""


def doctor(request: ListRequest) -> None:
    """Say what is installed, what this machine can do, and how to get what is missing.

    Nothing is loaded from the network, and no token, name of a user or whole path is shown, so the answer can be put
    into a report. Ends with 1 where something that is needed is missing.
    """
    output = console.Output(json=request.json)
    findings = [*packages(), *devices(), *hub(), *bundled(), *comfyui()]
    for finding in findings:
        output.record("finding", {"name": finding.name, "found": finding.found, "advice": finding.advice})
    output.table("", ("", "found"), [(finding.name, finding.found) for finding in findings])
    wrong = [finding for finding in findings if finding.advice]
    for finding in wrong:
        output.result(f"{finding.name}: {finding.advice}")
    if not wrong:
        output.result("all is well")
    if any(finding.found == MISSING for finding in wrong):
        raise typer.Exit(console.FAILED)


def packages() -> Iterator[Finding]:
    """Versions: of Python, of this package, of those that it needs and of those that it can use."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("alignprop-pipe", alignprop_pipe.__version__)
    for needed in _requirements():
        found = _version(needed.name)
        fits = bool(found) and needed.specifier.contains(found, prereleases=True)
        shown = found if fits or not found else f"{found}, and {needed.specifier} is needed"
        yield Finding(needed.name, shown or MISSING, "" if fits else f"pip install '{needed.name}{needed.specifier}'")
    for name, (use, way) in OPTIONAL.items():
        found = _version(name)
        yield Finding(name, found or f"not installed; needed for {use}: {way}")


def devices() -> Iterator[Finding]:
    """Where a run can compute, with what memory and which number formats."""
    import psutil

    try:
        import torch
    except (ImportError, OSError) as error:  # not there, or libraries that do not fit together
        yield Finding("PyTorch", MISSING, f"it cannot be imported ({error}): install it as pytorch.org says")
        return
    memory = psutil.virtual_memory()
    threads = f"{torch.get_num_threads()} threads, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    yield Finding("cpu", threads)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        formats = "bf16, fp16" if torch.cuda.is_bf16_supported() else "fp16, no bf16"
        yield Finding(f"cuda:{number}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {formats}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple's GPU")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        advice = "this PyTorch cannot use the NVIDIA card: install the build for your CUDA version, see pytorch.org"
        yield Finding("cuda", "a card, but no PyTorch for it", advice)


def hub() -> Iterator[Finding]:
    """The Hugging Face Hub: its cache, whether it may be asked, whether there is a token."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    held = sum(1 for folder in cache.glob("models--*") if folder.is_dir())
    advice = "make room, or set HF_HOME to a larger disk" if free < LEAST_FREE_GB else ""
    models = console.counted(held, "model")
    yield Finding("cache of the Hub", f"{_short(cache)}: {models}, {free:.0f} GB free on its disk", advice)
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    yield Finding("the Hub", f"not asked: {' and '.join(offline)} is set" if offline else "may be asked")
    none = "none; 'hf auth login' gets one, to push and for gated models"
    yield Finding("token for the Hub", "there" if get_token() else none)


def bundled() -> Iterator[Finding]:
    """The models that ship inside."""
    broken = [model for model in MODELS if model.missing is not None]
    advice = "install the package again: pip install --force-reinstall --no-deps alignprop-pipe" if broken else ""
    yield Finding("bundled models", MISSING if broken else ", ".join(model.name for model in MODELS), advice)


def comfyui() -> Iterator[Finding]:
    """A ComfyUI in one of the usual places, and whether the nodes are in it."""
    inside = find_spec("folder_paths") is not None and find_spec("comfy") is not None
    places = [Path.cwd(), *(Path.home() / name for name in COMFY_FOLDERS)]
    here = [place for place in places if (place / "custom_nodes").is_dir() and (place / "main.py").is_file()]
    if not here:
        yield Finding("ComfyUI", "this Python's own" if inside else "not found in the usual places")
    for place in dict.fromkeys(folder.resolve() for folder in here):
        packs = [pack.name for pack in (place / "custom_nodes").iterdir() if "alignprop" in pack.name.lower()]
        nodes = f"with the nodes ({', '.join(sorted(packs))})" if packs else "without the nodes"
        advice = "" if packs else f"alignprop comfy install {_short(place)}"
        yield Finding("ComfyUI", f"{_short(place)}, {nodes}", advice)


def _requirements() -> list[Requirement]:
    """What the installed package asks for, without its extras."""
    try:
        found = [Requirement(text) for text in requires("alignprop-pipe") or ()]
    except PackageNotFoundError:
        return [Requirement(name) for name in NEEDED]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _short(path: Path) -> str:
    """A path with ~ for the home folder, whose name is the user's."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except ValueError:
        return str(path)
