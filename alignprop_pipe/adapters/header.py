"""The header of an adapter file: what it was trained on and for, in texts that other programs read; nothing private.

`modelspec.*` is Stability's model metadata standard, which ComfyUI, InvokeAI and the Hub read; `ss_*` is what kohya's
scripts write and AUTOMATIC1111 reads; `alignprop.*` is ours.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from alignprop_pipe import __version__
from alignprop_pipe.adapters import strength
from alignprop_pipe.adapters.keys import PIPELINES, UNETS, family_of
from alignprop_pipe.errors import AdapterError
from alignprop_pipe.sources import exists

FORMAT = "1"
"""Number of the file format; raised when a reader of older files would misread a new one."""

PROMPTS_SHOWN = 20

FOREIGN = re.compile(r"(ss_|sshs_|.*\.).+|trained_words")
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
LONGEST_ID = 200
"""Of a name on the Hub; a longer text is none, and no file system takes it as a path either."""
LOCAL_PATHS = (
    re.compile(r"(?<![\w./~-])(?:file://|~)?/(?:[^/\s\"':;,]+/)+"),
    re.compile(r"(?<!\w)[A-Za-z]:(?:\\{1,2}|/)(?:[^\\/\s\"':;,]+(?:\\{1,2}|/))*"),
)

NAMES_OF_BASE = ("alignprop.base_model", "ss_sd_model_name", strength.BASE_MODEL)

KOHYA_BASES = {"v1": "sd_v1", "v2": "sd_v2", "xl": "sdxl_base_v1-0"}
ARCHITECTURES = {
    "v1": "stable-diffusion-v1",
    "v2": "stable-diffusion-v2-512",
    "xl": "stable-diffusion-xl-v1-base",
    "SD3Transformer2DModel": "stable-diffusion-3-medium",
    "FluxTransformer2DModel": "flux-1-dev",
}


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was made for, as far as it is known.

    `base_model` is a public id; `base_class` the stock pipeline class; `families` says of each denoiser what it is:
    `v1`, `v2` or `xl` for the UNets of Stable Diffusion, else its class; `prediction` is `epsilon` or `v`.
    """

    base_model: str = ""
    base_class: str = ""
    families: Mapping[str, str] = field(default_factory=dict)
    prediction: str = ""

    @classmethod
    def of_header(cls, header: Mapping[str, str]) -> "Base":
        """What a file's header says of it."""
        try:
            families = json.loads(header.get("alignprop.families", "{}"))
        except (ValueError, RecursionError):
            families = {}
        known = {str(name): str(family) for name, family in families.items()} if isinstance(families, dict) else {}
        model = next((header[key] for key in NAMES_OF_BASE if header.get(key)), "")
        prediction = header.get("modelspec.prediction_type", "")
        return cls(public_id(model), header.get("alignprop.base_class", ""), known, prediction)

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> "Base":
        """What a file's header says, and for files of others what its keys and shapes say."""
        said = cls.of_header(header)
        if said.base_class and said.families:
            return said
        family = family_of(tensors, header)
        name = "unet" if family in UNETS else "transformer"
        return replace(
            said,
            base_class=said.base_class or PIPELINES.get(family, ""),
            families=said.families or ({name: family} if family else {}),
        )


def base_of(pipe: DiffusionPipeline) -> Base:
    """What a pipeline says of itself."""
    denoisers = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    families = {
        name: _family(part)
        for name, part in denoisers.items()
        if isinstance(getattr(part, "_orig_mod", part), ModelMixin) and not hasattr(part, "decode")
    }
    return Base(_base_model(pipe), _stock_class(pipe), families, _prediction(pipe))


OF_ONE_FILE = (
    "format", strength.IN_HEADER, strength.BESIDE, strength.BASE_CLASS, strength.BASE_MODEL,
    "alignprop.format", "alignprop.version", "alignprop.rank", "alignprop.alpha",
    "alignprop.families", "alignprop.base_class", "alignprop.denoiser", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256",
    "modelspec.implementation", "modelspec.sai_model_spec", "modelspec.date",
)  # fmt: skip
"""Names in a header that describe the file itself, and would be wrong in another one."""
OF_THE_MODEL = ("ss_v2", "ss_base_model_version", "modelspec.architecture")
"""What is found here for a known model, since other programs hide a file over it."""


def carried(metadata: Mapping[str, str], made_for: Base) -> dict[str, str]:
    """The texts of a file that still hold in another file with the same adapter."""
    stale = {*OF_ONE_FILE, *(OF_THE_MODEL if made_for.families else ())}
    strengths = {*strength.PLAIN, *strength.ALPHAS, *strength.RANKS}
    return {key: v for key, v in metadata.items() if key not in stale and key.rpartition(".")[2] not in strengths}


def header_for(
    made_for: Base,
    shapes: Mapping[str, tuple[int, float]],
    metadata: Mapping[str, str],
    *,
    title: str,
    kohya: bool = False,
) -> dict[str, str]:
    """Texts for a file that holds adapters of `shapes` (rank and alpha by component).

    `metadata` wins over what is found here; its plain names get `alignprop.` in front, names of other standards stay.
    """
    wrong = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
    if wrong:
        raise AdapterError(f"metadata {wrong[0]!r} is not a text; safetensors headers hold texts alone: use json.dumps")
    given = dict(metadata)
    base = public_id(given.pop("base_model", "")) or made_for.base_model
    name, (rank, alpha) = next(iter(shapes.items()))
    family = made_for.families.get(name) or next(iter(made_for.families.values()), "")
    families = {name: made_for.families[name] for name in shapes if name in made_for.families} or made_for.families
    header = {
        "format": "pt",
        "alignprop.format": FORMAT,
        "alignprop.version": __version__,
        "alignprop.base_model": base,
        "alignprop.base_class": made_for.base_class,
        "alignprop.families": json.dumps(dict(families)) if families else "",
        "alignprop.rank": str(rank),
        "alignprop.alpha": f"{alpha:g}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURES.get(family, family)}/lora" if family else "",
        "modelspec.implementation": "diffusers",
        "modelspec.title": given.get("title", title),
        "modelspec.trigger_phrase": given.get("trigger_prompts", ""),
        "modelspec.prediction_type": made_for.prediction,
    }
    if kohya:
        header |= {
            "alignprop.denoiser": name,
            "ss_v2": str(family == "v2"),
            "ss_base_model_version": KOHYA_BASES.get(family, "flux1" if family.startswith("Flux") else family),
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": f"{alpha:g}",
            "ss_network_args": "{}",
            "ss_output_name": title,
            "ss_sd_model_name": base,
        }
    header |= {key if FOREIGN.fullmatch(key) else f"alignprop.{key}": value for key, value in given.items()}
    return {key: without_paths(value) for key, value in header.items() if value}


def describe(
    pipe: DiffusionPipeline,
    *,
    reward: str,
    config: str,
    step: int,
    prompts: Sequence[str],
    scores: Mapping[str, Any],
) -> dict[str, str]:
    """What a run knows about its adapter, as texts for `save_adapter(metadata=...)`.

    `config` is the run's JSON; `scores` holds the held-out scores by name, in anything that JSON can say. Of many
    prompts the first ones stand for all.
    """
    return {
        "base_model": _base_model(pipe),
        "reward": reward,
        "config": config,
        "step": str(step),
        "prompts": str(len(prompts)),
        "trigger_prompts": "\n".join(prompts[:PROMPTS_SHOWN]),
        "scores": json.dumps(dict(scores)),
    }


def public_id(model: str) -> str:
    """`me/model` or the name of a bundled model, as others can find it; empty for what only this machine has."""
    path = Path(model)
    for part in path.parts:  # a snapshot in the Hub's cache
        if part.startswith("models--"):
            name = part.removeprefix("models--").replace("--", "/")
            return name if HUB_ID.fullmatch(name) else ""
    if path.parent == Path(__file__).parents[1] / "models":
        return path.name
    is_name = len(model) <= LONGEST_ID and HUB_ID.fullmatch(model)
    is_public = is_name and not exists(path) and path.suffix != ".safetensors"
    return model if is_public else ""


def without_paths(text: str) -> str:
    """`text` with local paths cut to their last part: they may hold a user's name and are of no use to others."""
    text = text.replace(str(Path.home()), "~")
    for local in LOCAL_PATHS:
        text = local.sub("", text)
    return text


def _base_model(pipe: DiffusionPipeline) -> str:
    return public_id(str(pipe.config.get("_name_or_path") or ""))


def _stock_class(pipe: DiffusionPipeline) -> str:
    """The class that diffusers itself knows, under whatever was derived from it."""
    known = (kind for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers."))
    return next(known, type(pipe)).__name__


def _family(denoiser: nn.Module) -> str:
    """`v1`, `v2` or `xl` for the UNets of Stable Diffusion, told apart as their loaders do; else the class name."""
    inner: Any = getattr(denoiser, "_orig_mod", denoiser)
    if type(inner).__name__ != "UNet2DConditionModel":
        return type(inner).__name__
    if inner.config.get("addition_embed_type") == "text_time":
        return "xl"
    return "v2" if inner.config.get("cross_attention_dim") == 1024 else "v1"


def _prediction(pipe: DiffusionPipeline) -> str:
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    known = {"epsilon": "epsilon", "v_prediction": "v"}
    return known.get(config.get("prediction_type", ""), "")
