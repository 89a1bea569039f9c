"""All that is asked of ComfyUI itself: modes, memory, progress, stopping, folders, and inputs in its own classes."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from server import PromptServer

from .widgets import Widget

logger = logging.getLogger("alignprop")

CATEGORY = "AlignProp"
Pipe = io.Custom("ALIGNPROP_PIPE")
RewardSocket = io.Custom("ALIGNPROP_REWARD")
Prompts = io.Custom("ALIGNPROP_PROMPTS")
AdapterSocket = io.Custom("ALIGNPROP_ADAPTER")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")

OUT_OF_MEMORY = (
    "out of memory. Make fewer pictures at once (batch_size 1, with a larger gradient_accumulation_steps), keep "
    "checkpointing at 'all', use truncation 'last:1', draw smaller pictures (height, width), or load the model in "
    "float16 or bfloat16."
)


# --- schemas ---------------------------------------------------------------------------------------------------------


def schema(**about: Any) -> io.Schema:
    """A node's schema in our category, without what this version of ComfyUI does not know yet."""
    known = {one.name for one in fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY} | {name: value for name, value in about.items() if name in known})


def widget_input(widget: Widget, **more: Any) -> Any:
    """The input of ComfyUI for a widget."""
    about: dict[str, Any] = {"tooltip": widget.tooltip, "default": widget.default, "optional": not widget.required}
    if widget.kind in ("INT", "FLOAT"):
        about |= {"min": widget.low, "max": widget.high, "step": widget.step}
    if widget.kind == "STRING":
        about["multiline"] = widget.multiline
    if widget.kind == "COMBO":
        about["options"] = list(widget.options)
    kinds = {"INT": io.Int, "FLOAT": io.Float, "STRING": io.String, "BOOLEAN": io.Boolean, "COMBO": io.Combo}
    made = kinds[widget.kind].Input(widget.name, **about, **more)
    made.extra_dict = dict(widget.extra)
    if widget.advanced:
        made.extra_dict["advanced"] = True
    if widget.kind == "FLOAT":
        made.extra_dict["round"] = min(1e-3, (widget.step or 1.0) / 100)
    return made


def seed_input(tooltip: str, default: int = 0) -> Any:
    """A seed; the script of the node sets it to stay as it is from run to run, since each new one trains again."""
    made = io.Int.Input("seed", default=default, min=0, max=2**63 - 1, step=1, optional=True, tooltip=tooltip)
    made.extra_dict = {"control_after_generate": True}
    return made


# --- modes, memory ---------------------------------------------------------------------------------------------------


@contextmanager
def working() -> Iterator[None]:
    """The mode in which a node of ours runs: gradients as usual, though ComfyUI runs all in inference mode.

    Out of memory is told with what to change, in the class of exception that makes ComfyUI free its models.
    """
    from alignprop_pipe.diffusion.rollout import autograd_on

    try:
        with autograd_on():
            yield
    except torch.OutOfMemoryError as error:
        raise type(error)(OUT_OF_MEMORY) from error
    except MemoryError as error:
        raise MemoryError(OUT_OF_MEMORY) from error


@contextmanager
def on_device(pipe: Any, *others: Any) -> Iterator[torch.device]:
    """A pipeline on ComfyUI's device, whose own models give way; afterwards it waits in main memory."""
    from alignprop_pipe.diffusion import pipeline_parts

    device = memory.get_torch_device()
    memory.unload_all_models()
    memory.soft_empty_cache()
    networks = list(pipeline_parts.components(pipe).values())
    try:
        for network in networks:
            network.to(device)
        yield device
    finally:
        for moved in (*networks, *others):
            moved.to("cpu")
        memory.soft_empty_cache()


def image_of(pictures: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> ComfyUI's IMAGE [B, H, W, 3], both in [0, 1]."""
    return pictures.detach().float().movedim(1, -1).contiguous().to(memory.intermediate_device())


# --- progress and stopping -------------------------------------------------------------------------------------------


class Progress:
    """Bar, text and preview of a node while it works; counts calls of the denoiser.

    The stop button becomes a KeyboardInterrupt, which the loop takes as one: its flag is taken down, so that the
    evaluation
    at what was learned can follow and a second press ends that too. `pass_on_stop` hands it to ComfyUI at the end.
    """

    def __init__(self, node_id: str, total: int) -> None:
        self.node_id, self.total, self.done = node_id, max(total, 1), 0
        self.bar = comfy.utils.ProgressBar(self.total, node_id=node_id)
        self.began = self.shown = time.monotonic()
        self.stopped = False

    def stop_here(self) -> None:
        """KeyboardInterrupt where the user has pressed stop since the last one."""
        if memory.processing_interrupted():
            memory.interrupt_current_processing(False)
            self.stopped = True
            raise KeyboardInterrupt

    def pass_on_stop(self) -> None:
        """Raises ComfyUI's own exception where the user pressed stop."""
        if self.stopped:
            memory.interrupt_current_processing()
        memory.throw_exception_if_processing_interrupted()

    def call(self) -> None:
        """One denoiser call more; see `stop_here`."""
        self.stop_here()
        self.done = min(self.done + 1, self.total)
        if time.monotonic() - self.shown > 0.2:
            self._update(None)

    def show(self, picture: Any) -> None:
        """A preview picture (PIL)."""
        self._update(("JPEG", picture, 512))

    def _update(self, preview: Any) -> None:
        self.shown = time.monotonic()
        try:
            self.bar.update_absolute(self.done, self.total, preview)
        except BaseException as error:
            if type(error).__name__ == "InterruptProcessingException":  # it has taken the flag down
                self.stopped = True
                raise KeyboardInterrupt from error
            raise

    def say(self, text: str) -> None:
        PromptServer.instance.send_progress_text(text, self.node_id)

    def left(self) -> float:
        """Seconds left, by what was done so far."""
        return (time.monotonic() - self.began) / max(self.done, 1) * (self.total - self.done)


@contextmanager
def counted_calls(pipe: Any, progress: Progress) -> Iterator[None]:
    """Counts every denoiser call but those that are made again for the gradient; a stop ends the gradient too."""
    from alignprop_pipe.diffusion import pipeline_parts

    def stop(*_: Any) -> None:
        progress.stop_here()

    def before(*_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # -1: no backward pass is running
            progress.call()
        else:
            stop()

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        for value in output.values() if isinstance(output, dict) else output:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(stop)

    with ExitStack() as stack:
        for denoiser in pipeline_parts.denoisers(pipe).values():
            stack.callback(denoiser.register_forward_pre_hook(before).remove)
            stack.callback(denoiser.register_forward_hook(after).remove)
        yield


def send(event: str, data: Mapping[str, Any]) -> None:
    """An event for the script of a node in the browser."""
    PromptServer.instance.send_sync(event, dict(data), PromptServer.instance.client_id)


# --- folders ---------------------------------------------------------------------------------------------------------


def names_in(kind: str) -> list[str]:
    """The files of one of ComfyUI's model folders."""
    return folder_paths.get_filename_list(kind)


def file_in(kind: str, name: str) -> Path:
    """The path of one of them. Raises FileNotFoundError that names what there is."""
    found = folder_paths.get_full_path(kind, name)
    if found is None:
        known = ", ".join(names_in(kind)) or "nothing"
        raise FileNotFoundError(f"{name!r} is not in models/{kind} (any more); there is: {known}. Press R to refresh")
    return Path(found)


def diffusers_folders() -> dict[str, Path]:
    """The pipelines in models/diffusers: name -> folder."""
    roots = map(Path, folder_paths.get_folder_paths("diffusers"))
    return {index.parent.name: index.parent for root in roots for index in sorted(root.glob("*/model_index.json"))}


def new_lora_path(prefix: str) -> tuple[Path, str]:
    """A name in models/loras that is not taken, and how the LoRA loaders list it. Raises ValueError."""
    root = Path(folder_paths.get_folder_paths("loras")[0]).resolve()
    root.mkdir(parents=True, exist_ok=True)
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(root))
    except Exception as error:
        raise ValueError(f"{prefix!r} leads out of models/loras; give a name such as cats/AlignProp") from error
    file = f"{name}_{counter:05}_.safetensors"
    return Path(folder) / file, str(Path(subfolder) / file)


def run_folder(prefix: str) -> Path:
    """A new folder in ComfyUI's output folder for a run's report and pictures."""
    folder, name, _, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    number = 1
    while (Path(folder) / f"{name}_{number:05}").exists():
        number += 1
    return Path(folder) / f"{name}_{number:05}"


def tokenizer_folder() -> Path | None:
    """The files of CLIP's tokenizer that come with ComfyUI."""
    import comfy.sd1_clip

    folder = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    return folder if (folder / "vocab.json").is_file() else None


def shown_in(folder: Path) -> str:
    """A path in ComfyUI's output folder, from there on."""
    output = Path(folder_paths.get_output_directory()).resolve()
    resolved = folder.resolve()
    return str(Path("output") / resolved.relative_to(output)) if resolved.is_relative_to(output) else folder.name


def image_socket(images: torch.Tensor) -> torch.Tensor:
    """ComfyUI's IMAGE -> [B, 3, H, W] that may enter a graph."""
    return images[..., :3].clone().float().movedim(-1, 1).contiguous()
