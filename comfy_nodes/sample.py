"""The node that draws with a pipeline and an adapter."""

from typing import Any

from comfy_api.latest import io

from . import host
from .widgets import config_from


class Sample(io.ComfyNode):
    """Pictures of the pipeline, with an adapter or without."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AlignPropSample",
            display_name="Sample (AlignProp)",
            description="Draws prompts with the pipeline. With the same seed, an adapter or none gets the same noise.",
            search_aliases=["alignprop", "generate", "KSampler", "text to image"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                host.Pipe.Input("pipe", tooltip="the model"),
                host.Prompts.Input("prompts", tooltip="what to draw"),
                host.AdapterSocket.Input("adapter", optional=True, tooltip="from Align, Load Adapter or Mix Adapters"),
                io.Float.Input("scale", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True, tooltip=SCALE),
                host.seed_input("decides the noise, together with the prompt"),
                _whole("first", 8, 1, 1000, "how many of the prompts, from the first on"),
                _whole("num_inference_steps", 50, 1, 1000, "denoising steps"),
                io.Float.Input("guidance_scale", default=7.5, min=0, max=100, step=0.1, optional=True, tooltip=GUIDE),
                _whole("height", 0, 0, 8192, f"height {SIDE}", step=8),
                _whole("width", 0, 0, 8192, f"width {SIDE}", step=8),
                _whole("batch_size", 4, 1, 256, "pictures drawn at once"),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="one picture for each prompt")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, pipe: Any, prompts: Any, adapter: Any = None, scale: float = 1.0, seed: int = 0, first: int = 8,
        batch_size: int = 4, **sampling: Any,
    ) -> io.NodeOutput:  # fmt: skip
        import torch

        from alignprop_pipe.diffusion import lora, pipeline_parts
        from alignprop_pipe.diffusion.sample import sample_pictures

        chosen = [prompts.prompts[place] for place in range(min(first, len(prompts)))]
        with host.working():
            options = config_from(sampling).sampling
            calls = options.num_inference_steps * -(-len(chosen) // batch_size)
            progress = host.Progress(str(cls.hidden.unique_id), calls)
            try:
                with host.on_device(pipe):
                    if adapter is not None:
                        pipe.load_adapter(adapter, scale=scale)
                    with host.counted_calls(pipe, progress):
                        drawn = list(sample_pictures(pipe, chosen, options, seed=seed, batch_size=batch_size))
            except KeyboardInterrupt:
                progress.pass_on_stop()
                raise
            finally:
                lora.detach(pipeline_parts.denoisers(pipe))
            return io.NodeOutput(torch.cat([picture_tensor(one.image) for one in drawn]))


def _whole(name: str, default: int, low: int, high: int, tooltip: str, step: int = 1) -> Any:
    return io.Int.Input(name, default=default, min=low, max=high, step=step, optional=True, tooltip=tooltip)


def picture_tensor(picture: Any) -> Any:
    """A PIL picture as IMAGE."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


SCALE = "strength of the adapter: 1 as trained, 0 the base model"
GUIDE = "classifier-free guidance; 1 is none, which is right for the bundled model"
SIDE = "in pixels; 0: the model's own"
