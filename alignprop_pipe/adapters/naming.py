"""The layers of a file by diffusers' names: every name is looked up in the model that the file is for.

Names may be dotted or flat, diffusers' or those of the model's own code, whose fused projections are taken apart.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.keys import UNETS, place_of
from alignprop_pipe.adapters.kohya import own_layers
from alignprop_pipe.adapters.model_layers import Names, clip_path, found_in, is_text

FUSED = re.compile(r"(^|[._])(to_qkv|to_kv|to_added_qkv|to_added_kv|qkv|qkv_proj|linear1|Wqkv)$")
"""How layers end that hold the query, key and value of attention in one matrix."""
MODELS = {
    "v1": "Stable Diffusion 1's UNet", "v2": "Stable Diffusion 2's UNet", "xl": "Stable Diffusion XL's UNet",
}  # fmt: skip
RESNETS = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTSIDE_BLOCKS = {
    "input_blocks_0_0": "conv_in", "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2", "out_2": "conv_out",
}  # fmt: skip


class UnknownLayerError(ValueError):
    """A file names layers that its model has not; `names` are all of them, as the file has them."""

    def __init__(self, said: str, names: Sequence[str]) -> None:
        super().__init__(said)
        self.names = tuple(names)


@dataclass(frozen=True, slots=True)
class Model:
    """What names are looked up in.

    Args:
        names: component -> its layers; empty where they are not known.
        texts: the components that are text encoders.
        sole: the component that is meant where a name says none.
        family: what the denoiser is: `v1`, `v2`, `xl` or its class.
        per_block: resnets in a block of a UNet.
        extra: names of components whose layers need not be known.
    """

    names: Callable[[str], Names]
    texts: tuple[str, ...]
    sole: str
    family: str
    per_block: int = 2
    extra: frozenset[str] = frozenset()

    def has(self, component: str) -> bool:
        """Whether a name may begin with this component."""
        return component in self.extra or bool(self.names(component))

    def place(self, name: str) -> tuple[str, str]:
        """Component and path of the layer that a file calls `name`; an empty path where the model has none."""
        component, path, flat = self.split(name)
        found = self._looked_up(component, path, flat)
        if found or not is_text(component):
            return component, found
        # Programs number text encoders by what they are (CLIP-L, CLIP-G, T5), and leave out those that a model has not.
        others = {other: self._looked_up(other, path, flat) for other in self.texts if other != component}
        fitting = [(other, path) for other, path in others.items() if path]
        return fitting[0] if len(fitting) == 1 else (component, "")

    def missing(self, unknown: Sequence[str]) -> UnknownLayerError:
        """That the model has none of these layers, and what the first may be, in words."""
        # Names of 2023 are a converter's matter, and right as a rule where another is wrong.
        names = [name for name in unknown if ".processor." not in name] or list(unknown)
        return UnknownLayerError(self._said_of_missing(names[0]), names)

    def _said_of_missing(self, name: str) -> str:
        component = self.split(name)[0]
        if not self.family and not is_text(component):
            return f"which model has a layer {name!r} is not known here"
        said = f"{name!r} is no layer of {component if is_text(component) else MODELS.get(self.family, self.family)}"
        if FUSED.search(name):
            return (
                f"{said}, but a fused projection: it holds several layers in one and is not taken apart for this model"
            )
        return said

    def split(self, name: str) -> tuple[str, str, bool]:
        """Component and path by the name alone, and whether the path is flat."""
        head, _, rest = name.partition(".")
        place = place_of(name)
        if rest and self.has(head):
            return head, rest.removeprefix("base_model.model."), False
        component = {"denoiser": self.sole, "denoiser_2": "transformer_2"}.get(place.component, place.component)
        return component, place.path.removeprefix("base_model.model."), place.scheme == "kohya"

    def _looked_up(self, component: str, path: str, flat: bool) -> str:
        names = self.names(component)
        if is_text(component):
            tried = [path, f"text_model_{path}"] if flat else [path, clip_path(path, nested=True)]
            return next((found for one in tried if (found := found_in(one, names, flat=flat))), "")
        original = original_unet(path.replace(".", "_"), self.per_block) if self.family in UNETS else ""
        return found_in(path, names, flat=flat) or (found_in(original, names, flat=True) if original else "")


def read(
    in_file: Mapping[str, Mapping[str, Tensor]], model: Model, alpha_of: Callable[[str, str, int], float]
) -> tuple[Layers, list[str]]:
    """The layers of a file by component and path, and the names that the model has not.

    Args:
        in_file: name in the file -> "down", "up" and maybe "alpha", checked.
        model: where the names are looked up.
        alpha_of: the alpha of a layer whose own is not there, by component, path and rank.

    Raises:
        ValueError: a matrix cannot be that of the layers that it stands for.
    """
    found: Layers = {}
    unknown = []
    for name, parts in in_file.items():
        component, path = model.place(name)
        said = path or model.split(name)[1]
        rank = parts["down"].shape[0]
        alpha = parts["alpha"] if "alpha" in parts else alpha_of(component, said, rank)
        factors = whole(parts["down"], parts["up"], alpha)
        layers = {path: factors} if path else {}
        if not path and not is_text(component):
            layers = own_layers(model.family, said.replace(".", "_"), factors)
        if not layers:
            unknown.append(name)
        if twice := layers.keys() & found.get(component, {}).keys():
            raise ValueError(f"{name!r} and another name of the file both mean {min(twice)}")
        found.setdefault(component, {}).update(layers)
    return {component: layers for component, layers in found.items() if layers}, unknown


def whole(down: Tensor, up: Tensor, alpha: Any) -> Factors:
    """Factors with a finite alpha. Raises ValueError."""
    number = float(alpha)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return Factors(down, up, number)


def original_unet(flat: str, per_block: int) -> str:
    """A layer of Stable Diffusion's UNet by diffusers' flat name, from that of its original code; empty for others."""
    if flat in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[flat]
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d)_)?(.+)", flat)
    if match is None:
        return ""
    part, number, inner, rest = match[1], int(match[2]), int(match[3] or 0), RESNETS.get(match[4], match[4])
    kind = "attentions" if inner == 1 else "resnets"
    if part == "middle_block":
        rest = RESNETS.get(rest, rest)
        return f"mid_block_attentions_0_{rest}" if number == 1 else f"mid_block_resnets_{number // 2}_{rest}"
    if part == "output_blocks":
        block, layer = divmod(number, per_block + 1)
        sampler = rest == "conv"
        return f"up_blocks_{block}_" + ("upsamplers_0_conv" if sampler else f"{kind}_{layer}_{rest}")
    block, layer = divmod(number - 1, per_block + 1)
    return f"down_blocks_{block}_" + ("downsamplers_0_conv" if rest == "op" else f"{kind}_{layer}_{rest}")
