"""LoRAs that are fused, switched, deleted and trained in every order: what is drawn is the sum that it ought to be.

`Sum` works out by itself what PEFT and diffusers document, with nothing but additions of matrices: every layer of a
plain network gets its weight plus the changes of the adapters that work in it.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from aligning import align, aligned
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from torch import Tensor

from alignprop_pipe import Adapter, AlignPropPipeline
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.errors import AdapterError, PipelineError

OURS, STYLE = lora.ADAPTER_NAME, "style"
Changes = dict[tuple[str, str], Tensor]
"""The change of a weight at full strength, by component and layer."""


def put_on(pipe: Any, name: str = STYLE, seed: int = 5, components: tuple[str, ...] = ("unet",)) -> Changes:
    """A LoRA as a user loads it; returns what it changes."""
    generator = torch.Generator().manual_seed(seed)
    changes: Changes = {}
    for component in components:
        part = getattr(pipe, component)
        targets = ["to_q", "to_k"] if component == "unet" else ["q_proj"]
        required = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        part.add_adapter(config, adapter_name=name)
        part.eval()
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        for parameter, was in required:
            parameter.requires_grad_(was)
        for path, layer in part.named_modules():
            if name in getattr(layer, "lora_A", ()):
                for matrix in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                    matrix.data = 0.2 * torch.randn(matrix.shape, generator=generator)
                changes[component, path] = 2 * layer.lora_B[name].weight @ layer.lora_A[name].weight
    return {key: change.clone() for key, change in changes.items()}


def changes_of(adapter: Adapter) -> Changes:
    return {
        (component, path): (factors.alpha / factors.rank) * factors.up @ factors.down
        for component, layers in adapter.layers.items()
        for path, factors in layers.items()
    }


@dataclass
class Layer:
    """What PEFT keeps for one layer: `weight` is the base's, with what was fused into it."""

    weight: Tensor
    held: dict[str, Tensor] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)

    def change(self, name: str) -> Tensor:
        return self.scale[name] * self.held[name] if name in self.held else torch.tensor(0.0)

    def fuse(self, by: float) -> None:
        self.rescale({name: self.scale[name] * by for name in self.active if name in self.held})
        for name in self.active:
            if name in self.held and name not in self.fused:
                self.weight = self.weight + self.change(name)
                self.fused.append(name)

    def unfuse(self) -> None:
        self.weight = self.weight - sum(map(self.change, self.fused), torch.tensor(0.0))
        self.fused = []

    def rescale(self, scale: dict[str, float]) -> None:
        self.scale |= {name: value for name, value in scale.items() if name in self.held}

    def delete(self, name: str) -> None:
        self.held.pop(name, None)
        if name in self.active:
            self.active.remove(name)
            self.active = self.active or sorted(self.held)[:1]


@dataclass
class Sum:
    """The networks of a pipeline as the sums of their base and their adapters; `off` names those switched off."""

    layers: dict[tuple[str, str], Layer]
    off: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, pipe: Any) -> "Sum":
        return cls(
            {
                (component, path): Layer(layer.weight.detach().clone())
                for component, part in pipeline_parts.components(pipe).items()
                for path, layer in part.named_modules()
                if isinstance(layer, torch.nn.Linear)
            }
        )

    def of_unet(self) -> list[Layer]:
        return [layer for (component, _), layer in self.layers.items() if component == "unet"]

    def add(self, name: str, changes: Changes, active: list[str], switched: tuple[str, ...]) -> None:
        """In place of one of this name; `active` goes for the components `switched`, which are on now."""
        for key, layer in self.layers.items():
            layer.held.pop(name, None)
            if key in changes:
                layer.held[name], layer.scale[name] = changes[key], 1.0
            layer.active = list(active) if key[0] in switched else [one for one in layer.active if one != name]
        self.off -= {component for component, _ in changes}

    def names(self) -> set[str]:
        return {name for layer in self.layers.values() for name in layer.held}

    def unload(self) -> None:
        self.off = set()
        for layer in self.layers.values():
            layer.held, layer.active, layer.fused = {}, [], []

    def draw(self, plain: Any) -> Tensor:
        """Through a plain pipeline with these weights. PEFT unfuses at the first call after `disable_lora`."""
        for (component, path), layer in self.layers.items():
            if component in self.off:
                layer.unfuse()
            works = not layer.fused and component not in self.off
            weight = layer.weight + sum(map(layer.change, layer.active if works else ()), torch.tensor(0.0))
            getattr(plain, component).get_submodule(path).weight.data = weight
        return seen(plain)


@torch.no_grad()
def seen(pipe: Any) -> Tensor:
    """What the denoiser says of one noise and one prompt; quicker than a picture."""
    ids = pipe.tokenizer("a red dog", padding="max_length", max_length=8, return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe.unet(noise, 500, pipe.text_encoder(ids)[0])[0]


def with_style(components: tuple[str, ...]) -> tuple[AlignPropPipeline, Sum]:
    pipe = aligned()
    total = Sum.of(pipe)
    total.add(STYLE, put_on(pipe, components=components), [STYLE], components)
    return pipe, total


DONOR = align(aligned(), steps=1, lr=0.1, seed=3).adapter
PLAIN = miniatures.sd15()
Step = Callable[[Any, Sum, Path], None]


def run(pipe: Any, total: Sum, _folder: Path) -> None:
    if any(layer.fused for layer in total.of_unet()):
        with pytest.raises(PipelineError, match=r"is fused into the weights of unet.*unfuse_lora.*unload_lora_weights"):
            align(pipe, steps=1, lr=0.1)
        return
    working = [name for layer in total.of_unet() if layer.held for name in layer.active if "unet" not in total.off]
    others = [name for name in dict.fromkeys(working) if name != OURS]
    total.add(OURS, changes_of(align(pipe, steps=1, lr=0.1).adapter), [*others, OURS], ("unet",))


def load(pipe: Any, total: Sum, _folder: Path) -> None:
    if any(layer.fused for layer in total.of_unet()):
        with pytest.raises(AdapterError, match=r"is fused into the weights of unet.*unfuse_lora.*unload_lora_weights"):
            pipe.load_adapter(DONOR)
        return
    pipe.load_adapter(DONOR)
    total.add(OURS, changes_of(DONOR), [OURS], ("unet", "text_encoder"))


def save(pipe: Any, total: Sum, folder: Path) -> None:
    """The folder holds the weights as they are, and ours next to them unless it is in them."""
    pipe.save_pretrained(folder)
    opened: Any = DiffusionPipeline.from_pretrained(folder)
    bare = copy.deepcopy(total)
    bare.unload()
    torch.testing.assert_close(seen(opened), bare.draw(PLAIN), rtol=0, atol=2e-5)
    file = folder / LORA_WEIGHT_NAME_SAFE
    ours = {key: layer.held[OURS] for key, layer in total.layers.items() if OURS in layer.held}
    assert file.exists() == (bool(ours) and not any(OURS in total.layers[key].fused for key in ours))
    if file.exists():
        opened.load_lora_weights(folder)
        bare.add(OURS, ours, [OURS], ("unet",))
        torch.testing.assert_close(seen(opened), bare.draw(PLAIN), rtol=0, atol=2e-5)
        file.unlink()


def switch(pipe: Any, total: Sum, scale: dict[str, float]) -> None:
    if scale.keys() <= total.names():
        pipe.set_adapters(list(scale), list(scale.values()))
        for layer in total.layers.values():
            layer.active = list(scale)
            layer.rescale(scale)


def style_alone(pipe: Any, total: Sum, _folder: Path) -> None:
    switch(pipe, total, {STYLE: 0.5})


def both(pipe: Any, total: Sum, _folder: Path) -> None:
    switch(pipe, total, {OURS: 0.7, STYLE: 0.4})


def fuse(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.fuse_lora(safe_fusing=True)
    for layer in total.layers.values():
        layer.fuse(1.0)


def fuse_half(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)
    for layer in total.of_unet():
        layer.fuse(0.5)


def unfuse(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.unfuse_lora()
    for layer in total.layers.values():
        layer.unfuse()


def unload(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.unload_lora_weights()
    total.unload()


def delete(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.delete_adapters(OURS)
    for layer in total.layers.values():
        layer.delete(OURS)


def off(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.disable_lora()
    total.off = {key[0] for key, layer in total.layers.items() if layer.held or layer.fused}


def on(pipe: Any, total: Sum, _folder: Path) -> None:
    pipe.enable_lora()
    total.off = set()


STEPS: tuple[Step, ...] = (run, load, save, fuse, fuse_half, unfuse, unload, style_alone, both, delete, off, on)
LENGTH = 2
"""Of the orders that are all gone through; 3 takes minutes and held too."""
LONG = [random.Random(number).choices(STEPS, k=6) for number in range(12)]


def follow(pipe: Any, total: Sum, steps: Sequence[Step], folder: Path) -> None:
    """Takes the last of the steps; the others have been taken."""
    steps[-1](pipe, total, folder)
    said = " ".join(step.__name__ for step in steps)
    torch.testing.assert_close(seen(pipe), total.draw(PLAIN), rtol=0, atol=2e-5, msg=lambda text: f"{said}: {text}")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # PEFT's, of what it has to do
def test_in_every_order_the_denoiser_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    def every(pipe: Any, total: Sum, steps: list[Step]) -> None:
        for step in STEPS:
            pair = copy.deepcopy((pipe, total))
            follow(*pair, [*steps, step], tmp_path)
            if len(steps) + 1 < LENGTH:
                every(*pair, [*steps, step])

    every(*with_style(("unet", "text_encoder")), [])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("number", range(len(LONG)))
def test_and_in_long_orders(number: int, tmp_path: Path) -> None:
    pipe, total = with_style(("unet", "text_encoder")[: 1 + number % 2])
    for end in range(1, len(LONG[number]) + 1):
        follow(pipe, total, LONG[number][:end], tmp_path)
