"""What nodes show for the package's settings and rewards: widgets, and values back. ComfyUI is not needed here."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from alignprop_pipe.config import FIELD_PATHS, PRESETS, AlignConfig, leaves
from alignprop_pipe.errors import ConfigError, RewardError
from alignprop_pipe.rewards.registry import REGISTRY, RewardEntry

Kind = Literal["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"]

UP_FRONT = (
    "steps", "seed", "batch_size", "gradient_accumulation_steps", "rank", "lr", "num_inference_steps", "guidance_scale",
    "truncation", "eval_prompts",
)  # fmt: skip
"""Settings that the Align node shows at once; the others are in its advanced group."""

SMALL = {"lr": 1e-5, "weight_decay": 1e-5, "distance_weight": 1e-3, "max_grad_norm": 0.01, "eta": 0.05, "alpha": 0.5}
"""Steps of the arrows of number widgets that are not 0.1."""
MOST = 2**31 - 1
SEEDS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Widget:
    """One input with a widget, whatever ComfyUI's version calls its class."""

    name: str
    kind: Kind
    default: Any
    tooltip: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    options: tuple[str, ...] = ()
    multiline: bool = False
    advanced: bool = False
    required: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


# --- settings --------------------------------------------------------------------------------------------------------


@cache
def setting_widgets() -> tuple[Widget, ...]:
    """A widget for every setting of AlignConfig, in its order but for those up front."""
    made = {name: _setting(name, spec.metadata, value) for name, spec, value in leaves(AlignConfig())}
    return tuple(made[name] for name in (*UP_FRONT, *(name for name in made if name not in UP_FRONT)))


def _setting(name: str, about: Mapping[str, Any], default: Any) -> Widget:
    kind, options = _kind_of(name)
    shown = _shown(default, kind)
    low, high, step = _range(name, kind, about, default)
    tooltip = about["help"] + (" (0: the default)" if default is None else "")
    return Widget(name, kind, shown, tooltip, low, high, step, options, advanced=name not in UP_FRONT)


def _kind_of(name: str) -> tuple[Kind, tuple[str, ...]]:
    """The widget of a setting by the type of its field, and the choices of a combo."""
    kind = FIELD_PATHS[name][1].type
    if get_origin(kind) is Literal:
        return "COMBO", tuple(map(str, get_args(kind)))
    members = [one for one in get_args(kind) if one is not type(None)] or [kind]
    known: dict[Any, Kind] = {bool: "BOOLEAN", int: "INT", float: "FLOAT"}
    return known.get(members[0], "STRING") if get_origin(kind) is not tuple else "STRING", ()


def _shown(value: Any, kind: Kind) -> Any:
    if value is None:
        return {"INT": 0, "FLOAT": 0.0}.get(kind, "")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value) if is_dataclass(value) else value


def _range(name: str, kind: Kind, about: Mapping[str, Any], default: Any) -> tuple[Any, Any, Any]:
    if kind not in ("INT", "FLOAT"):
        return None, None, None
    low = about["low"] if about["low"] is not None else about["above"]
    low = 0 if default is None or low is None else low
    if kind == "INT":
        return int(low), SEEDS if name == "seed" else int(about["high"] or 1_000_000), 1
    return float(low), float(about["high"] or 1_000_000.0), SMALL.get(name, 0.1)


def config_from(values: Mapping[str, Any]) -> AlignConfig:
    """The settings that widgets hold. Raises ConfigError."""
    return AlignConfig().replace(**{name: _setting_value(name, value) for name, value in values.items()})


def _setting_value(name: str, value: Any) -> Any:
    spec = FIELD_PATHS[name][1]
    if spec.default is None and value == 0:
        return None
    if get_origin(spec.type) is tuple:
        return _listed(name, str(value), spec.type)
    return value


def _listed(name: str, text: str, kind: Any) -> tuple[Any, ...]:
    parts = [part.strip() for part in _split(text) if part.strip()]
    try:
        return tuple(float(part) if float in get_args(kind) else part for part in parts)
    except ValueError as error:
        raise ConfigError(f"{name} = {text!r}: numbers with commas between them are needed") from error


def _split(text: str) -> list[str]:
    """At commas and line ends that are in no brackets: judges are expressions with commas of their own."""
    parts, depth = [""], 0
    for letter in text.replace("\n", ","):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Every preset's values as the widgets show them, for the node's own script."""
    known = {name: AlignConfig.preset(name) for name in PRESETS}
    return {
        preset: {name: _shown(value, _kind_of(name)[0]) for name, _, value in leaves(config)}
        for preset, config in known.items()
    }


# --- rewards ---------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[float, float, float]] = {
    "quality": (1, 100, 1),
    "number": (0, 100, 1),
    "threshold": (0.0, 0.99, 0.01),
    "scale": (0.0, 1000.0, 0.1),
}
"""Range and step of the rewards' number parameters."""
DTYPES = ("float32", "bfloat16", "float16")
OBJECTS = 'name, several with commas, or JSON such as {"dog": 2}; empty: what the prompt says'


def reward_names() -> list[str]:
    """The rewards that can be chosen in a list; those that combine others are nodes of their own."""
    return [name for name, entry in REGISTRY.items() if not entry.combines and not entry.judge]


@cache
def reward_parameters(name: str) -> tuple[Widget, ...]:
    """A widget for every parameter of a reward."""
    entry = REGISTRY[name]
    if name == "python":
        return (Widget("source", "STRING", "", "module:function, or file.py:function"),)
    told = _told(entry)
    found = inspect.signature(_class(entry).__init__).parameters
    return tuple(_parameter(spec, told.get(spec.name, "")) for spec in list(found.values())[1:])


def _parameter(spec: inspect.Parameter, told: str) -> Widget:
    default = "" if spec.default is inspect.Parameter.empty or spec.default is None else spec.default
    members = set(get_args(spec.annotation)) or {spec.annotation}
    low, high, step = NUMBERS.get(spec.name, (None, None, None))
    if spec.name == "dtype":
        return Widget("dtype", "COMBO", default, told, options=DTYPES)
    if isinstance(default, bool):
        return Widget(spec.name, "BOOLEAN", default, told)
    kind: Kind = "FLOAT" if float in members else "INT" if int in members else "STRING"
    if spec.name in NUMBERS and kind != "STRING":
        # An optional number is empty at its lowest value, which no reward takes.
        start = default if default != "" else -1 if kind == "INT" else 0.0
        return Widget(spec.name, kind, start, told, min(low or 0, start), high, step)
    return Widget(spec.name, "STRING", str(default), told or OBJECTS)


def _class(entry: RewardEntry) -> Any:
    module, _, attribute = entry.where.partition(":")
    return entry.registered or getattr(import_module(module), attribute)


def _told(entry: RewardEntry) -> dict[str, str]:
    """What the docstrings of a reward and of its base classes say of the parameters, by name."""
    told: dict[str, str] = {}
    for kind in _class(entry).__mro__:
        section = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for match in re.finditer(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
            told.setdefault(match[1], re.sub(r"\s+", " ", match[2]))
    return told


def reward_text(name: str, parameters: str) -> str:
    """The expression for a reward with parameters in JSON: `jpeg(quality=60)`. Raises RewardError."""
    if name not in REGISTRY:
        raise RewardError(f"reward {name!r} is not known; known: {', '.join(reward_names())}")
    try:
        given = json.loads(parameters or "{}")
    except ValueError as error:
        raise RewardError(f'the parameters of {name!r} are no JSON ({error}); an example: {{"quality": 60}}') from error
    if not isinstance(given, dict):
        raise RewardError(
            f'the parameters of {name!r} are {parameters!r}; an example of what is needed: {{"quality": 60}}'
        )
    if name == "python":
        return str(given.get("source", ""))
    if unknown := [key for key in given if not key.isidentifier()]:
        raise RewardError(f"{unknown[0]!r} is no parameter of {name!r}")
    values = ", ".join(f"{key}={_value(key, value)!r}" for key, value in given.items() if value not in ("", None))
    return f"{name}({values})" if values else name


def _value(key: str, value: Any) -> Any:
    """A text that stands for a list or a mapping, as such: `dog, cat` and `{"dog": 2}`."""
    if key != "objects" or not isinstance(value, str):
        return value
    if value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except ValueError as error:
            raise RewardError(f"objects = {value!r} is no JSON ({error})") from error
    names = [name.strip() for name in value.split(",") if name.strip()]
    return names if len(names) > 1 else value.strip()


@cache
def reward_script_data() -> dict[str, Any]:
    """What the Reward node's own script needs to draw the widgets of every reward."""
    keys = ("name", "kind", "default", "tooltip", "low", "high", "step")
    return {
        name: {
            "about": REGISTRY[name].summary,
            "range": REGISTRY[name].range_text,
            "parameters": [
                {key: getattr(widget, key) for key in keys} | {"options": list(widget.options)}
                for widget in reward_parameters(name)
            ],
        }
        for name in reward_names()
    }


# --- names of files --------------------------------------------------------------------------------------------------


def cleaned(path: str) -> str:
    """A pasted path without the quotes and blanks around it."""
    return path.strip().strip("\"'").strip()


def fingerprint(*paths: str) -> str:
    """Changes with a file's time and size, so that a node with a changed file runs again; a folder by its index."""
    parts = []
    for path in map(Path, filter(None, map(cleaned, paths))):
        for file in (path, path / "model_index.json"):
            if file.is_file():
                about = file.stat()
                parts.append(f"{file.name}:{about.st_mtime_ns}:{about.st_size}")
    return " ".join(parts)
