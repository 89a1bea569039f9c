"""Align the bundled model from Python and look at the difference: python examples/align_bundled.py [STEPS]."""

import sys

from alignprop_pipe import AlignPropPipeline

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
pipe = AlignPropPipeline.from_pretrained("emoji")
result = pipe.align("smooth(clip)", "emoji", steps=steps, on_step=lambda record: print(record.step, record.reward))
print(result)

pictures = pipe(["two cats on a blue background"] * 4, num_inference_steps=20, guidance_scale=1.0).images
pictures[0].resize((256, 256)).save("cats.png")
pipe.save_adapter("cats.safetensors")
