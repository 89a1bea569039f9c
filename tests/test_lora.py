"""The adapter inside the denoisers: where it sits, how it starts, and that it leaves nothing behind."""

from typing import Any

import miniatures
import pytest
import torch
from aligning import adapter, is_stock, pictures, same, state
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from alignprop_pipe.config.settings import LoraOptions
from alignprop_pipe.diffusion import lora, patching, pipeline_parts
from alignprop_pipe.errors import PipelineError

SMALL = LoraOptions(rank=2)


def attached(pipe: Any, options: LoraOptions = SMALL, seed: int = 0) -> Any:
    lora.attach(pipeline_parts.denoisers(pipe), options, seed)
    return pipe


def in_use(pipe: Any) -> Any:
    """With an up-projection that is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for weight in lora.trainable(pipeline_parts.denoisers(attached(pipe))):
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return pipe


@pytest.mark.parametrize("name", miniatures.FAMILIES)
def test_every_linear_layer_of_every_attention_is_found(name: str) -> None:
    pipe = miniatures.FAMILIES[name].make()
    (denoiser,) = pipeline_parts.denoisers(pipe).values()
    found = lora.attention_linears(denoiser)
    assert len(set(found)) == len(found) >= 8
    assert all(isinstance(denoiser.get_submodule(path), nn.Linear) for path in found)
    # By the names that diffusers gives them, as a second opinion.
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    named = [path for path, layer in denoiser.named_modules() if path.endswith(ends) and isinstance(layer, nn.Linear)]
    assert sorted(found) == sorted(named)


def test_a_new_adapter_changes_no_picture_and_has_its_size() -> None:
    pipe = miniatures.sd15()
    wanted, before = pictures(pipe), state(pipe)
    linears = [pipe.unet.get_submodule(path) for path in lora.attention_linears(pipe.unet)]
    attached(pipe, LoraOptions(rank=3))
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    assert sum(weight.numel() for weight in weights) == sum(3 * (a.in_features + a.out_features) for a in linears)
    assert torch.equal(pictures(pipe), wanted)
    assert state(pipe) == before
    assert all(weight.dtype == torch.float32 for weight in weights)


def test_the_start_comes_from_the_seed_alone() -> None:
    drawn = torch.get_rng_state()
    first = adapter(attached(pipe := miniatures.sd15()))
    torch.manual_seed(99)
    moved = torch.get_rng_state()
    assert same(adapter(attached(pipe)), first)
    assert torch.equal(torch.get_rng_state(), moved)
    assert not same(adapter(attached(pipe, seed=1)), first)
    assert not same(adapter(attached(pipe, LoraOptions(rank=2, init_lora_weights="gaussian"))), first)
    torch.set_rng_state(drawn)


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (1, 0.5), (6.0, 3.0)])
def test_alpha_scales_the_update(alpha: float | None, scaling: float) -> None:
    pipe = attached(miniatures.sd15(), LoraOptions(rank=2, alpha=alpha))
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)]
    assert {layer.scaling[lora.ADAPTER_NAME] for layer in layers} == {scaling}
    layer = layers[0]
    down, up = layer.lora_A[lora.ADAPTER_NAME].weight, layer.lora_B[lora.ADAPTER_NAME].weight
    up.data.normal_(generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(1, down.shape[1])
    update = layer(inputs) - layer.get_base_layer()(inputs)
    torch.testing.assert_close(update, scaling * inputs @ down.detach().T @ up.detach().T, rtol=1e-4, atol=1e-5)


def test_target_modules_by_name() -> None:
    pipe = attached(miniatures.sd15(), LoraOptions(rank=2, target_modules=("to_q", "conv_in")))
    adapted = [path for path, layer in pipe.unet.named_modules() if isinstance(layer, LoraLayer)]
    assert "conv_in" in adapted
    assert len(adapted) > 1
    assert all(path == "conv_in" or path.endswith(".to_q") for path in adapted)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("to_p",), r"no layer 'to_p'; its linear layers end in .*to_q"),
        (("to_q", "to_p"), "no layer 'to_p'"),
        (("to_q", "norm1"), "Norm.* is not supported"),
    ],
)
def test_target_modules_that_do_not_fit_leave_a_stock_denoiser(targets: tuple[str, ...], words: str) -> None:
    pipe = miniatures.sd15()
    before = state(pipe)
    with pytest.raises(PipelineError, match=rf"target_modules=.*do not fit unet.*{words}"):
        attached(pipe, LoraOptions(target_modules=targets))
    assert is_stock(pipe)
    assert state(pipe) == before


def test_detach_gives_the_stock_denoiser_back() -> None:
    pipe = miniatures.sd15()
    wanted, before = pictures(pipe), state(pipe)
    in_use(pipe)
    assert not torch.equal(pictures(pipe), wanted)
    lora.detach(pipeline_parts.denoisers(pipe))
    assert is_stock(pipe)
    assert state(pipe) == before
    assert torch.equal(pictures(pipe), wanted)
    lora.detach(pipeline_parts.denoisers(pipe))  # once more is no mistake


def test_snapshot_and_restore() -> None:
    pipe = in_use(miniatures.sd15())
    denoisers = pipeline_parts.denoisers(pipe)
    kept = lora.snapshot(denoisers)
    for weight in lora.trainable(denoisers):
        weight.data.add_(1)
    assert not same(adapter(pipe), kept)
    lora.restore(denoisers, kept)
    assert same(adapter(pipe), kept)


def with_style(pipe: Any) -> Any:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), adapter_name="style")
    pipe.unet.requires_grad_(False).eval()
    return pipe


def test_adapter_off_switches_ours_off_and_no_other() -> None:
    pipe = with_style(miniatures.sd15())
    base = pictures(pipe)
    in_use(pipe)
    trained = pictures(pipe)
    with pytest.raises(KeyError), lora.adapter_off(pipe.unet):
        assert torch.equal(pictures(pipe), base)
        raise KeyError
    assert not torch.equal(trained, base)
    assert torch.equal(pictures(pipe), trained)


def test_taken_out_gives_the_stock_network_while_it_lasts() -> None:
    pipe = miniatures.sd15()
    stock_names, base = list(pipe.unet.state_dict()), pictures(pipe)
    in_use(with_style(pipe))
    names, trained, before = list(pipe.unet.state_dict()), pictures(pipe), state(pipe)
    with pytest.raises(KeyError), lora.taken_out([pipe.unet, pipe.text_encoder]):
        assert list(pipe.unet.state_dict()) == stock_names
        assert is_stock(pipe)
        assert torch.equal(pictures(pipe), base)
        attached(pipe)  # another adapter of the same name has room
        lora.detach(pipeline_parts.denoisers(pipe))
        raise KeyError
    assert list(pipe.unet.state_dict()) == names
    assert pipe.unet.active_adapters() == ["style", lora.ADAPTER_NAME]
    assert torch.equal(pictures(pipe), trained)
    assert state(pipe) == before


def test_the_adapter_alone_gets_gradient_where_it_is_asked_for() -> None:
    pipe = in_use(miniatures.sd15())
    weights = lora.trainable(pipeline_parts.denoisers(pipe))
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with patching.frozen_for_training(pipe, weights):
        pipe.unet(sample, 10, torch.randn(1, 3, miniatures.WIDTH))[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    ours = {id(weight) for weight in weights}
    assert all(weight.grad is None for weight in pipe.unet.parameters() if id(weight) not in ours)
