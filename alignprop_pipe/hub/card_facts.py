"""What a model card is made of: `Facts`, and the names of the files next to it."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers

from alignprop_pipe.bundled import MODELS
from alignprop_pipe.hub.licences import Licence, base_licence, reward_licences
from alignprop_pipe.layout import HUB_WEIGHTS
from alignprop_pipe.records import Change, Evidence

PROJECT = "alignprop-pipe"
PAPER = "https://arxiv.org/abs/2310.03739"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the card says. What is not known is empty, None or NaN, and the card says nothing of it.

    `base` is a public id; `prompts` the first ones of `num_prompts`; `source` where they came from; `changes` are
    keyed as the run's scores are; `judges` are the names among them that were never trained on; `diversity` carries
    its own standard error; `mixed` are the adapters that it was mixed of, each with its weight; `window` is the share
    of the denoising steps that the adapter is for. `widgets` are (prompt, picture's path in the repository); `choice`
    says how the adapter was chosen among several evaluations; `before` and `after` are those that the changes come
    from.
    """

    repo_id: str
    base: str = ""
    base_class: str = ""
    reward: str = ""
    source: str = ""
    prompts: Sequence[str] = ()
    num_prompts: int = 0
    held_out: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    judges: Sequence[str] = ()
    diversity: Change | None = None
    status: str = ""
    steps: int = 0
    kept_step: int = 0
    seconds: float = math.nan
    device: str = ""
    size: str = ""
    window: str = ""
    command: str = ""
    mixed: Sequence[str] = ()
    files: Sequence[str] = ()
    widgets: Sequence[tuple[str, str]] = ()
    choice: str = ""
    before: Evidence | None = None
    after: Evidence | None = None

    @property
    def scores(self) -> Mapping[str, Change]:
        """Every change and the diversity's, without a part that is the whole reward."""
        whole = self.changes.get("reward")
        shown = {
            name: change
            for name, change in self.changes.items()
            if name == "reward" or name in self.judges or change[:2] != (whole[:2] if whole else None)
        }
        return shown | ({} if self.diversity is None else {"diversity": self.diversity})

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @property
    def bundled(self) -> bool:
        """Whether the base model ships inside this package and is nowhere else."""
        return any(model.name == self.base for model in MODELS)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the base model's own call takes, by name; empty for a class that this diffusers does not know."""
        kind = getattr(diffusers, self.base_class, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            return {}
        found: Any = kind
        return inspect.signature(found.__call__).parameters

    @property
    def task(self) -> str:
        if "num_frames" in self.parameters:
            return "text-to-video"
        return "image-to-image" if {"image", "strength"} <= set(self.parameters) else "text-to-image"

    @property
    def licences(self) -> list[Licence]:
        judges = self.config.get("evaluation", {}).get("judges", ())
        found = [base_licence(self.base), *(reward_licences(self.reward) if self.reward else [])]
        return found + [one for judge in judges for one in reward_licences(judge, judge=True)]

    @property
    def comfyui_files(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors") and name != HUB_WEIGHTS]

    @property
    def kind_of_prompts(self) -> str:
        """Of the prompts of the evidence: "held-out" or "training"."""
        return "held-out" if self.after is None or self.after.held_out else "training"

    @property
    def number_of_prompts(self) -> str:
        """What the evidence is of: `16 held-out prompts`."""
        if self.after:
            return self.after.what
        return f"{self.held_out} held-out prompt{'s' * (self.held_out != 1)}" if self.held_out else "Held-out prompts"

    @property
    def of_prompts(self) -> str:
        """The same, and where they come from."""
        comma = "," * (self.kind_of_prompts == "training")
        return f"{self.number_of_prompts}{comma} of {self.source}" if self.source else self.number_of_prompts

    @property
    def prompts_text(self) -> str:
        """The prompts of the training: how many, and where they come from."""
        count = f"{self.num_prompts}" if self.num_prompts else ""
        return f"{count} of {self.source}" if self.source and count else count or self.source
