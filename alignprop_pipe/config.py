"""`AlignConfig`: everything that decides a run, as one frozen value. Python, command line and nodes read it.

Standard library only, so that `alignprop --help` can show every default without loading torch. Text becomes a
value once, at the edge; `str(value)` gives the text back.
"""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from alignprop_pipe.errors import ConfigError


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _float(name: str, number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ConfigError(f"{name} is a whole number of more than 300 digits: a smaller number is needed") from None


def _finite(name: str, value: Any) -> float:
    if not (_is_whole(value) or isinstance(value, float)) or not math.isfinite(number := _float(name, value)):
        raise ConfigError(f"{name}={value!r}): a finite number is needed")
    return number


# --- truncation: which of the last steps carry gradient ---


@dataclass(frozen=True, slots=True)
class FullBackprop:
    """Every denoising step carries gradient (DRaFT, arXiv 2309.17400; collapses early, AlignProp section 4)."""

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class LastK:
    """The last `k` denoising steps carry gradient (DRaFT-K)."""

    k: int

    def __post_init__(self) -> None:
        if not _is_whole(self.k) or self.k < 1:
            raise ConfigError(
                f"LastK(k={self.k!r}): k must be a whole number, 1 or more; with no graded step nothing is trained"
            )

    def __str__(self) -> str:
        return f"last:{self.k}"


@dataclass(frozen=True, slots=True)
class RandomLastK:
    """The last K steps, K uniform on low..high, drawn once per trajectory (AlignProp, section 3.3).

    The paper draws from 0..T; K = 0 would train nothing, so `low` starts at 1. `high=None` means T.
    """

    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        whole = _is_whole(self.low) and (self.high is None or _is_whole(self.high))
        if not whole or self.low < 1 or (self.high is not None and self.high < self.low):
            raise ConfigError(
                f"RandomLastK(low={self.low!r}, high={self.high!r}): whole numbers with 1 <= low <= high are needed; "
                "high=None means every step"
            )

    def __str__(self) -> str:
        if (self.low, self.high) == (1, None):
            return "random"
        return f"random:{self.low}-{'' if self.high is None else self.high}"


Truncation = FullBackprop | LastK | RandomLastK


def truncation_from_text(text: str) -> Truncation:
    """`full`, `last:5`, `random`, `random:1-10` or `random:3-` -> the value. Raises ConfigError."""
    name, _, rest = text.strip().lower().partition(":")
    try:
        if name == "full" and not rest:
            return FullBackprop()
        if name == "last":
            return LastK(int(rest))
        if name == "random":
            low, dash, high = rest.partition("-")
            if dash or not rest:
                return RandomLastK(int(low or 1), int(high) if high else None)
    except ConfigError:
        raise
    except ValueError:
        pass
    raise ConfigError(f"truncation {text!r} is not known; use one of: full, last:5, random, random:1-10")


# --- gradient checkpointing: which graded steps are computed twice ---


@dataclass(frozen=True, slots=True)
class RecomputeAll:
    """Every graded step is recomputed in the backward pass: least memory, flat in the number of steps."""

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class RecomputeNone:
    """Every graded step keeps its activations: fastest, memory grows with K."""

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class KeepSteps:
    """`steps` graded steps (the last ones) keep their activations, the others are recomputed."""

    steps: int

    def __post_init__(self) -> None:
        if not _is_whole(self.steps) or self.steps < 0:
            raise ConfigError(f"KeepSteps(steps={self.steps!r}): a number of graded steps, 0 or more, is needed")

    def __str__(self) -> str:
        return str(self.steps)


Checkpointing = RecomputeAll | RecomputeNone | KeepSteps


def checkpointing_from_text(text: str) -> Checkpointing:
    """`all`, `none` or a number of graded steps to keep -> the value. Raises ConfigError."""
    text = text.strip().lower()
    if text == "all":
        return RecomputeAll()
    if text == "none":
        return RecomputeNone()
    try:
        return KeepSteps(int(text))
    except ValueError:  # a ConfigError too: KeepSteps(-1)
        raise ConfigError(
            f"checkpointing {text!r} is not known; use one of: all, none, or a number of graded steps to keep"
        ) from None


# --- losses: what the optimizer makes of the rewards ---


@dataclass(frozen=True, slots=True)
class Maximize:
    """loss = -mean(reward)."""

    def __str__(self) -> str:
        return "maximize"


@dataclass(frozen=True, slots=True)
class Target:
    """loss = mean(|reward - value|); the paper's aesthetic run aims at 10."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _finite("Target(value", self.value))

    def __str__(self) -> str:
        return f"target:{self.value!r}"


@dataclass(frozen=True, slots=True)
class Hinge:
    """loss = mean(relu(margin - reward)): pictures past the margin pull no more (ReFL uses 2)."""

    margin: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", _finite("Hinge(margin", self.margin))

    def __str__(self) -> str:
        return f"hinge:{self.margin!r}"


Loss = Maximize | Target | Hinge


def loss_from_text(text: str) -> Loss:
    """`maximize`, `target:10` or `hinge:2` -> the value. Raises ConfigError."""
    name, _, rest = text.strip().lower().partition(":")
    try:
        if name == "maximize" and not rest:
            return Maximize()
        if name in ("target", "hinge"):
            return Target(float(rest)) if name == "target" else Hinge(float(rest))
    except ValueError:  # a ConfigError too: target:nan
        pass
    raise ConfigError(f"loss {text!r} is not known; use one of: maximize, target:10, hinge:2")


# --- the fields ---


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its help text and its range: `low` and `high` belong to it, `above` does not."""
    return field(default=default, metadata={"help": help, "parse": parse, "low": low, "high": high, "above": above})


class _Checked:
    """Brings every setting into its field's type where nothing is lost (5 -> 5.0, list -> tuple), then checks it."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for spec in fields(typing.cast(Any, self)):
            if spec.name in PARTS:
                _check_part(spec.name, getattr(self, spec.name))
                continue
            value = _exact(spec.name, spec, getattr(self, spec.name))
            _check(spec.name, spec, value)
            object.__setattr__(self, spec.name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions(_Checked):
    """The adapter that is trained."""

    rank: int = option(4, "rank of the LoRA (paper: 4)", low=1, high=4096)
    alpha: float | None = option(None, "LoRA alpha; the update is scaled by alpha / rank (default: the rank)", above=0)
    target_modules: tuple[str, ...] = option(
        (), "names of the linear layers to adapt (default: every linear layer of the denoiser's attention modules)"
    )
    init_lora_weights: Literal["default", "gaussian"] = option(
        "default", "how the down-projection starts: PEFT's default or gaussian; the up-projection starts at zero"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions(_Checked):
    """AdamW (paper: lr 1e-3, betas .9 and .999, weight decay 0.1, clip 5)."""

    lr: float = option(1e-3, "learning rate", above=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "constant", "how the learning rate goes over the run: constant (the paper's), or falling to zero"
    )
    warmup_steps: int = option(0, "steps in which the learning rate rises from zero", low=0)
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's running averages", low=0, high=0.999999)
    weight_decay: float = option(0.1, "AdamW's weight decay", low=0)
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(_Checked):
    """How pictures are made during training and for the held-out evidence: arguments of the stock pipeline."""

    num_inference_steps: int = option(50, "denoising steps T (paper: 50)", low=1, high=1000)
    guidance_scale: float = option(7.5, "classifier-free guidance (paper: 7.5)", low=0)
    eta: float = option(0.0, "share of fresh noise in DDIM steps, 0 to 1; ignored by other schedulers", low=0, high=1)
    height: int | None = option(None, "height in pixels (default: the pipeline's)", low=8)
    width: int | None = option(None, "width in pixels (default: the pipeline's)", low=8)
    negative_prompt: str = option("", "what the pictures should not show")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(_Checked):
    """Held-out prompts with fixed noise, rendered and scored before, during and after the run."""

    eval_every: int = option(
        10, "optimizer steps between looks at the held-out prompts; 0: only before and after", low=0
    )
    eval_prompts: int = option(16, "number of held-out prompts; 0 switches the evidence off", low=0)
    eval_batch_size: int = option(8, "pictures made at once for the evidence", low=1)
    keep_best: bool = option(True, "keep the adapter with the best held-out score, not the last one")
    patience: int = option(0, "stop after so many looks in a row without a better held-out score; 0: never", low=0)
    judges: tuple[str, ...] = option(
        (), "reward expressions that are only watched on the held-out pictures, never trained on"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignConfig(_Checked):
    """Everything that decides a run (see the fields; `AlignConfig.preset` has named starting points)."""

    steps: int = option(60, "optimizer steps", low=1)
    batch_size: int = option(4, "pictures made at once", low=1)
    gradient_accumulation_steps: int = option(
        1, "batches whose gradients are summed for one optimizer step (paper: 128 pictures in all)", low=1
    )
    seed: int = option(0, "the run's only source of randomness", low=0, high=2**63 - 1)
    truncation: Truncation = option(
        RandomLastK(), "steps that carry gradient: full, last:5, random, random:1-10", parse=truncation_from_text
    )
    checkpointing: Checkpointing = option(
        RecomputeAll(),
        "graded steps computed twice to save memory: all, none, or how many to keep",
        parse=checkpointing_from_text,
    )
    loss: Loss = option(Maximize(), "what becomes of the rewards: maximize, target:10, hinge:2", parse=loss_from_text)
    distance_weight: float = option(
        0.0, "weight of the mean squared distance to the base model's noise prediction (DRaFT+)", low=0
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "autocast of the denoising chain: no (the pipeline's own dtype), fp16 or bf16"
    )
    max_skipped: int = option(5, "non-finite steps in a row that end the run", low=1)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    @classmethod
    def preset(cls, name: str) -> "AlignConfig":
        """A named starting point: see `PRESETS`. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is not known; {_nearest(name, PRESETS)}")
        return cls().replace(**PRESETS[name])

    def replace(self, **overrides: Any) -> "AlignConfig":
        """A copy with some fields changed, by flat names: `config.replace(steps=8, rank=16, truncation="last:2")`."""
        changed = {name: overrides.pop(name) for name in PARTS if name in overrides}  # whole parts before single fields
        for part, value in changed.items():
            _check_part(part, value)
        _refuse_unknown(overrides, FIELD_PATHS)
        for name, given in overrides.items():
            part, spec = FIELD_PATHS[name]
            value = value_from(name, spec, given)
            if part is None:
                changed[name] = value
            else:
                changed[part] = dataclasses.replace(changed.get(part, getattr(self, part)), **{name: value})
        return dataclasses.replace(self, **changed)

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as the dataclass is; choices as their texts."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], base: "AlignConfig | None" = None) -> "AlignConfig":
        """The inverse of `to_dict`; fields that are absent keep the value of `base` (default: the defaults).

        Raises ConfigError for an unknown key, with the nearest right one, and for a value out of range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"the configuration must be a table of settings, not {type(data).__name__}")
        flat = {name: value for name, value in data.items() if not (name in PARTS and isinstance(value, Mapping))}
        _refuse_unknown(flat, {*PARTS, *FIELD_PATHS})
        for part in PARTS:
            inside = data.get(part)
            if not isinstance(inside, Mapping):
                continue
            _refuse_unknown(inside, [f.name for f in fields(PARTS[part])], f"{part}.")
            if twice := [name for name in inside if name in flat]:
                raise ConfigError(f"setting {twice[0]!r} is given twice, alone and in {part!r}; keep one")
            flat |= inside
        return (base or cls()).replace(**flat)

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal value back."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, base: "AlignConfig | None" = None) -> "AlignConfig":
        """The inverse of `to_json`; see `from_dict` for `base`. Raises ConfigError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        return cls.from_dict(data, base)

    def to_toml(self) -> str:
        """TOML; a field that is None is left out, since TOML has no null and None is its default."""
        top, tables = [], []
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                tables += [f"\n[{name}]", *_toml_lines(value)]
            else:
                top += _toml_lines({name: value})
        return "\n".join([*top, *tables]) + "\n"

    @classmethod
    def from_toml(cls, text: str, base: "AlignConfig | None" = None) -> "AlignConfig":
        """The inverse of `to_toml`; see `from_dict` for `base`. Raises ConfigError."""
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]  # not installed on newer Pythons
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the configuration is not TOML: {error}") from error
        return cls.from_dict(data, base)

    @classmethod
    def load(cls, path: str | Path, base: "AlignConfig | None" = None) -> "AlignConfig":
        """Read a .toml or .json file. Raises ConfigError, which names the file."""
        path = Path(path)
        readers = {".toml": cls.from_toml, ".json": cls.from_json}
        read = readers.get(path.suffix.lower())
        if read is None:
            raise ConfigError(f"configuration file {str(path)!r}: a name that ends in .toml or .json is needed")
        try:
            text = path.read_text(encoding="utf-8-sig")  # -sig: some editors put a byte order mark first
        except (OSError, ValueError) as error:
            raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error
        try:
            return read(text, base)
        except ConfigError as error:
            raise ConfigError(f"configuration file {str(path)!r}: {error}") from error


PARTS: dict[str, type] = {
    "lora": LoraOptions,
    "optimizer": OptimizerOptions,
    "sampling": SamplingOptions,
    "evaluation": EvaluationOptions,
}

FIELD_PATHS: dict[str, tuple[str | None, dataclasses.Field]] = {
    **{f.name: (None, f) for f in fields(AlignConfig) if f.name not in PARTS},
    **{f.name: (part, f) for part, kind in PARTS.items() for f in fields(kind)},
}
"""Every flat name -> the part it lives in (None: AlignConfig itself) and its field."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "steps": 60,
        "batch_size": 4,
        "gradient_accumulation_steps": 32,
        "rank": 4,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 5.0,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "eta": 0.0,
        "truncation": RandomLastK(),
    },
    "fast": {
        "steps": 40,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "truncation": RandomLastK(1, 8),
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    },
    "emoji": {
        "steps": 70,
        "batch_size": 12,
        "rank": 16,
        "lr": 5e-3,
        "lr_scheduler": "cosine",
        "loss": Hinge(0.8),
        "weight_decay": 1e-4,
        "max_grad_norm": 0.05,
        "truncation": RandomLastK(4),
        "checkpointing": RecomputeNone(),
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "eval_prompts": 100,
        "eval_batch_size": 25,
        "eval_every": 0,
        "judges": ("emoji_judge",),
    },
}
"""`paper`: AlignProp, arXiv 2310.03739. `fast`: the authors' later code. `emoji`: the model that ships inside."""


def leaves(config: AlignConfig) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every single setting: flat name, field, value."""
    for name, (part, spec) in FIELD_PATHS.items():
        holder = config if part is None else getattr(config, part)
        yield name, spec, getattr(holder, name)


def value_from(name: str, spec: dataclasses.Field, value: Any) -> Any:
    """Turn text, a list or an int into what the field holds, where that loses nothing. Raises ConfigError."""
    parse = spec.metadata["parse"]
    if parse is not None and (isinstance(value, str) or _is_whole(value)):
        return parse(str(value))
    return _exact(name, spec, value)


# --- inside ---


def _exact(name: str, spec: dataclasses.Field, value: Any) -> Any:
    """A list as a tuple and a whole number as a float, where the field holds these; anything else as it came."""
    kinds = _kinds(spec)
    if tuple in kinds and isinstance(value, list | tuple):
        floats = float in kinds[tuple]
        return tuple(_float(name, one) if floats and _is_whole(one) else one for one in value)
    return _float(name, value) if float in kinds and _is_whole(value) else value


def _kinds(spec: dataclasses.Field) -> dict[Any, tuple]:
    """The types that a field takes, each with its arguments: `int | None` -> {int: (), NoneType: ()}."""
    union = isinstance(spec.type, types.UnionType) or typing.get_origin(spec.type) is typing.Union
    members = typing.get_args(spec.type) if union else (spec.type,)
    return {typing.get_origin(member) or member: typing.get_args(member) for member in members}


def _fits(value: Any, kind: Any, arguments: tuple) -> bool:
    if kind is Literal:
        return value in arguments
    if kind is tuple:
        shape_ok = isinstance(value, tuple) and (Ellipsis in arguments or len(value) == len(arguments))
        return shape_ok and all(isinstance(v, arguments[0]) and not isinstance(v, bool) for v in value)
    return isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))


_WORDS: dict[type, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "truths"),
    types.NoneType: ("nothing (None)", ""),
}


def _type_text(spec: dataclasses.Field) -> str:
    names = []
    for kind, arguments in _kinds(spec).items():
        if kind is Literal:
            names.append(" or ".join(map(repr, arguments)))
        elif kind is tuple:
            inner = _WORDS[arguments[0]][1]
            names.append(f"a list of {inner}" if Ellipsis in arguments else f"a list of {len(arguments)} {inner}")
        else:
            names.append(_WORDS[kind][0] if kind in _WORDS else f"{kind.__name__}(...)")
    return " or ".join(names)


def _check(name: str, spec: dataclasses.Field, value: Any) -> None:
    if not any(_fits(value, kind, arguments) for kind, arguments in _kinds(spec).items()):
        texts = f" ({spec.metadata['help']})" if spec.metadata["parse"] else ""
        raise ConfigError(f"{name} = {value!r}: {_type_text(spec)} is needed{texts}")
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) or _is_whole(one):
            _check_range(name, spec.metadata, one)
        elif isinstance(one, str) and any("\ud800" <= letter <= "\udfff" for letter in one):
            raise ConfigError(f"{name} = {one!r}: text with half a character in it (a lone surrogate) cannot be used")


def _check_range(name: str, limits: Mapping[str, Any], number: float) -> None:
    low, high, above = limits["low"], limits["high"], limits["above"]
    finite = isinstance(number, int) or math.isfinite(number)
    if finite and (low is None or number >= low) and (above is None or number > above):
        if high is None or number <= high:
            return
    bounds = [f">= {low}" if low is not None else "", f"> {above}" if above is not None else ""]
    bounds.append(f"<= {high}" if high is not None else "")
    raise ConfigError(f"{name} = {number!r}: a finite number {' and '.join(filter(None, bounds))} is needed")


def _check_part(name: str, value: Any) -> None:
    kind = PARTS[name]
    if not isinstance(value, kind):
        inside = ", ".join(f.name for f in fields(kind))
        raise ConfigError(f"{name} = {value!r}: {kind.__name__}(...) or a table with some of {inside} is needed")


def _refuse_unknown(names: Iterable[Any], known: Collection[str], prefix: str = "") -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"setting {prefix + str(name)!r} is not known; {_nearest(name, known)}")


def _nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def _plain(value: Any) -> Any:
    if type(value) in PARTS.values():
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if is_dataclass(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    # A JSON string, number, boolean or list of these is TOML as it stands, but for two things: TOML knows no
    # surrogate pairs (so emoji stay as they are), and the DEL character needs an escape.
    given = {name: value for name, value in values.items() if value is not None}
    texts = {name: json.dumps(value, ensure_ascii=False, allow_nan=False) for name, value in given.items()}
    return [f"{name} = {text}".replace("\x7f", "\\u007f") for name, text in texts.items()]
