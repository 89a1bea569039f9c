"""The way in for adapter files: a file, a folder or a name on the Hub -> what is in it.

Loading, `inspect`, `export`, `mix`, `merge` and the model card all read through `open_adapter`, so that one file means
the same everywhere: its tensors, the texts of its header, the settings next to it, its base model and its strength.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from alignprop_pipe.adapters import files, naming, strength
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import Base, base_of
from alignprop_pipe.adapters.keys import PIPELINES, FileLayers, check, family_of, layers_of, place_of
from alignprop_pipe.adapters.model_layers import clip_path, found_in, is_text, names_for, names_in, pipeline_class
from alignprop_pipe.adapters.naming import Model, UnknownLayerError
from alignprop_pipe.adapters.pipeline_layers import named_for, networks
from alignprop_pipe.adapters.resolve import local_file
from alignprop_pipe.adapters.strength import BASE_CLASS, BESIDE, Settings, folded, settings_of
from alignprop_pipe.errors import AdapterError

logger = logging.getLogger(__name__)

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
LANGUAGE = re.compile(
    r"^(base_model\.model\.)?((model\.)?(language_model\.)?layers|model\.(en|de)coder\.layers|transformer\.h|gpt_neox\.layers"
    r"|((bert|roberta|vit)\.)encoder\.layer)\.\d+\.((self_)?attn|(encoder_)?attn|mlp|attention|intermediate|output|fc\d)\."
)
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """What is in an adapter file, read once.

    Args:
        path: where it lies.
        tensors: by their names in the file.
        header: the texts of its header; PEFT's settings next to the file are among them, see `strength`.
        in_file: the tensors by layer, under the names that the layers have in the file.
        base: the model that it was made for, as far as header, names and shapes say.
        doubts: why its strength may be another than the one that it gets here, in sentences; empty as a rule.
    """

    path: Path
    tensors: dict[str, Tensor]
    header: Mapping[str, str]
    in_file: FileLayers
    base: Base
    doubts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.name

    def sorted_layers(self, pipe: DiffusionPipeline | None = None) -> Layers:
        """The layers by component and by diffusers' names, of which those of `pipe` are the measure if it is given.

        Raises UnknownLayerError for names of no layer, ValueError for what is no plain LoRA, and whatever diffusers'
        converters raise.
        """
        if pipe is None:
            return layers_alone(self.base, self.tensors, self.header)
        return layers_from(pipe, self.tensors, self.header)

    def layers(self, pipe: DiffusionPipeline | None = None) -> Layers:
        """As `sorted_layers`, with the doubts told in the log. Raises AdapterError: they cannot be read."""
        called = type(pipe).__name__
        try:
            found = self.sorted_layers(pipe)
        except UnknownLayerError as error:
            if pipe is None:
                raise AdapterError(f"{self.name} holds no LoRA that can be read ({error})") from error
            share = f"{len(error.names)} of its {len(self.in_file.layers)} layers do not fit"
            raise AdapterError(
                f"{self.name} was not made for this {called}: {share}, the first: {error}; {way_out(self.base)}"
            ) from error
        except Exception as error:  # diffusers' converters fail in any way on keys that they do not expect
            reason = first_line(error)
            if pipe is None:
                raise AdapterError(f"{self.name} holds no LoRA that can be read ({reason})") from error
            raise AdapterError(
                f"{self.name} holds no LoRA that {called} can read ({reason}); {way_out(self.base)}"
            ) from error
        if not found:
            raise AdapterError(f"{self.name} is empty: it holds no LoRA")
        for doubt in self.doubts:
            logger.warning("%s: %s", self.name, doubt)
        return found


def open_adapter(
    source: str | Path, revision: str | None = None, *, allow_pickle: bool = False, finite: bool = True
) -> AdapterFile:
    """Read an adapter file of any program.

    A file that comes in is data: its header is checked against its size before anything is allocated, and keys, shapes,
    ranks and numbers before anything is used.

    Args:
        source: a safetensors file, a folder of a run, of PEFT or of diffusers, or a name on the Hub, "me/name"; what
            is here goes first.
        revision: branch, tag or commit of a name on the Hub.
        allow_pickle: read a pickle (.bin, .pt, .ckpt) too, weights alone: nothing in it is run.
        finite: refuse NaN and infinity.

    Raises:
        AdapterError: the file is missing, damaged, a pickle, or holds something else than a LoRA.
        HubError: the name on the Hub cannot be fetched.
    """
    path = files.located(local_file(source, revision))
    tensors, header = files.read_file(path, allow_pickle=allow_pickle, finite=finite)
    in_file = layers_of(tensors)
    doubts = tuple(strength.doubts(in_file.layers, header))
    return AdapterFile(path, tensors, header, in_file, Base.of_file(tensors, header), doubts)


def way_out(base: Base) -> str:
    """The advice for an adapter of another model."""
    made_for = " ".join(filter(None, (base.base_model, base.base_class)))
    return f"load it into {made_for or 'the pipeline that it was made for'}"


def first_line(error: Exception) -> str:
    """What an error says, without the lines behind the first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- the layers, sorted ----------------------------------------------------------------------------------------------


def layers_from(pipe: DiffusionPipeline, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Layers:
    """Sort the keys of any known format by component and layer, through the converter of the pipeline itself.

    Raises ValueError, and whatever the converter raises: the keys are none of a LoRA for such a pipeline.
    """
    options: dict[str, Any] = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    parts = networks(pipe)
    sole = next((n for n, part in parts.items() if isinstance(part, ModelMixin) and not hasattr(part, "decode")), "")
    known = {
        name: frozenset(clip_path(path, nested=True) for path in names_in(part)) if is_text(name) else names_in(part)
        for name, part in parts.items()
    }
    model = Model(
        lambda name: known.get(name, frozenset()),
        tuple(filter(is_text, parts)),
        sole,
        base_of(pipe).families.get(sole, ""),
        getattr(options.get("unet_config"), "layers_per_block", 2),
    )

    def exists(name: str, path: str) -> bool:
        part = parts.get(name)
        if is_text(name):
            path = clip_path(path, nested=hasattr(part, "text_model"))
        return part is not None and path in dict(part.named_modules())

    return named_for(pipe, _all_of(pipe, tensors, header, options, model, exists))


def layers_alone(base: Base, tensors: dict[str, Tensor], header: Mapping[str, str]) -> Layers:
    """As `layers_from`, where no pipeline is there but what is known of it."""
    family = family_of(tensors, header)
    reader = pipeline_class(base.base_class) or pipeline_class(PIPELINES.get(family, ""))
    is_transformer = not hasattr(reader, "unet_name") and hasattr(reader, "transformer_name")
    # What diffusers asks of a UNet's configuration, to number the blocks of SDXL's original layout.
    options = {} if is_transformer else {"unet_config": SimpleNamespace(layers_per_block=2)}
    own = [name for name in base.families if name.isidentifier()]
    sole = next(iter(own), "transformer" if is_transformer else "unet")
    family = base.families.get(sole) or family
    if not family and any(LANGUAGE.search(key) for key in tensors):
        raise ValueError("it is a LoRA for a model of language or speech, which PEFT and transformers read")
    known = partial(names_for, getattr(reader, "__name__", ""), family=family)
    model = Model(known, tuple(filter(is_text, COMPONENTS)), sole, family, extra=frozenset({*COMPONENTS, *own}))
    components = {*inspect.signature(reader.__init__).parameters, *own} if reader else {*COMPONENTS, *own}

    def exists(name: str, path: str) -> bool:
        names = known(name)
        is_foreign = path.startswith(("lora_", "lycoris_", "diffusion_model."))
        return name in components and not is_foreign and (not names or bool(found_in(path, names)))

    is_ours = "alignprop.families" in header
    found = _all_of(reader, tensors, header, options, model, None if is_ours else exists)
    denoiser = header.get("alignprop.denoiser", "")
    if denoiser == "transformer_2" and found.keys() == {"transformer"}:  # ComfyUI's file of the second one
        return {denoiser: found["transformer"]}
    return found


def _all_of(
    reader: Any,
    tensors: dict[str, Tensor],
    header: Mapping[str, str],
    options: dict[str, Any],
    model: Model,
    exists: Callable[[str, str], bool] | None,
) -> Layers:
    """Every layer of the file, by component, or ValueError: nothing is dropped in silence."""
    if BESIDE in header:
        settings_of(header, "")  # refuses another kind of adapter by its name, before one of its keys is found unknown
    in_file = check(tensors).layers
    # Alphas of the layers' own come first; converters fold them in.
    said = {} if any("alpha" in parts for parts in in_file.values()) else header
    if told := _component_told(header, model):
        model = replace(model, sole=told)
    found, unknown = naming.read(in_file, model, lambda name, path, rank: settings_of(said, name).alpha_of(path, rank))
    if unknown:
        try:
            state = _converted(reader, tensors, options)
            paths = {key.partition(".lora_")[0] for key in state}
            if (
                BESIDE in said
                and settings_of(said, "").patterns
                and not all(place_of(n).path in paths for n in in_file)
            ):
                state, said = _converted(reader, folded(tensors, said), options), {}
            found = _sorted(state, said, model)
        except Exception as error:  # converters fail in any way, and name keys of their own
            raise model.missing(unknown) from error
        if exists is not None:
            _check_names(found, unknown, model, exists)
    if sum(map(len, found.values())) < len(in_file):
        raise ValueError("some of its keys name the same layer, or one that this model has not")
    return {name: found[name] for name in sorted(found, key=lambda name: (is_text(name), name))}


def _component_told(header: Mapping[str, str], model: Model) -> str:
    """The text encoder that PEFT's settings name, by its class; empty for what is a denoiser or not known."""
    told = header.get(BASE_CLASS, "")
    if told.startswith("CLIPText"):
        second = told.endswith("WithProjection") and model.has("text_encoder_2")
        return "text_encoder_2" if second else "text_encoder"
    return ""


def _check_names(found: Layers, unknown: Sequence[str], model: Model, exists: Callable[[str, str], bool]) -> None:
    """Raises UnknownLayerError for names that the converter left as they were or changed to those of no layer."""
    wrong = [path for name, layers in found.items() for path in layers if not exists(name, path)]
    if wrong:  # told by their names in the file
        ends = tuple(re.sub(r"[._]", "", path) for path in wrong)
        raise model.missing([name for name in unknown if re.sub(r"[._]", "", name).endswith(ends)] or unknown)


def _converted(reader: Any, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """The tensors in diffusers' names, with their alphas, by the loader of a pipeline or of a pipeline class."""
    read: Any = getattr(reader, "lora_state_dict", StableDiffusionLoraLoaderMixin.lora_state_dict)
    if all(key.startswith(PEFT_PREFIX) for key in tensors) and not any(".double_blocks." in key for key in tensors):
        tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    if "return_alphas" in inspect.signature(read).parameters:
        options = {**options, "return_alphas": True}
    converted = read(dict(tensors), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return {**state, **(alphas or {})}


def _sorted(state: Mapping[str, Any], header: Mapping[str, str], model: Model) -> Layers:
    """By component, or the model's sole one where a key names none."""
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        name, path = (head, rest) if model.has(head) else (model.sole, key.removeprefix(PEFT_PREFIX))
        by_part.setdefault(name, {})[path.replace(".default.", ".")] = value
    found = {}
    for name, keys in by_part.items():
        if is_text(name):
            keys = convert_state_dict(keys, {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT})
            keys = {clip_path(key, nested=True): value for key, value in keys.items()}
        else:
            keys = convert_unet_state_dict_to_peft(keys)
        found[name] = _layers(keys, settings_of(header, name))
    return found


def _layers(keys: Mapping[str, Any], settings: Settings) -> dict[str, Factors]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        path, lora, kind = key.partition(".lora_")
        kind = "alpha" if key.endswith(".alpha") else kind
        if kind not in ("A.weight", "B.weight", "alpha"):
            raise ValueError(f"{key!r} is no part of a plain LoRA")
        found.setdefault(path if lora else key.removesuffix(".alpha"), {})[kind] = value
    layers = {}
    for path, values in found.items():
        if not {"A.weight", "B.weight"} <= values.keys():
            raise ValueError(f"{path} has only {' and '.join(sorted(values))} of its two matrices")
        down, up = values["A.weight"], values["B.weight"]
        alpha = values["alpha"] if "alpha" in values else settings.alpha_of(path, down.shape[0])
        layers[path] = naming.whole(down, up, alpha)
    return layers
