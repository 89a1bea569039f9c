"""`AlignConfig`: everything that decides a run, as one frozen value. Python, command line and nodes read it.

Standard library only, so that `alignprop --help` can show every default without loading torch.
"""

import dataclasses
import difflib
import functools
import json
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from alignprop_pipe.config.choices import (
    Checkpointing,
    Loss,
    Maximize,
    RecomputeAll,
    RecomputeNone,
    checkpointing_from_text,
    followed_from_text,
    is_whole,
    loss_from_text,
)
from alignprop_pipe.config.code import refuse_code
from alignprop_pipe.config.fields import check, exact, option
from alignprop_pipe.config.truncation import RandomLastK, Truncation, truncation_from_text
from alignprop_pipe.errors import ConfigError, RewardError
from alignprop_pipe.files import decoded

Made = typing.TypeVar("Made")

CHOSEN = "auto"
"""In the place of a judge: one that costs nothing is chosen for the reward when the run starts."""


class _Checked:
    """Brings every setting into its field's type where nothing is lost (5 -> 5.0, list -> tuple), then checks it."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for spec in fields(typing.cast(Any, self)):
            if spec.name in PARTS:
                _check_part(spec.name, getattr(self, spec.name))
                continue
            value = exact(spec.name, spec, getattr(self, spec.name))
            check(spec.name, spec, value)
            object.__setattr__(self, spec.name, value)


def _by_name(kind: type[Made]) -> type[Made]:
    """The class, which says of a setting that it does not have where that one lives. Raises ConfigError."""
    fill, own = typing.cast(Any, kind.__init__), [f.name for f in fields(typing.cast(Any, kind))]

    @functools.wraps(fill)
    def __init__(self: Any, *given: Any, **settings: Any) -> None:
        if given:
            raise ConfigError(f"{kind.__name__} takes its settings by name, such as {own[0]}=...")
        for name in settings:
            if name not in own:
                raise ConfigError(_elsewhere(name, kind))
        fill(self, **settings)

    kind.__init__ = __init__
    return kind


@_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions(_Checked):
    """The adapter that is trained.

    Examples:
        >>> from alignprop_pipe import AlignConfig, LoraOptions
        >>> AlignConfig(lora=LoraOptions(rank=16)) == AlignConfig().replace(rank=16)
        True
    """

    rank: int = option(4, "rank of the LoRA (paper: 4)", low=1, high=4096)
    alpha: float | None = option(None, "LoRA alpha; the update is scaled by alpha / rank (default: the rank)", above=0)
    target_modules: tuple[str, ...] = option(
        (),
        "names of the layers to adapt, linear ones or convolutions (default: every linear layer of the denoiser's "
        "attention modules)",
    )
    init_lora_weights: Literal["default", "gaussian"] = option(
        "default", "how the down-projection starts: PEFT's default or gaussian; the up-projection starts at zero"
    )


@_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions(_Checked):
    """AdamW (paper: lr 1e-3, betas .9 and .999, weight decay 0.1, clip 5).

    Examples:
        >>> from alignprop_pipe import AlignConfig, OptimizerOptions
        >>> AlignConfig(optimizer=OptimizerOptions(lr=3e-4)) == AlignConfig().replace(lr=3e-4)
        True
    """

    lr: float = option(1e-3, "learning rate", above=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "constant", "how the learning rate goes over the run: constant (the paper's), or falling towards zero"
    )
    warmup_steps: int = option(
        0,
        "first steps in which the learning rate rises evenly, with every schedule; step n of them has n shares",
        low=0,
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's running averages", low=0, high=0.999999)
    weight_decay: float = option(0.1, "AdamW's weight decay", low=0)
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm", above=0)
    max_grad_growth: float | None = option(
        None,
        "each picture's gradient, on its way back through the denoising steps, is scaled down to this many times its "
        "norm at the finished latents (default: it may grow)",
        above=0,
    )


@_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(_Checked):
    """How pictures are made during training and for the held-out evidence: arguments of the stock pipeline.

    Examples:
        >>> from alignprop_pipe import AlignConfig, SamplingOptions
        >>> AlignConfig(sampling=SamplingOptions(guidance_scale=5.0)) == AlignConfig().replace(guidance_scale=5.0)
        True
    """

    num_inference_steps: int = option(50, "denoising steps T (paper: 50)", low=1, high=1000)
    guidance_scale: float = option(7.5, "classifier-free guidance (paper: 7.5)", low=0)
    eta: float = option(0.0, "share of fresh noise in DDIM steps, 0 to 1; ignored by other schedulers", low=0, high=1)
    height: int | None = option(None, "height in pixels (default: the pipeline's)", low=8)
    width: int | None = option(None, "width in pixels (default: the pipeline's)", low=8)
    negative_prompt: str = option("", "what the pictures should not show")


@_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(_Checked):
    """Held-out prompts with fixed noise, rendered and scored before, during and after the run.

    Where there are fewer than eight different prompts, all are trained on, and these pictures are of the same prompts
    with other noise.

    Examples:
        >>> from alignprop_pipe import AlignConfig, EvaluationOptions
        >>> AlignConfig(evaluation=EvaluationOptions(eval_prompts=16, judges=("sharpness",))).evaluation.eval_prompts
        16
    """

    eval_every: int = option(
        10, "optimizer steps between evaluations of the held-out prompts; 0: only before and after", low=0
    )
    eval_prompts: int = option(
        16, "number of held-out prompts (of few prompts: of pictures); 0 switches the evidence off", low=0
    )
    eval_batch_size: int = option(8, "pictures made at once for the evidence", low=1)
    keep_best: bool | str = option(
        True,
        "keep the adapter of the best evaluation, not the last one: yes, no, judge (the first), a judge's name, or "
        "reward (by the loss); yes follows the first judge where there is one, else the loss",
        parse=followed_from_text,
    )
    patience: int = option(
        0, "stop after so many evaluations in a row that are no better, by what keep_best follows; 0: never", low=0
    )
    judges: tuple[str, ...] = option(
        (CHOSEN,),
        "reward expressions that are only watched on the held-out pictures, never trained on; auto is a free one "
        "that differs from the reward in kind",
    )

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        if self.patience and not (self.eval_every and self.eval_prompts):
            without = "eval_every" if not self.eval_every else "eval_prompts"
            raise ConfigError(
                f"patience = {self.patience}: with {without} = 0 no evaluation is taken on the way that could be "
                "better or worse, so the run would never stop early; 1 or more is needed there, such as 10, or "
                "patience = 0"
            )
        if isinstance(self.keep_best, str) and self.keep_best != "reward" and not {*self.judges} - {CHOSEN}:
            raise ConfigError(
                f"keep_best = {self.keep_best!r}: a judge to follow is needed in judges (--judges), and there is none; "
                "'reward' follows the loss of the trained reward"
            )


@_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class AlignConfig(_Checked):
    """Everything that decides a run (see the fields; `AlignConfig.preset` has named starting points).

    Examples:
        >>> from alignprop_pipe import AlignConfig
        >>> config = AlignConfig().replace(steps=20, rank=8, truncation="last:1")
        >>> config.lora.rank, str(config.truncation)
        (8, 'last:1')
        >>> AlignConfig.from_dict(config.to_dict()) == config
        True
    """

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
        inside: dict[str, dict[str, Any]] = {}
        for name, given in overrides.items():
            part, spec = FIELD_PATHS[name]
            (changed if part is None else inside.setdefault(part, {}))[name] = value_from(name, spec, given)
        for part, values in inside.items():  # at once: what does not go alone may go together
            changed[part] = dataclasses.replace(changed.get(part, getattr(self, part)), **values)
        return dataclasses.replace(self, **changed)

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested as the dataclass is; choices as their texts."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], base: "AlignConfig | None" = None, allow_code: bool = False
    ) -> "AlignConfig":
        """The inverse of `to_dict`; fields that are absent keep the value of `base` (default: the defaults).

        A file may be a stranger's, so `judges` in it name Python code (`my.py:score`) only with `allow_code=True`, or
        where that code was named by `--import`. Raises ConfigError for these, for an unknown key, with the nearest
        right one, and for a value out of range.
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
        config = (base or cls()).replace(**flat)
        for judge in config.evaluation.judges if "judges" in flat and not allow_code else ():
            _refuse_code_in(judge)
        return config

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal value back, with `allow_code=True` also where judges name code."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, base: "AlignConfig | None" = None, allow_code: bool = False) -> "AlignConfig":
        """The inverse of `to_json`; see `from_dict` for the other arguments. Raises ConfigError."""
        return cls.from_dict(_json(text), base, allow_code)

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
    def from_toml(cls, text: str, base: "AlignConfig | None" = None, allow_code: bool = False) -> "AlignConfig":
        """The inverse of `to_toml`; see `from_dict` for the other arguments. Raises ConfigError."""
        return cls.from_dict(_toml(text), base, allow_code)

    @classmethod
    def load(cls, path: str | Path, base: "AlignConfig | None" = None, allow_code: bool = False) -> "AlignConfig":
        """Read a .toml or .json file; see `from_dict`. Raises ConfigError, which names the file."""
        data = read_table(path)
        try:
            return cls.from_dict(data, base, allow_code)
        except ConfigError as error:
            raise ConfigError(f"configuration file {str(path)!r}: {error}") from error


def read_table(path: str | Path) -> Any:
    """What a .toml or .json file holds. Raises ConfigError, which names the file."""
    path = Path(path)
    read = {".toml": _toml, ".json": _json}.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"configuration file {str(path)!r}: a name that ends in .toml or .json is needed")
    try:
        return read(decoded(path.read_bytes()))
    except ConfigError as error:
        raise ConfigError(f"configuration file {str(path)!r}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration file {str(path)!r} cannot be read: {error}") from error


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
        "steps": 90,
        "batch_size": 8,
        "rank": 16,
        "target_modules": (
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "time_emb_proj"),
        ),
        "lr": 3e-3,
        "lr_scheduler": "cosine",
        "weight_decay": 1e-4,
        "max_grad_norm": 0.05,
        "max_grad_growth": 0.5,
        "truncation": RandomLastK(2, 7),
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
    if parse is not None and (isinstance(value, str) or is_whole(value)):
        return parse(str(value))
    return exact(name, spec, value)


# --- inside ---


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise ConfigError(f"the configuration is not JSON: {error}") from error


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]  # not installed on newer Pythons
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration is not TOML: {error}") from error


def _check_part(name: str, value: Any) -> None:
    kind = PARTS[name]
    if not isinstance(value, kind):
        inside = ", ".join(f.name for f in fields(kind))
        raise ConfigError(f"{name} = {value!r}: {kind.__name__}(...) or a table with some of {inside} is needed")


def _elsewhere(name: str, kind: type) -> str:
    """What is said of a setting that a class does not have."""
    if name not in FIELD_PATHS.keys() | PARTS.keys():
        own = {f.name for f in fields(kind)} | (FIELD_PATHS.keys() if kind is AlignConfig else set())
        return f"{kind.__name__} has no setting {name!r}; {_nearest(name, own)}"
    part = FIELD_PATHS[name][0] if name in FIELD_PATHS else None
    if part is None:
        return f"{name} is a setting of AlignConfig, not of {kind.__name__}: AlignConfig({name}=...)"
    home = PARTS[part].__name__
    return (
        f'{name} is a setting of {home}, not of {kind.__name__}: AlignConfig.preset("fast").replace({name}=...), or '
        f"AlignConfig({part}={home}({name}=...))"
    )


def _refuse_code_in(judge: str) -> None:
    if ":" not in judge and "python" not in judge:  # names no code, whether it can be read or not
        return
    try:
        refuse_code(judge)
    except RewardError as error:
        raise ConfigError(f"judges: {error}") from error


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
