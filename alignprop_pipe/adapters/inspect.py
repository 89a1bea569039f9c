"""What is in an adapter file: model, format, ranks, where it changes how much, who loads it, and what is wrong with it.

Nothing is applied and no pipeline is needed. A file that is whole but faulty is described with its faults; one that is
cut off or no LoRA at all is an error.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from alignprop_pipe.adapters import strength
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.file_kinds import said_of_unknown
from alignprop_pipe.adapters.keys import FileLayers, duplicates, place_of, problem_of
from alignprop_pipe.adapters.naming import UnknownLayerError
from alignprop_pipe.adapters.programs import Verdict, hidden_by, unknown_to_comfyui, verdicts
from alignprop_pipe.adapters.reading import AdapterFile, first_line, open_adapter
from alignprop_pipe.adapters.stock_loading import said_of_diffusers
from alignprop_pipe.config.choices import window_from_text
from alignprop_pipe.errors import AdapterError, ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a network: how many of its layers change, and how much, as the Frobenius norm of all changes."""

    component: str
    name: str
    layers: int
    change: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of an adapter file.

    `ranks`, `alphas`, `targets` and `dtypes` count layers (for `dtypes`, tensors) by rank, alpha, kind of layer and
    number format; `format` is whose names its keys have. `problems` are sentences, the worst first; empty: none found.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, inspect_adapter
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> files = pipe.align("jpeg", ["a fox"], **options).adapter.save("fox.safetensors", format="comfyui")
        >>> inspect_adapter("fox.safetensors").problems
        ()
    """

    file: str
    sha256: str
    size: int
    format: str
    base_model: str
    base_class: str
    family: str
    parameters: int
    layers: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    targets: Mapping[str, int]
    dtypes: Mapping[str, int]
    blocks: tuple[Block, ...]
    programs: tuple[Verdict, ...]
    problems: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def change(self) -> float:
        """The Frobenius norm of the whole weight change."""
        return sum(block.change**2 for block in self.blocks) ** 0.5


def inspect_adapter(path: str | Path, *, allow_pickle: bool = False) -> Inspection:
    """Describe a LoRA file of any format, or the one in a run folder.

    Args:
        path: a safetensors file, a run folder, or a name on the Hub, "me/name".
        allow_pickle: look into a pickle too; weights alone are read from it, nothing is run.

    Raises:
        AdapterError: the file is missing, cut off, damaged, a pickle, or no LoRA.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, inspect_adapter
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> files = pipe.align("jpeg", ["a fox"], **options).adapter.save("fox.safetensors", format="comfyui")
        >>> dict(inspect_adapter("fox.safetensors").ranks)
        {16: 72}
    """
    file = open_adapter(path, allow_pickle=allow_pickle, finite=False)
    base, header, in_file = file.base, file.header, file.in_file
    if not file.tensors:
        raise AdapterError(f"{file.name} is empty: it holds no LoRA")
    layers, unreadable, missing = _readable(file)
    all_layers = [factors for part in layers.values() for factors in part.values()]
    family = next(iter(base.families.values()), "")
    of_diffusers = said_of_diffusers(file, {} if unreadable else layers)
    return Inspection(
        file=file.name,
        sha256=sha256_of(file.path),
        size=file.path.stat().st_size,
        format=_format(in_file),
        base_model=base.base_model,
        base_class=base.base_class,
        family=family,
        parameters=sum(factors.down.numel() + factors.up.numel() for factors in all_layers),
        layers={component: len(part) for component, part in layers.items()},
        ranks=_counted(factors.rank for factors in all_layers),
        alphas=_counted(factors.alpha for factors in all_layers),
        targets=_counted(_kind(path) for part in layers.values() for path in part),
        dtypes=_counted(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()),
        blocks=tuple(_blocks(layers)),
        programs=verdicts(family, list(in_file.layers), header, of_diffusers, missing, next(_faults(in_file), "")),
        problems=tuple(_problems(file, family, layers, unreadable)),
        metadata=dict(header),
    )


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hex. Raises AdapterError: it cannot be read."""
    try:
        with file.open("rb") as opened:
            digest = hashlib.sha256()
            while piece := opened.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _readable(file: AdapterFile) -> tuple[Layers, str, tuple[str, ...]]:
    """The layers, by diffusers' names where the file can be read, else by its own; why not, and names of no layer."""
    try:
        return file.sorted_layers(), "", ()
    except Exception as error:  # converters fail in any way on keys that they do not expect
        reason = first_line(error)
        missing = error.names if isinstance(error, UnknownLayerError) else ()
    found: Layers = {}
    for name, parts in file.in_file.layers.items():
        if not problem_of(parts):
            place, rank = place_of(name), parts["down"].shape[0]
            alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)
            found.setdefault(place.component, {})[place.path] = Factors(parts["down"], parts["up"], alpha)
    return found, reason, missing


def _format(in_file: FileLayers) -> str:
    found = {place_of(name).scheme for name in in_file.layers}
    if "ComfyUI" in found:  # text encoders have diffusers' names there
        found.discard("diffusers")
    return " and ".join(sorted(found))


def _counted(values: Iterator) -> dict:
    return dict(Counter(values).most_common())


def _kind(path: str) -> str:
    """What a layer is called in each block: `to_q`, `ff.net.0.proj`; the whole of a flat path of kohya's."""
    *parents, last = re.split(r"\.(?=[^.])", path)
    words = [last]
    while words[0].isdigit() or words[0] == "proj" or words[0] == "net":
        if not parents:
            break
        words.insert(0, parents.pop())
    return ".".join(words)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(layers: Layers) -> Iterator[Block]:
    for component, part in layers.items():
        squares: dict[str, list[float]] = {}
        for path, factors in part.items():
            squares.setdefault(_block(path), []).append(factors.norm() ** 2)
        for name in sorted(squares, key=_natural):
            yield Block(component, name, len(squares[name]), sum(squares[name]) ** 0.5)


def _block(path: str) -> str:
    """`down_blocks.0`, `mid_block`, `transformer_blocks.7`, `layers.3` of a CLIP."""
    path = path.removeprefix("text_model.").removeprefix("encoder.")
    if path.startswith("mid_block."):
        return "mid_block"
    found = re.match(r"(?:.*?\.)??[a-z_.]*?(?:blocks|layers|block)\.\d+(?=\.)", path)
    return found[0] if found else path.split(".")[0]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _problems(file: AdapterFile, family: str, layers: Layers, unreadable: str) -> Iterator[str]:
    header, in_file = file.header, file.in_file
    broken = [key for key, tensor in file.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        yield f"{len(broken)} tensors hold NaN or infinity, the first {broken[0]}: a failed run saved it"
    yield from _faulty_keys(in_file)
    yield from _without_effect(layers)
    yield from _fused_copies(layers)
    if unreadable:
        yield f"this package does not load it: {unreadable}"
    yield from _alphas(in_file, header, layers)
    yield from file.doubts
    yield from _window(header)
    dropped = unknown_to_comfyui(family, list(in_file.layers)) or []
    if 0 < len(dropped) < len(in_file.layers):
        yield (
            f"ComfyUI would apply half of it: it drops {len(dropped)} of {len(in_file.layers)} layers, the first "
            f"{dropped[0]}; export it with --to comfyui"
        )
    if hidden := hidden_by(family, header):
        if all(place_of(name).scheme == "kohya" for name in in_file.layers):
            yield hidden


def _faulty_keys(in_file: FileLayers) -> Iterator[str]:
    if in_file.unknown:
        count = len(in_file.unknown)
        yield f"{count} {'key is' if count == 1 else 'keys are'} not understood: {said_of_unknown(in_file.unknown)}"
    if faults := list(_faults(in_file)):
        yield f"{len(faults)} of its layers are faulty: {faults[0]}"
    if twice := duplicates(in_file.layers):
        yield f"{' and '.join(twice)} are the same layer"


def _faults(in_file: FileLayers) -> Iterator[str]:
    """The layers whose matrices are damaged, each with what is wrong with them."""
    return (f"{name} {fault}" for name, parts in in_file.layers.items() if (fault := problem_of(parts)))


def _without_effect(layers: Layers) -> Iterator[str]:
    all_layers = {f"{name}.{path}": f for name, part in layers.items() for path, f in part.items()}
    still = [path for path, f in all_layers.items() if not f.alpha or not bool(f.up.any()) or not bool(f.down.any())]
    if all_layers and len(still) == len(all_layers):
        yield "it changes nothing: in every layer a matrix or alpha is zero, as before the first step of training"
    elif still:
        share = f"{len(still)} of {len(all_layers)} layers"
        yield f"{share} change nothing, the first {still[0]}: a matrix or alpha is zero"


def _fused_copies(layers: Layers) -> Iterator[str]:
    """Trained after `fuse_qkv_projections`, whose layers are next to those whose weights they hold."""
    originals = {"to_qkv": "to_q", "to_kv": "to_k", "to_added_qkv": "add_q_proj", "to_added_kv": "add_k_proj"}
    for name, part in layers.items():
        parts = [path.rpartition(".") for path in part]
        copies = [f"{at}.{last}" for at, _, last in parts if f"{at}.{originals.get(last, '')}" in part]
        if copies:
            yield (
                f"{len(copies)} of its layers in {name} are fused projections, the first {copies[0]}, which no freshly "
                "loaded model has: no program loads them"
            )


def _scales(layers: Layers) -> bool:
    return any(factors.alpha != factors.rank for part in layers.values() for factors in part.values())


def _alphas(in_file: FileLayers, header: Mapping[str, str], layers: Layers) -> Iterator[str]:
    flat = {name: parts for name, parts in in_file.layers.items() if place_of(name).scheme == "kohya"}
    without = [name for name, parts in flat.items() if "alpha" not in parts]
    if without:
        yield f"{len(without)} layers have no alpha, the first {without[0]}: programs take them at full strength"
    if not any("alpha" in parts for parts in in_file.layers.values()) and _scales(layers):
        if strength.IN_HEADER in header:
            yield "alpha stands in the header alone, which only diffusers reads: other programs apply another strength"
        elif strength.BESIDE in header:
            yield (
                f"alpha stands in {strength.CONFIG_FILE} alone, which only PEFT and this package read: other programs "
                "apply another strength; export it"
            )


def _window(header: Mapping[str, str]) -> Iterator[str]:
    text = header.get("alignprop.window", "")
    try:
        if text:
            window_from_text(text)
    except ConfigError as error:
        yield f"its window is damaged, so that this package does not load it without another: {error}"
