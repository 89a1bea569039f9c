"""What a run folder's `config.json` says next to the settings, so that the run can be repeated from it; and back again.

The format is that of `describe`, `prompt_facts` and `repeat_command`; `run_facts` lists it. What no file can
hold, such as a picture that was an argument of the call, is described, and said under "not_repeatable": then no
command repeats the run, and none is given. A file is data: no class outside diffusers is made, and nothing is run.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from alignprop_pipe.config.expression import read_expression
from alignprop_pipe.diffusion import lora, pipeline_parts
from alignprop_pipe.errors import ConfigError, PromptError, RewardError
from alignprop_pipe.escaping import in_shell
from alignprop_pipe.prompts import PromptSet, named_sets
from alignprop_pipe.rewards.base import Reward, members
from alignprop_pipe.rewards.registry import REGISTRY
from alignprop_pipe.rewards.scorers.python import PythonReward, reference
from alignprop_pipe.sources import exists, expanded, on_hub

TUPLE, TABLE, DESCRIBED = "tuple", "table", "described"
"""Keys of the one-entry tables that stand for what JSON does not know."""

OWN = "alignprop_pipe."
DTYPES = ("float32", "float16", "bfloat16", "float64")
MEASURED_FOR = 0.3
"""Seconds for which is looked how busy the cores are."""
CPU_LIMITS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Files that say how many microseconds of a period a container may use all cores together."""
MOST = 1_000_000
"""Of steps, and of whatever else a scheduler counts: it makes tables of that length."""


# --- the pipeline ----------------------------------------------------------------------------------------------------


def describe(pipe: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The state of a pipeline that decides a run's numbers, as plain values; and what cannot be repeated, by subject.

    `class`; `source`, the `revision` and `variant` that it was loaded in, and `hub` where that was said; `dtype` of
    each network; `device` and CPU `threads`; `scheduler` with its `class` and `config`; `adapters`, other LoRAs that
    worked, fused ones too, with their weight; and `call`, the further arguments of the pipeline's own call.
    """
    scheduler, lacking = pipeline_parts.scheduler(pipe), {}
    others, call = lora.active_others(pipe), {name: encoded(value) for name, value in call_kwargs.items()}
    facts = {
        "class": type(pipe).__name__,
        "source": dict(getattr(pipe, "_alignprop_source", None) or {}),
        "dtype": {name: _dtype_of(part) for name, part in pipeline_parts.components(pipe).items()},
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "scheduler": {"class": type(scheduler).__name__, "config": _config_of(scheduler)},
        "adapters": [asdict(one) for one in others],
        "call": call,
    }
    if _kind(facts["class"], DiffusionPipeline) is None or _kind(type(scheduler).__name__, SchedulerMixin) is None:
        lacking["pipeline"] = f"{facts['class']} with {type(scheduler).__name__} is not made of diffusers' own classes"
    if others:
        lacking["pipeline"] = f"the LoRA {others[0]} belonged to the pipeline, and its file is not known"
    if described := [name for name, value in call.items() if _is_described(value)]:
        lacking["pipeline"] = f"{described[0]}= was {_is_described(call[described[0]])}, which no text can hold"
    model = pipe.name_or_path or ""
    if not model or not (model == "emoji" or facts["source"].get("hub") or exists(model) or on_hub(model)):
        lacking["model"] = "the pipeline was made in Python, and no folder, file or name on the Hub holds it"
    return facts, lacking


def applied(pipe: DiffusionPipeline, facts: Mapping[str, Any]) -> DiffusionPipeline:
    """A pipeline that has just been loaded -> the same in the state that `describe` told of.

    The networks are shared; the class may be another one. `adapters`, `call`, `device` and `threads` are left to the
    caller. Raises ConfigError for what is not of diffusers.
    """
    kind = facts.get("class", type(pipe).__name__)
    if kind != type(pipe).__name__:
        pipe = _known(kind, DiffusionPipeline).from_pipe(pipe)
    for name, part in pipeline_parts.components(pipe).items():
        dtype = _dtype((facts.get("dtype") or {}).get(name))
        if dtype is not None and _dtype_of(part) != facts["dtype"][name]:
            part.to(dtype)
    wanted = facts.get("scheduler") or {}
    if wanted:
        scheduler = _scheduler(_known(wanted.get("class"), SchedulerMixin), wanted.get("config") or {})
        now = pipeline_parts.scheduler(pipe)
        if type(scheduler) is not type(now) or _config_of(scheduler) != _config_of(now):
            pipeline_parts.painting(pipe).scheduler = scheduler
    return pipe


def call_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments of the pipeline's call. Raises ConfigError for one that was only described."""
    return {str(name): decoded(str(name), value) for name, value in (facts.get("call") or {}).items()}


def one_dtype(facts: Mapping[str, Any]) -> str | None:
    """The number format to load a model in: that of all its networks, or float32 where they differ.

    Raises ConfigError for one that is not known.
    """
    named = set((facts.get("dtype") or {}).values()) - {"", None}
    if unknown := sorted(named - set(DTYPES)):
        raise ConfigError(f"pipeline.dtype holds {unknown[0]!r}: one of {', '.join(DTYPES)} is needed")
    return (named.pop() if len(named) == 1 else "float32") if named else None


@contextmanager
def on_threads(count: Any) -> Iterator[None]:
    """As many CPU threads inside as the run had: sums in another order round differently."""
    before = torch.get_num_threads()
    if isinstance(count, int) and 0 < count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def free_threads() -> int:
    """CPU threads that find a free core; as many as torch has where somebody has set their number.

    More threads than free cores wait for each other in every sum: then a step takes up to a hundred times as long.
    """
    usual = torch.get_num_threads()
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return usual
    busy = psutil.cpu_percent(interval=MEASURED_FOR, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    free = sum(1 - busy[core] / 100 for core in ours if core < len(busy))
    return max(1, math.floor(min(usual, round(free), granted_cores())))


def granted_cores() -> float:
    """As many cores' time as the container's control group grants; infinite where it grants all."""
    for files in CPU_LIMITS:
        try:
            quota, period = " ".join(Path(file).read_text() for file in files).split()
            if float(quota) > 0:
                return max(1.0, float(quota) / float(period))
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
    return math.inf


def encoded(value: Any) -> Any:
    """A plain value as JSON has it, with tuples and tables told apart; anything else as a description."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, tuple | list):
        inside = [encoded(one) for one in value]
        return next((one for one in inside if _is_described(one)), {TUPLE: inside} if type(value) is tuple else inside)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        table = {name: encoded(one) for name, one in value.items()}
        return next((one for one in table.values() if _is_described(one)), {TABLE: table})
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    size = f" of {'x'.join(map(str, shape))}" if isinstance(shape, tuple) else ""
    return {DESCRIBED: f"a {type(value).__name__}{size}"}


def decoded(name: str, value: Any) -> Any:
    """The inverse of `encoded`; `name` says whose value it is. Raises ConfigError for what `encoded` does not write."""
    try:
        if isinstance(value, list):
            return [decoded(name, one) for one in value]
        if not isinstance(value, Mapping):
            return value
        if isinstance(value.get(TUPLE), list):
            return tuple(decoded(name, one) for one in value[TUPLE])
        if isinstance(value.get(TABLE), Mapping):
            return {key: decoded(name, one) for key, one in value[TABLE].items()}
    except RecursionError as error:
        raise ConfigError(f"{name!r} of the run is too deep to be read") from error
    said = f"was {_is_described(value)}, which no text can hold" if _is_described(value) else "cannot be read"
    raise ConfigError(f"{name!r} of the run {said}")


def _is_described(value: Any) -> str:
    return str(value[DESCRIBED]) if isinstance(value, Mapping) and set(value) == {DESCRIBED} else ""


def _kind(name: Any, base: type) -> Any:
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _known(name: Any, base: type) -> Any:
    found = _kind(name, base)
    if found is None:
        raise ConfigError(f"the run's {name!r} is no class of the installed diffusers; install the version of the run")
    return found


def _scheduler(kind: Any, config: Mapping[str, Any]) -> Any:
    """Raises ConfigError for a configuration that the class does not take."""
    try:
        if large := [name for name, value in config.items() if isinstance(value, int) and value > MOST]:
            raise ValueError(f"{large[0]} is more than {MOST:,}")
        return kind.from_config(dict(config))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"the run's {kind.__name__} cannot be made from pipeline.scheduler.config: {reason}"
        ) from error


def _config_of(scheduler: Any) -> dict[str, Any]:
    """Its configuration as plain values, without the versions that wrote it."""
    said = json.loads(scheduler.to_json_string())
    return {name: value for name, value in said.items() if not name.startswith("_")}


def _dtype_of(part: nn.Module) -> str:
    parameter = next(iter(part.parameters()), None)
    return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype | None:
    return getattr(torch, name) if name in DTYPES else None


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_facts(prompts: PromptSet) -> tuple[dict[str, Any], str]:
    """`prompts`: the source or a list; `prompt_set`: what was in a file or has targets; and what cannot be written."""
    if named_sets().get(prompts.source) == prompts:
        return {"prompts": prompts.source}, ""
    targets = {name: [encoded(value) for value in column] for name, column in prompts.targets.items()}
    odd = [name for name, column in targets.items() if any(map(_is_described, column))]
    held = {"prompts": list(prompts.prompts), "targets": {} if odd else targets}
    lacking = f"the targets {odd[0]!r} of the prompts are no plain values" if odd else ""
    if prompts.source:
        return {"prompts": prompts.source, "prompt_set": held}, lacking
    return {"prompts": held["prompts"], **({"prompt_set": held} if targets else {})}, lacking


def prompts_of(about: Mapping[str, Any], folders: Sequence[Path] = ()) -> tuple[PromptSet, str]:
    """The prompts of a run, and what is to be said of them. `folders` are where a file of theirs may be.

    What the run drew counts, also where its file has changed since. Raises PromptError.
    """
    given, held = about.get("prompts"), about.get("prompt_set")
    if isinstance(given, str) and not held:
        return PromptSet.load(given), ""
    listed = held.get("prompts") if held else given
    if not isinstance(listed, list):
        raise PromptError("the run's file holds no prompts: give --prompts")
    targets = held.get("targets") or {} if held else {}
    columns = {name: tuple(decoded(name, one) for one in column or ()) for name, column in targets.items()}
    found = PromptSet(tuple(listed), columns)
    if not isinstance(given, str):
        return found, ""
    try:
        now = next(PromptSet.load(str(folder / given)) for folder in folders if exists(folder / given))
    except StopIteration:
        return found, f"the prompts are those that the run had; their file {given!r} is not here"
    except PromptError:
        now = None
    changed = f"the prompts are those that the run had; their file {given!r} holds others now"
    return found, "" if now == found else changed


# --- the command -----------------------------------------------------------------------------------------------------


def repeat_command(
    config: Path, reward: Reward, judges: Sequence[Reward], not_repeatable: Mapping[str, str]
) -> tuple[str, str]:
    """What to type in any folder to repeat the run in `config`, and why nothing can be typed; one of them is empty.

    The file holds all of it but code, which is named by who runs it. Python runs get this command too: it needs no
    script, whose second run would do everything else in it again.
    """
    words = ["alignprop", "train", "--config", str(config.absolute())]
    try:
        texts, imports = [], []
        for one in (reward, *judges):
            text, needed = typed(one)
            texts.append(text)
            imports += needed
    except RewardError as error:
        return "", str(error)
    if not_repeatable:
        return "", "; ".join(not_repeatable.values())
    words += [word for place in dict.fromkeys(imports) for word in ("--import", place)]
    if has_code(reward):
        words += ["--reward", texts[0]]
    if any(map(has_code, judges)):
        words += [word for text in texts[1:] for word in ("--judges", text)]
    if any("accept_license=True" in text for text in texts):
        words.append("--accept-license")
    return " ".join(map(in_shell, words)), ""


def has_code(reward: Reward) -> bool:
    """Whether its text names code outside this package."""
    return any(type(member) is PythonReward for member in members(reward))


def typed(reward: Reward) -> tuple[str, list[str]]:
    """Its text with every file by its whole path, and the files or modules to import before it is read.

    Raises RewardError where a part of it has no name that another process could find.
    """
    imports = [place for member in members(reward) if (place := _registered_in(member))]
    text = str(_by_whole_paths(reward))
    try:
        read_expression(text, lambda *_: reward)
    except RewardError as error:
        raise RewardError(f"the reward {text} was given arguments that no text can hold") from error
    return text, imports


def _registered_in(member: Reward) -> str:
    """The file or module that registers a reward of somebody's own; empty for ours and for those named by place."""
    kind = type(member)
    if kind is PythonReward or (kind.__module__.startswith(OWN) and not isinstance(member, PythonReward)):
        return ""
    entry = REGISTRY.get(member.name)
    if entry is None or entry.registered is not kind:
        raise RewardError(f"the reward {member.name} is a class that is not registered, so that no text names it")
    return _place(member.inner if isinstance(member, PythonReward) else kind, member.name)[0]


def _by_whole_paths(reward: Reward) -> Reward:
    if type(reward) is not PythonReward:
        return reward.rebuilt(_by_whole_paths) if reward.children() else reward
    source = reward._args[0] if reward._args else reward._kwargs["source"]
    if isinstance(source, str):
        place, _, name = source.rpartition(":")
        place = str(expanded(place).absolute()) if place.endswith(".py") else _findable(place)
    else:
        place, name = _place(source, reward.name)
    twin = copy.copy(reward)  # made anew, it would run the file again
    twin._args = (f"{place}:{name}",)
    twin._kwargs = {key: value for key, value in reward._kwargs.items() if key != "source"}
    return twin


def _place(source: Any, called: str) -> tuple[str, str]:
    """The file or module of a function or class, and its name there. Raises RewardError where it has none."""
    module, name = getattr(source, "__module__", ""), getattr(source, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if module == "__main__" or not name or found is not source:
        where = "in the script or notebook that ran" if module == "__main__" else "while the program ran"
        raise RewardError(
            f"the reward {called} was made {where}, so that no text names it: put it into a file of its own, "
            "and give it as 'file.py:function'"
        )
    place, _, name = reference(source).rpartition(":")
    return (str(Path(place).absolute()) if place.endswith(".py") else _findable(place)), name


def _findable(module: str) -> str:
    """A module by its file, where it lies next to a script and is found from there alone; else by its name."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or "site-packages" in file or "." in module:
        return module
    return str(Path(file).absolute())
