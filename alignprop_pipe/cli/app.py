"""The command `alignprop`: train, sample, score, and lists of what can be asked for.

Commands translate: flags to values, values to calls, records to lines. torch loads inside them, so `--help` is quick.
"""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_pipe.bundled import preset_for
from alignprop_pipe.cli import comfy, console, doctor, exporting, mixing, pushing, scores
from alignprop_pipe.cli.drawing import Sheet, check_out, draw
from alignprop_pipe.cli.opening import check_model, find_device, is_model, open_pipeline
from alignprop_pipe.cli.options import (
    BUNDLED,
    ListRequest,
    SampleRequest,
    TrainRequest,
    config_for,
    options_from,
)
from alignprop_pipe.cli.planning import Plan, open_planned, planned
from alignprop_pipe.cli.usage import Commands
from alignprop_pipe.config.choices import window_from_text
from alignprop_pipe.config.settings import AlignConfig, SamplingOptions
from alignprop_pipe.errors import AlignError
from alignprop_pipe.layout import ADAPTER, REPORT, SHEET
from alignprop_pipe.sources import adapter_in, expanded, hub_hint, is_file, is_folder, on_hub

if TYPE_CHECKING:
    from alignprop_pipe.training.result import AlignResult


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXAMPLES = """[bold]Examples[/]

alignprop train

alignprop sample --adapter runs/my-run --compare

alignprop train MODEL --reward "hpsv2.1 + 0.1*jpeg" --prompts prompts.txt --steps 100"""

TRAIN_EXAMPLES = """[bold]Examples[/]

alignprop train                                     [dim]# the bundled model, 3 minutes on a laptop[/]

alignprop train --reward jpeg --steps 20 --out runs/blocky

alignprop train stable-diffusion-v1-5/stable-diffusion-v1-5 --reward hpsv2.1 --prompts animals --preset fast

alignprop train MODEL --reward my_reward.py:score --prompts prompts.txt --dry-run

alignprop train MODEL --config runs/my-run/config.json --seed 1"""

SAMPLE_EXAMPLES = """[bold]Examples[/]

alignprop sample                                    [dim]# eight pictures of the bundled model[/]

alignprop sample "two dogs on a blue background" --num 4 --seed 7

alignprop sample --adapter runs/my-run --compare    [dim]# base and aligned side by side[/]

alignprop sample MODEL "a fox in the snow" --adapter adapter.safetensors --scale 0.8

alignprop sample --adapter runs/my-run --window 0.0-0.6   [dim]# in the first 60 % of the denoising steps alone[/]"""


def _version(wanted: bool) -> bool:
    if wanted:
        from alignprop_pipe import __version__

        typer.echo(f"alignprop-pipe {__version__}")
        raise typer.Exit
    return wanted


@app.callback(epilog=EXAMPLES)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="say the version and stop")
    ] = False,
) -> None:
    """Align a text-to-image model to a reward, and get a LoRA that loads everywhere."""


# --- train -----------------------------------------------------------------------------------------------------------


@app.command(epilog=TRAIN_EXAMPLES)
@options_from(TrainRequest, AlignConfig)
def train(request: TrainRequest, settings: Mapping[str, Any]) -> None:
    """Train an adapter on MODEL that makes its pictures score higher, and write a run folder.

    Ctrl-C stops after the current step and saves everything. With MODEL 'emoji', which is bundled and the default,
    nothing else is needed; other models need --reward and --prompts.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    plan = planned(request, settings, output)
    for note in plan.notes:
        output.say(note)
    from alignprop_pipe.runs.repeating import free_threads, on_threads

    with on_threads(plan.facts.get("threads") or free_threads()):
        _train(plan, output)


def _train(plan: Plan, output: console.Output) -> None:
    config, request = plan.config, plan.request
    pipe = open_planned(plan, output)
    if request.dry_run:
        return _forecast(output, pipe, plan)
    split = plan.prompts.split(config.evaluation.eval_prompts, config.seed)
    output.say(split.words)
    try:
        with console.Progress(output, config, split) as progress, plan.trackers, console.stop_on_interrupt() as stop:
            watching = {"progress": progress, "on_step": plan.trackers.on_step, "stop": stop}
            result = pipe.align(plan.reward, plan.prompts, config, out=plan.out, **watching, **plan.call)
    except AlignError as error:
        if error.result is not None:
            _tell(output, plan.model, error.result)
        raise
    _tell(output, plan.model, result)
    if result.interrupted:
        raise typer.Exit(console.INTERRUPTED)


def _forecast(output: console.Output, pipe: Any, plan: Plan) -> None:
    """What would run, and what it costs."""
    from alignprop_pipe.diffusion.memory import check_training
    from alignprop_pipe.training.forecast import forecast, looks

    config, held_out = (
        plan.config,
        len(plan.prompts.split(plan.config.evaluation.eval_prompts, plan.config.seed).evidence),
    )
    check_training(pipe, config, {}, config.evaluation.eval_prompts)
    with console.waiting(output, "measuring one step"):
        cost = forecast(pipe, config)
    seconds, looked = cost.seconds(config, held_out), looks(config)
    step, whole = console.duration(cost.seconds_per_step), console.duration(seconds)
    pictures = config.batch_size * config.gradient_accumulation_steps
    rows = [
        ("pipeline", type(pipe).__name__),
        ("device, number format", f"{pipe.device}, {str(pipe.dtype).removeprefix('torch.')}"),
        ("reward", str(plan.reward)),
        ("optimizer steps", f"{config.steps}, {pictures} pictures each"),
        ("looks", f"{looked}, {console.counted(held_out, 'picture')} each" if looked else "none"),
        ("trainable parameters", f"{cost.trainable_parameters:,}"),
        ("denoiser calls a step", f"{cost.denoiser_calls_per_step:g}"),
        ("memory", f"about {cost.memory_mb:,.0f} MB for the pipeline, and the reward's"),
        ("memory of the process", f"about {cost.process_mb:,.0f} MB at its peak, and the reward's"),
        ("time", f"about {step} a step, {whole} in all with the evaluations"),
    ]
    output.table("What would run", ("", ""), rows)
    counts = {"steps": config.steps, "looks": looked, "held_out": held_out, "seconds": seconds}
    output.record("forecast", {**console.plain(cost), **counts, "config": config.to_dict()})
    if output.quiet and not output.json:
        output.result(f"{rows[-2][1]}, {rows[-1][1]}")


def _tell(output: console.Output, model: str, result: "AlignResult") -> None:
    """The summary: what changed on the held-out prompts, where everything is, and what to try next."""
    if result.before is not None and result.after is not None:
        rows = [_change_row(name, *change) for name, change in result.changes.items()]
        if math.isfinite(result.after.diversity):
            rows += [("diversity", f"{result.before.diversity:.4g}", f"{result.after.diversity:.4g}", "")]
        title = f"{result.after.what}{', same noise before and after' * result.after.held_out}"
        output.table(title, ("", "before", "after", "change"), rows, numbers=True)
    if result.choice:
        output.say(f"kept: {result.choice}")
    warnings = result.warnings
    ended = result.stopped or ("done, with warnings" if warnings else "done")
    output.say(f"{ended}, {console.duration(result.seconds)}")
    output.warn(warnings)
    files = {name: path for name, path in _files(result).items() if path.exists()}
    for name, path in files.items():
        output.result(f"{name + ':':<15}{path}")
    if result.adapter_path is not None:
        output.say(f"next:          {_next_command(model, result)}")
    held_out = {name: change._asdict() for name, change in result.changes.items()}
    facts = {
        "interrupted": result.interrupted,
        "stopped": result.stopped,
        "status": result.stopped or "completed",
        "trained_on": result.trained_on,
        "kept_step": result.kept_step,
        "chosen_from": result.chosen_from,
        "seconds": result.seconds,
        "steps": result.steps,
    }
    told = {"held_out": held_out, "warnings": warnings}
    keys = {"before, after": "before_after", "all of it": "run_folder"}
    named = {keys.get(name, name): path for name, path in files.items()}
    output.record("result", {**facts, **told, "run_folder": result.run_folder, "files": named})


def _change_row(name: str, before: float, after: float, difference: float, error: float) -> tuple[str, ...]:
    spread = f" ± {error:.2g}" if math.isfinite(error) else ""
    known = [f"{value:.4g}" if math.isfinite(value) else "–" for value in (before, after)]
    return name, *known, f"{difference:+.3g}{spread}" if math.isfinite(difference) else "–"


def _files(result: "AlignResult") -> dict[str, Path]:
    files = {} if result.adapter_path is None else {"adapter": result.adapter_path}
    if result.run_folder is not None:
        files["before, after"] = result.run_folder / SHEET
        files["report"] = result.run_folder / REPORT
        files["all of it"] = result.run_folder
    return files


def _next_command(model: str, result: "AlignResult") -> str:
    """The command that shows the adapter's work; settings that differ from the model's preset are spelled out."""
    usual, used = AlignConfig.preset(preset_for(model)).sampling, result.config.sampling
    words = ["alignprop", "sample", *([] if model == BUNDLED else [model])]
    words += ["--adapter", str(result.adapter_path), "--compare"]
    for name in ("num_inference_steps", "guidance_scale", "height", "width"):
        if getattr(used, name) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(used, name))]
    prompts = result.after.prompts[:1] if result.after is not None and model != BUNDLED else ()
    return shlex.join([*words, *prompts])


# --- sample ----------------------------------------------------------------------------------------------------------


@app.command(epilog=SAMPLE_EXAMPLES)
@options_from(SampleRequest, SamplingOptions)
def sample(request: SampleRequest, settings: Mapping[str, Any]) -> None:
    """Draw pictures with MODEL, with or without an adapter, into PNG files and a grid.

    Prompt, seed, adapter and settings stand in the text chunks of each file. A picture depends on the seed, its
    prompt and its number alone, whatever else is drawn with it.
    """
    output = console.Output(quiet=request.quiet, json=request.json)
    words = request.words or []
    model, prompts = (words[0], words[1:]) if words and is_model(words[0]) else (BUNDLED, words)
    sampling, problems, adapter = config_for(model, settings).sampling, console.Problems(), None
    with problems.noted():
        check_model(model)
    with problems.noted():
        check_out(request.out)
    with problems.noted():
        find_device(request.device)
    with problems.noted():
        prompts = prompts or _default_prompts(model, request.seed)
        _check_words(prompts)
    with problems.noted():
        window_from_text(request.window or "0-1")
    with problems.noted():
        adapter = _adapter_file(request)
    problems.tell()
    pipe = open_pipeline(model, request, output)
    from alignprop_pipe.diffusion.effects import drawing_without_effect, tell

    tell(sampling, drawing_without_effect(pipe, sampling, settings, {}))
    sheet = Sheet.begin(request, model, sampling, adapter)
    with console.waiting(output, f"drawing {console.counted(len(prompts) * request.num, 'picture')}"):
        files = draw(pipe, prompts, sheet, output)
    output.result(f"{console.counted(len(files) - 1, 'picture')} in {request.out}, all on {files[-1]}")


def _adapter_file(request: SampleRequest) -> Path | None:
    if request.adapter is None:
        given = {"--compare": request.compare, "--scale": request.scale is not None, "--window": request.window}
        if any(given.values()):
            flag = next(flag for flag, is_given in given.items() if is_given)
            raise typer.BadParameter("an adapter is needed: add --adapter FILE", param_hint=flag)
        return None
    path = expanded(request.adapter)
    path = adapter_in(path) or path / ADAPTER if is_folder(path) else path
    if is_file(path):
        return path
    if on_hub(request.adapter) is None:
        hint = hub_hint(request.adapter)
        raise typer.BadParameter(f"there is no file {str(path)!r}{hint}", param_hint="--adapter")

    from alignprop_pipe.adapters.resolve import local_file

    local_file(request.adapter)  # before the model is loaded, since it may not be there
    return request.adapter


def _check_words(prompts: list[str]) -> None:
    """Raises PromptError for a prompt that cannot be drawn. An empty one can: it asks for any picture."""
    from alignprop_pipe.prompts import check_whole

    for number, prompt in enumerate(prompts, start=1):
        check_whole(prompt, f"prompt {number}")


def _default_prompts(model: str, seed: int) -> list[str]:
    if model != BUNDLED:
        raise typer.BadParameter(
            f'what should {model!r} draw? Write it behind the model, for example: alignprop sample {model} "a dog"',
            param_hint="PROMPT",
        )
    from alignprop_pipe.prompts import PromptSet

    return PromptSet.load(BUNDLED).batch(seed, 0, 8).prompts


# --- push ------------------------------------------------------------------------------------------------------------

app.command(epilog=pushing.PUSH_EXAMPLES)(pushing.push)


# --- score -----------------------------------------------------------------------------------------------------------

app.command(epilog=scores.SCORE_EXAMPLES)(scores.score)


# --- adapters --------------------------------------------------------------------------------------------------------

app.command(epilog=exporting.EXPORT_EXAMPLES)(exporting.export)
app.command(epilog=exporting.INSPECT_EXAMPLES)(exporting.inspect)
app.command(epilog=mixing.MIX_EXAMPLES)(mixing.mix)


# --- lists -----------------------------------------------------------------------------------------------------------


app.add_typer(scores.rewards, name="rewards")
app.command(epilog=doctor.DOCTOR_EXAMPLES)(options_from(ListRequest)(doctor.doctor))
app.add_typer(comfy.comfy, name="comfy")


@app.command()
@options_from(ListRequest)
def models(request: ListRequest) -> None:
    """List the models that ship inside."""
    from alignprop_pipe.bundled import MODELS

    rows = [{"name": m.name, "summary": m.summary, "licence": m.licence, "size_mb": m.size_mb} for m in MODELS]
    _list(request, rows, "'train' and 'sample' also take an id of the Hugging Face hub, a diffusers folder or a file")


@app.command()
@options_from(ListRequest)
def prompts(request: ListRequest) -> None:
    """List the prompt sets that --prompts takes by name."""
    from alignprop_pipe.prompts import named_sets

    rows = [
        {"name": name, "prompts": len(found), "first": found.prompts[0], "targets": [*found.targets]}
        for name, found in named_sets().items()
    ]
    _list(request, rows, "or a file: .txt with a prompt a line, .jsonl, .csv or .tsv with a column 'prompt'")


def _list(request: ListRequest, rows: list[dict[str, Any]], more: str) -> None:
    output = console.Output(quiet=request.json, json=request.json)
    for row in rows:
        output.record("entry", row)
    titles = [name.replace("size_mb", "MB") for name in rows[0]]
    texts = [[_cell(value) for value in row.values()] for row in rows]
    output.table("", titles, texts)
    output.say(more)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
