"""Adapters for the miniatures, made without training: every layer with its own rank, in any components."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from miniatures import FAMILIES
from torch import Tensor

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import base_of
from alignprop_pipe.adapters.model_layers import clip_path
from alignprop_pipe.diffusion.lora import attention_linears

DENOISERS = ("unet", "transformer")
TEXT = ("text_encoder", "text_encoder_2")


@functools.cache
def miniature(family: str) -> Any:
    """Never written to."""
    return FAMILIES[family].make()


def places(family: str, text: bool = False) -> dict[str, list[tuple[str, int, int]]]:
    """Component -> path, outputs and inputs of what an adapter usually changes, by the names of an Adapter."""
    pipe, found = miniature(family), {}
    for name in (*DENOISERS, *(TEXT if text else ())):
        part = pipe.components.get(name)
        if part is None:
            continue
        paths = attention_linears(part) if name in DENOISERS else [path for path, _ in part.named_modules()]
        linear = {path: part.get_submodule(path) for path in paths}
        found[name] = [
            (path if name in DENOISERS else clip_path(path, nested=True), layer.out_features, layer.in_features)
            for path, layer in linear.items()
            if name in DENOISERS or path.endswith(("q_proj", "out_proj", "fc1"))
        ]
    return {name: here for name, here in found.items() if here}


def made(
    family: str,
    *,
    ranks: Sequence[int] = (3,),
    alpha: Callable[[int], float] = lambda _: 5.0,
    text: bool = False,
    size: float = 1.0,
) -> Adapter:
    """An adapter whose layers have the ranks in turn, and for each rank its alpha; `size` is that of its numbers."""
    layers: Layers = {}
    generator = torch.Generator().manual_seed(0)
    for name, here in places(family, text).items():
        layers[name] = {}
        for number, (path, outputs, inputs) in enumerate(here):
            rank = ranks[number % len(ranks)]
            down = size * torch.randn(rank, inputs, generator=generator)
            up = size * torch.randn(outputs, rank, generator=generator)
            layers[name][path] = Factors(down, up, float(alpha(rank)))
    return Adapter(layers, base_of(miniature(family)))


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """The full weight change of every layer."""
    return {
        f"{name}.{path}": f.up.flatten(1) @ f.down.flatten(1) * (f.alpha / f.rank)
        for name, layers in adapter.layers.items()
        for path, f in layers.items()
    }


def assert_same_changes(got: Adapter, wanted: Adapter, atol: float = 1e-5) -> None:
    found, expected = changes(got), changes(wanted)
    assert found.keys() == expected.keys()
    assert expected
    for path, change in expected.items():
        torch.testing.assert_close(found[path], change, atol=atol, rtol=1e-5)


def assert_same_tensors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
