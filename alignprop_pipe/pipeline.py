"""`AlignPropPipeline`: a stock diffusers pipeline that can also be aligned to a reward.

The class is made on the fly as a subclass of the stock class, so everything that takes the stock
pipeline takes this one, and pictures, files and arguments stay the stock ones.
"""

import copyreg
import difflib
import inspect
import logging
import math
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import DiffusionPipeline, pipelines
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from torch import Tensor

from alignprop_pipe.adapters import apply
from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.bundled import is_bundled, preset_for, resolve_model
from alignprop_pipe.config.choices import Window
from alignprop_pipe.config.settings import CHOSEN, FIELD_PATHS, PARTS, AlignConfig
from alignprop_pipe.diffusion import effects, lora, memory, stock
from alignprop_pipe.diffusion import window as windows
from alignprop_pipe.diffusion.rollout import autograd_on
from alignprop_pipe.diffusion.single_file import load_single_file
from alignprop_pipe.errors import AdapterError, AlignError, ConfigError, PipelineError, RunError
from alignprop_pipe.layout import CONFIG
from alignprop_pipe.prompts import PromptSet
from alignprop_pipe.records import Change, StepRecord
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.networks.network import check_fits, check_sources, cuts_in
from alignprop_pipe.rewards.registry import as_reward, parse_reward
from alignprop_pipe.rewards.scorers.judge import knows
from alignprop_pipe.runs import facts as run_facts
from alignprop_pipe.runs import repeating
from alignprop_pipe.runs.folder import RunFolder, check_place
from alignprop_pipe.runs.summary import Watch
from alignprop_pipe.runs.trackers import all_of
from alignprop_pipe.sources import exists, hub_hint, on_hub
from alignprop_pipe.training.loop import Training, start, steps_of, usable_denoisers
from alignprop_pipe.training.progress import Display, shown
from alignprop_pipe.training.result import AlignResult, changes_between, kept_evidence, looks_in

logger = logging.getLogger(__name__)

SLOWER, LEAST_SLOW = 10, 5.0
"""Times as long as the fastest step, and seconds, from which on a step is slow."""
MODEL_NEEDED = (
    "name 'emoji' (bundled), a model on the Hub like stable-diffusion-v1-5/stable-diffusion-v1-5, a folder that holds "
    "a model_index.json, or a .safetensors file"
)


if TYPE_CHECKING:
    from diffusers.loaders.lora_base import LoraBaseMixin
    from PIL import Image

    class Drawn:
        """What a call returns: pictures, or the frames of each video. As PIL has them, unless `output_type` says so."""

        images: list[Image.Image]
        frames: list[list[Image.Image]]

    class Stock(LoraBaseMixin, DiffusionPipeline):
        """What a type checker and an editor know of the stock class that is found when the model is loaded."""

        unet: Any
        transformer: Any
        vae: Any
        scheduler: Any
        tokenizer: Any
        text_encoder: Any

        def __call__(self, *args: Any, **kwargs: Any) -> Drawn: ...

        def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]  # the mixin's takes no file
            self,
            pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
            adapter_name: str | None = None,
            **kwargs: Any,
        ) -> None: ...
else:
    Stock = DiffusionPipeline


class AlignPropPipeline(Stock):
    """Mixin that gives `align`, `save_adapter` and `load_adapter` to a stock pipeline class.

    Make one with `from_pretrained`, `from_pipe` or `from_single_file`; it is an instance of the stock class too.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "AlignPropPipeline":
        """Load any text-to-image or text-to-video pipeline of diffusers: `emoji`, a folder, or `me/name` on the Hub.

        `hf://me/name` and `hf://me/name@revision` are on the Hub whatever folders are here. `kwargs` are those of
        `DiffusionPipeline.from_pretrained` (`dtype`, `revision`, `variant`, ...). Raises PipelineError where there is
        no such folder and the name may have been meant as one, or where the model names a module that is no part of
        diffusers, and HubError for an hf:// that is no name.
        """
        name, there = model_source(pretrained_model_name_or_path)
        folder = resolve_model(name)
        if there.get("revision"):
            kwargs = {"revision": there["revision"], **kwargs}
        refuse_foreign_modules(folder, kwargs)
        with autograd_on(), known_types() if folder != name else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=name)
        asked = {key: kwargs[key] for key in ("revision", "variant") if isinstance(kwargs.get(key), str)}
        pipe._alignprop_source = {**there, **asked}
        return cls.from_pipe(pipe)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "AlignPropPipeline":
        """The same pipeline as an AlignPropPipeline; the networks are shared, not copied.

        So after `align` the first pipeline draws with the adapter too, as every pipeline does that shares them.

        Args:
            pipeline: any pipeline of diffusers.
            kwargs: as in `DiffusionPipeline.from_pipe`: other components and options of the class, and `dtype`
                (`torch_dtype`) to cast the networks, which `pipeline` shares, to. By default they keep theirs.

        Raises:
            PipelineError: no pipeline, or a name that its class does not know.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise PipelineError(
                f"from_pipe needs a diffusers pipeline, not {type(pipeline).__name__}; for a model id or a folder "
                "use AlignPropPipeline.from_pretrained(...)"
            )
        dtypes = [kwargs.pop(name, None) for name in ("torch_dtype", "dtype")]
        dtype = dtypes[1] or dtypes[0]
        if not isinstance(dtype, torch.dtype | None):
            raise PipelineError(f"dtype={dtype!r}: a number format of torch is needed, such as torch.float16")
        kind = stock_class(type(pipeline))
        if kwargs:
            pipe = _made_anew(kind, pipeline, kwargs)
        else:
            pipe = _bare(kind)
            pipe.__dict__.update(vars(pipeline))
        return cast(AlignPropPipeline, pipe if dtype is None else pipe.to(dtype=dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For `pickle` and `copy`: the class is made on the fly, so what is written is the stock one."""
        return _bare, (stock_class(type(self)),), *cast(tuple, super().__reduce_ex__(protocol))[2:]

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, pipeline_class: type | None = None, **kwargs: Any
    ) -> "AlignPropPipeline":
        """Load a single checkpoint file; Stable Diffusion 1.x, 2.x and XL with no call to the Hub.

        They need a folder with the CLIP tokenizer's vocab.json and merges.txt as `tokenizer_folder=` or `tokenizer=`,
        or the tokenizer in the Hub's cache. For other models diffusers asks the Hub for the configuration: give
        `config=` (a diffusers folder or Hub id) where it cannot tell the model by its weights, or `pipeline_class=` to
        choose. Other `kwargs` are those of the stock `from_single_file`. Raises PipelineError.
        """
        path = str(pretrained_model_link_or_path)
        with autograd_on():
            pipe = load_single_file(path, pipeline_class, **kwargs)
        pipe.register_to_config(_name_or_path=path)
        return cls.from_pipe(pipe)

    def align(
        self,
        reward: Reward | str | Callable[..., Tensor],
        prompts: Any,
        config: AlignConfig | Mapping[str, Any] | None = None,
        *,
        out: str | Path | None = None,
        on_step: Callable[[StepRecord], object] | None = None,
        progress: bool | Display = True,
        previews: bool = False,
        **overrides: Any,
    ) -> AlignResult:
        """Train a LoRA on the denoiser so that `reward` of the finished pictures goes up (AlignProp, 2310.03739).

        Afterwards the pipeline holds the adapter, ready to sample; everything else about it is as before. A run
        starts from the base model: an adapter of an earlier `align` is replaced. If it fails, no adapter is left.

        Args:
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
                with `on_pictures(done, total)` and `on_step(record)` takes its place.
            previews: in a notebook, show the newest pictures of the training too.
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
        model = self.name_or_path or stock_class(type(self)).__name__
        reward, prompt_set = read_together(reward, prompts, out, judges, model)
        config, call_kwargs = settings(self, config_of(config, usual_config(self, prompt_set)), overrides)
        usable_denoisers(self)
        tell_about(self, prompt_set, reward)
        usual = AlignConfig.preset(preset_for(self.name_or_path))
        effects.tell(config, effects.settings_without_effect(self, config, usual, call_kwargs))
        memory.check_training(self, config, call_kwargs, min(config.evaluation.eval_prompts, len(prompt_set)))
        with (
            lora.switched_back(stock.components(self).values()),
            stop_on_interrupt() as stop,
            shown(self, config.steps, progress, previews) as display,
        ):
            with autograd_on():
                state = start(self, reward, prompt_set, config, call_kwargs, display.on_pictures)
            if CHOSEN in config.evaluation.judges and state.judges:
                display.say(f"the judge {state.judges[0].label} watches, since none was named; judges=() goes without")
            session = Session(self, state, prompt_set)
            steps = steps_of(state, stop.is_set)
            try:
                if out is not None:
                    session.run = open_run(state, out, reward, prompts, prompt_set)
                drain(steps, session, all_of(display.on_step, *filter(None, [on_step])), stop)
                steps.close()
                return conclude(session, stop.is_set() or state.interrupted)
            except BaseException as error:
                steps.close()
                give_up(session, error)
                raise

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the base model in diffusers' folder format, and the adapter, if there is one, as a file in it.

        Stock diffusers opens the folder; `load_lora_weights(save_directory)` there puts the adapter on. What
        `fuse_lora` has put into the weights is in them there too, our adapter as well, which then gets no file. Other
        LoRAs stay out, which is told. Raises AdapterError for an adapter that is fused in some components alone, or in
        spite of its window.
        """
        beside, fused = lora.unfused_and_fused(stock.components(self))
        if lora.ADAPTER_NAME in beside & fused:
            raise AdapterError(
                "the adapter is fused in some components and in others not: call pipe.unfuse_lora() first, or "
                "pipe.fuse_lora() to fuse all of it"
            )
        if lora.ADAPTER_NAME in fused and (window := windows.held_by(apply.networks(self).values())) is not None:
            raise AdapterError(
                f"the adapter works in the window {window} of the steps, which weights cannot say, and is fused: call "
                "pipe.unfuse_lora() first"
            )
        if lora.ADAPTER_NAME in beside:
            apply.save_adapter(self, Path(save_directory) / LORA_WEIGHT_NAME_SAFE, format="diffusers")
        if left_out := sorted(beside - {lora.ADAPTER_NAME}):
            logger.warning(
                "LoRA %s is not in the folder, which holds the base model%s; pipe.fuse_lora() before puts it into the "
                "weights",
                " and ".join(map(repr, left_out)),
                " and our adapter" if lora.ADAPTER_NAME in beside else "",
            )
        with lora.taken_out(stock.components(self).values()):
            super().save_pretrained(save_directory, *args, **kwargs)

    def save_adapter(self, path: str | Path, format: str = "both", **metadata: str) -> list[Path]:
        """Write the adapter as safetensors: `diffusers`, `comfyui` or `kohya` keys, or the first two side by side.

        Returns the files written. Raises AdapterError if the pipeline holds no adapter.
        """
        return apply.save_adapter(self, path, format=format, metadata=metadata)  # type: ignore[arg-type]

    def load_adapter(
        self,
        source: str | Path | Adapter,
        scale: float = 1.0,
        window: Window | str | Sequence[Any] | None = None,
        revision: str | None = None,
    ) -> None:
        """Put an adapter on the pipeline, in place of one that it holds: a file, run folder, `Adapter` or "me/name".

        The last is a name on the Hub, there at `revision`; the cache serves where the Hub cannot be reached.
        `scale` is its strength: 1.0 as trained. `window` keeps it to a share of the denoising steps: (0.0, 0.6) or
        "0.0-0.6" are the first 60 % (default: what the file says, else all). Raises AdapterError, ConfigError.
        """
        apply.load_adapter(self, source, scale, window, revision)


def refuse_foreign_modules(folder: str, kwargs: Mapping[str, Any]) -> None:
    """A model's index names the module of each part, and diffusers before 0.42.1 imports whichever it is.

    Modules that the program has imported itself are its own. Raises PipelineError.
    """
    where = ("revision", "cache_dir", "token", "local_files_only", "proxies", "force_download")
    try:
        index: Any = DiffusionPipeline.load_config(folder, **{name: kwargs[name] for name in where if name in kwargs})
    except (OSError, ValueError):  # there is none, as from_pretrained will say
        return
    for part, named in index.items() if isinstance(index, dict) else ():
        if part.startswith("_") or not (isinstance(named, list | tuple) and named and isinstance(named[0], str)):
            continue
        module = named[0]
        is_known = module in LOADABLE_CLASSES or module in sys.modules or hasattr(pipelines, module)
        if not is_known and not kwargs.get("trust_remote_code"):
            raise PipelineError(
                f"{folder!r} names the module {module!r} for its part {part!r}, which is no part of diffusers and is "
                "not imported. If you trust it, import it before, or give trust_remote_code=True where it lies in the "
                "model's folder"
            )


@contextmanager
def known_types() -> Iterator[None]:
    """No warning that a bundled model's decoder is not of the class in the type hint: it is meant to be another."""
    library = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "Expected types" not in record.getMessage()

    library.addFilter(keep)
    try:
        yield
    finally:
        library.removeFilter(keep)


# --- classes ---


def stock_class(kind: type) -> type:
    """The stock pipeline class behind `kind`, which may be an aligned one."""
    return next(base for base in kind.__mro__ if not issubclass(base, AlignPropPipeline))


class _Made(type):
    """The type of classes that no module holds: a pickle names the stock class instead."""


copyreg.pickle(_Made, lambda kind: (aligned_class, (stock_class(kind),)))  # type: ignore[arg-type]


@cache
def aligned_class(kind: type) -> type:
    """The subclass of AlignPropPipeline and `kind`.

    It keeps the stock `__name__`, which diffusers writes into model_index.json and looks up when it converts between
    tasks, so what is saved opens without this package; `__qualname__` tells the two apart.
    """
    body = {"__qualname__": f"AlignProp{kind.__name__}", "__module__": __name__, "__doc__": kind.__doc__}
    return _Made(kind.__name__, (AlignPropPipeline, kind), body)


def model_source(given: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The folder or the name on the Hub; that it is there, and the revision in it. Raises PipelineError, HubError."""
    name, there = os.fspath(given), on_hub(given)
    if there is not None:
        return there.repo_id, {"hub": True, **({"revision": there.revision} if there.revision else {})}
    if resolve_model(name) == name and not exists(name):
        raise PipelineError(f"there is no file or folder {name!r} here{hub_hint(name)}; {MODEL_NEEDED}")
    return name, {}


def _bare(kind: type) -> AlignPropPipeline:
    """An object of the aligned class with nothing in it."""
    return object.__new__(aligned_class(kind))


def _made_anew(kind: type, pipeline: DiffusionPipeline, changed: Mapping[str, Any]) -> AlignPropPipeline:
    """Through `__init__`, which works out what depends on the parts; what else was set on `pipeline` stays."""
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in changed:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1) or takes
            raise PipelineError(f"{kind.__name__} takes no {name!r}; did you mean {' or '.join(map(repr, near))}?")
        if name in pipeline.components and isinstance(changed[name], str | bytes | int | float | Path | Mapping | list):
            held = type(pipeline.components[name]).__name__
            raise PipelineError(f"{name}={changed[name]!r}: a loaded component is needed, or None; now it is a {held}")
    known = {**pipeline.config, **pipeline.components}
    pipe = aligned_class(kind)(**{**{name: known[name] for name in takes if name in known}, **changed})
    vars(pipe).update({name: value for name, value in vars(pipeline).items() if name not in vars(pipe)})
    pipe.register_to_config(**{name: value for name, value in pipeline.config.items() if name not in pipe.config})
    return pipe


# --- the steps of align ---


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
    callable_names = stock.call_parameters(pipe)
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
    source = lora.held(stock.components(pipe).values())
    if source not in ("", lora.TRAINED):
        logger.warning(
            "%s, which was loaded, is taken off: a run starts from the base model. To train on top of it, load it with "
            "load_lora_weights(..., adapter_name='mine')",
            source,
        )
    for other in lora.active_others(pipe):
        logger.warning("trained on top of LoRA %s: the adapter belongs with it, use them together", other)
    for guard in stock.guards_on(pipe):
        logger.warning("%s is switched off while training, because it stops the gradient; it is back afterwards", guard)
    stock.tell_lost_words(pipe, prompts.prompts)


def open_run(state: Training, out: str | Path, reward: Reward, given: Any, prompts: PromptSet) -> RunFolder:
    """The run folder, once everything has been checked; `reward` and `given` prompts are those that were asked for."""
    pipe = state.pipe
    facts, lacking = repeating.describe(pipe, state.call_kwargs)
    drawn, unwritten = repeating.prompt_facts(given, prompts)
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


@dataclass(slots=True)
class Session:
    """One call of `align`: the training (its reward is the calibrated one), and what has come of it so far."""

    pipe: DiffusionPipeline
    state: Training
    prompts: PromptSet
    run: RunFolder | None = None
    history: list[StepRecord] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    watch: Watch = field(init=False)
    fastest: float = math.inf
    is_slow: bool = False

    def __post_init__(self) -> None:
        self.watch = Watch(self.config.loss)

    @property
    def reward(self) -> Reward:
        return self.state.reward

    @property
    def config(self) -> AlignConfig:
        return self.state.config

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self.history[-1].step if self.history else 0

    def remember(self, record: StepRecord) -> None:
        """Append a record; of the looks, only the first and the kept one hold on to their pictures.

        What its look warns of is told at once, so that a run that goes wrong can be ended.
        """
        record = replace(record, images=None)
        if self.history and self.steps == record.step:  # the same step, with its evidence now
            self.history.pop()
        for warning in self.watch.first_at(record):
            logger.warning("step %d: %s", record.step, warning.text, extra={"run_warning": warning.kind})
        self.tell_if_slow(record)
        self.history.append(record)
        kept = kept_evidence(self.history, self.config)
        for number, old in enumerate(self.history[1:], start=1):
            look = old.evidence
            if look is not None and look is not kept and look.images is not None:
                self.history[number] = replace(old, evidence=replace(look, images=None))
        if self.run is not None:
            self.run.append(record)

    def tell_if_slow(self, record: StepRecord) -> None:
        """Say once that the steps have become very slow, and why that may be."""
        if not record.step:
            return
        slow = not self.is_slow and record.seconds > max(SLOWER * self.fastest, LEAST_SLOW)
        self.fastest = min(self.fastest, record.seconds)
        if slow and self.pipe.device.type == "cpu":
            self.is_slow = True
            threads = torch.get_num_threads()
            logger.warning(
                "step %d took %.0f s, far more than the steps before: other programs may need the same cores. With "
                "fewer CPU threads, of which there are %d, a run waits less: OMP_NUM_THREADS=1",
                record.step,
                record.seconds,
                threads,
            )


def drain(
    steps: Iterator[StepRecord],
    session: Session,
    on_step: Callable[[StepRecord], object],
    stop: threading.Event,
) -> None:
    """Run the loop to its end, or to the look after the step in which `stop` was set; a second interrupt ends at once.

    KeyboardInterrupt between two steps, and StopIteration from `on_step`, set it too.
    """
    try:
        for record in steps:
            try:
                session.remember(record)
                on_step(record)
            except (KeyboardInterrupt, StopIteration):
                if stop.is_set():
                    return
                stop.set()
    except KeyboardInterrupt:
        stop.set()


def conclude(session: Session, interrupted: bool) -> AlignResult:
    """Save what there is and say how the run ended."""
    done, planned, patience = session.steps, session.config.steps, session.config.evaluation.patience
    status = ""
    if done < planned:
        status = f"interrupted after {done} of {planned} steps"
        if not interrupted:
            status = f"no better look by {session.state.followed} for {patience} looks: ended after {done} steps"
    result = result_of(session, status, interrupted=interrupted and done < planned)
    if session.run is not None:
        write_down(session.run, result)
    return result


def result_of(session: Session, status: str, *, interrupted: bool) -> AlignResult:
    """What came of the run so far. The loop must have ended, so that the adapter on the pipeline is the kept one."""
    state, run, config = session.state, session.run, session.config
    looks = looks_in(session.history)
    before = session.history[0].evidence if session.history else None
    after = next((look for look in looks if look.step == state.kept_step), None)
    changes = changes_between(before, after)
    with autograd_on():  # in inference mode the copies would be of no use outside it
        adapter = Adapter.of(session.pipe, adapter_metadata(session, changes))
        adapter = adapter if run is None else replace(adapter, run_folder=run.path)
    return AlignResult(
        reward=str(session.reward),
        config=config,
        adapter=adapter,
        history=tuple(session.history),
        before=before,
        after=after,
        seconds=time.monotonic() - session.began,
        run_folder=None if run is None else run.path,
        adapter_path=None if run is None else run.adapter_path,
        interrupted=interrupted,
        stopped=status,
        changes=changes,
        kept_step=state.kept_step,
        chosen_from=len(looks) if config.evaluation.keep_best and after is not None else 0,
        followed=state.followed,
        trained_on=state.prompts.words,
        cuts=cuts_in((state.reward, *state.judges), (*state.prompts.train.prompts, *state.prompts.evidence.prompts)),
    )


def write_down(run: RunFolder, result: AlignResult) -> None:
    """Fill the run folder, the adapter first. Raises RunError."""
    try:
        result.adapter.save(run.adapter_path)
    except AdapterError as error:
        raise RunError(str(error)) from error
    if result.after is not None:
        run.evidence(result.after, "after")
    facts = {"kept_step": result.kept_step, "followed": result.followed, "chosen_from": result.chosen_from}
    facts |= {"trained_on": result.trained_on, "choice": result.choice}
    facts |= {} if result.after is None else {"evidence_of": result.after.what}
    run.finish(result.changes, result.stopped or "completed", facts, result.cuts)


def give_up(session: Session, error: BaseException) -> None:
    """After an error: save what was learned, put it on the error, and take the adapter off the pipeline.

    An error of writing leaves the adapter on, and it is written to another place where need be. An interrupt leaves it
    on too: it comes when the end is being saved, here or before, which may so be on no disk.
    """
    is_writing = isinstance(error, RunError) and session.steps > 0
    stays_on = session.steps > 0 and isinstance(error, RunError | KeyboardInterrupt)
    try:
        interrupted = isinstance(error, KeyboardInterrupt)
        how = f"failed: {str(error) or type(error).__name__}"
        if not session.steps:
            if session.run is not None and not isinstance(error, RunError):
                session.run.finish(status="interrupted before the first step" if interrupted else how)
            return
        how = "interrupted while it was saved" if interrupted else how
        result = vars(error)["result"] = result_of(session, how, interrupted=interrupted)
        if session.run is not None:
            try:
                write_down(session.run, result)
            except RunError:
                result = vars(error)["result"] = rescued(result)
        if is_writing:
            error.args = (f"{error}. {where_it_is(result)}",)
    except KeyboardInterrupt as again:
        stays_on = session.steps > 0
        vars(again)["result"] = vars(error).get("result")
        raise
    finally:
        if not stays_on:
            lora.detach(stock.denoisers(session.pipe))


def rescued(result: AlignResult) -> AlignResult:
    """The result with its adapter on disk: where it was meant to be, or in the first other place that takes it."""
    wanted = result.adapter_path
    if wanted is None or wanted.is_file():
        return result
    for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        path = folder / f"{wanted.absolute().parent.name}-adapter-{secrets.token_hex(4)}.safetensors"
        try:
            result.adapter.save(path, format="diffusers")
        except (AlignError, OSError):
            continue
        logger.error("the adapter could not be written to %s; it is in %s", wanted, path)
        return replace(result, adapter_path=path)
    return replace(result, adapter_path=None)


def where_it_is(result: AlignResult) -> str:
    """Where the adapter of a run is that could not be written down."""
    held = "the pipeline still holds it, and so does the error, as error.result.adapter"
    if result.adapter_path is None:
        return f"The adapter of step {result.kept_step} is on no disk; in Python {held}"
    return f"The adapter of step {result.kept_step} is in {str(result.adapter_path)!r}; in Python {held}"


def adapter_metadata(session: Session, changes: Mapping[str, Change]) -> dict[str, str]:
    """What the adapter's header says of the run."""
    scores = {
        name: [float(f"{number:.5g}") for number in (before, after, error) if not math.isnan(number)]
        for name, (before, after, _, error) in changes.items()
    }
    others = "; ".join(map(str, lora.active_others(session.pipe)))
    trained_with = {"trained_with": others} if others else {}
    return trained_with | apply.describe(
        session.pipe,
        reward=str(session.reward),
        config=session.config.to_json(),
        step=session.state.kept_step,
        prompts=session.prompts.prompts,
        scores=scores,
    )


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C ends the run after the current step; a second one raises KeyboardInterrupt at once.

    Only where Python's own handler is in place, so that a notebook or a program with its own handler keeps it.
    """
    stop = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()
        logger.warning("stopping after this step and saving everything; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
