"""The command `mix`: several adapters into one file, or the row of pictures from one to another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alignprop_pipe.cli import completing, console
from alignprop_pipe.cli.opening import check_model, import_rewards, is_model, open_pipeline
from alignprop_pipe.cli.options import (
    BUNDLED,
    OUTPUT,
    AcceptLicense,
    Common,
    Imports,
    config_for,
    options_from,
)
from alignprop_pipe.config.settings import SamplingOptions
from alignprop_pipe.files import SHEET_CHUNK, write_whole
from alignprop_pipe.sources import adapter_in, exists, expanded, is_file

if TYPE_CHECKING:
    from alignprop_pipe.adapters.adapter import Adapter
    from alignprop_pipe.adapters.mix import Energy
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.training.sweep import Column

MIX_EXAMPLES = """[bold]Examples[/]

alignprop mix runs/foxes=0.6 runs/colour=0.4 --out both.safetensors

alignprop mix a.safetensors=1 b.safetensors=-0.5 --out a-less-b.safetensors --rank 8

alignprop mix runs/foxes runs/colour --sweep 0:1:0.25 --out row.png      [dim]# pictures from one to the other[/]

alignprop mix runs/foxes --sweep 0:1.5:0.5 --prompt "a fox" --reward aesthetic --out strength.png"""

PROMPTS = 3
"""Rows of a sweep of the bundled model where no prompt is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixRequest(Common):
    """What `alignprop mix` is asked for, next to SamplingOptions for --sweep."""

    words: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT...",
            help="adapter files, run folders or names on the Hub, each with its weight behind the last '='; with "
            "--sweep one or two of them without, and after them the model (default: the one that the adapter names)",
            autocompletion=completing.runs,
        ),
    ]
    out: Annotated[Path, typer.Option(help="a .safetensors file; with --sweep a .png file. Nothing is overwritten")]
    rank: Annotated[
        int | None, typer.Option(help="compress every layer to this rank, and say what is kept (default: exact)", min=1)
    ] = None
    format: Annotated[
        Literal["both", "diffusers", "comfyui", "kohya"], typer.Option(help="whose names the file gets")
    ] = "both"
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO:STEP",
            help="draw pictures instead, at weights of the second adapter (the first has 1 - weight), or of the only "
            "one: 0:1:0.25",
        ),
    ] = None
    prompt: Annotated[list[str] | None, typer.Option(help="--sweep: a row of pictures; may be repeated")] = None
    reward: Annotated[
        str | None,
        typer.Option(
            help="--sweep: what stands under the pictures (default: the adapters' own rewards; emoji: clip)",
            autocompletion=completing.rewards,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="--sweep: the noise, the same in a row", min=0, max=2**63 - 1)] = 0
    batch_size: Annotated[int, typer.Option(help="--sweep: pictures made at once", min=1)] = 4
    imports: Imports = None
    accept_license: AcceptLicense = False
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="number format of the file (default: float32); with --sweep of the model (float16 on cuda)",
            rich_help_panel=OUTPUT,
        ),
    ] = None


@options_from(MixRequest, SamplingOptions)
def mix(request: MixRequest, settings: Mapping[str, Any]) -> None:
    """Mix adapters of one model into one: its weight change is exactly the weighted sum of theirs.

    Ranks, alphas and layers may differ; the ranks add up, and --rank makes the file smaller. With --sweep the row of
    pictures from one adapter to the other is drawn instead, or from the base model to one adapter, with scores.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    if request.sweep is None:
        _refuse_for_files(request, settings)
        _write_mix(request, output)
    else:
        _write_sweep(request, settings, output)


def _refuse_for_files(request: MixRequest, settings: Mapping[str, Any]) -> None:
    given = [*settings, *(name for name in ("prompt", "reward") if getattr(request, name))]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise typer.BadParameter("pictures are drawn with --sweep alone, for example --sweep 0:1:0.25", param_hint=flag)


def _free(path: Path, suffix: str, *others: Path) -> Path:
    path = expanded(path)
    if path.suffix != suffix:
        raise typer.BadParameter(f"{str(path)!r} has to end in {suffix!r}", param_hint="--out")
    for one in (path, *others):
        if exists(one):
            raise typer.BadParameter(f"{str(one)!r} exists already and is not overwritten", param_hint="--out")
    return path


# --- a file ----------------------------------------------------------------------------------------------------------


def _write_mix(request: MixRequest, output: console.Output) -> None:
    parts = [_weighted(word) for word in request.words]
    beside = [expanded(request.out).with_stem(f"{request.out.stem}-comfyui")] * (request.format == "both")
    out = _free(request.out, ".safetensors", *beside)
    with console.waiting(output, f"mixing {console.counted(len(parts), 'adapter')}"):
        console.quiet_libraries(output)
        import torch

        from alignprop_pipe.adapters import mix as mixing
        from alignprop_pipe.adapters.inspect import sha256_of

        mixed = mixing.mix(parts, rank=request.rank)
        dtype = None if request.dtype is None else getattr(torch, request.dtype)
        files = mixed.save(out, format=request.format, dtype=dtype)
    energy = mixing.Energy.of(mixed)
    if energy is not None:
        _tell_energy(energy, output)
    ranks = {name: rank for name, (rank, _) in mixed.shapes.items()}
    output.say(", ".join(f"{name}: {len(mixed.layers[name])} layers of rank {rank}" for name, rank in ranks.items()))
    for file in files:
        digest = sha256_of(file)
        output.result(f"{digest}  {file}")
        output.record("file", {"file": file, "sha256": digest, "size": file.stat().st_size, "ranks": ranks})


def _weighted(word: str) -> tuple[str, float]:
    """`runs/a=b=0.6` -> `runs/a=b` and 0.6."""
    source, sign, text = word.rpartition("=")
    try:
        weight = float(text) if sign and source else None
    except ValueError:
        weight = None
    if weight is None:
        raise typer.BadParameter(
            f"how much of {word!r}? Write its weight behind it, for example {word}=0.6; or draw the row of pictures "
            "with --sweep 0:1:0.25",
            param_hint="ADAPTER=WEIGHT",
        )
    return source, weight


def _tell_energy(energy: "Energy", output: console.Output) -> None:
    rows = sorted(energy.layers.items(), key=lambda pair: pair[1])
    texts = [(name, f"{share:.2%}") for name, share in rows]
    shown = texts if len(texts) <= 12 else [*texts[:11], (f"and {len(texts) - 11} more layers", "")]
    output.table("Energy kept, the least first", ("layer", "kept"), shown, numbers=True)
    output.result(f"energy kept: {energy.total:.2%}")
    output.record("energy", {"total": energy.total, "layers": energy.layers})


# --- a row of pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a sweep draws."""

    sources: list[str]
    adapters: "list[Adapter]"
    weights: tuple[float, ...]
    model: str
    sampling: SamplingOptions
    out: Path


def _write_sweep(request: MixRequest, settings: Mapping[str, Any], output: console.Output) -> None:
    asked, problems, batch, rewards = _asked(request, settings, output), console.Problems(), None, []
    with problems.noted():
        check_model(asked.model)
    with problems.noted():
        batch = _prompts(request, asked.model)
    with problems.noted():
        rewards = _rewards(request, asked)
    problems.tell()
    pipe = open_pipeline(asked.model, request, output)
    from alignprop_pipe.adapters import mix as mixing
    from alignprop_pipe.images import png_bytes
    from alignprop_pipe.training import sweep

    names = [mixing.name_of(source) for source in asked.sources]
    columns: list[Column] = []
    many = console.counted(len(asked.weights) * len(batch.prompts), "picture")
    with console.waiting(output, f"drawing {many}"):
        how = {"seed": request.seed, "batch_size": request.batch_size}
        for column in sweep.sweep(pipe, asked.adapters, asked.weights, batch, asked.sampling, rewards, **how):
            columns.append(column)
            for place, picture in enumerate(column.pictures):
                scores = {name: values[place] for name, values in column.scores.items()}
                output.record("picture", {"weight": column.weight, "prompt": picture.prompt, "scores": scores})
    about = _about(request, asked, names)
    write_whole(asked.out, png_bytes([sweep.sheet(columns, names, _caption(names, about))], about))
    _tell_columns(columns, names, output)
    output.result(f"{many} on {asked.out}")
    means = [{"weight": column.weight, "scores": _means(column)} for column in columns]
    output.record("sweep", {"file": asked.out, "adapters": names, "model": about["model"], "means": means})


def _asked(request: MixRequest, settings: Mapping[str, Any], output: console.Output) -> _Asked:
    """Raises typer.BadParameter for words and flags that do not go together."""
    if request.rank is not None:
        raise typer.BadParameter("a sweep mixes exactly; compress the file that you choose", param_hint="--rank")
    sources, model = _split(request.words)
    out = _free(request.out, ".png")
    console.quiet_libraries(output)
    from alignprop_pipe.adapters.adapter import Adapter
    from alignprop_pipe.training.sweep import weights_from_text

    weights = weights_from_text(request.sweep or "")
    adapters = [Adapter.load(expanded(source)) for source in sources]
    model = model or next((a.base.base_model for a in adapters if a.base.base_model), "") or BUNDLED
    return _Asked(sources, adapters, weights, model, config_for(model, settings).sampling, out)


def _split(words: Sequence[str]) -> tuple[list[str], str]:
    """The adapters and the model, which comes last and need not be there."""
    last = expanded(words[-1])
    is_adapter = is_file(last) or adapter_in(last) is not None
    is_base = len(words) > 1 and (len(words) == 3 or (is_model(words[-1]) and not is_adapter))
    sources, model = (list(words[:-1]), words[-1]) if is_base else (list(words), "")
    if len(sources) > 2:
        raise typer.BadParameter(
            "a sweep goes from one adapter to another, or from the base model to one: give one or two, and the model",
            param_hint="ADAPTER",
        )
    return sources, model


def _prompts(request: MixRequest, model: str) -> Any:
    from alignprop_pipe.prompts import PromptSet

    if request.prompt:
        found = PromptSet.load(list(request.prompt))
        return found.take(range(len(found)))
    if model != BUNDLED:
        raise typer.BadParameter(
            f'what should {model!r} draw? For example --prompt "a fox in the snow"', param_hint="--prompt"
        )
    return PromptSet.load(BUNDLED).batch(request.seed, 0, PROMPTS)


def _rewards(request: MixRequest, asked: _Asked) -> "list[Reward]":
    """What was asked for; else what the adapters were trained by, where that is here; else clip for emoji."""
    from alignprop_pipe.bundled import is_bundled
    from alignprop_pipe.rewards.networks.network import check_fits, emoji_by_default
    from alignprop_pipe.rewards.registry import parse_reward
    from alignprop_pipe.training.sweep import rewards_of

    import_rewards(request.imports)
    if request.reward is not None:
        typed = parse_reward(request.reward, accept_license=request.accept_license, allow_code=True)
        return [check_fits(typed, asked.model)]
    found = [one for one in rewards_of(asked.adapters) if is_bundled(asked.model) or not emoji_by_default(one)]
    return found or ([parse_reward("clip")] if asked.model == BUNDLED else [])


def _about(request: MixRequest, asked: _Asked, names: Sequence[str]) -> dict[str, str]:
    """The text chunks: names alone, no path of this machine."""
    import alignprop_pipe

    return {
        SHEET_CHUNK: "sweep",
        "adapters": ", ".join(names),
        "weights": " ".join(f"{weight:g}" for weight in asked.weights),
        "seed": str(request.seed),
        "model": Path(asked.model).name if exists(asked.model) else asked.model,
        "num_inference_steps": str(asked.sampling.num_inference_steps),
        "guidance_scale": f"{asked.sampling.guidance_scale:g}",
        "software": f"alignprop-pipe {alignprop_pipe.__version__}",
    }


def _caption(names: Sequence[str], about: Mapping[str, str]) -> str:
    if len(names) > 1:
        way = f"From {names[0]} to {names[1]}: the numbers above are their weights in the mix."
    else:
        way = f"From the base model to {names[0]}: the number above is the adapter's strength."
    return (
        f"{way} All pictures of a row start from the same noise, seed {about['seed']}. Model {about['model']}, "
        f"{about['num_inference_steps']} steps, guidance {about['guidance_scale']}. Under every picture: its score."
    )


def _tell_columns(columns: "Sequence[Column]", names: Sequence[str], output: console.Output) -> None:
    """The means over the prompts."""
    rewards = list(columns[0].scores)
    heads = [names[-1], *([names[0]] if len(names) > 1 else []), *rewards]
    rows = [
        [
            f"{column.weight:g}",
            *([f"{1 - column.weight:g}"] if len(names) > 1 else []),
            *(f"{mean:.4g}" for mean in _means(column).values()),
        ]
        for column in columns
    ]
    prompts = console.counted(len(columns[0].pictures), "prompt")
    if rewards:
        output.say(f"weights, and the mean score of {prompts} from the same noise")
        output.table("", heads, rows, numbers=range(len(heads)))
    else:
        output.say("no score: name a reward with --reward, for example --reward hpsv2.1 (list: alignprop rewards)")


def _means(column: "Column") -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in column.scores.items()}
