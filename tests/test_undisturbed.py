"""What a run leaves alone: the random numbers of the process, other threads, the reward's network."""

import random
import threading
from typing import Any

import aligning
import by_hand
import miniatures
import numpy as np
import pytest
import torch
from aligning import align, aligned, same
from torch import Tensor, nn

from alignprop_pipe import Adapter, AlignPropPipeline
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.diffusion.sample import sample_pictures
from alignprop_pipe.rewards import PythonReward, as_reward
from alignprop_pipe.training import evidence


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


class Scorer(nn.Module):
    """Draws random numbers in training mode, counts its calls in a buffer, has weights that want a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images).square().mean((1, 2, 3))


@pytest.fixture
def scorer() -> Scorer:
    torch.manual_seed(1)
    return Scorer().train()


# --- random numbers ---


@pytest.mark.parametrize("reward", ["brightness", 'clip(model="emoji")', 'zscore(clip(model="emoji")) + jpeg'])
def test_a_run_touches_no_random_state_of_the_process(reward, tmp_path, unchecked):  # the type checks draw some
    pipe = aligned()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that is watched is this one
    before = random_states()
    how = {"eval_prompts": 3, "eval_every": 1, "judges": ["tv"], "eta": 1.0, "truncation": "random"}
    result = align(pipe, reward, out=tmp_path / "run", **how)
    pipe.load_adapter(Adapter.load(tmp_path / "run" / "adapter.safetensors"))
    list(sample_pictures(pipe, ["a dog"], result.config.sampling))
    assert random_states() == before


def random_crops(images: Tensor) -> Tensor:
    corner = int(torch.randint(4, ()))
    return (images + 0.01 * torch.randn_like(images))[..., corner : corner + 8, :].mean((1, 2, 3))


def test_a_reward_that_draws_is_that_of_the_seed(unchecked):
    runs = []
    for seed in (1, 2):
        pipe = aligned()
        torch.manual_seed(seed)
        before = random_states()
        runs.append(align(pipe, random_crops, eval_prompts=3, eval_every=1))
        assert random_states() == before
    assert runs[0].adapter == runs[1].adapter
    assert [record.loss for record in runs[0].history[1:]] == [record.loss for record in runs[1].history[1:]]
    assert runs[0].after.per_prompt == runs[1].after.per_prompt


def noisy() -> AlignPropPipeline:
    """Its decoder draws noise that no generator can be given for."""
    return aligned(miniatures.ltx())


def short(pipe: AlignPropPipeline, **changed: Any) -> list[Tensor]:
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
    return list(align(pipe, "brightness", **{**size, "steps": 1, **changed}).adapter.values())


def test_a_run_with_a_noisy_decoder_is_that_of_its_seed():
    pipe = noisy()
    torch.manual_seed(1)
    first = short(pipe)
    torch.manual_seed(2)
    torch.rand(5)
    assert same(short(pipe), first)
    assert not same(short(pipe, seed=1), first)


def test_held_out_pictures_of_a_noisy_decoder_stay_the_same():
    pipe = noisy()
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = aligning.settings(height=32, width=32, eval_batch_size=2)
        extra = {"num_frames": 9, "max_sequence_length": 16}
        prompts = aligning.PROMPTS[:2]
        drawn = evidence.render(pipe, aligned_prompts(prompts), config, **extra)
        seen.append(torch.cat([part.videos for part in drawn]))
    assert torch.equal(*seen)


def aligned_prompts(prompts: list[str]) -> Any:
    from alignprop_pipe import PromptSet

    return PromptSet(tuple(prompts))


def test_the_adapter_starts_as_peft_would_start_it():
    """The numbers that PEFT itself draws after torch.manual_seed."""
    from peft import LoraConfig, inject_adapter_in_model

    pipe, plain = miniatures.sd15(), miniatures.sd15()
    lora.attach(pipeline_parts.denoisers(pipe), aligning.settings(rank=3).lora, seed=7)
    torch.manual_seed(7)
    targets = lora.attention_linears(plain.unet)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=targets), plain.unet, lora.ADAPTER_NAME)
    assert same(lora.snapshot(pipeline_parts.denoisers(pipe)), lora.snapshot({"unet": plain.unet}))


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_two_runs_in_two_threads_are_those_of_one_after_another(init):
    pipes = [aligned(), aligned(miniatures.sdxl())]
    how = {"eta": 1.0, "steps": 3, "init_lora_weights": init}
    alone = [list(align(pipe, seed=place, **how).adapter.values()) for place, pipe in enumerate(pipes)]
    together: dict[int, list[Tensor]] = {}

    def run(place: int) -> None:
        together[place] = list(align(pipes[place], seed=place, **how).adapter.values())

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        torch.rand(100)
    for thread in threads:
        thread.join()
    assert all(same(together[place], alone[place]) for place in range(2))


# --- the reward's network ---


def check_left_alone(scorer: Scorer, reward: Any) -> None:
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    align(aligned(), reward, eval_prompts=2, eval_every=1)
    assert all(module.training for module in scorer.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in scorer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())


def test_a_network_as_reward_is_as_it_was(scorer):
    check_left_alone(scorer, scorer)


def test_a_network_inside_a_sum_is_as_it_was(scorer):
    check_left_alone(scorer, PythonReward(scorer) + 0.5 * as_reward("zscore(tv)"))


def test_a_network_that_a_function_uses_is_as_it_was(scorer):
    check_left_alone(scorer, lambda images: scorer(images))
    check_left_alone(scorer, scorer.forward)


class Holder:
    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)


def test_a_network_that_an_object_holds_is_as_it_was(scorer):
    check_left_alone(scorer, Holder(scorer))


def test_a_network_scores_in_eval_mode(scorer):
    """Batch norm in training mode would make a score depend on the other pictures of the batch."""
    seen: list[bool] = []

    def reward(images: Tensor) -> Tensor:
        seen.append(scorer.training)
        return scorer(images)

    align(aligned(), reward, eval_prompts=2)
    assert seen
    assert not any(seen)


# --- mixed precision ---


def sdxl_whose_decoder_overflows_in_float16() -> AlignPropPipeline:
    """As SDXL's: large inside, small at its end."""
    pipe = miniatures.sdxl()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e4)
        pipe.vae.decoder.conv_in.bias.mul_(3e4)
    return aligned(pipe)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_is_for_the_denoiser_alone(name):
    pipe = aligned(miniatures.sdxl())
    seen: dict[str, set[Any]] = {"unet": set(), "text_encoder": set(), "decoder": set()}

    def look(part: str) -> Any:
        return lambda _module, _args, output: seen[part].add(output.dtype)

    layers = {
        "unet": pipe.unet.conv_out,
        "text_encoder": pipe.text_encoder.text_model.encoder.layers[0].mlp.fc1
        if hasattr(pipe.text_encoder, "text_model")
        else next(m for m in pipe.text_encoder.modules() if isinstance(m, nn.Linear)),
        "decoder": pipe.vae.decoder.conv_out,
    }
    handles = [layer.register_forward_hook(look(part)) for part, layer in layers.items()]
    with by_hand.hooked(*handles):
        align(pipe, mixed_precision=name, eval_prompts=2, eval_every=1, steps=1)
    assert seen == {"unet": {patching.PRECISIONS[name]}, "text_encoder": {torch.float32}, "decoder": {torch.float32}}


def test_evidence_is_drawn_in_the_precision_of_training():
    """With a learning rate that moves nothing, a training picture and a held-out one of the same noise are equal."""
    pipe = aligned()
    drawn = {}
    for name in ("no", "bf16"):
        config = aligning.settings(mixed_precision=name)
        (part,) = evidence.render(pipe, aligned_prompts(["a dog"]), config)
        drawn[name] = part.videos
    assert not torch.equal(drawn["no"], drawn["bf16"])
    assert torch.allclose(drawn["no"], drawn["bf16"], atol=2e-2)


def test_a_decoder_that_overflows_in_float16_stays_finite():
    result = align(
        sdxl_whose_decoder_overflows_in_float16(), mixed_precision="fp16", eval_prompts=2, guidance_scale=2.0
    )
    assert not any(record.skipped for record in result.history)
    assert result.after is not None
    assert result.after.images is not None
    assert result.after.images.isfinite().all()
    assert all(value.isfinite().all() for value in result.adapter.values())
