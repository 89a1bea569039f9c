"""What nodes show for the package's settings and rewards: widgets, and values back. ComfyUI is not needed here."""

import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from alignprop_pipe.config.code import BY_TEXT, WAY_OUT, refuse_code
from alignprop_pipe.config.settings import FIELD_PATHS, PRESETS, AlignConfig, leaves
from alignprop_pipe.errors import ConfigError, RewardError
from alignprop_pipe.rewards.registry import REGISTRY, RewardEntry
from alignprop_pipe.sources import expanded, is_file

Kind = Literal["INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"]

UP_FRONT = (
    "steps", "seed", "batch_size", "gradient_accumulation_steps", "rank", "lr", "num_inference_steps", "guidance_scale",
    "truncation", "eval_prompts",
)  # fmt: skip
"""Settings that the Align node shows at once; the others are in its advanced group."""

SMALL = {
    "lr": 1e-5, "weight_decay": 1e-5, "distance_weight": 1e-3, "max_grad_norm": 0.01, "eta": 0.05, "alpha": 0.5,
}  # fmt: skip
"""Steps of the arrows of number widgets that are not 0.1."""
HIGHEST = {
    "lr": 1.0, "weight_decay": 10.0, "guidance_scale": 100.0, "alpha": 65536.0, "height": 8192, "width": 8192,
    "batch_size": 4096, "eval_batch_size": 4096,
}  # fmt: skip
"""Where the arrows of number widgets end, of settings that know no end themselves."""


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
    blank = "0" if kind in ("INT", "FLOAT") else "empty"
    tooltip = about["help"].replace("(default: ", f"({blank}: ")
    tooltip += "; commas between them" if isinstance(default, tuple) else ""
    return Widget(name, kind, shown, tooltip, low, high, step, options, advanced=name not in UP_FRONT)


def _kind_of(name: str) -> tuple[Kind, tuple[str, ...]]:
    """The widget of a setting by the type of its field, and the choices of a combo."""
    kind = FIELD_PATHS[name][1].type
    if get_origin(kind) is Literal:
        return "COMBO", tuple(map(str, get_args(kind)))
    members = [one for one in get_args(kind) if one is not type(None)] or [kind]
    if str in members:  # next to a truth, which is said as yes or no
        return "STRING", ()
    known: dict[Any, Kind] = {bool: "BOOLEAN", int: "INT", float: "FLOAT"}
    return known.get(members[0], "STRING") if get_origin(kind) is not tuple else "STRING", ()


def _shown(value: Any, kind: Kind) -> Any:
    if value is None:
        return {"INT": 0, "FLOAT": 0.0}.get(kind, "")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool) and kind == "STRING":
        return "yes" if value else "no"
    return str(value) if is_dataclass(value) else value


def _range(name: str, kind: Kind, about: Mapping[str, Any], default: Any) -> tuple[Any, Any, Any]:
    if kind not in ("INT", "FLOAT"):
        return None, None, None
    step = 8 if name in ("height", "width") else 1 if kind == "INT" else SMALL.get(name, 0.1)
    # A number above 0 begins a hundredth of a step above it; one that may be left out begins at 0, which says so.
    low = 0 if default is None or about["low"] is None else about["low"]
    low = about["above"] + round(step / 100, 9) if about["above"] is not None and default is not None else low
    high = about["high"] if about["high"] is not None else HIGHEST.get(name, 1_000_000)
    return (int(low), int(high), step) if kind == "INT" else (float(low), float(high), step)


def config_from(values: Mapping[str, Any]) -> AlignConfig:
    """The settings that widgets hold. Raises ConfigError, and RewardError for judges that name code."""
    known = {name: _setting_value(name, value) for name, value in values.items() if name in FIELD_PATHS}
    config = AlignConfig().replace(**{**values, **known})
    if not code_allowed():
        for judge in config.evaluation.judges:
            refuse_code(judge)
    return config


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
    """At commas and line ends that are in no brackets and quotes: judges are expressions with commas of their own."""
    parts, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in "\"'":
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter in ",\n" and not quote and depth <= 0:
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
    "number": (0, 24, 1),
    "threshold": (0.0, 0.99, 0.01),
    "scale": (0.0, 1000.0, 0.1),
}
"""Range and step of the rewards' number parameters; those of users' own rewards have a wide one."""
DTYPES = ("float32", "bfloat16", "float16")
ANY_NAME = inspect.Parameter.VAR_KEYWORD


def code_allowed() -> bool:
    """Whether whoever started the server lets workflows name Python code: ALIGNPROP_ALLOW_CODE=1."""
    return os.environ.get("ALIGNPROP_ALLOW_CODE") == "1"


def reward_names() -> list[str]:
    """The rewards that can be chosen in a list; those that combine others are nodes of their own."""
    return [
        name
        for name, entry in REGISTRY.items()
        if not entry.combines and not entry.judge and (name != BY_TEXT or code_allowed())
    ]


def reward_parameters(name: str) -> tuple[Widget, ...]:
    """A widget for every parameter of a reward. A licence is accepted on the node itself."""
    return _parameters(REGISTRY[name])


@cache
def _parameters(entry: RewardEntry) -> tuple[Widget, ...]:
    told = _told(entry)
    named = (spec for spec in _signature(entry) if spec.kind not in (ANY_NAME, inspect.Parameter.VAR_POSITIONAL))
    return tuple(_parameter(spec, told.get(spec.name, "")) for spec in named if spec.name != "accept_license")


def _signature(entry: RewardEntry) -> list[inspect.Parameter]:
    return list(inspect.signature(entry.kind.__init__).parameters.values())[1:]


def _parameter(spec: inspect.Parameter, told: str) -> Widget:
    required = spec.default is inspect.Parameter.empty
    default = "" if required or spec.default is None else spec.default
    kind = _parameter_kind(spec, default)
    low, high, step = NUMBERS.get(spec.name, (-1e6, 1e6, 1 if kind == "INT" else 0.01))
    if kind in ("INT", "FLOAT"):
        # An optional number is empty at its lowest value, which no reward takes.
        default = default if default != "" else -1 if kind == "INT" else 0.0
        told = re.sub(r"\bNone\b", str(default), told)
        return Widget(spec.name, kind, default, told, min(low, default), high, step, required=required)
    if kind == "STRING":
        default, told = str(default), re.sub(r"\bNone\b", "empty", told)
    options = DTYPES if kind == "COMBO" else ()
    return Widget(spec.name, kind, default, told, options=options, required=required)


def _parameter_kind(spec: inspect.Parameter, default: Any) -> Kind:
    if spec.name == "dtype" and default in DTYPES:
        return "COMBO"
    for kind, name in ((bool, "BOOLEAN"), (int, "INT"), (float, "FLOAT")):
        if type(default) is kind and not (kind is int and float in get_args(spec.annotation)):
            return cast(Kind, name)
    members = set(get_args(spec.annotation)) if spec.name in NUMBERS else set()
    return "FLOAT" if float in members else "INT" if int in members else "STRING"


def _told(entry: RewardEntry) -> dict[str, str]:
    """What the docstrings of a reward and of its base classes say of the parameters, by name."""
    told: dict[str, str] = {}
    for kind in entry.kind.__mro__:
        section = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
        for match in re.finditer(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
            told.setdefault(match[1], re.sub(r"\s+", " ", match[2]).replace("`", ""))
    return told


def reward_text(name: str, parameters: str) -> str:
    """The expression for a reward with parameters in JSON: `jpeg(quality=60)`. Raises RewardError.

    A parameter that is empty, or as the widget shows it at first, is left to the reward.
    """
    if name not in REGISTRY:
        raise RewardError(f"reward {name!r} is not known; known: {', '.join(reward_names())}")
    if name == BY_TEXT and not code_allowed():
        raise RewardError(f"{name!r} {WAY_OUT}")
    known = {widget.name: widget for widget in reward_parameters(name)}
    values = {
        key: value
        for key, value in _given(name, parameters).items()
        if value not in ("", None) and not (key in known and _same(known[key].default, value))
    }
    for widget in known.values():
        if widget.required and widget.name not in values:
            raise RewardError(f"reward {name!r} needs {widget.name}: {widget.tooltip}")
    arguments = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"{name}({arguments})" if arguments else name


def _given(name: str, parameters: str) -> dict[str, Any]:
    try:
        given = json.loads(parameters or "{}")
    except (ValueError, RecursionError) as error:
        raise RewardError(f'the parameters of {name!r} are no JSON ({error}); an example: {{"quality": 60}}') from error
    if not isinstance(given, dict):
        raise RewardError(
            f'the parameters of {name!r} are {parameters!r}; an example of what is needed: {{"quality": 60}}'
        )
    signature = _signature(REGISTRY[name])
    takes = [spec.name for spec in signature if spec.kind is not ANY_NAME]
    free = len(takes) < len(signature)
    if unknown := [key for key in given if key not in takes and not (free and key.isidentifier())]:
        listed = f"it takes {', '.join(takes)}" if takes else "it takes none"
        raise RewardError(f"{unknown[0]!r} is no parameter of reward {name!r}; {listed}")
    return given


def _same(default: Any, value: Any) -> bool:
    return default == value and isinstance(default, bool) == isinstance(value, bool)


def connected(reward: Any) -> Any:
    """The reward on a socket. A workflow can write anything there in place of a link. Raises RewardError."""
    from alignprop_pipe.rewards.base import Reward

    if not isinstance(reward, Reward):
        raise RewardError(f"the input 'reward' holds {reward!r} and no reward: connect a Reward or Reward from Text")
    return reward


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
        for file in (expanded(path), expanded(path) / "model_index.json"):
            if is_file(file):
                about = file.stat()
                parts.append(f"{file.name}:{about.st_mtime_ns}:{about.st_size}")
    return " ".join(parts)
