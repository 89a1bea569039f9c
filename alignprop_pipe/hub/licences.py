"""The licences that an adapter carries on: that of its base model, and those of what its reward was computed with."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from alignprop_pipe.bundled import MODELS
from alignprop_pipe.config.expression import read_expression
from alignprop_pipe.errors import RewardError
from alignprop_pipe.rewards.registry import REGISTRY

HUB = "https://huggingface.co/"
SPDX = {"Apache-2.0": "apache-2.0", "MIT": "mit", "BSD-3-Clause": "bsd-3-clause", "AGPL-3.0": "agpl-3.0"}
UNKNOWN = "unknown"

BASES: dict[str, str] = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd-legacy/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}
"""Licences of base models that are used much, by the names that their own cards give."""

OWN_NAMES = frozenset({"stabilityai-ai-community", "flux-1-dev-non-commercial-license"})
"""Licences that the Hub files under `other`."""


@dataclass(frozen=True, slots=True)
class Licence:
    """Of one thing: `name` as it is filed (`UNKNOWN`, or empty where there is nothing to license), `text` in words."""

    of: str
    name: str
    text: str
    link: str = ""
    binds: bool = True


def base_licence(model: str) -> Licence:
    """The licence of a base model by its public id; of Hub models beyond the table, as their cached card says it."""
    bundled = next((one for one in MODELS if one.name == model), None)
    if bundled is not None:
        return Licence(f"base model {model}", "apache-2.0", bundled.licence)
    if "/" not in model:
        return Licence("base model", UNKNOWN, "a local model, whose licence this file does not know")
    name = BASES.get(model) or _cached(model)
    if not name:
        return Licence(f"base model {model}", UNKNOWN, "as its own page says", f"{HUB}{model}")
    return Licence(f"base model {model}", name, name, f"{HUB}{model}")


def reward_licences(expression: str, *, judge: bool = False) -> list[Licence]:
    """The licences of the weights behind every reward that `expression` names; a judge's bind nobody."""
    kind = "judge" if judge else "reward"
    found: dict[str, Licence] = {}

    def note(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        licence = _reward_licence(kind, name, _model_in(name, args, kwargs))
        found[licence.of] = licence
        return 1

    try:
        read_expression(expression, note)
    except RewardError:
        return [Licence(f"{kind} {expression}", UNKNOWN, "of its author", binds=not judge)]
    return [one for one in found.values() if one.text]


def _model_in(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The weights that the arguments of a reward name; None for the usual ones, or a reward that is not known."""
    if "model" in kwargs or name not in REGISTRY:
        return kwargs.get("model")
    parameters = [one for one in inspect.signature(REGISTRY[name].kind.__init__).parameters if one != "self"]
    return dict(zip(parameters, args, strict=False)).get("model")


def overall(licences: Sequence[Licence]) -> dict[str, str]:
    """`license`, and where the Hub has no name for it `license_name`: one for all, or the mixture by its names."""
    binding = [one for one in licences if one.binds and one.name]
    names = list(dict.fromkeys(name for one in binding for name in one.name.split("-and-")))
    if UNKNOWN in names:
        return {"license": "other", "license_name": "see-licences-in-the-card"}
    if len(names) == 1 and names[0] not in OWN_NAMES:
        return {"license": names[0]}
    joined = re.sub(r"[^a-z0-9.-]+", "-", "-and-".join(names).replace("++", "-plus-plus").lower())
    return {"license": "other", "license_name": joined or "see-licences-in-the-card"}


def _reward_licence(kind: str, name: str, other: Any) -> Licence:
    """`other` is the model that was asked for in place of the usual one."""
    entry, binds = REGISTRY.get(name), kind == "reward"
    if ":" in name or entry is None or entry.licence == "yours":
        return Licence(f"{kind} {name}", "", "its author's own code, which is not part of this repository", binds=binds)
    usual = ("emoji", entry.bundled, *(repository for repository, _ in entry.weights))
    if isinstance(other, str) and other not in usual:
        link = f"{HUB}{other}" if re.fullmatch(r"[\w.-]+/[\w.-]+", other) else ""
        of = f"{kind} {name} with {other}"
        return Licence(of, UNKNOWN, "as the page of these weights says" if link else "of local weights", link, binds)
    if entry.licence == "no weights":
        return Licence(f"{kind} {name}", "", "")
    names = dict.fromkeys(SPDX[word] for word in re.findall("|".join(map(re.escape, SPDX)), entry.licence))
    link = f"{HUB}{entry.weights[0][0]}" if entry.weights else ""
    return Licence(f"{kind} {name}", "-and-".join(names) or UNKNOWN, entry.licence, link, binds)


def _cached(model: str) -> str:
    """The licence in the model's card, where the Hub's cache holds it; nothing is downloaded."""
    try:
        path = try_to_load_from_cache(model, "README.md")
        if not isinstance(path, str):
            return ""
        data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return ""
    name = data.license_name if data.license == "other" else data.license
    return name if isinstance(name, str) else ""
