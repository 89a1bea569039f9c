"""What diffusers does with a file: the pipeline's own `load_lora_weights`, run on a skeleton of the pipeline.

The skeleton has the layers of the model that the loader itself finds names for, of the shapes in the file and without
weights, so that every model is there at no cost; what it holds afterwards is what a real one would apply.
"""

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import Base
from alignprop_pipe.adapters.model_layers import clip_path, found_in, is_text, names_for, pipeline_class
from alignprop_pipe.adapters.reading import AdapterFile
from alignprop_pipe.seeds import SeededDraws

UNKNOWN = "the model is not known"
NAME = "inspected"
CONFIG = FrozenDict(layers_per_block=2, image_dim=None, in_channels=0)
"""What loaders ask of a network's configuration: how blocks of SDXL's original layout are numbered, Wan's pictures."""
TOLERANCE = 0.01
"""Of the size of a layer's change; half precision rounds a product of two matrices less."""
WAY_OUT = "export it with --to diffusers"


def said_of_diffusers(file: AdapterFile, layers: Layers) -> tuple[bool | None, str]:
    """Whether the stock pipeline's `load_lora_weights` applies the whole file at its strength, and why not.

    Args:
        file: what is in it; the loader reads it anew from its path, but for a pickle.
        layers: the same as this package reads it; empty where it does not.
    """
    base, tensors = file.base, file.tensors
    base_class, reader = base.base_class, pipeline_class(base.base_class)
    if reader is None:
        return None, UNKNOWN
    if not hasattr(reader, "load_lora_weights"):
        return False, f"{base_class} has no load_lora_weights; AlignPropPipeline.load_adapter reads it"
    if any(".lokr_" in key for key in tensors):
        return None, "whether it reads this LoKr is not known here"
    source: Any = str(file.path) if file.path.suffix == ".safetensors" else dict(tensors)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        with warnings.catch_warnings(), SeededDraws(0):
            warnings.simplefilter("ignore")
            pipe = _skeleton(reader, source, base)
            pipe.load_lora_weights(source, adapter_name=NAME)
    except Exception as error:  # loaders fail in any way on names and shapes that they do not expect
        return False, f"load_lora_weights raises an error: {_reason(error)}" + (f"; {WAY_OUT}" if layers else "")
    finally:
        diffusers_logging.set_verbosity(verbosity)
    applied = {name: _applied(network) for name, network in pipe.parts.items()}
    return _compared(applied, layers, len(file.in_file.layers), any("dora_scale" in key for key in tensors))


def _reason(error: Exception) -> str:
    """What an error of the loader says about the file: errors of Python and torch name only the line that failed."""
    text, kind = " ".join(str(error).split())[:300].rstrip(".:"), type(error).__name__
    if isinstance(error, RuntimeError) and re.match(r"chunk expects|split_with_sizes|split expects", text):
        return f"it splits fused layers (query, key and value in one), and cannot split these or their alphas ({text})"
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict"):
        return "a matrix does not have the shape that its layer needs"
    if "'model_type'" in text:
        return "the settings in the header name no target_modules, and PEFT knows none for this model"
    if isinstance(error, LookupError | AttributeError | TypeError | AssertionError | RuntimeError):
        return f"its conversion of names does not expect this file ({f'{kind}: {text}' if text else kind})"
    return text or kind


def _compared(applied: Layers, layers: Layers, in_file: int, without_scales: bool) -> tuple[bool, str]:
    got = {
        (name, clip_path(path, nested=is_text(name))): f for name, found in applied.items() for path, f in found.items()
    }
    if not got:
        return False, f"load_lora_weights finds none of its names, warns and leaves the model as it was; {WAY_OUT}"
    if without_scales:
        return False, "load_lora_weights leaves out the scales of this DoRA, so that it is applied as another one"
    wanted = {(name, path): factors for name, found in layers.items() for path, factors in found.items()}
    total, missing = (len(wanted), wanted.keys() - got.keys()) if wanted else (in_file, set())
    left = len(missing) if wanted else max(0, in_file - len(got))
    if left:
        first = f", the first {'.'.join(min(missing))}" if missing else ""
        return (
            False,
            f"load_lora_weights applies {total - left} of {total} layers and leaves out the others{first}; {WAY_OUT}",
        )
    for place, factors in wanted.items():
        if not _alike(got[place], factors):
            scales = f"{_scale(got[place])} instead of {_scale(factors)}"
            return False, f"load_lora_weights applies it at another strength: {'.'.join(place)} by {scales}; {WAY_OUT}"
    return True, "load_lora_weights reads all of its layers"


def _alike(got: Factors, wanted: Factors) -> bool:
    """Whether two changes of a layer are the same, by the size of their difference."""
    if got.down.flatten(1).shape[1] != wanted.down.flatten(1).shape[1] or len(got.up) != len(wanted.up):
        return False
    down = torch.cat([got.down.double().flatten(1), wanted.down.double().flatten(1)])
    ups = [
        got.up.double().flatten(1) * (got.alpha / got.rank),
        wanted.up.double().flatten(1) * (-wanted.alpha / wanted.rank),
    ]
    difference = Factors(down, torch.cat(ups, dim=1), float(len(down))).norm()
    return not difference > TOLERANCE * wanted.norm() + 1e-12


def _scale(factors: Factors) -> str:
    return f"{factors.alpha / factors.rank:g}"


# --- the skeleton ----------------------------------------------------------------------------------------------------


class _Level(nn.Module):
    """A block, or a list of blocks."""

    def __getitem__(self, number: int) -> nn.Module | None:
        return self._modules[str(number)]


class _Network(PeftAdapterMixin, nn.Module):
    """The layers that are named; to loaders a model of diffusers or a text encoder."""

    def __init__(self, layers: Mapping[str, nn.Module], *, nested: bool) -> None:
        super().__init__()
        self.config = CONFIG
        self.device, self.dtype = torch.device("cpu"), torch.float32
        if nested:
            self.text_model = _Level()
        for path in sorted(layers, key=len):
            *parents, last = path.split(".")
            place: nn.Module = self
            for name in parents:
                if name not in place._modules:
                    place.add_module(name, _Level())
                place = place._modules[name]  # type: ignore[assignment]
            place.add_module(last, layers[path])

    def load_adapter(
        self, adapter_name: str, adapter_state_dict: dict[str, Tensor], peft_config: Any, **_: Any
    ) -> None:
        """As transformers' text encoders have it."""
        inject_adapter_in_model(peft_config, self, adapter_name, low_cpu_mem_usage=True)
        set_peft_model_state_dict(self, adapter_state_dict, adapter_name, low_cpu_mem_usage=True)

    def to(self, *_: Any, **__: Any) -> "_Network":
        """Stay where it is: without weights there is nothing to move."""
        return self


def _skeleton(reader: Any, source: Any, base: Base) -> Any:
    """A pipeline of that class without its own start: each part that its loader puts LoRAs on, and the layers named."""
    options = {"unet_config": CONFIG} if hasattr(reader, "unet_name") else {}
    state = reader.lora_state_dict(dict(source) if isinstance(source, dict) else source, **options)
    state = state[0] if isinstance(state, tuple) else state
    kinds = inspect.signature(reader.__init__).parameters
    parts = {}
    for name in reader._lora_loadable_modules:
        mine = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        nested = is_text(name) and "WithProjection" in str(kinds[name].annotation if name in kinds else "")
        if is_text(name):
            mine = convert_state_dict_to_peft(convert_state_dict_to_diffusers(mine)) if mine else {}
            mine = {clip_path(key, nested=nested): value for key, value in mine.items()}
        elif mine and "lora_A" not in next(iter(mine)):
            mine = convert_unet_state_dict_to_peft(mine)
        names = names_for(reader.__name__, name, family=base.families.get(name, ""))
        layers = {
            path: layer
            for path, layer in _layers_named(mine).items()
            if not names or found_in(clip_path(path, nested=True) if is_text(name) else path, names)
        }
        parts[name] = _Network(layers, nested=nested)
    made = type(reader.__name__, (reader,), {"components": parts, "hf_device_map": None, "parts": parts})
    pipe = made.__new__(made)
    vars(pipe).update(parts)
    return pipe


def _layers_named(state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    found: dict[str, Any] = {}
    for key, down in state.items():
        path, lora, _ = key.partition(".lora_A.weight")
        up = state.get(f"{path}.lora_B.weight")
        if not lora or up is None or down.ndim < 2 or up.ndim != down.ndim or not _is_path(path):
            continue
        kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        sizes = (down.shape[1], up.shape[0])
        if down.ndim == 2:
            found[path] = nn.Linear(*sizes, bias=False, device="meta")
        elif down.ndim in kinds:
            found[path] = kinds[down.ndim](*sizes, tuple(down.shape[2:]), bias=False, device="meta")
        else:
            continue
        # PEFT moves a LoRA to its layer's device; a single number stands for all of the layer's.
        found[path].weight = nn.Parameter(torch.zeros(()).expand(found[path].weight.shape), requires_grad=False)
    return found


def _is_path(path: str) -> bool:
    """Whether modules can be called so."""
    words = path.split(".")
    return len(words) < 50 and all(words) and not any(hasattr(nn.Module, word) for word in words)


def _applied(network: Any) -> dict[str, Factors]:
    """The change that each layer of a skeleton got; one that stayed without weights got none."""
    found = {}
    for path, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
            down: Any = layer.lora_A[NAME].weight
            up: Any = layer.lora_B[NAME].weight
            if not down.is_meta and not up.is_meta:
                found[path] = Factors(down.detach(), up.detach(), float(layer.scaling[NAME]) * len(down))
    return found
