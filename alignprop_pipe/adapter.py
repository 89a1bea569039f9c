"""`Adapter`: a LoRA away from any pipeline, between files of any format and the pipelines that take it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from alignprop_pipe import adapter_files
from alignprop_pipe.errors import AdapterError
from alignprop_pipe.export_header import Base, base_of, header_for
from alignprop_pipe.export_keys import (
    Factors,
    Layers,
    comfyui_keys,
    common_shape,
    diffusers_keys,
    layers_alone,
    layers_in,
)
from alignprop_pipe.files import write_whole

Format = Literal["diffusers", "kohya", "both"]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Adapter(Mapping[str, Tensor]):
    """A LoRA: two matrices and an alpha for each adapted layer, and what is known of it.

    As a mapping it holds the tensors by diffusers' names, alpha folded in, as `load_lora_weights(dict(adapter))` takes
    them.

    Args:
        layers: component ("unet", "transformer", "transformer_2", "text_encoder", ...) -> layer's name -> factors.
        base: the model that it was made for.
        metadata: texts about it, by their names in a file's header.
    """

    layers: Layers
    base: Base = field(default_factory=Base)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read a LoRA file of diffusers, PEFT, kohya or ComfyUI, or the one in a run folder; no pipeline is needed.

        Raises AdapterError: the file is missing, damaged, a pickle, or holds something else than a LoRA.
        """
        source = adapter_files.located(path)
        tensors, header = adapter_files.read_file(source)
        base = Base.of_file(tensors, header)
        try:
            reader: Any = getattr(diffusers, base.base_class, None)
            # What diffusers asks of a UNet's configuration, to number the blocks of SDXL's original layout.
            layers = layers_alone(reader, tensors, header, SimpleNamespace(layers_per_block=2))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise AdapterError(f"{source.name} holds no LoRA that can be read ({error})") from error
        if not layers:
            raise AdapterError(f"{source.name} is empty: it holds no LoRA")
        return cls(layers, base, header)

    @classmethod
    def of(cls, pipe: DiffusionPipeline, metadata: Mapping[str, str] | None = None) -> "Adapter":
        """A copy, on the CPU, of the adapter that the denoisers of `pipe` hold. Raises AdapterError."""
        held = layers_in(pipe)
        layers = {name: {path: _copied(f) for path, f in layers.items()} for name, layers in held.items()}
        return cls(layers, base_of(pipe), dict(metadata or {}))

    def save(
        self, path: str | Path, *, format: Format = "both", dtype: torch.dtype | None = None, **metadata: str
    ) -> list[Path]:
        """Write the adapter and return the files: `path` for diffusers, `…-comfyui.safetensors` for the others.

        `format="kohya"` writes the second one alone, at `path`. An adapter of two denoisers gets a ComfyUI file for
        each, since ComfyUI loads them as two models.

        Args:
            path: ends in .safetensors; folders are made.
            format: which of the two files to write: "diffusers", "kohya" or "both".
            dtype: precision of the file; default: the adapter's own.
            metadata: more texts for the header; local paths in them are cut to names.

        Raises:
            AdapterError: `path` is not usable.
        """
        target = _target(path, format)
        files: dict[Path, bytes] = {}
        about = {**self.metadata, **metadata}
        if format != "kohya":
            header = header_for(self.base, self.shapes, about, title=target.stem)
            files[target] = adapter_files.serialised(diffusers_keys(self.layers), header, dtype)
        if format != "diffusers":
            place = target if format == "kohya" else target.with_stem(f"{target.stem}-comfyui")
            for beside, tensors, header in self._kohya_files(place, about):
                files[beside] = adapter_files.serialised(tensors, header, dtype)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterError(f"the folder of {str(path)!r} cannot be made: {error}; choose another path") from error
        for beside, content in files.items():
            write_whole(beside, content)
        return list(files)

    def comfyui_tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Tensors by the names that ComfyUI's loaders know, of one denoiser (default: the first); alpha written."""
        name = name or next(iter(self.layers))
        return comfyui_keys(self.base.families.get(name, ""), name, self.layers[name])

    def _kohya_files(
        self, place: Path, about: Mapping[str, str]
    ) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, str]]]:
        for number, name in enumerate(self.layers):
            beside = place.with_stem(f"{place.stem}-{name}") if number else place
            header = header_for(self.base, {name: self.shapes[name]}, about, title=beside.stem, kohya=True)
            yield beside, self.comfyui_tensors(name), header

    @property
    def shapes(self) -> dict[str, tuple[int, float]]:
        """The rank and alpha that most layers of each component have."""
        return {name: common_shape(layers) for name, layers in self.layers.items()}

    def __getitem__(self, key: str) -> Tensor:
        return diffusers_keys(self.layers)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(diffusers_keys(self.layers))

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
    if format not in ("diffusers", "kohya", "both"):
        raise AdapterError(f"format is {format!r}; it can be 'diffusers', 'kohya' or 'both'")
    return target


def _copied(factors: Factors) -> Factors:
    return Factors(factors.down.detach().cpu().clone(), factors.up.detach().cpu().clone(), factors.alpha)
