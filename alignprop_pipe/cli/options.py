"""Flags made from dataclasses: names, defaults and help texts come from the fields, so no second set can drift.

`options_from` gives a command its flags; `config_for` lays them over the preset.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from alignprop_pipe.bundled import preset_for
from alignprop_pipe.cli import completing
from alignprop_pipe.cli.console import translated
from alignprop_pipe.config.settings import FIELD_PATHS, PARTS, PRESETS, AlignConfig
from alignprop_pipe.errors import ConfigError

BUNDLED = "emoji"
"""The id of the bundled model, and the name of its preset and of its prompts."""

PANELS = {None: "Run", "lora": "LoRA", "optimizer": "Optimizer", "sampling": "Sampling", "evaluation": "Evaluation"}
OUTPUT = "Device and output"

Command = Callable[..., None]


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", help="a .py file or a module that registers rewards of your own; may be repeated"),
]
AcceptLicense = Annotated[
    bool,
    typer.Option("--accept-license", help="use rewards whose weights or code have a licence that binds you"),
]


Subcommand = Annotated[str | None, "no flag: the subcommand that follows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """What all commands that compute share: where, and how much to say."""

    device: Annotated[
        str, typer.Option(help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps", rich_help_panel=OUTPUT)
    ] = "auto"
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the last lines", rich_help_panel=OUTPUT)] = False
    json: Annotated[
        bool, typer.Option("--json", help="records as JSON lines on stdout, talk on stderr", rich_help_panel=OUTPUT)
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="show the traceback of an error (also ALIGNPROP_DEBUG=1)",
            rich_help_panel=OUTPUT,
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Common(Computing):
    """What `train` and `sample` share besides: the number format of the pipeline."""

    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="number format of the frozen model (default: float16 on cuda, else float32)", rich_help_panel=OUTPUT
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest(Common):
    """What `alignprop train` is asked for, next to the settings of AlignConfig."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="'emoji' (bundled, the default), a model id of the Hugging Face hub, a diffusers folder, or a "
            ".safetensors file",
            autocompletion=completing.models,
        ),
    ] = None
    reward: Annotated[
        str | None,
        typer.Option(
            help="what to maximise: 'clip', 'clip + 0.1*jpeg', 'file.py:function'; see 'alignprop rewards' "
            "(emoji: clip)",
            autocompletion=completing.rewards,
        ),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="a .txt, .jsonl, .csv or .tsv file, or a set; see 'alignprop prompts' (emoji: emoji)",
            autocompletion=completing.prompt_sets,
        ),
    ] = None
    prompt: Annotated[list[str] | None, typer.Option(help="one prompt; may be repeated, instead of --prompts")] = None
    out: Annotated[Path | None, typer.Option(help="the run folder (default: runs/<date-time>-<reward>)")] = None
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"starting point: {', '.join(PRESETS)} (default: emoji for the bundled model, else fast)",
            autocompletion=lambda: list(PRESETS),
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="settings, and model, reward and prompts if they stand there, from a .toml or .json file, or a run "
            "folder, whose run is repeated; over the preset, under the flags",
            autocompletion=completing.run_files,
        ),
    ] = None
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="a tracker to send every step to: tensorboard, wandb, ...; may be repeated"),
    ] = None
    imports: Imports = None
    accept_license: AcceptLicense = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run, how long and in how much memory; train nothing")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest(Common):
    """What `alignprop sample` is asked for, next to SamplingOptions."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="the first word is the model if it is 'emoji', a diffusers folder, like org/name, a path, or ends in "
            ".safetensors; everything else is a prompt, drawn by the bundled model if none is named",
            autocompletion=completing.models,
        ),
    ] = None
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="an adapter.safetensors, the run folder that holds it, or me/name on the Hub",
            autocompletion=completing.runs,
        ),
    ] = None
    scale: Annotated[float | None, typer.Option(help="strength of the adapter [default: 1.0]")] = None
    window: Annotated[
        str | None,
        typer.Option(
            metavar="START-END",
            help="the share of the denoising steps in which the adapter works, such as 0.0-0.6 "
            "(default: what its file says, else all)",
        ),
    ] = None
    compare: Annotated[bool, typer.Option("--compare", help="base and aligned side by side, from the same noise")] = (
        False
    )
    seed: Annotated[int, typer.Option(help="the pictures' only source of randomness", min=0, max=2**63 - 1)] = 0
    num: Annotated[int, typer.Option(help="pictures for each prompt", min=1)] = 1
    batch_size: Annotated[int, typer.Option(help="pictures made at once", min=1)] = 4
    out: Annotated[Path, typer.Option(help="folder for the pictures; nothing in it is overwritten")] = Path("samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest(Computing):
    """What `alignprop score` is asked for."""

    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES", help="picture files, or folders of them, at any depth")
    ]
    reward: Annotated[
        str | None,
        typer.Option(
            help="what to score by: 'clip', 'clip + 0.1*jpeg', 'file.py:function'; see 'alignprop rewards'",
            autocompletion=completing.rewards,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(help="one prompt for all pictures (default: the one in each PNG's text chunk 'prompt')"),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="a .txt, .jsonl, .csv or .tsv file, or a set: one prompt for each picture, in their order or by a "
            "column 'file'. Pictures whose own prompts are all in it take their targets from there",
            autocompletion=completing.prompt_sets,
        ),
    ] = None
    top: Annotated[
        int | None, typer.Option(help="show the best N alone; the mean is of all (default: all)", min=1, metavar="N")
    ] = None
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="write all scores as CSV; '-' writes to stdout, talk to stderr")
    ] = None
    batch_size: Annotated[int, typer.Option(help="pictures of one size that are scored at once", min=1)] = 8
    imports: Imports = None
    accept_license: AcceptLicense = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest(Computing):
    """What `alignprop rewards check` is asked for."""

    reward: Annotated[
        str,
        typer.Argument(
            metavar="EXPR",
            help="the reward: 'clip + 0.1*jpeg', 'file.py:function'",
            autocompletion=completing.rewards,
        ),
    ]
    size: Annotated[int, typer.Option(help="height and width of the pictures, in pixels", min=1)] = 512
    batch_size: Annotated[int, typer.Option(help="pictures in the batch", min=1)] = 2
    prompt: Annotated[str, typer.Option(help="the prompt of every picture")] = "two dogs on a blue background"
    imports: Imports = None
    accept_license: AcceptLicense = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRequest:
    """What the listing commands are asked for."""

    json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardsRequest(ListRequest):
    """What `alignprop rewards` is asked for; it lists, unless a subcommand follows."""

    subcommand: Subcommand = None
    imports: Imports = None


def options_from(request: type, settings: type | None = None) -> Callable[[Command], Command]:
    """Give a command the fields of `request` as parameters, and those of `settings` as optional flags.

    The command is called with one `request` and, where `settings` is given, with a dict of the flags that were set.
    Its errors become sentences and exit codes.
    """
    own = [
        inspect.Parameter(f.name, _KEYWORD, default=_EMPTY if f.default is MISSING else f.default, annotation=f.type)
        if f.type != Subcommand
        else inspect.Parameter(f.name, _KEYWORD, annotation=typer.Context)
        for f in fields(request)
    ]
    flags = [] if settings is None else [flag for named in _specs(settings) for flag in _flags(*named)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def edge(**values: Any) -> None:
            asked = request(**{p.name: _from_context(values.pop(p.name)) for p in own})
            given = dict(_from_flag(name, value) for name, value in values.items() if value is not None)
            with translated(debug=getattr(asked, "debug", False)):
                command(asked) if settings is None else command(asked, given)

        parameters = [*own, *flags]
        edge.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue] - functions take it
        edge.__annotations__ = {p.name: p.annotation for p in parameters}
        return edge

    return decorate


def config_for(model: str, flags: Mapping[str, Any], preset: str | None = None) -> AlignConfig:
    """The preset, by default the model's, under the flags. Raises ConfigError."""
    return AlignConfig.preset(preset or preset_for(model)).replace(**flags)


# --- inside ----------------------------------------------------------------------------------------------------------

_KEYWORD, _EMPTY = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty


def _specs(settings: type) -> list[tuple[str, str | None, Field]]:
    """The single settings of AlignConfig, or of one of its parts: name, part, field."""
    parts = [part for part, kind in PARTS.items() if kind is settings]
    return [(name, part, spec) for name, (part, spec) in FIELD_PATHS.items() if not parts or part in parts]


NO = "no_"
"""What the name of a flag begins with that says no to a setting which takes a text too."""


def _flags(name: str, part: str | None, spec: Field) -> list[inspect.Parameter]:
    """The flag of a setting, and the one that says no to it where the setting takes a text or a truth."""
    if {bool, str} - set(typing.get_args(spec.type)):
        return [_flag(name, part, spec)]
    no = typer.Option(
        f"--no-{name.replace('_', '-')}",
        help=f"the same as --{name.replace('_', '-')} no",
        rich_help_panel=PANELS[part],
        show_default=False,
    )
    return [
        _flag(name, part, spec),
        inspect.Parameter(f"{NO}{name}", _KEYWORD, default=None, annotation=Annotated[bool | None, no]),
    ]


def _flag(name: str, part: str | None, spec: Field) -> inspect.Parameter:
    parse = spec.metadata["parse"]
    info = typer.Option(
        f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if spec.type is bool else ""),
        help=_help(name, spec),
        rich_help_panel=PANELS[part],
        show_default=False,
        parser=None if parse is None else _parser(parse),
        autocompletion=completing.judges if name == "judges" else None,
        # Choices stand in the help text; spelled out here they would push long names of flags out of the panel.
        metavar="TEXT" if parse is not None or typing.get_origin(spec.type) is Literal else None,
    )
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=Annotated[_flag_type(spec) | None, info])


def _flag_type(spec: Field) -> Any:
    """The field's type as Typer takes it: without None, a tuple of any length as a list, a choice as text."""
    if spec.metadata["parse"] is not None:
        return str
    kind: Any = spec.type
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    if union:
        (kind,) = (member for member in typing.get_args(kind) if member is not types.NoneType)
    if typing.get_origin(kind) is tuple and Ellipsis in typing.get_args(kind):
        return list[typing.get_args(kind)[0]]
    return kind


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error

    return parsed


def _from_context(value: Any) -> Any:
    """The name of the subcommand that Typer's context holds; every other value as it came."""
    return getattr(value, "invoked_subcommand", value)


def _from_flag(name: str, value: Any) -> tuple[str, Any]:
    """Repeated flags become a tuple; a lone 'none' empties it, since a flag cannot be given zero times."""
    if name.startswith(NO) and name not in FIELD_PATHS:
        return name.removeprefix(NO), False
    if isinstance(value, list | tuple):
        return name, () if list(value) == ["none"] else tuple(value)
    return name, value


def _help(name: str, spec: Field) -> str:
    """The field's help, its default, and the presets that differ from it."""
    part, _ = FIELD_PATHS[name]
    texts = {preset: _text(_value(config, part, name)) for preset, config in _presets().items()}
    default = _text(_value(AlignConfig(), part, name))
    others = [f"{preset}: {text}" for preset, text in texts.items() if text != default]
    shown = [f"default: {default}"] if default and "default" not in spec.metadata["help"] else []
    repeat = " (may be repeated; 'none': no name)" if _flag_type(spec) == list[str] else ""
    notes = "; ".join([*shown, *others])
    return spec.metadata["help"] + repeat + (rf" \[{notes}]" if notes else "")


@functools.cache
def _presets() -> dict[str, AlignConfig]:
    return {preset: AlignConfig.preset(preset) for preset in PRESETS}


def _value(config: AlignConfig, part: str | None, name: str) -> Any:
    return getattr(config if part is None else getattr(config, part), name)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
