"""Text encoders that are asked once for each prompt: the same pictures, fewer calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aligning
import by_hand
import miniatures
import pytest
import torch

from alignprop_pipe.diffusion import text_encoders
from alignprop_pipe.diffusion.text_encoders import EncodedPrompts

PROMPTS = ["a red dog", "two cats", "three birds on the snow"]


@contextmanager
def counted(pipe: Any) -> Iterator[dict[str, int]]:
    """How many prompts each text encoder reads inside."""
    calls = dict.fromkeys(text_encoders.text_encoders(pipe), 0)

    # On a layer inside: a hook on the encoder itself is called whether it runs or answers from memory.
    handles = []
    for name, encoder in text_encoders.text_encoders(pipe).items():
        norm = next(module for path, module in encoder.named_modules() if path.endswith("final_layer_norm"))

        def hook(_module: Any, args: tuple, _output: Any, name: str = name) -> None:
            calls[name] += len(args[0].unique(dim=0))

        handles.append(norm.register_forward_hook(hook))
    with by_hand.hooked(*handles):
        yield calls


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart", "wan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pictures_are_those_of_the_stock_call(family, dtype):
    about = miniatures.FAMILIES[family]
    pipe = about.make().to(dtype)
    assert text_encoders.text_encoders(pipe)
    memory = EncodedPrompts()
    for prompts in (PROMPTS[:2], PROMPTS[1:], PROMPTS[:2], [PROMPTS[0]] * 2):
        given = {"prompt": prompts, "num_inference_steps": 1, "guidance_scale": 2.0, **about.call(2)}
        wanted = by_hand.stock_pictures(pipe, given)
        with memory.used_by(pipe):
            assert torch.equal(by_hand.stock_pictures(pipe, given), wanted)


def test_each_prompt_is_read_once():
    pipe = miniatures.sdxl()
    memory = EncodedPrompts()
    given = {"num_inference_steps": 1, "guidance_scale": 2.0, "height": 16, "width": 16}
    with counted(pipe) as calls, memory.used_by(pipe):
        for prompts in (PROMPTS[:2], PROMPTS[1:], PROMPTS[::2]):
            by_hand.stock_pictures(pipe, {"prompt": prompts, "negative_prompt": ["grey"] * 2, **given})
    assert calls == {"text_encoder": 4, "text_encoder_2": 4}  # three prompts, and the negative one
    assert "forward" not in vars(pipe.text_encoder)


@pytest.mark.parametrize("reward", ["brightness", "zscore(brightness)"])
def test_a_run_reads_each_prompt_once(reward):
    pipe = aligning.aligned()
    with counted(pipe) as calls:
        aligning.align(
            pipe,
            reward,
            steps=4,
            gradient_accumulation_steps=2,
            batch_size=2,
            eval_prompts=2,
            eval_every=1,
            eval_batch_size=2,
        )
    assert calls == {"text_encoder": len(aligning.PROMPTS)}


def test_what_was_not_asked_for_the_longest_is_forgotten(monkeypatch):
    pipe = miniatures.sd15()
    memory = EncodedPrompts()
    given = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}

    def read(prompt: str) -> None:
        by_hand.stock_pictures(pipe, {"prompt": [prompt], **given})

    with counted(pipe) as calls, memory.used_by(pipe):
        read(PROMPTS[0])
        monkeypatch.setattr(text_encoders, "MEMORY", 2 * memory._size)
        for prompt in (PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]):
            read(prompt)
        assert calls["text_encoder"] == 3
        read(PROMPTS[1])
        assert calls["text_encoder"] == 4
    assert memory._size <= text_encoders.MEMORY


def test_an_encoder_that_is_given_something_else_is_left_alone():
    pipe = miniatures.sd15()
    encoder, memory = pipe.text_encoder, EncodedPrompts()
    ids = torch.arange(1, 9)[None].expand(2, -1)
    with memory.used_by(pipe), torch.no_grad():
        wanted = encoder(input_ids=ids)[0]
        assert torch.equal(encoder(ids)[0], wanted)
        assert torch.equal(encoder(input_ids=ids, output_attentions=object()).last_hidden_state, wanted)
        assert encoder(input_ids=ids[:, None].flatten(0, 1)).keys() == pipe.text_encoder(ids).keys()
