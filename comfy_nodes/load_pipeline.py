"""The node that opens a text-to-image pipeline."""

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import host
from .widgets import cleaned, fingerprint

BUNDLED = "emoji (bundled)"
CHECKPOINTS, DIFFUSERS = "checkpoints/", "diffusers/"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class LoadPipeline(io.ComfyNode):
    """A diffusers pipeline: bundled, from models/checkpoints, from models/diffusers, or from a Hub id or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropLoadPipeline",
            display_name="Load Pipeline (AlignProp)",
            description="Opens a model that can be aligned: the small emoji model that comes with AlignProp, a "
            "checkpoint, or a diffusers pipeline. ComfyUI's own MODEL cannot be trained through; this one can.",
            search_aliases=["alignprop", "diffusers", "checkpoint", "RLHF", "train"],
            inputs=[
                io.Combo.Input("model", options=_models(), default=BUNDLED, tooltip=MODEL),
                io.String.Input("id_or_folder", default="", optional=True, tooltip=ID_OR_FOLDER),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto", optional=True, tooltip=DTYPE),
            ],
            outputs=[host.Pipe.Output(display_name="pipe", tooltip="a pipeline for the other AlignProp nodes")],
        )

    @classmethod
    def validate_inputs(cls, id_or_folder: Any = "") -> bool | str:
        text = cleaned(id_or_folder or "")
        from alignprop_pipe.errors import HubError
        from alignprop_pipe.sources import exists, expanded, hub_hint, on_hub

        try:
            if text in ("", "emoji") or exists(expanded(text)) or on_hub(text) is not None:
                return True
        except HubError as error:
            return str(error)
        return f"there is no file or folder {text!r}{hub_hint(text)}; give {ID_OR_FOLDER.partition(': ')[2]}"

    @classmethod
    def fingerprint_inputs(cls, model: str = BUNDLED, id_or_folder: str = "", dtype: str = "auto") -> str:
        return fingerprint(id_or_folder or str(_path_of(model)))

    @classmethod
    def execute(cls, model: str = BUNDLED, id_or_folder: str = "", dtype: str = "auto") -> io.NodeOutput:
        with host.working():
            from alignprop_pipe import AlignPropPipeline
            from alignprop_pipe.sources import expanded, is_file

            text = cleaned(id_or_folder)
            home = text.startswith("~")  # else the text as it is: a Path would take a / out of hf://
            source = str(expanded(text)) if home else text or str(_path_of(model))
            options = {"dtype": _dtype(dtype)}
            if is_file(source):
                pipe = AlignPropPipeline.from_single_file(source, tokenizer_folder=host.tokenizer_folder(), **options)
            else:
                pipe = AlignPropPipeline.from_pretrained(source, **options)
            pipe.set_progress_bar_config(disable=True)
            return io.NodeOutput(pipe)


def _models() -> list[str]:
    found = [BUNDLED, *(CHECKPOINTS + name for name in host.names_in("checkpoints"))]
    return found + [DIFFUSERS + name for name in host.diffusers_folders()]


def _path_of(model: str) -> Path | str:
    if model.startswith(CHECKPOINTS):
        return host.file_in("checkpoints", model.removeprefix(CHECKPOINTS))
    if model.startswith(DIFFUSERS):
        folders = host.diffusers_folders()
        name = model.removeprefix(DIFFUSERS)
        if name not in folders:
            raise FileNotFoundError(f"models/diffusers has no folder {name!r} with a model_index.json (any more)")
        return folders[name]
    if model != BUNDLED:
        raise ValueError(f"{model!r} is not in the list of models; press R to refresh the list, then choose again")
    return "emoji"


def _dtype(name: str) -> Any:
    """`auto`: float16 on an accelerator, whose memory is short, and float32 on a CPU, which is slow at less."""
    import torch

    if name == "auto":
        return torch.float32 if host.memory.get_torch_device().type == "cpu" else torch.float16
    return getattr(torch, name)


MODEL = (
    "the bundled model, a file in models/checkpoints (SD 1.x, 2.x, SDXL and others that diffusers knows), or a folder "
    "in models/diffusers"
)
ID_OR_FOLDER = (
    "used instead of the list where it is not empty: a folder in diffusers' format, a .safetensors checkpoint, or a "
    "Hugging Face Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, with hf:// before it where it might be "
    "taken for a folder"
)
DTYPE = "number format of the weights; the LoRA is always trained in float32. auto: float16 on a GPU, float32 on a CPU"
