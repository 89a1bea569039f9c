"""How strong an adapter file's layers are where the layers themselves do not say: alpha by PEFT's settings.

Those stand in `adapter_config.json` next to PEFT's own files, in diffusers' JSON in the header, or as plain texts of
the
header (`lora_alpha`, with or without a component's name in front). Where nobody can know the strength, the doubt is put
into words.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alignprop_pipe.adapters.keys import MOST_ALPHA, layers_of, place_of

CONFIG_FILE = "adapter_config.json"
MOST_CONFIG = 4_000_000
"""Bytes; a large transformer with an entry for every layer takes a few hundred thousand."""
BESIDE = "adapter_config"
"""The name in a header under which the reader puts the settings that stand next to the file."""
BASE_CLASS = f"{BESIDE}.base_model_class"
BASE_MODEL = f"{BESIDE}.base_model"
IN_HEADER = "lora_adapter_metadata"
"""The name of diffusers' own JSON of PEFT's settings."""
OURS = "alignprop.format"

PLAIN = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "use_dora", "peft_type", "r")
ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
RANKS = ("ss_network_dim", "network_dim", "lora_rank", "lora_r", "lora_dim", "rank", "dim", "r")
"""By which names trainers write alpha and rank into a header, or into a table in it."""

_OTHER_FORWARD = {
    "use_dora": "a DoRA", "lora_bias": "a LoRA with biases", "use_qalora": "a QALoRA",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)", "layer_replication": "a LoRA with replicated layers",
    "modules_to_save": "whole weights next to the LoRA", "target_parameters": "a LoRA of bare parameters",
    "trainable_token_indices": "trained tokens next to the LoRA", "use_bdlora": "a block-diagonal LoRA (BD-LoRA)",
    "arrow_config": "an Arrow router of several LoRAs", "kasa_config": "a KaSA",
    "monteclora_config": "a Monte Carlo LoRA", "velora_config": "a VeLoRA",
}  # fmt: skip
"""PEFT's options that make something else of a LoRA than two matrices and a number -> what."""
_OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that change the weights of the model itself as well."""

_PATH = re.compile(r"\^?[\w.]+\$?")
_UNBOUNDED = re.compile(r"(?<!\\)[*+{]")
_DEEP = re.compile(r"\)[*+{]|\\\d|\(\?(?!:)")
"""Repeated groups, references and conditions, which take unbounded time to match."""
MOST_REPEATS = 3
LONGEST_NAME = 150
"""Letters in the name of a layer that a pattern is tried on; with `MOST_REPEATS` what bounds the time of a match."""
MOST_PATTERNS = 5000
"""More than any model has layers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """PEFT's settings of one component; `alpha` is None where they say nothing of it."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    is_rooted: bool = False

    def alpha_of(self, path: str, rank: int) -> float:
        """The alpha of a layer in the sense of `Factors`, whose change is scaled by alpha / rank.

        As PEFT has it: the first pattern that matches the end of the layer's name counts, and with `use_rslora` the
        scale is alpha / sqrt(rank).
        """
        names = dict.fromkeys((path, path.removeprefix("text_model.")))  # a level that some classes of CLIP have not
        found = next((alpha for key, alpha in self.patterns.items() if any(_matches(key, n) for n in names)), None)
        alpha = self.alpha if found is None else found
        if alpha is None:
            return float(rank)
        return alpha * (math.sqrt(rank) if self.is_rooted else 1.0)


def beside(file: Path) -> dict[str, str]:
    """The settings that stand next to a file of PEFT, as a text of a header; diffusers' own file has them in itself.

    Raises ValueError: they cannot be read.
    """
    config = file.with_name(CONFIG_FILE)
    others = [one for one in file.parent.glob("*") if one.suffix in (".safetensors", ".bin")]
    is_its_own = file.stem == "adapter_model" or (len(others) == 1 and file.stem != "pytorch_lora_weights")
    if not is_its_own or not config.is_file():
        return {}
    if config.stat().st_size > MOST_CONFIG:
        raise ValueError(f"{CONFIG_FILE} next to it has {config.stat().st_size} bytes")
    text = config.read_text(encoding="utf-8")
    found = _mapping(text, CONFIG_FILE)
    mapped = found.get("auto_mapping")
    told = {BASE_MODEL: found.get("base_model_name_or_path")}
    told |= {BASE_CLASS: mapped.get("base_model_class")} if isinstance(mapped, dict) else {}
    return {BESIDE: text, **{key: value for key, value in told.items() if isinstance(value, str) and value}}


def settings_of(header: Mapping[str, str], component: str, *, sole: bool = True) -> Settings:
    """What a header says of one component's strength; `sole`: settings without a component's name are its own.

    Raises ValueError: it is no LoRA of two matrices and a number, or the settings are damaged.
    """
    config, source = _config(header)
    mine = {key.removeprefix(f"{component}."): v for key, v in config.items() if key.startswith(f"{component}.")}
    if not mine and sole:
        mine = config
    if kind := other_kind(mine):
        raise ValueError(f"{source} says that it is {kind}, which is not supported")
    alpha = mine.get("lora_alpha")
    patterns = mine.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping) or len(patterns) > MOST_PATTERNS:
        raise ValueError(f"alpha_pattern in {source} is no table of names and numbers, one for a layer")
    return Settings(
        None if alpha is None else _number(alpha, f"lora_alpha in {source}"),
        {_pattern(key, source): _number(value, f"alpha_pattern in {source}") for key, value in patterns.items()},
        mine.get("use_rslora") is True,
    )


def folded(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with their strength in the up matrices, in float32: for names that a converter changes later."""
    found = dict(tensors)
    for name, parts in layers_of(tensors).layers.items():
        place, up = place_of(name), parts["up"]
        scale = settings_of(header, place.component).alpha_of(place.path, up.shape[1]) / up.shape[1]
        key = next(key for key, tensor in tensors.items() if tensor is up)
        found[key] = up.float() * scale
    return found


def other_kind(config: Mapping[str, Any]) -> str:
    """What PEFT's settings describe where that is no plain LoRA; else an empty text."""
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        return f"an adapter of PEFT's type {str(kind)[:40]!r}"
    if (config.get("bias") or "none") != "none":
        return "a LoRA with biases"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        return (
            f"a LoRA that starts from {start[:40]!r} and changes the model's own weights too (PEFT's save_pretrained "
            "turns it into a plain one with path_initial_model_for_weight_conversion)"
        )
    return next((what for option, what in _OTHER_FORWARD.items() if config.get(option)), "")


def doubts(layers: Mapping[str, Mapping[str, Tensor]], header: Mapping[str, str]) -> list[str]:
    """Why the strength of a file may be another than the one that it gets here, in sentences; empty as a rule.

    Args:
        layers: name in the file -> "down", "up" and maybe "alpha".
        header: its texts.
    """
    if OURS in header or not layers:
        return []
    try:
        config, source = _config(header)
    except ValueError:  # which is told, since nothing can be read then
        return []
    if any("alpha" in parts for parts in layers.values()):
        return list(_contradicted(layers, config, source))
    if any(key.rpartition(".")[2] in ("lora_alpha", "alpha_pattern") for key in config):
        if BESIDE in header or IN_HEADER in header:
            return []
        return [
            f"its strength is in doubt: alpha stands in {source} alone, which only this package reads; it is applied "
            "here, and other programs apply the layers as they are"
        ]
    return [*_by_trainer(layers, header), *_by_peft(layers)]


def _contradicted(layers: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], source: str) -> Iterator[str]:
    held = {float(parts["alpha"]) for parts in layers.values() if "alpha" in parts and parts["alpha"].numel() == 1}
    said = {value for key, value in config.items() if key.rpartition(".")[2] == "lora_alpha"}
    if said and not any(isinstance(value, int | float) and float(value) in held for value in said):
        numbers = ", ".join(f"{alpha:g}" for alpha in sorted(held)[:3])
        yield (
            f"its strength is in doubt: {source} says lora_alpha {', '.join(map(str, said))}, and its layers hold "
            f"alpha {numbers}, which is applied"
        )


def _by_trainer(layers: Mapping[str, Mapping[str, Tensor]], header: Mapping[str, str]) -> Iterator[str]:
    """Whoever wrote alpha into the header alone may have put it into the weights, or lost it."""
    said = dict(_numbers_in(header))
    alpha = next((said[name] for name in ALPHAS if name in said), None)
    if alpha is None:
        return
    ranks = {parts["down"].shape[0] for parts in layers.values() if "down" in parts and parts["down"].ndim}
    rank = next((said[name] for name in RANKS if name in said), max(ranks, default=0))
    if rank > 0 and alpha != rank:
        yield (
            f"its strength is in doubt: its header says alpha {alpha:g} for rank {rank:g}, and its layers hold no "
            f"alpha, so that they are applied in full, as other programs do; if alpha is not in the weights already, "
            f"give the scale {alpha / rank:g}"
        )


def _numbers_in(header: Mapping[str, Any], deepest: int = 3) -> Iterator[tuple[str, float]]:
    """Alphas and ranks by the last part of their names, also those in tables of JSON."""
    for key, value in header.items():
        name = key.rpartition(".")[2]
        table = _value(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        if isinstance(table, dict):
            yield from _numbers_in(table, deepest - 1) if deepest else ()
        elif name in (*ALPHAS, *RANKS) and (number := _number_or_none(value)) is not None:
            yield name, number


def _by_peft(layers: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """PEFT's own names, and no settings with them."""
    bare = [name for name in layers if place_of(name).scheme == "PEFT"]
    if bare:
        yield (
            f"its strength is in doubt: it has PEFT's own names ({bare[0]}), and PEFT keeps alpha in {CONFIG_FILE}, "
            "which is not next to it; it is applied as if alpha were the rank"
        )


# --- inside ----------------------------------------------------------------------------------------------------------


def _config(header: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """PEFT's settings and where they stand: next to the file, in diffusers' JSON, or in plain texts of the header."""
    if BESIDE in header:
        return _mapping(header[BESIDE], CONFIG_FILE), CONFIG_FILE
    if IN_HEADER in header:
        return _mapping(header[IN_HEADER], IN_HEADER), IN_HEADER
    plain = {
        key: _value(text) for key, text in header.items() if key.rpartition(".")[2] in PLAIN and OURS not in header
    }
    return plain, "its header"


def _mapping(text: str, called: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{called} is damaged: it is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{called} is damaged: it is no table of settings")
    return found


def _value(text: str) -> Any:
    """A text of a header as what it stands for: a number, a JSON table, True of Python or JSON."""
    if text.strip() in ("True", "False", "None", ""):
        return {"True": True, "False": False}.get(text.strip())
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(value: Any, called: str) -> float:
    number = _number_or_none(value)
    if number is None:
        raise ValueError(f"{called} is {str(value)[:40]!r}, where a number is needed")
    if abs(number) > MOST_ALPHA:
        raise ValueError(f"{called} is {number:g}, and none in use is beyond {MOST_ALPHA:g}")
    return number


def _number_or_none(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _pattern(key: str, source: str) -> str:
    """A name or regular expression of PEFT's, which is matched in bounded time. Raises ValueError."""
    if _PATH.fullmatch(key):
        return key
    said = f"alpha_pattern in {source} holds {key[:60]!r}, which is no pattern of names"
    if len(key) > LONGEST_NAME or len(_UNBOUNDED.findall(key)) > MOST_REPEATS or _DEEP.search(key):
        raise ValueError(f"{said} that is read here")
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{said} ({error})") from error
    return key


def _matches(key: str, name: str) -> bool:
    """Whether PEFT takes the pattern for the layer: it matches the name, or its end after a dot."""
    if _PATH.fullmatch(key):
        bare = key.removesuffix("$")
        return name == bare.removeprefix("^") or (not bare.startswith("^") and name.endswith(f".{bare}"))
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a layer is called {name[:60]!r}…, which is too long for the patterns of alpha_pattern")
    return re.match(rf"(.*\.)?({key})$", name) is not None
