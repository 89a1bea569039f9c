"""The commands `export` and `inspect`: an adapter for another program, and what is in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alignprop_pipe.cli import completing, console
from alignprop_pipe.cli.opening import open_pipeline
from alignprop_pipe.cli.options import OUTPUT, Common, options_from
from alignprop_pipe.escaping import one_line
from alignprop_pipe.sources import exists, expanded

if TYPE_CHECKING:
    import torch

    from alignprop_pipe.adapters.adapter import Adapter
    from alignprop_pipe.adapters.inspect import Block, Inspection

EXPORT_EXAMPLES = """[bold]Examples[/]

alignprop export runs/my-run --to comfyui --out ComfyUI/models/loras/foxes.safetensors

alignprop export theirs.safetensors --to diffusers --out mine.safetensors --dtype float16

alignprop export runs/my-run --to merged --out foxes             [dim]# a diffusers folder with the adapter in it[/]

alignprop export runs/my-run --to merged --out foxes.safetensors --model me/model --dtype float16"""

INSPECT_EXAMPLES = """[bold]Examples[/]

alignprop inspect runs/my-run

alignprop inspect theirs.safetensors --json"""

BAR = 20
"""Characters of the longest bar."""

AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="read a pickle (.bin, .pt, .ckpt) too: weights alone, nothing that is in it is run"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """What both commands share: how much to say."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the last lines", rich_help_panel=OUTPUT)] = False
    json: Annotated[
        bool, typer.Option("--json", help="records as JSON lines on stdout, talk on stderr", rich_help_panel=OUTPUT)
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="show the traceback of an error (also ALIGNPROP_DEBUG=1)", rich_help_panel=OUTPUT),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(Telling):
    """What `alignprop export` is asked for."""

    adapter: Annotated[
        Path, typer.Argument(help="a LoRA file of any format, or a run folder", autocompletion=completing.runs)
    ]
    to: Annotated[
        Literal["diffusers", "comfyui", "kohya", "merged"],
        typer.Option(help="whose names it gets; merged: the model itself with the adapter in its weights"),
    ]
    out: Annotated[
        Path,
        typer.Option(
            help="a .safetensors file; for merged a folder in diffusers' format, or a file of Stable Diffusion 1.x, "
            "2.x or XL. Nothing is overwritten"
        ),
    ]
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="number format of the file (default: the adapter's; merged: float32)"),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="merged: the model to merge into (default: the one that the file names)",
            autocompletion=completing.models,
        ),
    ] = None
    allow_pickle: AllowPickle = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectRequest(Telling):
    """What `alignprop inspect` is asked for."""

    file: Annotated[
        Path, typer.Argument(help="a LoRA file of any format, or a run folder", autocompletion=completing.runs)
    ]
    allow_pickle: AllowPickle = False


# --- export ----------------------------------------------------------------------------------------------------------


@options_from(ExportRequest)
def export(request: ExportRequest) -> None:
    """Write an adapter for another program, from any format to any other, or merge it into its model.

    Ranks and alphas are kept, layer by layer; diffusers' form has no alpha and takes it folded into the weights. The
    SHA-256 of every file is printed.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    out = expanded(request.out)
    if request.model is not None and request.to != "merged":
        raise typer.BadParameter("a model is needed for --to merged alone", param_hint="--model")
    if exists(out):
        raise typer.BadParameter(f"{str(out)!r} exists already and is not overwritten", param_hint="--out")
    console.quiet_libraries(output)
    from alignprop_pipe.adapters.adapter import Adapter
    from alignprop_pipe.adapters.inspect import inspect_adapter, sha256_of

    adapter = Adapter.load(expanded(request.adapter), allow_pickle=request.allow_pickle)
    output.say(f"read: {adapter}")
    if request.to == "merged":
        files = _merged(adapter, out, request, output)
    else:
        files = adapter.save(out, format=request.to, dtype=_dtype(request.dtype))
    for file in files:
        digest = sha256_of(file)
        output.result(f"{digest}  {file}")
        output.record("file", {"file": file, "sha256": digest, "size": file.stat().st_size})
        if request.to != "merged":
            _tell_programs(inspect_adapter(file), output)


def _merged(adapter: "Adapter", out: Path, request: ExportRequest, output: console.Output) -> list[Path]:
    model = request.model or adapter.base.base_model
    if not model:
        raise typer.BadParameter(
            "which model is it for? Its file does not say: give --model, an id of the Hub, a folder or a file",
            param_hint="--model",
        )
    where = Common(device="cpu", dtype="float32", quiet=request.quiet, json=request.json, debug=request.debug)
    pipe = open_pipeline(model, where, output)
    from alignprop_pipe.adapters.merge import merge

    with console.waiting(output, f"merging into {model}"):
        merge(pipe, adapter, out, dtype=_dtype(request.dtype))
    return sorted(file for file in out.rglob("*") if file.is_file()) if out.is_dir() else [out]


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return None if name is None else getattr(torch, name)


# --- inspect ---------------------------------------------------------------------------------------------------------


@options_from(InspectRequest)
def inspect(request: InspectRequest) -> None:
    """Say what is in an adapter file: model, ranks, where it changes how much, who loads it, and what is wrong."""
    output = console.Output(quiet=request.quiet, json=request.json)
    console.quiet_libraries(output)
    from alignprop_pipe.adapters.inspect import inspect_adapter

    found = inspect_adapter(expanded(request.file), allow_pickle=request.allow_pickle)
    numbers = {"ranks": _listed("rank", found.ranks), "alphas": _listed("alpha", found.alphas)}
    output.record("adapter", {**console.plain(found), **numbers, "change": found.change})
    output.table("", ("", ""), _facts(found))
    texts = [(_cut(key), _cut(value)) for key, value in sorted(found.metadata.items())]
    if texts:
        output.table("Header", ("", ""), texts)
    output.table("Weight change (Frobenius norm)", ("block", "layers", "change", ""), _bars(found.blocks, output))
    _tell_programs(found, output)
    for problem in found.problems:
        output.result(f"wrong: {_cut(problem, 500)}")
    if not found.problems:
        output.result(f"ok: {found.file}, nothing wrong found")


def _facts(found: "Inspection") -> list[tuple[str, str]]:
    shown = [
        ("file", f"{found.file}, {found.size:,} bytes"),
        ("SHA-256", found.sha256),
        ("base model", found.base_model or "not said"),
        ("made for", " ".join(filter(None, (found.base_class, f"({found.family})" * bool(found.family))))),
        ("names of", found.format),
        ("layers", ", ".join(f"{count} in {component}" for component, count in found.layers.items())),
        ("kinds of layers", _counts(found.targets)),
        ("rank", _counts(found.ranks)),
        ("alpha", _counts({f"{alpha:g}": count for alpha, count in found.alphas.items()})),
        ("number format", _counts(found.dtypes)),
        ("parameters", f"{found.parameters:,}"),
        ("weight change", f"{found.change:.4g}"),
    ]
    return [(name, _cut(value, 2000)) for name, value in shown if value]


def _counts(counts: Mapping[Any, int]) -> str:
    """`4`, or `4 (30 times), 8 (2 times)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} times)" for value, count in counts.items())


def _listed(name: str, counts: Mapping[Any, int]) -> list[dict[str, Any]]:
    """For JSON, whose keys are no numbers."""
    return [{name: value, "layers": count} for value, count in counts.items()]


def _cut(text: str, most: int = 100) -> str:
    """A text out of a file on one line."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[:most]}… ({len(text)} characters)"


def _bars(blocks: "tuple[Block, ...]", output: console.Output) -> list[tuple[str, str, str, str]]:
    most = max((block.change for block in blocks if block.change < float("inf")), default=0.0) or 1.0
    sign = "█" if (output.console.encoding or "").lower().startswith("utf") else "#"
    many = len({block.component for block in blocks}) > 1
    rows = []
    for block in blocks:
        name = f"{block.component}.{block.name}" if many else block.name
        length = round(BAR * block.change / most) if block.change < float("inf") else 0
        rows.append((_cut(name), str(block.layers), f"{block.change:.4g}", sign * length))
    return rows


def _tell_programs(found: "Inspection", output: console.Output) -> None:
    words = {True: "loads it", False: "does not load it", None: "not known"}
    for verdict in found.programs:
        output.say(f"{verdict.program}: {words[verdict.loads]}: {_cut(verdict.reason, 500)}")
