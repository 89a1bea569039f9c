"""What a user writes, for the type checker: `pyright` reads this file, and nothing runs it."""

from pathlib import Path

from PIL import Image
from typing_extensions import assert_type

from alignprop_pipe import AlignPropPipeline, AlignResult


def use(pipe: AlignPropPipeline, picture: Path) -> AlignResult:
    """The stock class's methods next to ours."""
    pipe.to("cuda").enable_model_cpu_offload()
    pipe.load_lora_weights("me/style", adapter_name="style")
    pipe.set_adapters(["style"], [0.7])
    pipe.vae.enable_tiling()
    assert pipe.components
    assert pipe.unet or pipe.transformer
    assert_type(pipe("a fox", num_inference_steps=4).images[0], Image.Image)
    assert_type(pipe("a fox runs").frames, list[list[Image.Image]])
    pipe("a fox").images[0].save(picture)
    result = pipe.align("clip", ["a fox"], config={"steps": 3})
    pipe.save_adapter(picture.parent)
    return result


def loaded(folder: Path) -> tuple[AlignPropPipeline, ...]:
    """All three ways lead to the same class."""
    pipe = assert_type(
        AlignPropPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5"), AlignPropPipeline
    )
    again = assert_type(AlignPropPipeline.from_pipe(pipe), AlignPropPipeline)
    return pipe, again, assert_type(AlignPropPipeline.from_single_file(folder / "a.safetensors"), AlignPropPipeline)
