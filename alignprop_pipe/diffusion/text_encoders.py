"""Text encoders that are asked once for each prompt: their outputs, remembered by what goes in, for one run.

An encoder is called for one prompt at a time, so what is remembered does not depend on the other prompts of a batch.
"""

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.utils import ModelOutput

from alignprop_pipe.diffusion import patching, pipeline_parts

MEMORY = 2**30
"""Bytes of main memory for what is remembered. Beyond it, what was not asked for the longest is forgotten."""


class EncodedPrompts:
    """What the text encoders of a pipeline returned for each prompt; `used_by` lets them answer from it.

    The encoders must not change meanwhile. A call with other inputs than texts (pictures, embeddings of another batch
    size) goes through as it is.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[Any, tuple[list[Any], TreeSpec]] = OrderedDict()
        self._size = 0

    @contextmanager
    def used_by(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """Inside, a text encoder of `pipe` runs only for prompts that it has not seen."""
        with ExitStack() as stack:
            for name, encoder in text_encoders(pipe).items():
                stack.enter_context(patching.replaced(encoder, "forward", self._remembering(name, encoder.forward)))
            yield

    def _remembering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            count = len(tensors[0]) if tensors and tensors[0].ndim else 0
            is_plain = all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in leaves)
            if not (count and is_plain and all(one.ndim and len(one) == count for one in tensors)):
                return forward(*args, **kwargs)
            # One, two or three, and more rows are multiplied with sums in different orders: as many copies of a prompt
            # give the result of the whole batch, to the bit on a CPU.
            copies, rows = 1 if count == 1 else 2 if count < 4 else 4, []
            for number in range(count):
                row = [leaf[[number] * copies] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                key = (name, str(spec), *map(_fingerprint, row))
                if key not in self._rows:
                    row_args, row_kwargs = tree_unflatten(row, spec)
                    if not self._keep(key, copies, forward(*row_args, **row_kwargs)):
                        return forward(*args, **kwargs)
                self._rows.move_to_end(key)
                rows.append(self._rows[key])
            self._forget()
            columns, device = zip(*(output for output, _ in rows), strict=True), tensors[0].device
            joined = [
                one if one is None else torch.cat([row.to(device) for row in (one, *more)]) for one, *more in columns
            ]
            return tree_unflatten(joined, rows[0][1])

        return call

    def _keep(self, key: Any, copies: int, output: Any) -> bool:
        """Remember an output; false for one that is not an answer for each prompt."""
        if isinstance(output, ModelOutput) and "past_key_values" in output:
            # What a language model keeps for the next word; no pipeline reads it.
            output = type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})
        leaves, spec = tree_flatten(output)
        if not all(one is None or (isinstance(one, Tensor) and one.shape[:1] == (copies,)) for one in leaves):
            return False
        kept = [None if one is None else one[:1].detach().cpu().clone() for one in leaves]
        self._rows[key] = kept, spec
        self._size += sum(one.nbytes for one in kept if one is not None)
        return True

    def _forget(self) -> None:
        while self._size > MEMORY and len(self._rows) > 1:
            _, (forgotten, _) = self._rows.popitem(last=False)
            self._size -= sum(one.nbytes for one in forgotten if one is not None)


def text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline that read tokens."""
    others = pipeline_parts.called_each_step(pipe)
    return {
        name: part
        for name, part in pipeline_parts.components(pipe).items()
        if name not in others and "input_ids" in inspect.signature(type(part).forward).parameters
    }


def _fingerprint(leaf: Any) -> Any:
    """A value that is the same for the same contents only."""
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    content = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tuple(leaf.shape), leaf.dtype, hashlib.blake2b(content).digest()
