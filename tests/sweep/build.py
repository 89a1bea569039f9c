"""A pipeline class of diffusers -> a miniature of it, from the type hints of its `__init__`."""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from miniatures import redraw
from torch import nn

from sweep.networks import NETWORKS
from sweep.parts import OTHERS, TEXT_ENCODERS, TOKENIZER_FOR, TOKENIZERS, scheduler
from sweep.recipes import Recipe, recipe_for

UNUSED = ("safety_checker", "feature_extractor", "watermarker", "image_encoder", "guider", "ocr_guider")
"""Parts that a class gets only where its recipe names them."""


class CannotBuild(Exception):
    """A miniature of this class cannot be made, for the reason given."""


def hinted(kind: type) -> dict[str, Any]:
    """The parameters of a pipeline's `__init__` with their type hints."""
    try:
        hints = typing.get_type_hints(kind.__init__)
    except NameError:  # a hint that exists for type checkers alone
        hints = {}
    taken = inspect.signature(kind.__init__).parameters
    return {name: hints.get(name, one.annotation) for name, one in taken.items() if name != "self"}


def _classes(hint: Any) -> Iterator[str]:
    """The names of the classes that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _classes(one)
    elif isinstance(hint, type):
        yield hint.__name__
    elif isinstance(hint, str):
        yield from (part.strip().rpartition(".")[2] for part in hint.split("|"))


def _known(name: str) -> bool:
    return any(name in table for table in (TOKENIZERS, TEXT_ENCODERS, OTHERS, NETWORKS)) or "Scheduler" in name


def build(kind: type, seed: int = 0) -> Any:
    """A pipeline of this class with small networks and seeded weights. Raises CannotBuild."""
    recipe = recipe_for(kind.__name__)
    if recipe.cannot:
        raise CannotBuild(recipe.cannot)
    parts: dict[str, Any] = {}
    _stand_in(kind)
    wanted = hinted(kind)
    optional = set(getattr(kind, "_optional_components", ()))
    # Tokenizers first: text encoders need their vocabulary.
    for name in sorted(wanted, key=lambda one: ("tokenizer" not in one, "processor" not in one)):
        if name in recipe.parts and recipe.parts[name] is None:
            parts[name] = None
        elif name in recipe.parts or not _left_out(name, _tokenizer_hint(name, wanted), optional):
            made = _make(name, _tokenizer_hint(name, wanted), recipe, parts)
            if made is not None:
                parts[name] = made[0]
        elif inspect.signature(kind.__init__).parameters[name].default is inspect.Parameter.empty:
            if name not in (*UNUSED, *optional) and _is_network(wanted[name]):
                raise CannotBuild(f"no small settings for {name} ({', '.join(_classes(wanted[name]))})")
            parts[name] = None
    parts |= recipe.settings
    pipe = finish(kind(**parts), seed)
    recipe.after(pipe)
    return pipe


def _is_network(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, nn.Module)


def _stand_in(kind: type) -> None:
    """ftfy, where it is not installed: it leaves plain letters as they are."""
    module = sys.modules[kind.__module__]
    if "ftfy." in inspect.getsource(module) and not hasattr(module, "ftfy"):
        module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)  # pyright: ignore[reportAttributeAccessIssue]


def _tokenizer_hint(name: str, wanted: dict[str, Any]) -> Any:
    """The hint; of a slot for any tokenizer, the name of the one for its text encoder."""
    hint = wanted[name]
    if "tokenizer" not in name or any(one in TOKENIZERS for one in _classes(hint)):
        return hint
    encoders = (one for one in _classes(wanted.get(name.replace("tokenizer", "text_encoder"))) if _known(one))
    chosen = next(encoders, "PreTrainedModel")
    return next((kind for pattern, kind in TOKENIZER_FOR.items() if re.fullmatch(pattern, chosen)), hint)


def _left_out(name: str, hint: Any, optional: set[str]) -> bool:
    known = [one for one in _classes(hint) if _known(one)]
    return not known or name in UNUSED or (name in optional and name.startswith(("transformer_2", "prompt_enhancer")))


def _make(name: str, hint: Any, recipe: Recipe, parts: dict[str, Any]) -> tuple[Any] | None:
    """The part in a tuple; None for a parameter that is no part."""
    given = recipe.parts.get(name, {})
    if callable(given):
        return (given(parts),)
    config = dict(given)
    names = [config.pop("class")] if "class" in config else [one for one in _classes(hint) if _known(one)]
    if not names:
        raise CannotBuild(f"no small settings for {name} ({', '.join(_classes(hint)) or hint})")
    kind = names[0]
    torch.manual_seed(0)
    if kind in TOKENIZERS:
        return (TOKENIZERS[kind](**config),)
    if kind in TEXT_ENCODERS:
        return (TEXT_ENCODERS[kind](_tokenizer_of(name, parts), **config),)
    if kind in OTHERS:
        return (OTHERS[kind](**config),)
    if "Scheduler" in kind:
        return (scheduler(kind, **config),)
    found = getattr(diffusers, kind, None) or _hinted_class(hint, kind)
    return (found(**{**NETWORKS[kind], **config}),)


def _hinted_class(hint: Any, name: str) -> type:
    options = typing.get_args(hint) or (hint,)
    return next(one for one in options if getattr(one, "__name__", "") == name)


def _tokenizer_of(name: str, parts: dict[str, Any]) -> Any:
    for candidate in (name.replace("text_encoder", "tokenizer"), "tokenizer", "processor", "text_processor"):
        if parts.get(candidate) is not None:
            return getattr(parts[candidate], "tokenizer", parts[candidate])
    raise CannotBuild(f"no tokenizer for {name}")


def finish(pipe: Any, seed: int) -> Any:
    """Seeded weights, eval mode, no progress bar; a decoder's last layer small enough that few pixels saturate."""
    for number, (_, part) in enumerate(sorted(pipe.components.items())):
        if isinstance(part, nn.Module):
            redraw(part, 1000 * seed + number)
            part.eval().requires_grad_(False)
            if callable(getattr(part, "decode", None)):
                _dim(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dim(decoder: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "decoder" in name and "conv_out" in name:
                parameter.mul_(0.2)
