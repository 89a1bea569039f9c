"""The adapter inside the denoisers: put it on, find what trains, switch it off, take it away. PEFT does the work."""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.peft_utils import (
    recurse_remove_peft_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignprop_pipe.config.settings import LoraOptions
from alignprop_pipe.diffusion import pipeline_parts
from alignprop_pipe.errors import PipelineError
from alignprop_pipe.seeds import SeededDraws

ADAPTER_NAME = "alignprop"

SOURCE = "alignprop_source"
"""The attribute of our adapter's PEFT configuration that tells it from a user's of the same name; see `held`."""
TRAINED = "training"

WINDOW = "_alignprop_window"
"""The attribute of a denoiser that holds the hooks of windows.py."""


def attention_linears(denoiser: nn.Module) -> list[str]:
    """Names of every linear layer inside an attention module, found by the processor that diffusers gives those.

    The paper adapts the q, k, v and output projections of self- and cross-attention. Left out is what the pipeline has
    and a freshly loaded one has not, since a LoRA on that would load nowhere: layers of an IP-Adapter, which are in
    the processor, and copies that `fuse_qkv_projections` has made, which also stay after unfusing.
    """
    found = []
    for name, module in denoiser.named_modules():
        if any(hasattr(module, kept) for kept in ("processor", "get_processor", "set_processor")):
            copies = fused_copies(module)
            found += [
                f"{name}.{inner}"
                for inner, layer in module.named_modules()
                if _is_linear(inner, layer) and inner not in copies and not inner.startswith("processor.")
            ]
    return found


def fused_copies(attention: nn.Module) -> list[str]:
    """The layers of an attention module that hold the weights of others next to them once more."""
    originals = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj", "to_added_kv": "add_k_proj"}
    has = [copy for copy, original in originals.items() if hasattr(attention, copy) and hasattr(attention, original)]
    return [copy for copy in has if getattr(attention, copy) is not None]


def _is_linear(name: str, layer: nn.Module) -> bool:
    is_inside_adapter = "lora_" in name or name.endswith("base_layer")
    return not is_inside_adapter and isinstance(getattr(layer, "base_layer", layer), nn.Linear)


def attach(denoisers: Mapping[str, nn.Module], options: LoraOptions, seed: int) -> None:
    """Put a new adapter in float32 on every denoiser, next to adapters that are active already.

    An adapter of ours is replaced. The start is drawn from `seed` alone. Raises PipelineError.
    """
    if reason := obstacle(denoisers, denoisers):
        raise PipelineError(reason)
    targets = {name: _targets(name, denoiser, options) for name, denoiser in denoisers.items()}
    detach(denoisers)
    try:
        with SeededDraws(seed):
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
    mark(denoiser, TRAINED)
    for layer in _adapted_layers(denoiser):
        layer.enable_adapters(True)
        layer.set_adapter([*others, ADAPTER_NAME])
        layer.train(layer.get_base_layer().training)  # PEFT leaves new layers in training mode
    for parameter, was in required:
        parameter.requires_grad_(was)
    for parameter in _parameters(denoiser):
        parameter.data = parameter.data.float()


@dataclass(frozen=True, slots=True)
class Weights:
    """What an adapter puts on one network: PEFT's settings, and its tensors by PEFT's names (`path.lora_A.weight`)."""

    settings: Mapping[str, Any]
    tensors: dict[str, Tensor]


def attach_weights(
    pipe: DiffusionPipeline,
    networks: Mapping[str, nn.Module],
    adapter: Mapping[str, Weights],
    scale: float,
    source: str,
) -> None:
    """Put an adapter with known weights on the networks that it names, active at `scale`; others are switched off.

    An adapter of ours in any of `networks` is replaced. After an error none of ours is left.

    Args:
        pipe: the pipeline of `networks`, whose offloading hooks diffusers keeps.
        networks: all of its networks, by name.
        adapter: what each network gets, by its name.
        scale: strength, 1.0 as trained.
        source: where it came from, for `held`.
    """
    required = [(parameter, parameter.requires_grad) for part in networks.values() for parameter in part.parameters()]
    detach(networks)
    try:
        for name, weights in adapter.items():
            _inject(pipe, networks[name], weights)
            mark(networks[name], source)
            set_adapter_layers(networks[name], enabled=True)
        for network in networks.values():
            set_weights_and_activate_adapters(network, [ADAPTER_NAME], [scale])
    except BaseException:
        detach(networks)
        raise
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)


def _inject(pipe: DiffusionPipeline, network: nn.Module, weights: Weights) -> None:
    config = dict(weights.settings)
    # New layers draw weights that are overwritten: not from the random numbers of the process.
    with warnings.catch_warnings(), SeededDraws(0):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # other adapters may stay
        if isinstance(network, PeftAdapterMixin):
            load: Any = network.load_lora_adapter  # whose prefix may be None, against its annotation
            load(weights.tensors, prefix=None, adapter_name=ADAPTER_NAME, metadata=config, _pipeline=pipe)
        else:  # a text encoder, or a denoiser to which diffusers gives no such method
            inject_adapter_in_model(LoraConfig(**config), network, ADAPTER_NAME, state_dict=weights.tensors)
            set_peft_model_state_dict(network, weights.tensors, ADAPTER_NAME)
            network._hf_peft_config_loaded = True  # type: ignore[assignment]  # as diffusers and transformers mark it
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.train(network.training)


def _active(network: nn.Module) -> list[str]:
    """The adapters that are switched on, but for ours; not every layer lists those that it does not hold."""
    names = [name for layer in _adapted_layers(network) if not layer.disable_adapters for name in layer.active_adapters]
    return list(dict.fromkeys(name for name in names if name != ADAPTER_NAME))


def detach(networks: Mapping[str, nn.Module]) -> None:
    """Take our adapter away; other adapters stay, and without any the network is the stock one again."""
    for network in networks.values():
        forget_window(network)
        if ADAPTER_NAME in _names_in(network):
            _take_away(network)


def forget_window(denoiser: nn.Module) -> None:
    """Our adapter, or the one that comes in its place, works in every step again."""
    held = vars(denoiser).pop(WINDOW, None)
    if held is not None:
        held.remove()


@contextmanager
def switched_back(networks: Iterable[nn.Module]) -> Iterator[None]:
    """After an error inside, the adapters that are still there are on or off as they were before."""
    layers = [layer for network in networks for layer in _adapted_layers(network)]
    were = [(layer, layer.disable_adapters, layer.active_adapters) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, is_off, active in were:
            layer._disable_adapters = is_off
            layer._active_adapter = [name for name in active if name in layer._get_available_adapters()]
        raise


def _take_away(network: nn.Module) -> None:
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    others = _active(network)
    for layer in _adapted_layers(network):
        if not layer.disable_adapters:
            layer.set_adapter(others)  # PEFT would switch on one that is off in the place of the deleted one
        layer.delete_adapter(ADAPTER_NAME)
    getattr(network, "peft_config", {}).pop(ADAPTER_NAME, None)
    if not _names_in(network):
        recurse_remove_peft_layers(network)
        vars(network).pop("peft_config", None)
        network._hf_peft_config_loaded = False  # type: ignore[assignment]  # as diffusers marks it
    for parameter, was in required:  # PEFT lets the adapter that is left train
        parameter.requires_grad_(was)


def _names_in(network: nn.Module) -> set[str]:
    """The adapters that it holds; one that is fused and was deleted since has left nothing but its weights' sum."""
    configured = set(getattr(network, "peft_config", {}))
    return configured.union(*(layer._get_available_adapters() for layer in _adapted_layers(network)))


# --- what is there next to ours, or in its way ---


def mark(network: nn.Module, source: str) -> None:
    """Note that the adapter is ours, and where it came from: `TRAINED`, or the name of its file."""
    setattr(network.peft_config[ADAPTER_NAME], SOURCE, source)  # type: ignore[index]


def held(networks: Iterable[nn.Module]) -> str:
    """Where the adapter of ours in these networks came from, as `mark` notes it; empty where there is none."""
    configs = [getattr(network, "peft_config", {}).get(ADAPTER_NAME) for network in networks]
    return next((source for config in configs if (source := getattr(config, SOURCE, ""))), "")


def obstacle(networks: Mapping[str, nn.Module], receiving: Collection[str]) -> str:
    """Why our adapter cannot be put on the networks named in `receiving`, with the way out; empty if it can be.

    In the others one of ours may have to be taken away.
    """
    for name, network in networks.items():
        config = getattr(network, "peft_config", {}).get(ADAPTER_NAME)
        if config is not None and not hasattr(config, SOURCE):
            return (
                f"{name} holds a LoRA of yours under the name {ADAPTER_NAME!r}, which this package needs for its own: "
                f"load it under another one, load_lora_weights(..., adapter_name='mine'), or take it off first with "
                f"pipe.delete_adapters({ADAPTER_NAME!r})"
            )
        merged = {fused for layer in _adapted_layers(network) for fused in layer.merged_adapters}
        if merged and (name in receiving or config is not None):
            return (
                f"LoRA {' and '.join(map(repr, sorted(merged)))} is fused into the weights of {name}, and PEFT lets no "
                "other adapter work next to it: call pipe.unfuse_lora() first, or pipe.unload_lora_weights() to keep "
                "it in the weights for good"
            )
        if name in receiving and _has_fused_projections(network):
            return (
                f"{name} computes with fused query, key and value projections (fuse_qkv_projections), where adapters "
                f"have no effect: call pipe.{name}.unfuse_qkv_projections() first"
            )
    return ""


def unfused_and_fused(networks: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """The names of the adapters that are next to the weights of a component, and of those that are in its weights."""
    beside, fused = set(), set()
    for network in networks.values():
        merged = {name for layer in _adapted_layers(network) for name in layer.merged_adapters}
        beside |= _names_in(network) - merged
        fused |= merged
    return beside, fused


def _has_fused_projections(network: nn.Module) -> bool:
    """The older attention class keeps the copies when it is unfused, and tells by its processor."""
    attentions = [module for module in network.modules() if fused_copies(module)]
    return any(
        module.fused_projections
        if hasattr(module, "unfuse_projections")
        else type(module.processor).__name__.startswith("Fused")
        for module in attentions
    )


@dataclass(frozen=True, slots=True)
class OtherLora:
    """A LoRA next to ours that works in a component; `weight` is None where it is no longer known."""

    component: str
    name: str
    weight: float | None
    is_fused: bool = False

    def __str__(self) -> str:
        known = ", ".join(["fused"] * self.is_fused + ([] if self.weight is None else [f"{self.weight:g}"]))
        return f"{self.name!r} in {self.component} ({known})"


def active_others(pipe: DiffusionPipeline) -> list[OtherLora]:
    """The LoRAs next to ours that work in the networks of `pipe`: they belong to what a run starts from.

    Fused ones too; those that are in the weights for good (`unload_lora_weights`) as far as diffusers still names them.
    """
    found: list[OtherLora] = []
    known: set[str] = set()
    for component, network in pipeline_parts.components(pipe).items():
        layers, names = _adapted_layers(network), _names_in(network)
        known |= names
        fused = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
        if ADAPTER_NAME in names:
            fused.pop(ADAPTER_NAME, None)
        found += [OtherLora(component, name, _weight(layers, name), True) for name in fused]
        working = _active(network)
        found += [
            OtherLora(component, name, weight)
            for name in working
            if name not in fused and (weight := _weight(layers, name)) is not None
        ]
    known |= {other.name for other in found}
    in_weights = sorted(set(getattr(pipe, "fused_loras", ())) - known)
    return found + [OtherLora("the weights", name, None, True) for name in in_weights]


def _weight(layers: Iterable[Any], name: str) -> float | None:
    """The strength of an adapter, on the mean of the layers that hold it."""
    found = []
    for layer in layers:
        if name in getattr(layer, "scaling", {}) and layer.r.get(name):
            alpha = (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[name]
            is_rooted = getattr(layer, "use_rslora", {}).get(name, False)
            found.append(layer.scaling[name] * (math.sqrt(layer.r[name]) if is_rooted else layer.r[name]) / alpha)
    return round(sum(found) / len(found), 4) if found else None


# --- its weights ---


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
