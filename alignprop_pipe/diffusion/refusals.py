"""States of a pipeline's networks in which a gradient would be wrong or lost: refused in words before anything runs.

Looked at are the networks that a gradient passes: the denoisers, other networks that are told the timestep, and the
decoder. Text encoders may be in any state in which they can be called.
"""

from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from alignprop_pipe.diffusion import pipeline_parts
from alignprop_pipe.errors import PipelineError

EXACT_HOOKS = ("layer_skip", "smoothed_energy_guidance_utils")
"""The files of diffusers with hooks that compute the same a second time, and so leave the gradient exact."""


def refuse_untrainable(pipe: DiffusionPipeline) -> None:
    """Raises PipelineError for a network that is in the way of an exact gradient, with its state and the way out."""
    pipeline_parts.refuse_inference_weights(pipe)
    passed = pipeline_parts.called_each_step(pipe)
    for name, part in passed.items():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise PipelineError(f"{name} is compiled: call align() first and torch.compile the pipeline afterwards")
    if (decoder := pipeline_parts.decoder(pipe)) is not None:
        parts = pipeline_parts.components(pipe).items()
        passed |= {name: decoder for name, part in parts if decoder is getattr(part, "_orig_mod", part)}
    for name, part in passed.items():
        if reason := next(_in_the_way(name, part), ""):
            raise PipelineError(reason)


def _in_the_way(name: str, part: nn.Module) -> Iterator[str]:
    """The reasons against this network, the plainest first."""
    if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
        yield _quantised(name, "")
    for where, key, hook in _hooks(name, part):
        file = type(hook).__module__.rpartition(".")[2]
        if hook is None or file == "group_offloading":
            yield _offloaded(name)
        elif file == "layerwise_casting":
            yield (
                f"{name} keeps its weights in another format than it computes in (enable_layerwise_casting), and they "
                "are cast back before the backward pass needs them: load the pipeline anew, in torch.bfloat16 to save "
                "memory"
            )
        elif file not in EXACT_HOOKS:
            is_cache = getattr(part, "_cache_config", None) is not None
            removal = f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.{where}).remove_hook({key!r})"
            yield (
                f"{where} has a hook that may take results of earlier steps over ({type(hook).__name__}), which the "
                f"backward pass cannot follow: call {f'pipe.{name}.disable_cache()' if is_cache else removal} first"
            )
    if any(weight.is_meta for weight in part.parameters()):
        yield _offloaded(name)
    kinds = [type(weight.data) if type(weight.data) is not Tensor else weight.dtype for weight in part.parameters()]
    odd = [
        kind for kind in kinds if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 2
    ]
    if odd or any("quantized" in type(module).__module__ for module in part.modules()):
        yield _quantised(name, f" ({odd[0]})" if odd else "")
    for path, module in part.named_modules():
        forward = vars(module).get("forward")
        is_own = forward is None or getattr(forward, "__func__", None) is type(module).forward
        if not is_own and not hasattr(forward, "_torchdynamo_orig_callable") and not _registered(module):
            yield (
                f"the forward of {'.'.join(filter(None, (name, path)))} ({type(module).__name__}) was replaced by "
                f"{getattr(forward, '__module__', type(forward).__module__)}, and what that keeps from call to call is "
                "not known here: take it off (of DeepCache: helper.disable()) and put it on again afterwards"
            )


def _hooks(name: str, part: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Path, key and hook of diffusers; of accelerate's hooks the last is None."""
    for path, module in part.named_modules():
        where = ".".join(filter(None, (name, path)))
        if hasattr(module, "_hf_hook"):
            yield where, "", None
        yield from ((where, key, hook) for key, hook in _registered(module).items())


def _registered(module: nn.Module) -> dict[str, object]:
    registry = vars(module).get("_diffusers_hook")
    return dict(registry.hooks) if isinstance(registry, HookRegistry) else {}


def _quantised(name: str, found: str) -> str:
    return (
        f"{name} is quantised{found}, and a gradient through quantised weights is not exact: load the pipeline without "
        "a quantization_config, in torch.bfloat16 to save memory"
    )


def _offloaded(name: str) -> str:
    return (
        f"{name} is offloaded, and its weights would leave the device before the backward pass needs them: call "
        "pipe.remove_all_hooks() and pipe.to('cuda'), or load it anew without group offloading and device_map; "
        "gradient checkpointing already saves the memory"
    )
