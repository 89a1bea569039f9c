"""`align`: a pipeline, a reward and prompts -> a trained adapter, with its evidence."""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from alignprop_pipe.bundled import is_bundled, preset_for
from alignprop_pipe.config.settings import CHOSEN, FIELD_PATHS, PARTS, AlignConfig
from alignprop_pipe.diffusion import effects, lora, memory, patching, pipeline_call, pipeline_parts
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.errors import AlignError, ConfigError
from alignprop_pipe.layout import CONFIG
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import StepRecord
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.networks.network import check_fits, check_sources
from alignprop_pipe.rewards.registry import as_reward, parse_reward
from alignprop_pipe.rewards.scorers.judge import knows
from alignprop_pipe.runs import facts as run_facts
from alignprop_pipe.runs import repeating
from alignprop_pipe.runs.folder import RunFolder, check_place
from alignprop_pipe.runs.trackers import all_of
from alignprop_pipe.training.evidence import judges_of, with_chosen_judge
from alignprop_pipe.training.loop import Training, start, steps_of, usable_denoisers
from alignprop_pipe.training.progress import Display, shown
from alignprop_pipe.training.result import AlignResult
from alignprop_pipe.training.session import Session, conclude, drain, give_up

logger = logging.getLogger(__name__)


def align(
    pipe: DiffusionPipeline,
    reward: Reward | str | Callable[..., Tensor],
    prompts: Any,
    config: AlignConfig | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    on_step: Callable[[StepRecord], object] | None = None,
    progress: bool | Literal["previews"] | Display = True,
    stop: threading.Event | None = None,
    **overrides: Any,
) -> AlignResult:
    """Train a LoRA on the denoiser so that `reward` of the finished pictures goes up (AlignProp, 2310.03739).

    Afterwards the pipeline holds the adapter, ready to sample; everything else about it is as before. A run
    starts from the base model: an adapter of an earlier `align` is replaced. If it fails, no adapter is left.

    Args:
        pipe: any pipeline of diffusers; it need not be an `AlignPropPipeline`.
        reward: a reward, an expression (`"hpsv2.1 + 0.1*jpeg"`), or a function `(images, prompts) -> [batch]` of
            pictures [batch, 3, height, width] in [0, 1] that keeps the gradient. What `zscore` and `scaled` need
            is measured on pictures of the base model first; `result.reward` holds the numbers.
        prompts: a list, a .txt, .csv, .tsv or .jsonl file, the name of a set that ships inside, or a PromptSet.
        config: all settings, or a table of some of them; the others are those of the model's own preset where it
            has one.
        out: folder for adapter, curve, pictures and report; None writes nothing.
        on_step: called with every record; step 0 holds the evidence before training. It ends the run by raising
            StopIteration (or KeyboardInterrupt): what is learned by then is kept, with its evidence.
        progress: a line with reward, held-out score, memory and the time that is left; False: silence, as after
            `set_progress_bar_config(disable=True)` or with HF_HUB_DISABLE_PROGRESS_BARS. An object of your own
            with `on_pictures(done, total)` and `on_step(record)` takes its place. "previews": in a notebook, the
            newest pictures of the training too.
        stop: ends the run after the current step once it is set, as on_step can; the command line sets it on Ctrl-C.
        overrides: single settings by name (`steps=60, rank=8, truncation="last:5"`), or arguments of this
            pipeline's own call (`num_frames=9`, `strength=0.5`).

    Raises:
        ConfigError, PromptError, PipelineError, RewardError: before anything is trained.
        TrainingDiverged: losses, gradients, weights or evidence were no finite numbers any more.
        RunError: `out` cannot be written (any more). The adapter stays on the pipeline.

    An error after the first step has the adapter that was learned, the last good one, as `error.result.adapter`;
    with `out` it is on disk too, elsewhere where `out` cannot be written, and the message says where.
    """
    judges = overrides.get("judges", () if config is None else judges_in(config))
    model = pipe.name_or_path or type(pipe).__name__
    reward, prompts = read_together(reward, prompts, out, judges, model)
    config, call_kwargs = settings(pipe, config_of(config, usual_config(pipe, prompts)), overrides)
    judges_given, config = config.evaluation.judges, with_chosen_judge(config, reward)
    usable_denoisers(pipe)
    tell_about(pipe, prompts, reward)
    usual = AlignConfig.preset(preset_for(pipe.name_or_path))
    effects.tell(config, effects.settings_without_effect(pipe, config, usual, call_kwargs))
    memory.check_training(pipe, config, call_kwargs, min(config.evaluation.eval_prompts, len(prompts)))
    stop = stop or threading.Event()
    with (
        lora.switched_back(pipeline_parts.components(pipe).values()),
        shown(pipe, config.steps, progress) as display,
    ):
        with autograd_on():
            state = start(pipe, reward, judges_of(config), prompts, config, call_kwargs, display.on_pictures)
        if CHOSEN in judges_given and state.judges:
            display.say(f"the judge {state.judges[0].label} watches, since none was named; judges=() goes without")
        session = Session(pipe, state, prompts)
        steps = steps_of(state, stop.is_set)
        try:
            if out is not None:
                session.run = open_run(state, out, reward, prompts)
            drain(steps, session, all_of(display.on_step, *filter(None, [on_step])), stop)
            steps.close()
            return conclude(session, stop.is_set() or state.interrupted)
        except BaseException as error:
            steps.close()
            give_up(session, error)
            raise


def usual_config(pipe: DiffusionPipeline, prompts: PromptSet) -> AlignConfig:
    """The model's preset, with a free judge where its own could not check these prompts."""
    config = AlignConfig.preset(preset_for(pipe.name_or_path))
    fits = config.evaluation.judges == (CHOSEN,) or knows(prompts.targets)
    return config if fits else config.replace(judges=(CHOSEN,))


def config_of(given: Any, usual: AlignConfig) -> AlignConfig:
    """The settings that were given, over the usual ones. Raises ConfigError for what are none."""
    if given is None or isinstance(given, AlignConfig):
        return given or usual
    if isinstance(given, Mapping):
        return AlignConfig.from_dict(given, usual, allow_code=True)
    raise ConfigError(
        f"config={given!r}: an AlignConfig is needed, a table such as {{'steps': 60}}, or what "
        "AlignConfig.load('settings.toml') reads"
    )


def judges_in(config: Any) -> Any:
    """The judges that are named in the settings, whatever these are."""
    if isinstance(config, Mapping):
        inside = config.get("evaluation")
        return config.get("judges") or (inside.get("judges", ()) if isinstance(inside, Mapping) else ())
    return config.evaluation.judges if isinstance(config, AlignConfig) else ()


def settings(
    pipe: DiffusionPipeline, config: AlignConfig, overrides: Mapping[str, Any]
) -> tuple[AlignConfig, dict[str, Any]]:
    """Overrides that are settings go into the configuration; those that the stock call takes go to the call."""
    known = {name: value for name, value in overrides.items() if name in FIELD_PATHS or name in PARTS}
    rest = {name: value for name, value in overrides.items() if name not in known}
    callable_names = pipeline_call.call_parameters(pipe)
    reserved = {"prompt", "generator", "output_type", "return_dict", "callback_on_step_end", "latents"}
    for name in rest:
        if name not in callable_names or name in reserved:
            config.replace(**{name: rest[name]})  # raises ConfigError with the nearest names
    return config.replace(**known), rest


def read_together(
    reward: Any, prompts: Any, out: str | Path | None, judges: Any, model: str
) -> tuple[Reward, PromptSet]:
    """The reward and the prompts; what is wrong with them, the judges and the place of the run folder is told at once.

    Raises RunError, PromptError, RewardError; ConfigError for several of them.
    """
    problems: list[AlignError] = []
    found: list[Any] = []
    checks = (
        lambda: out is None or check_place(out),
        lambda: PromptSet.load(prompts),
        lambda: check_fits(check_sources(as_reward(reward)), model),
        *(partial(check_judge, text, model) for text in judges if isinstance(judges, list | tuple)),
    )
    for check in checks:
        try:
            found.append(check())
        except AlignError as error:
            problems.append(error)
    if len(problems) > 1:
        raise ConfigError("; and ".join(map(str, problems))) from problems[0]
    if problems:
        raise problems[0]
    return found[2], found[1]


def check_judge(text: Any, model: str) -> None:
    """Raises RewardError for a judge that cannot be read or knows other pictures; no text is refused with the rest."""
    if isinstance(text, str) and text != CHOSEN:
        check_fits(check_sources(parse_reward(text, allow_code=True)), model)


def tell_about(pipe: DiffusionPipeline, prompts: PromptSet, reward: Reward) -> None:
    """Say once what a user would otherwise find out late."""
    emoji_only = [member.name for member in members(reward) if getattr(member, "model", None) == "emoji"]
    if emoji_only and not is_bundled(pipe.name_or_path):
        logger.warning("the bundled scorer of %s knows only emoji pictures", " and ".join(dict.fromkeys(emoji_only)))
    source = lora.held(pipeline_parts.components(pipe).values())
    if source not in ("", lora.TRAINED):
        logger.warning(
            "%s, which was loaded, is taken off: a run starts from the base model. To train on top of it, load it with "
            "load_lora_weights(..., adapter_name='mine')",
            source,
        )
    for other in lora.active_others(pipe):
        logger.warning("trained on top of LoRA %s: the adapter belongs with it, use them together", other)
    for guard in patching.guards_on(pipe):
        logger.warning("%s is switched off while training, because it stops the gradient; it is back afterwards", guard)
    pipeline_call.tell_lost_words(pipe, prompts.prompts)


def open_run(state: Training, out: str | Path, reward: Reward, prompts: PromptSet) -> RunFolder:
    """The run folder, once everything has been checked; `reward` is the one that was asked for, not calibrated."""
    pipe = state.pipe
    facts, lacking = repeating.describe(pipe, state.call_kwargs)
    drawn, unwritten = repeating.prompt_facts(prompts)
    run = RunFolder.create(
        out, config=state.config, model=pipe.name_or_path or facts["class"], reward=str(reward),
        calibrated=str(state.reward), prompts=drawn["prompts"],
    )  # fmt: skip
    lacking |= {"prompts": unwritten} if unwritten else {}
    command, unnamed = repeating.repeat_command(run.path / CONFIG, state.reward, state.judges, lacking)
    lacking |= {"reward": unnamed} if unnamed and not lacking else {}
    run.tell(
        format=run_facts.FORMAT, command=command or f"cannot be repeated by a command: {unnamed}", pipeline=facts,
        not_repeatable=lacking, working_folder=str(Path.cwd()), device=device_name(pipe.device), **drawn,
    )  # fmt: skip
    return run


def device_name(device: torch.device) -> str:
    """The card's name; of a CPU, how many threads worked on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type
