"""The nodes that save, load, mix, apply and push adapters."""

from typing import Any

from comfy_api.latest import io

from . import host

MIXED = 4
"""Adapters that one Mix node takes; its output goes into another for more."""


class SaveAdapter(io.ComfyNode):
    """The adapter as a LoRA file in models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropSaveAdapter",
            display_name="Save Adapter (AlignProp)",
            description="Writes the adapter to models/loras, where every LoRA loader lists it (press R to refresh "
            "the lists). What it was trained on is in the file's metadata.",
            search_aliases=["alignprop", "save LoRA", "export"],
            is_output_node=True,
            inputs=[
                host.AdapterSocket.Input("adapter", tooltip="from Align, Load Adapter or Mix Adapters"),
                io.String.Input("filename_prefix", default="AlignProp", tooltip=PREFIX),
                io.Combo.Input("dtype", options=list(DTYPES), default="float32", optional=True, tooltip=DTYPE),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="the file's name in the LoRA loaders' lists")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: Any = "") -> bool | str:
        ok = filename_prefix is None or (filename_prefix.strip() and ".." not in filename_prefix)
        return bool(ok) or f"filename_prefix is {filename_prefix!r}; a name such as cats/AlignProp is needed"

    @classmethod
    def execute(cls, adapter: Any, filename_prefix: str, dtype: str = "float32") -> io.NodeOutput:
        import torch

        with host.working():
            path, listed = host.new_lora_path(filename_prefix.strip())
            files = adapter.save(path, format="comfyui", dtype=getattr(torch, dtype))
            read_back = type(adapter).load(files[0])
        layers = sum(map(len, read_back.layers.values()))
        text = f"models/loras/{listed}\n{layers} layers; press R to see it in the LoRA loaders"
        return io.NodeOutput(listed, ui={"text": (text,)})


class LoadAdapter(io.ComfyNode):
    """An adapter from models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropLoadAdapter",
            display_name="Load Adapter (AlignProp)",
            description="Reads a LoRA from models/loras, for Sample, Mix Adapters and Push to Hub.",
            search_aliases=["alignprop", "load LoRA"],
            inputs=[io.Combo.Input("lora_name", options=host.names_in("loras"), tooltip="a file in models/loras")],
            outputs=[
                host.AdapterSocket.Output(display_name="adapter", tooltip="the LoRA"),
                io.String.Output(display_name="about", tooltip="what its metadata says"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "") -> str:
        from .widgets import fingerprint

        return fingerprint(str(host.file_in("loras", lora_name)))

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        from alignprop_pipe import Adapter

        with host.working():
            adapter = Adapter.load(host.file_in("loras", lora_name))
        return io.NodeOutput(adapter, about(adapter))


def about(adapter: Any) -> str:
    """An adapter in a few lines, one for each text of its header."""
    from alignprop_pipe.escaping import one_line

    shown = ("alignprop.base_model", "alignprop.reward", "alignprop.step", "alignprop.prompts", "alignprop.scores")
    said = (f"{key}: {adapter.metadata[key]}" for key in shown if key in adapter.metadata)
    return "\n".join(map(one_line, [repr(adapter), *said]))


class MixAdapters(io.ComfyNode):
    """A weighted mix of adapters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[Any] = []
        for number in range(1, MIXED + 1):
            inputs += [
                host.AdapterSocket.Input(f"adapter_{number}", optional=True, tooltip=f"adapter {number}"),
                io.Float.Input(
                    f"weight_{number}", default=0.5, min=-10.0, max=10.0, step=0.05, optional=True,
                    tooltip=f"how much of adapter {number}",
                ),
            ]  # fmt: skip
        rank = io.Int.Input("rank", default=0, min=0, max=4096, step=1, optional=True, tooltip=RANK)
        return host.schema(
            node_id="AlignPropMixAdapters",
            display_name="Mix Adapters (AlignProp)",
            description="Adds up the weight changes of adapters for one base model, exactly.",
            search_aliases=["alignprop", "merge LoRA", "combine LoRA"],
            inputs=[*inputs, rank],
            outputs=[host.AdapterSocket.Output(display_name="adapter", tooltip="the mixed LoRA")],
        )

    @classmethod
    def execute(cls, rank: int = 0, **terms: Any) -> io.NodeOutput:
        from alignprop_pipe import mix

        numbers = [number for number in range(1, MIXED + 1) if terms.get(f"adapter_{number}") is not None]
        if not numbers:
            raise ValueError("Mix Adapters has no adapter: connect one or more, and check that they are not muted")
        parts = [(terms[f"adapter_{number}"], float(terms.get(f"weight_{number}", 0.5))) for number in numbers]
        with host.working():
            return io.NodeOutput(mix(parts, rank=rank or None))


class ApplyAdapter(io.ComfyNode):
    """The adapter on ComfyUI's own model, for a KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
        return host.schema(
            node_id="AlignPropApply",
            display_name="Apply to Model (AlignProp)",
            description="Puts the adapter on a MODEL from Load Checkpoint, so that it goes straight to a KSampler.",
            search_aliases=["alignprop", "apply LoRA", "LoRA loader"],
            inputs=[
                io.Model.Input("model", tooltip="the base model, as for a LoRA loader"),
                host.AdapterSocket.Input("adapter", tooltip="from Align, Load Adapter or Mix Adapters"),
                io.Clip.Input("clip", optional=True, tooltip="for adapters that also change the text encoder"),
                io.Float.Input("strength_model", **strength, optional=True, tooltip="on the model; 1 as trained"),
                io.Float.Input("strength_clip", **strength, optional=True, tooltip="strength on the text encoder"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="the model with the adapter"),
                io.Clip.Output(display_name="clip", tooltip="the text encoder, with the adapter's part for it"),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, adapter: Any, clip: Any = None, strength_model: float = 1.0, strength_clip: float = 1.0
    ) -> io.NodeOutput:
        import comfy.sd

        tensors = adapter.comfyui_tensors()
        fitting, layers = fitting_layers(model, clip, tensors)
        if not fitting:
            made_for = adapter.base.base_model or adapter.base.base_class or "another model"
            raise ValueError(
                f"not one of the adapter's {layers} layers fits this model: it was made for {made_for}. "
                "Load the checkpoint that it was trained on"
            )
        if fitting < layers:
            host.logger.warning("alignprop: %d of the adapter's %d layers fit this model", fitting, layers)
        return io.NodeOutput(*comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip))


def fitting_layers(model: Any, clip: Any, tensors: dict[str, Any]) -> tuple[int, int]:
    """How many layers find their place in the model, and how many there are: ComfyUI says nothing where none does."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    weights = model.model.state_dict() | ({} if clip is None else clip.cond_stage_model.state_dict())
    names = [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")]
    layers = [(key[: -len(up)], tensors[key], key[: -len(up)] + down)
              for key in tensors for up, down in names if key.endswith(up)]  # fmt: skip
    fits = [layer in keys and _fits(weights, keys[layer], up, tensors[down]) for layer, up, down in layers]
    return sum(fits), len(layers)


def _fits(weights: dict[str, Any], place: Any, up: Any, down: Any) -> bool:
    """Whether the change has the shape of the weight; a place that is a part of a weight is not looked into."""
    weight = weights.get(place) if isinstance(place, str) else None
    return weight is None or (weight.shape[0] == up.shape[0] and weight.shape[1:] == down.shape[1:])


class PushToHub(io.ComfyNode):
    """The adapter on the Hugging Face Hub."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropPushToHub",
            display_name="Push to Hub (AlignProp)",
            description="Uploads the adapter with a model card. You must be logged in on this machine (hf auth login) "
            "or have HF_TOKEN set: a token never goes into a workflow.",
            search_aliases=["alignprop", "huggingface", "upload", "share"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                host.AdapterSocket.Input("adapter", tooltip="from Align, Load Adapter or Mix Adapters"),
                io.String.Input("repo_id", default="", tooltip="your-name/name-of-the-adapter"),
                io.Boolean.Input("private", default=True, optional=True, tooltip="only you can see it"),
            ],
            outputs=[io.String.Output(display_name="link", tooltip="the page of the adapter")],
        )

    @classmethod
    def validate_inputs(cls, repo_id: Any = "") -> bool | str:
        parts = (repo_id or "").strip().split("/")
        if repo_id is None or (len(parts) == 2 and all(parts)):
            return True
        return f"repo_id is {repo_id!r}; your name and the adapter's are needed, such as me/cute-animals"

    @classmethod
    def execute(cls, adapter: Any, repo_id: str, private: bool = True) -> io.NodeOutput:
        with host.working():
            link = str(adapter.push_to_hub(repo_id.strip(), private=private))
        return io.NodeOutput(link, ui={"text": (link,)})


DTYPES = ("float32", "float16", "bfloat16")
DTYPE = "precision of the file"
PREFIX = "name in models/loras, also with a subfolder (cats/AlignProp) and %year% %month% %day%; a number is added"
RANK = "0: exact. Otherwise the mix is pressed into this rank, which loses some of it"
