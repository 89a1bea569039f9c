"""What is replaced on a pipeline and its networks for a while, and put back: attributes, methods, gradient, guards."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alignprop_pipe.diffusion.pipeline_parts import called_each_step, components

GUARDS = ("safety_checker", "watermark")
"""Attributes of stock pipelines that look at finished pictures outside torch, and so cut the gradient."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute and put back what was there, or nothing where there was nothing."""
    absent = object()
    before = vars(owner).get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`wrap(method)` in the place of a method of this object, and of deep copies that are made of it inside."""
    with replaced(owner, name, _Wrapped(owner, getattr(owner, name), wrap)):
        yield


class _Wrapped:
    """A method that follows its object into deep copies.

    A pipeline may step a deep copy of its scheduler, for each frame or for the sound: the copy's method acts on the
    copy. Or it may copy the scheduler's attributes and write them back: then it stays the method of that scheduler.
    """

    def __init__(self, owner: Any, method: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        functools.update_wrapper(self, method, updated=())
        self.owner, self.method, self.wrap, self.call = owner, method, wrap, wrap(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Wrapped":
        owner = memo.get(id(self.owner))
        if owner is None:
            return self
        is_bound = getattr(self.method, "__self__", None) is self.owner
        method = MethodType(self.method.__func__, owner) if is_bound else copy.deepcopy(self.method, memo)
        return _Wrapped(owner, method, self.wrap)


PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a configuration's `mixed_precision` stands for."""


@contextmanager
def mixed_precision(pipe: DiffusionPipeline, name: str) -> Iterator[None]:
    """Inside, the denoisers (and networks called next to them, such as a ControlNet) compute under autocast.

    The text encoders and the decoder stay as they are, since a decoder may overflow in float16. What the denoisers
    return has the number format that it has without autocast. `name` is a key of `PRECISIONS`.
    """
    dtype = PRECISIONS[name]
    with ExitStack() as stack:
        for network in called_each_step(pipe).values() if dtype is not None else ():
            stack.enter_context(replaced(network, "forward", _autocast(network, dtype)))
        yield


def _autocast(network: nn.Module, dtype: torch.dtype | None) -> Callable[..., Any]:
    forward = network.forward
    first = next(network.parameters())

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, dtype):
            output = forward(*args, **kwargs)
        return tree_map(lambda leaf: leaf.to(first.dtype) if _is_float(leaf) else leaf, output)

    return call


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextmanager
def frozen_for_training(
    pipe: DiffusionPipeline, trainable: Sequence[nn.Parameter] = (), others: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Eval mode, gradient to `trainable` alone, guards off; all undone on leaving. `others` are frozen too."""
    with ExitStack() as stack:
        for part in (*components(pipe).values(), *others):
            stack.enter_context(frozen(part))
        for parameter in trainable:
            parameter.requires_grad_(True)
        stack.enter_context(guards_off(pipe))
        stack.callback(lambda: [parameter.requires_grad_(False) for parameter in trainable])
        yield


@contextmanager
def frozen(part: nn.Module) -> Iterator[None]:
    """Eval mode inside, and no parameter wants a gradient."""
    training = [(module, module.training) for module in part.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, was in required:
            parameter.requires_grad_(was)


def guards_on(pipe: DiffusionPipeline) -> list[str]:
    """The names of the guards that are switched on."""
    return [name for name in GUARDS if getattr(pipe, name, None) is not None]


@contextmanager
def guards_off(pipe: DiffusionPipeline) -> Iterator[None]:
    """No safety checker and no watermark inside."""
    own = vars(pipe)  # setattr would also forget the guard's class in pipe.config, and save_pretrained then the guard
    kept = {name: own[name] for name in guards_on(pipe) if name in own}
    try:
        own.update(dict.fromkeys(kept))
        yield
    finally:
        own.update(kept)
