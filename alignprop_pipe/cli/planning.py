"""What `train` will do: the flags, over the file of `--config`, over the preset; and all that is wrong with it at once.

Nothing is loaded or drawn here. A file may be settings alone, or a run's `config.json`, which repeats the run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from alignprop_pipe.bundled import REWARD
from alignprop_pipe.cli import console
from alignprop_pipe.cli.drawing import default_out
from alignprop_pipe.cli.opening import check_model, find_device, import_rewards, open_pipeline, open_reward
from alignprop_pipe.cli.options import BUNDLED, TrainRequest, config_for
from alignprop_pipe.config.settings import CHOSEN, FIELD_PATHS, PARTS, AlignConfig, read_table
from alignprop_pipe.errors import ConfigError, RewardError
from alignprop_pipe.layout import CONFIG
from alignprop_pipe.runs.facts import NAMED, check_run, check_types
from alignprop_pipe.sources import exists, expanded, is_folder

if TYPE_CHECKING:
    from alignprop_pipe.pipeline import AlignPropPipeline
    from alignprop_pipe.prompts import PromptSet
    from alignprop_pipe.rewards.base import Reward
    from alignprop_pipe.runs.trackers import Trackers

ACCEPTED = re.compile(r"accept_license\s*=\s*True")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run needs. `facts` is the state of the pipeline in a run that is repeated, else empty."""

    request: TrainRequest
    model: str
    reward: "Reward"
    prompts: "PromptSet"
    config: AlignConfig
    out: Path
    trackers: "Trackers"
    facts: Mapping[str, Any]
    call: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SettingsFile:
    """A file of settings, which may name model, reward and prompts too; or what a run has written of itself."""

    path: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "SettingsFile":
        """A .toml or .json file, or a run folder. Raises ConfigError."""
        if path is None:
            return cls()
        path = expanded(path)
        path = path / CONFIG if is_folder(path) else path
        data = read_table(path)
        if not isinstance(data, Mapping):
            raise ConfigError(f"configuration file {str(path)!r}: a table of settings is needed")
        made = cls(path, data)
        try:
            check_run(data) if made.is_run else check_types(data, NAMED)
        except ConfigError as error:
            raise ConfigError(f"configuration file {str(path)!r}: {error}") from error
        return made

    @property
    def is_run(self) -> bool:
        return "config" in self.data

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.data["config"] if self.is_run else {k: v for k, v in self.data.items() if k not in NAMED}

    @property
    def names(self) -> set[str]:
        """The single settings that it gives."""
        inside = [
            name for part in PARTS if isinstance(self.settings.get(part), Mapping) for name in self.settings[part]
        ]
        return {*self.settings, *inside} & set(FIELD_PATHS)

    def text(self, name: str) -> str:
        return self.data.get(name) or ""

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        return (self.is_run and self.data.get("pipeline")) or {}

    @property
    def folders(self) -> list[Path]:
        """Where its relative paths may lead: from where the run was started, and from here."""
        return [*([Path(self.text("working_folder"))] if self.text("working_folder") else []), Path()]

    @property
    def model(self) -> str:
        """The model as it is found from here."""
        said, source = self.text("model"), self.facts.get("source") or {}
        if said in ("", BUNDLED):
            return said
        path = next((folder / said for folder in self.folders if exists(folder / said)), None)
        if path is not None and not source.get("hub"):
            return str(path)
        revision = f"@{source['revision']}" if source.get("revision") else ""
        return f"hf://{said}{revision}" if source.get("hub") or revision else said


def planned(request: TrainRequest, settings: Mapping[str, Any], output: console.Output) -> Plan:
    """Raises ConfigError, which says all that is wrong."""
    console.quiet_libraries(output)
    problems, file = console.Problems(), SettingsFile()
    with problems.noted():
        import_rewards(request.imports)  # first, since the file may name what is in them
    with problems.noted():
        file = SettingsFile.read(request.config)
    model = request.model or file.model or BUNDLED
    same_model = request.model in (None, file.text("model"), file.model)
    facts = file.facts if same_model else {}
    notes = _winning(request, file)
    config = AlignConfig()
    with problems.noted():
        config = _config(request, model, file, settings, notes)
    reward = prompts = trackers = None
    call: Mapping[str, Any] = {}
    with problems.noted():
        check_model(model)
    with problems.noted():
        reward = _reward(request, file, model, problems, output)
    with problems.noted():
        prompts = _prompts(request, file, model, notes)
    with problems.noted():
        config = _judges(request, file, config, settings, prompts, notes)
    if reward is not None:
        config = _free_judge(config, reward, notes)
    _check_judges(request, model, config, settings.get("judges", config.evaluation.judges), problems, output)
    out = request.out or default_out(str(reward or "run"))
    with problems.noted():
        from alignprop_pipe.runs.folder import check_place

        check_place(out)
    with problems.noted():
        from alignprop_pipe.runs.trackers import Trackers

        trackers = Trackers(request.report_to or [], config, out)
    with problems.noted():
        from alignprop_pipe.runs import repeating

        request = _computing(request, facts, notes)
        call = repeating.call_of(facts)
    problems.found += _not_repeatable(request, file, facts)
    problems.tell()
    return Plan(request, model, reward, prompts, config, out, trackers, facts, call, tuple(notes))  # type: ignore[arg-type]  # nothing is None without a problem


def open_planned(plan: Plan, output: console.Output) -> "AlignPropPipeline":
    """The model, in the state that the run had which is repeated. Raises PipelineError, ConfigError."""
    from alignprop_pipe.diffusion import pipeline_call
    from alignprop_pipe.pipeline import AlignPropPipeline
    from alignprop_pipe.runs import repeating

    source = plan.facts.get("source") or {}
    variant = {"variant": source["variant"]} if source.get("variant") else {}
    pipe: Any = open_pipeline(plan.model, plan.request, output, **variant)
    facts = plan.facts if plan.request.dtype in (None, repeating.one_dtype(plan.facts)) else {**plan.facts, "dtype": {}}
    pipe = AlignPropPipeline.from_pipe(repeating.applied(pipe, facts)) if facts else pipe
    unknown = sorted(set(plan.call) - set(pipeline_call.call_parameters(pipe)))
    if unknown:
        raise ConfigError(
            f"the run gave {unknown[0]!r} to the pipeline's call, which {type(pipe).__name__} does not take"
        )
    return pipe


def _config(
    request: TrainRequest, model: str, file: SettingsFile, settings: Mapping[str, Any], notes: list[str]
) -> AlignConfig:
    base = config_for(model, {}, request.preset)
    try:
        # Judges of the file name no code; but those that were typed take their place.
        below = AlignConfig.from_dict(file.settings, base, allow_code="judges" in settings)
    except ConfigError as error:
        raise ConfigError(f"configuration file {str(file.path)!r}: {error}") from error
    config = below.replace(**settings)
    for name in settings:
        if name in file.names and (before := _single(below, name)) != (now := _single(config, name)):
            notes.append(f"--{name.replace('_', '-')} {_shown(now)} wins over {_shown(before)} in {file.path}")
    return config


def _single(config: AlignConfig, name: str) -> Any:
    part, _ = FIELD_PATHS[name]
    return getattr(config if part is None else getattr(config, part), name)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _winning(request: TrainRequest, file: SettingsFile) -> list[str]:
    """A line for each thing next to the settings that a flag decides against the file."""
    said = {"MODEL": (request.model, file.text("model")), "--reward": (request.reward, file.text("reward"))}
    prompts = file.data.get("prompts")
    given = request.prompts or (f"{len(request.prompt)} prompts" if request.prompt else None)
    held = prompts if isinstance(prompts, str) else f"{len(prompts)} prompts" if isinstance(prompts, list) else ""
    said["--prompts"] = (given, held)
    return [
        f"{flag} {now} wins over {before} in {file.path}"
        for flag, (now, before) in said.items()
        if now and before and now not in (before, file.model, file.text("calibrated_reward"))
    ]


def _reward(
    request: TrainRequest, file: SettingsFile, model: str, problems: console.Problems, output: console.Output
) -> "Reward | None":
    """What was typed; else what the file says, which names no code and accepts no licence; else clip for emoji."""
    if request.reward is not None:
        return open_reward(request.reward, request, output, model=model)
    text = file.text("calibrated_reward") or file.text("reward")
    if text:
        return open_reward(_from_file(request, file, text), request, output, allow_code=False, model=model)
    if model == BUNDLED:
        return open_reward(REWARD, request, output)
    if problems.found and request.config is not None and file.path is None:
        return None  # what the file says is not known
    raise typer.BadParameter(
        f"what should pictures of {model!r} be scored by? Give --reward, for example --reward "
        "hpsv2.1, or --reward 'clip(model=\"openai/clip-vit-large-patch14\")' (list: alignprop rewards)",
        param_hint="--reward",
    )


def _from_file(request: TrainRequest, file: SettingsFile, text: str) -> str:
    if ACCEPTED.search(text) and not request.accept_license:
        raise RewardError(
            f"{text!r}, which {file.path} names, has a licence that binds whoever uses it (see 'alignprop rewards'): "
            "add --accept-license"
        )
    return text


def _prompts(request: TrainRequest, file: SettingsFile, model: str, notes: list[str]) -> "PromptSet | None":
    from alignprop_pipe.prompts import PromptSet
    from alignprop_pipe.runs.repeating import prompts_of

    if request.prompts is not None and request.prompt:
        raise typer.BadParameter("give --prompts or --prompt, not both", param_hint="--prompt")
    source: Any = request.prompts or request.prompt
    if source is None and file.data.get("prompts"):
        source, note = prompts_of(file.data, file.folders)
        notes += [note] if note else []
    if source is None and model == BUNDLED:
        source = BUNDLED
    if source is None and request.config is not None and file.path is None:
        return None
    if source is None:
        raise typer.BadParameter(
            f"what should {model!r} draw in training? Give --prompts, a file or the name of a set, for example "
            "--prompts animals (list: alignprop prompts)",
            param_hint="--prompts",
        )
    return PromptSet.load(source)


def _judges(
    request: TrainRequest,
    file: SettingsFile,
    config: AlignConfig,
    settings: Mapping[str, Any],
    prompts: "PromptSet | None",
    notes: list[str],
) -> AlignConfig:
    """The judges of the file accept no licence; the preset's needs prompts that say what it could check."""
    from alignprop_pipe.rewards.scorers.judge import knows

    judges = config.evaluation.judges
    if judges and "judges" in file.names and "judges" not in settings:
        for text in judges:
            _from_file(request, file, text)
    elif {*judges} - {CHOSEN} and prompts is not None and not ("judges" in settings or knows(prompts.targets)):
        notes.append("these prompts come without targets that the preset's judge knows")
        return config.replace(judges=(CHOSEN,))
    return config


def _free_judge(config: AlignConfig, reward: "Reward", notes: list[str]) -> AlignConfig:
    """With a judge that costs nothing, where none is named."""
    from alignprop_pipe.training.evidence import with_chosen_judge

    judged = with_chosen_judge(config, reward)
    if judged != config and judged.evaluation.judges:
        notes.append(f"the judge {judged.evaluation.judges[0]} watches this run, since none was named (--judges)")
    return judged


def _check_judges(
    request: TrainRequest,
    model: str,
    config: AlignConfig,
    texts: Sequence[str],
    problems: console.Problems,
    output: console.Output,
) -> None:
    """Those of a file have been searched for code by now."""
    from alignprop_pipe.training.evidence import followed_judge

    judges, before = [], len(problems.found)
    for text in (text for text in texts if text != CHOSEN):
        with problems.noted():
            judges.append(open_reward(text, request, output, model=model))
    if len(problems.found) == before:
        with problems.noted():
            followed_judge(config.evaluation.keep_best, judges, config.evaluation.judges)


def _computing(request: TrainRequest, facts: Mapping[str, Any], notes: list[str]) -> TrainRequest:
    """Device and number format: the flag's, else the run's. Raises typer.BadParameter."""
    from alignprop_pipe.runs.repeating import one_dtype

    device, dtype = str(facts.get("device") or "auto"), one_dtype(facts)
    if request.device == "auto" and device != "auto":
        try:
            find_device(device)
        except typer.BadParameter:
            notes.append(f"the run was on {device}, which is not here: other numbers come out")
            device = "auto"
        request = replace(request, device=device)
    elif device not in ("auto", request.device):
        notes.append(f"--device {request.device} wins over {device} in the run")
    find_device(request.device)
    if request.dtype is None:
        return replace(request, dtype=dtype)
    if dtype not in (None, request.dtype):
        notes.append(f"--dtype {request.dtype} wins over {dtype} in the run")
    return request


def _not_repeatable(request: TrainRequest, file: SettingsFile, facts: Mapping[str, Any]) -> list[str]:
    """What the run had that no file can hold, and that no flag gives."""
    found = (file.is_run and file.data.get("not_repeatable")) or {}
    given = {
        "reward": request.reward,
        "prompts": request.prompts or request.prompt,
        "model": request.model,
        "pipeline": not facts,
    }
    return [f"{file.path} cannot repeat its run: {why}" for subject, why in found.items() if not given.get(subject)]
