"""The adapter inside the denoisers: put it on, find what trains, switch it off, take it away. PEFT does the work."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_pipe.config import LoraOptions
from alignprop_pipe.errors import PipelineError

ADAPTER_NAME = "alignprop"

WINDOW = "_alignprop_window"
"""The attribute of a denoiser that holds the hooks of windows.py."""


def attention_linears(denoiser: nn.Module) -> list[str]:
    """Names of every linear layer inside an attention module, found by the processor that diffusers gives those.

    The paper adapts the q, k, v and output projections of self- and cross-attention.
    """
    found = []
    for name, module in denoiser.named_modules():
        if any(hasattr(module, kept) for kept in ("processor", "get_processor", "set_processor")):
            found += [f"{name}.{inner}" for inner, layer in module.named_modules() if _is_linear(inner, layer)]
    return found


def _is_linear(name: str, layer: nn.Module) -> bool:
    is_inside_adapter = "lora_" in name or name.endswith("base_layer")
    return not is_inside_adapter and isinstance(getattr(layer, "base_layer", layer), nn.Linear)


def attach(denoisers: Mapping[str, nn.Module], options: LoraOptions, seed: int) -> None:
    """Put a new adapter in float32 on every denoiser, beside adapters that are active already.

    An adapter of the same name is replaced. The start is drawn from `seed` alone. Raises PipelineError.
    """
    targets = {name: _targets(name, denoiser, options) for name, denoiser in denoisers.items()}
    detach(denoisers)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, denoiser in denoisers.items():
                _attach_one(name, denoiser, options, targets[name])
    except BaseException:
        for denoiser in denoisers.values():
            _take_away(denoiser)
        raise


def _targets(name: str, denoiser: nn.Module, options: LoraOptions) -> list[str]:
    targets = list(options.target_modules) or attention_linears(denoiser)
    if not targets:
        raise PipelineError(
            f"{name} ({type(denoiser).__name__}) has no linear attention projections; "
            "name the layers to adapt with target_modules=(...)"
        )
    layers = [f".{path}".removesuffix(".base_layer") for path, _ in denoiser.named_modules()]
    unknown = [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]
    if unknown:
        linears = {path.rpartition(".")[2]: None for path, layer in denoiser.named_modules() if _is_linear(path, layer)}
        raise PipelineError(
            f"target_modules={tuple(targets)} do not fit {name} ({type(denoiser).__name__}): it has no layer "
            f"{unknown[0]!r}; its linear layers end in {', '.join(linears)}"
        )
    return targets


def _attach_one(name: str, denoiser: nn.Module, options: LoraOptions, targets: list[str]) -> None:
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,  # type: ignore[arg-type]  # floats work
        target_modules=targets,
        init_lora_weights=True if options.init_lora_weights == "default" else options.init_lora_weights,
    )
    others = _active(denoiser)
    required = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # other adapters may stay
            inject_adapter_in_model(config, denoiser, ADAPTER_NAME)
    except ValueError as error:
        raise PipelineError(f"target_modules={tuple(targets)} do not fit {name}: {error}") from error
    denoiser._hf_peft_config_loaded = True  # type: ignore[assignment]  # as diffusers marks it
    for layer in _adapted_layers(denoiser):
        layer.enable_adapters(True)
        layer.set_adapter([*others, ADAPTER_NAME])
        layer.train(layer.get_base_layer().training)  # PEFT leaves new layers in training mode
    for parameter, was in required:
        parameter.requires_grad_(was)
    for parameter in _parameters(denoiser):
        parameter.data = parameter.data.float()


def _active(denoiser: nn.Module) -> list[str]:
    """The adapters that are switched on, but for ours."""
    layers = [layer for layer in _adapted_layers(denoiser) if not layer.disable_adapters]
    return [name for name in (layers[0].active_adapters if layers else ()) if name != ADAPTER_NAME]


def detach(denoisers: Mapping[str, nn.Module]) -> None:
    """Take our adapter away; other adapters stay, and without any the denoiser is the stock one again."""
    for denoiser in denoisers.values():
        forget_window(denoiser)
        if ADAPTER_NAME in getattr(denoiser, "peft_config", {}):
            _take_away(denoiser)


def forget_window(denoiser: nn.Module) -> None:
    """Our adapter, or the one that comes in its place, works in every step again."""
    held = vars(denoiser).pop(WINDOW, None)
    if held is not None:
        held.remove()


def _take_away(denoiser: nn.Module) -> None:
    required = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    others = _active(denoiser)
    for layer in _adapted_layers(denoiser):
        layer.set_adapter(others)
        layer.delete_adapter(ADAPTER_NAME)
    configs = getattr(denoiser, "peft_config", {})
    configs.pop(ADAPTER_NAME, None)
    if not configs:
        recurse_remove_peft_layers(denoiser)
        vars(denoiser).pop("peft_config", None)
        denoiser._hf_peft_config_loaded = False  # type: ignore[assignment]  # as diffusers marks it
    for parameter, was in required:  # PEFT lets the adapter that is left train
        parameter.requires_grad_(was)


def trainable(denoisers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters of our adapter, in a fixed order."""
    return [parameter for denoiser in denoisers.values() for parameter in _parameters(denoiser)]


def _parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    mine = (f".{ADAPTER_NAME}.", f".{ADAPTER_NAME}")
    named = denoiser.named_parameters()
    return [p for name, p in named if "lora_" in name and (mine[0] in name or name.endswith(mine[1]))]


def snapshot(denoisers: Mapping[str, nn.Module]) -> list[Tensor]:
    """A copy of the adapter's weights, for `restore`."""
    return [parameter.detach().clone() for parameter in trainable(denoisers)]


def restore(denoisers: Mapping[str, nn.Module], weights: list[Tensor]) -> None:
    """Put weights of `snapshot` back."""
    for parameter, weight in zip(trainable(denoisers), weights, strict=True):
        parameter.data.copy_(weight)


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[None]:
    """The base model inside: our adapter alone is switched off, other active adapters belong to the base."""
    layers = [layer for layer in _adapted_layers(denoiser) if ADAPTER_NAME in layer.scaling]
    scales = [(layer, layer.scaling[ADAPTER_NAME]) for layer in layers]
    try:
        for layer, _ in scales:
            layer.scaling[ADAPTER_NAME] = 0.0
        yield
    finally:
        for layer, scale in scales:
            layer.scaling[ADAPTER_NAME] = scale


@contextmanager
def taken_out(networks: Iterable[nn.Module]) -> Iterator[None]:
    """The stock networks inside: every layer with adapters, ours or another's, gives its place to its base layer."""
    with ExitStack() as stack:
        for network in networks:
            for parent in list(network.modules()):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, BaseTunerLayer):
                        stack.callback(setattr, parent, name, layer)
                        setattr(parent, name, layer.get_base_layer())
            own = vars(network)
            for name in ("peft_config", "_hf_peft_config_loaded"):
                if name in own:
                    stack.callback(own.__setitem__, name, own.pop(name))
        yield


def _adapted_layers(denoiser: nn.Module) -> list[Any]:
    return [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
