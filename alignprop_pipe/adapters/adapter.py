"""`Adapter`: a LoRA away from any pipeline, between files of any format and the pipelines that take it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from alignprop_pipe.adapters import files as adapter_files
from alignprop_pipe.adapters.export_keys import (
    comfyui_keys,
    comfyui_text_keys,
    diffusers_keys,
    kohya_keys,
    kohya_text_keys,
)
from alignprop_pipe.adapters.factors import Factors, Layers, common_shape
from alignprop_pipe.adapters.header import Base, base_of, carried, header_for
from alignprop_pipe.adapters.model_layers import is_text
from alignprop_pipe.adapters.pipeline_layers import layers_in, networks
from alignprop_pipe.adapters.reading import open_adapter
from alignprop_pipe.diffusion import window
from alignprop_pipe.errors import AdapterError
from alignprop_pipe.files import write_whole
from alignprop_pipe.layout import run_of
from alignprop_pipe.records import Pushed

Format = Literal["diffusers", "comfyui", "kohya", "both"]
COMPONENT = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Adapter(Mapping[str, Tensor]):
    """A LoRA: two matrices and an alpha for each adapted layer, and what is known of it.

    As a mapping it holds the tensors by diffusers' names, alpha folded in, as `load_lora_weights(dict(adapter))` takes
    them.

    Args:
        layers: component ("unet", "transformer", "transformer_2", "text_encoder", ...) -> layer's name -> factors.
        base: the model that it was made for.
        metadata: texts about it, by their names in a file's header.
        run_folder: where the run that made it left its evidence, for `push_to_hub`; never written into a file.

    Examples:
        >>> from alignprop_pipe import Adapter, AlignPropPipeline
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> adapter = pipe.align("jpeg", ["a fox"], **options).adapter
        >>> file = adapter.save("fox.safetensors")[0]
        >>> Adapter.load(file) == adapter
        True
    """

    layers: Layers
    base: Base = field(default_factory=Base)
    metadata: Mapping[str, str] = field(default_factory=dict)
    run_folder: Path | None = None

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None, *, allow_pickle: bool = False) -> "Adapter":
        """Read a LoRA file of diffusers, PEFT, kohya or ComfyUI, also from the Hub; no pipeline is needed.

        PEFT's settings next to the file (adapter_config.json) count, and what stays in doubt of its strength is told.

        Args:
            path: a safetensors file, a folder of a run, of PEFT or of diffusers, or a name on the Hub, "me/name"; what
                is here goes first.
            revision: branch, tag or commit of a name on the Hub.
            allow_pickle: read a pickle (.bin, .pt, .ckpt) too, weights alone: nothing in it is run.

        Raises:
            AdapterError: the file is missing, damaged, a pickle, or holds something else than a LoRA.
        """
        found = open_adapter(path, revision, allow_pickle=allow_pickle)
        return cls(found.layers(), found.base, found.header, run_of(found.path))

    @classmethod
    def of(cls, pipe: DiffusionPipeline, metadata: Mapping[str, str] | None = None) -> "Adapter":
        """A copy, on the CPU, of the adapter that the denoisers of `pipe` hold. Raises AdapterError."""
        held = layers_in(pipe)
        layers = {name: {path: _copied(f) for path, f in layers.items()} for name, layers in held.items()}
        works_in = window.held_by(networks(pipe).values())
        known = {} if works_in is None else {"window": str(works_in)}
        return cls(layers, base_of(pipe), {**known, **(metadata or {})})

    def save(
        self, path: str | Path, *, format: Format = "both", dtype: torch.dtype | None = None, **metadata: str
    ) -> list[Path]:
        """Write the adapter and return the files.

        "diffusers" and "comfyui" write `path`; "both" writes `path` for diffusers and `…-comfyui.safetensors` for
        ComfyUI; "kohya" writes `path` for kohya's scripts, which of Stable Diffusion's UNets is the same file as for
        ComfyUI and of other models has kohya's names and alphas. An adapter of two denoisers gets a ComfyUI file for
        each, since ComfyUI loads them as two models.

        The weight change is kept to the bit where alpha / rank is a power of two. Else diffusers' form, which has no
        alpha and takes it folded into the up matrix, is off by a rounding of that matrix.

        Args:
            path: ends in .safetensors; folders are made.
            format: which of the files to write.
            dtype: precision of the file; default: the adapter's own.
            metadata: more texts for the header; local paths in them are cut to names.

        Raises:
            AdapterError: `path` is not usable, or the format has no names for this model.
        """
        target = _target(path, format)
        _check_components(self.layers)
        files: dict[Path, bytes] = {}
        about = {**carried(self.metadata, self.base), **metadata}
        if format in ("diffusers", "both"):
            header = header_for(self.base, self.shapes, about, title=target.stem)
            files[target] = adapter_files.serialised(diffusers_keys(self.layers), header, dtype)
        if format != "diffusers":
            place = target.with_stem(f"{target.stem}-comfyui") if format == "both" else target
            for beside, tensors, header in self._other_files(place, about, strict=format == "kohya"):
                files[beside] = adapter_files.serialised(tensors, header, dtype)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterError(f"the folder of {str(path)!r} cannot be made: {error}; choose another path") from error
        for beside, content in files.items():
            write_whole(beside, content)
        return list(files)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        dry_run: str | Path | None = None,
    ) -> Pushed:
        """Put it on the Hugging Face Hub as "me/name": both files, a card, and its run's evidence if that is known.

        Stock diffusers then loads it with `load_lora_weights("me/name")`. With `dry_run`, a folder, the files go there
        and nothing is sent. The other arguments are those of `hub.push`. Raises HubError.
        """
        from alignprop_pipe.hub.push import push  # the Hub's wing is above this one

        return push(
            self, repo_id, private=private, token=token, revision=revision, create_pr=create_pr, dry_run=dry_run
        )

    def comfyui_tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Tensors by the names that ComfyUI's loaders know, of one denoiser and, with the first, the text encoders.

        `name` is the denoiser, by default the first.
        """
        name = name or next(iter(self._denoisers), "")
        family = self.base.families.get(name, "")
        tensors = comfyui_keys(family, name, self.layers[name]) if name in self.layers else {}
        return tensors | self._text_tensors(name, comfyui_text_keys)

    def kohya_tensors(self) -> dict[str, Tensor]:
        """Tensors by the names of kohya's scripts, with alphas. Raises AdapterError: they have none for this model."""
        name = next(iter(self._denoisers), "")
        tensors = {}
        for denoiser in self._denoisers:
            tensors |= kohya_keys(self.base.families.get(denoiser, ""), denoiser, self.layers[denoiser])
        return tensors | self._text_tensors(name, kohya_text_keys)

    def _text_tensors(self, name: str, keys: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """The text encoders for the file of the denoiser `name`; they go with the first."""
        if name != next(iter(self._denoisers), ""):
            return {}
        family = next(iter(self.base.families.values()), "")
        found: dict[str, Tensor] = {}
        for encoder, layers in self.layers.items():
            if is_text(encoder):
                found |= keys(family, encoder, layers)
        return found

    @property
    def _denoisers(self) -> list[str]:
        return [name for name in self.layers if not is_text(name)]

    def _other_files(
        self, place: Path, about: Mapping[str, str], *, strict: bool
    ) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, str]]]:
        """Files for the other programs: of kohya's names if `strict`, else of ComfyUI's, one for each denoiser."""
        texts = {name: shape for name, shape in self.shapes.items() if is_text(name)}
        for number, name in enumerate(self._denoisers or [""]):
            beside = place.with_stem(f"{place.stem}-{name}") if number else place
            shapes = {one: self.shapes[one] for one in [name] if one} | ({} if number else texts)
            header = header_for(self.base, shapes, about, title=beside.stem, kohya=True)
            yield beside, self.kohya_tensors() if strict else self.comfyui_tensors(name), header

    @property
    def shapes(self) -> dict[str, tuple[int, float]]:
        """The rank and alpha that most layers of each component have."""
        return {name: common_shape(layers) for name, layers in self.layers.items()}

    def __getitem__(self, key: str) -> Tensor:
        place, _, matrix = key.rpartition(".lora_")
        name, _, path = place.partition(".")
        factors = self.layers.get(name, {}).get(path)
        if factors is None or matrix not in ("A.weight", "B.weight"):
            raise KeyError(key)
        return factors.down if matrix == "A.weight" else factors.folded()

    def __iter__(self) -> Iterator[str]:
        for name, layers in self.layers.items():
            for path in layers:
                yield f"{name}.{path}.lora_A.weight"
                yield f"{name}.{path}.lora_B.weight"

    def __eq__(self, other: object) -> bool:
        """Whether it holds the same tensors by the same names, bit for bit; what is known of it is not compared."""
        if not isinstance(other, Adapter):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in self.items())

    def __hash__(self) -> int:
        return hash(frozenset(self))  # of the names, which equal ones share

    def __len__(self) -> int:
        return 2 * sum(map(len, self.layers.values()))

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name}: {len(self.layers[name])} layers of rank {r}" for name, (r, _) in self.shapes.items()
        )
        return f"Adapter({self.base.base_model or self.base.base_class or 'of an unknown model'}; {shapes})"


def _target(path: str | Path, format: str) -> Path:
    target = Path(path)
    if target.suffix != ".safetensors":
        raise AdapterError(f"adapters are saved as safetensors: {str(path)!r} has to end in '.safetensors'")
    if format not in get_args(Format):
        raise AdapterError(f"format is {format!r}; it can be 'diffusers', 'comfyui', 'kohya' or 'both'")
    return target


def _check_components(layers: Layers) -> None:
    """Their names stand in names of files."""
    wrong = [name for name in layers if not COMPONENT.fullmatch(name)]
    if wrong or not any(layers.values()):
        what = f"has a component {wrong[0]!r}, which is no name of a network" if wrong else "is empty"
        raise AdapterError(f"the adapter {what}; nothing was saved")


def _copied(factors: Factors) -> Factors:
    return Factors(factors.down.detach().cpu().clone(), factors.up.detach().cpu().clone(), factors.alpha)
