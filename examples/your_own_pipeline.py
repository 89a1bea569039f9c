"""Align a stock diffusers pipeline that is loaded already: python examples/your_own_pipeline.py MODEL [STEPS].

MODEL is any text-to-image id or folder of diffusers, for example stable-diffusion-v1-5/stable-diffusion-v1-5.
"""

import sys

from diffusers import DiffusionPipeline

from alignprop_pipe import AlignConfig, AlignPropPipeline, LastK

stock = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe = AlignPropPipeline.from_pipe(stock)  # the weights are shared, not copied
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 60
config = AlignConfig.preset("fast").replace(steps=steps, truncation=LastK(2), eval_prompts=4)
result = pipe.align("colour - 0.1*jpeg", "animals", config, out="runs/colourful-animals")
print(result)
