"""Several adapters -> one, exactly: its weight change in every layer is the weighted sum of theirs.

Ranks are put next to each other: with B = up, A = down, the sum of w_i * B_i @ A_i * alpha_i / rank_i over the parts is
the product of all w_i * alpha_i / rank_i * B_i side by side and all A_i on top of each other. `rank` compresses that
product by its singular values, which gives the nearest change of that rank (Eckart and Young, 1936); QR of both factors
leaves a square of the concatenated rank to decompose, so the full matrix is never there.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_pipe.adapters.adapter import Adapter
from alignprop_pipe.adapters.factors import Factors, Layers
from alignprop_pipe.adapters.header import Base
from alignprop_pipe.config.choices import is_whole
from alignprop_pipe.errors import AdapterError
from alignprop_pipe.layout import run_of
from alignprop_pipe.sources import expanded, is_folder

logger = logging.getLogger(__name__)

Source = Adapter | str | Path


def mix(parts: Sequence[tuple[Source, float]] | Mapping[str | Path, float], rank: int | None = None) -> Adapter:
    """One adapter whose weight change in every layer is the weighted sum of the parts'.

    Ranks, alphas, layers and components may differ. The tensors are float32, whatever the parts have, because rounding
    to 16 bits would not be exact; float64 if a part is. `save(dtype=...)` writes smaller files.

    Args:
        parts: adapters, adapter files or run folders, each with its weight: any number, also negative.
        rank: compress every layer to this rank at most; `Energy.of(result)` says what is kept. Default: exact, with the
            sum of the ranks.

    Raises:
        AdapterError: the parts are of different base models, or cannot be read; or a weight is no number.

    Examples:
        >>> from alignprop_pipe import AlignPropPipeline, mix
        >>> pipe = AlignPropPipeline.from_pretrained("emoji")
        >>> options = {"steps": 1, "batch_size": 1, "num_inference_steps": 1, "eval_prompts": 0, "progress": False}
        >>> first, second = (pipe.align(reward, ["a fox"], rank=2, **options).adapter for reward in ("jpeg", "colour"))
        >>> {rank for rank, _ in mix([(first, 0.5), (second, 0.5)]).shapes.values()}
        {4}
    """
    taken = _taken(parts)
    if rank is not None and (not is_whole(rank) or rank < 1):
        raise AdapterError(f"rank is {rank!r}; it has to be a whole number, 1 or more, or None for an exact mix")
    for number, part in enumerate(taken):
        for other in taken[:number]:
            _check_base(other, part)
    dtype = torch.float64 if any(f.down.dtype == torch.float64 for part in taken for f in part.factors()) else None
    layers: Layers = {}
    sizes: dict[str, tuple[float, float]] = {}
    for name, paths in _by_layer(taken).items():
        for path, group in paths.items():
            factors = _sum(group)
            if rank is not None:
                factors, sizes[f"{name}.{path}"] = _compressed(factors, rank)
            layers.setdefault(name, {})[path] = _finished(factors, dtype or torch.float32, f"{name}.{path}")
    metadata = _metadata(taken)
    if rank is not None:
        metadata["mix.energy"] = str(_energy(sizes))
    return Adapter(layers, _base(taken), metadata)


@dataclass(frozen=True, slots=True)
class Energy:
    """What a compression kept of the squared Frobenius norm of the weight change: in all, and of each layer.

    1.0 is all of it. Layers stand under their component: "unet.mid_block.attentions.0...".
    """

    total: float
    layers: Mapping[str, float]

    @classmethod
    def of(cls, adapter: Adapter) -> "Energy | None":
        """Of a mix that was compressed; None for every other adapter. Raises AdapterError for a damaged header."""
        text = adapter.metadata.get("mix.energy")
        if text is None:
            return None
        try:
            said = json.loads(text)
            return cls(float(said["total"]), {str(name): float(share) for name, share in said["layers"].items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise AdapterError(f"the header's mix.energy is damaged ({error}); mix the adapters again") from error

    def __str__(self) -> str:
        return json.dumps({"total": round(self.total, 9), "layers": {k: round(v, 9) for k, v in self.layers.items()}})


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter, its weight, and its name for people."""

    name: str
    adapter: Adapter
    weight: float

    def factors(self) -> list[Factors]:
        return [factors for layers in self.adapter.layers.values() for factors in layers.values()]


def said_of(adapter: Adapter, name: str) -> str:
    """A text of the metadata by its plain name, which a file's header has with `alignprop.` in front."""
    return adapter.metadata.get(name) or adapter.metadata.get(f"alignprop.{name}", "")


def name_of(source: Source, number: int = 1) -> str:
    """How an adapter is called where others read it: a file's or run folder's own name, without the way to it."""
    if isinstance(source, Adapter):
        return source.metadata.get("modelspec.title") or f"adapter {number}"
    path = expanded(source).resolve()
    run = path if is_folder(path) else run_of(path)
    return path.stem if run is None else run.name


def _taken(parts: Any) -> list[_Part]:
    """The parts, read; weights of 0 are left out unless all are."""
    pairs = list(parts.items()) if isinstance(parts, Mapping) and not isinstance(parts, Adapter) else parts
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise AdapterError(f"mix needs adapters with weights, for example [(a, 0.6), (b, 0.4)]; got {_short(parts)}")
    taken = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Source):
            raise AdapterError(f"part {number} is {_short(pair)}; an adapter with its weight is needed, as in (a, 0.6)")
        source, weight = pair
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not is_number:
            raise AdapterError(f"the weight of part {number} is {weight!r}; a number is needed, such as 0.6")
        adapter = source if isinstance(source, Adapter) else Adapter.load(expanded(source))
        taken.append(_Part(name_of(source, number), adapter, float(weight)))
    return taken


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{type(value).__name__}"


def _check_base(left: _Part, right: _Part) -> None:
    """Raises AdapterError that names both, unless the parts can be of one model."""
    ours, theirs = left.adapter.base, right.adapter.base
    if ours.base_model and theirs.base_model and ours.base_model != theirs.base_model:
        raise _other_base(left, ours.base_model, right, theirs.base_model)
    shared = sorted(ours.families.keys() & theirs.families.keys())
    for name in shared:
        if ours.families[name] != theirs.families[name]:
            raise _other_base(left, _described(ours, name), right, _described(theirs, name))
    if not shared and ours.families and theirs.families and not {*ours.families.values()} & {*theirs.families.values()}:
        raise _other_base(left, _described(ours), right, _described(theirs))
    for name, layers in left.adapter.layers.items():
        for path, factors in layers.items():
            other = right.adapter.layers.get(name, {}).get(path)
            if other is not None and _shape(factors) != _shape(other):
                shapes = [f"{_described(part.adapter.base)} ({_text(f)} in {name}.{path})"
                          for part, f in ((left, factors), (right, other))]  # fmt: skip
                raise _other_base(left, shapes[0], right, shapes[1])


def _other_base(left: _Part, ours: str, right: _Part, theirs: str) -> AdapterError:
    return AdapterError(
        f"{left.name!r} was made for {ours}, and {right.name!r} for {theirs}: weight changes of different models "
        "cannot be added; mix adapters of one base model"
    )


def _described(base: Base, name: str | None = None) -> str:
    families = ", ".join(base.families.values()) if name is None else base.families[name]
    return base.base_model or " ".join(filter(None, (base.base_class, families))) or "an unknown model"


def _shape(factors: Factors) -> tuple[int, ...]:
    """Of the weight that is changed."""
    return (factors.up.shape[0], *factors.down.shape[1:])


def _text(factors: Factors) -> str:
    return "x".join(map(str, _shape(factors)))


def _by_layer(parts: Sequence[_Part]) -> dict[str, dict[str, list[tuple[Factors, float]]]]:
    """Weighted factors by component and layer, in the order in which they come."""
    counted = [part for part in parts if part.weight != 0] or parts[:1]
    found: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
    for part in counted:
        for name, layers in part.adapter.layers.items():
            for path, factors in layers.items():
                _check_factors(part, f"{name}.{path}", factors)
                found.setdefault(name, {}).setdefault(path, []).append((factors, part.weight))
    if not found:
        raise AdapterError(f"{parts[0].name!r} is empty: it holds no LoRA")
    return found


def _check_factors(part: _Part, path: str, factors: Factors) -> None:
    down, up = factors.down, factors.up
    fit = down.ndim > 1 and up.ndim == down.ndim and up.shape[1] == down.shape[0] > 0
    if not fit or any(size != 1 for size in up.shape[2:]):
        raise AdapterError(
            f"{path} of {part.name!r} is no LoRA: its matrices are {tuple(up.shape)} and {tuple(down.shape)}"
        )


# --- the sum ---------------------------------------------------------------------------------------------------------


def _sum(group: Sequence[tuple[Factors, float]]) -> Factors:
    """The weighted sum in float64; a layer that only one part changes keeps its rank and alpha."""
    if len(group) == 1:
        factors, weight = group[0]
        return Factors(_exact(factors.down), _exact(factors.up) * weight, factors.alpha)
    down = torch.cat([_exact(factors.down) for factors, _ in group])
    up = torch.cat([_exact(f.up) * (weight * f.alpha / f.rank) for f, weight in group], dim=1)
    return Factors(down, up, float(down.shape[0]))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _compressed(factors: Factors, rank: int) -> tuple[Factors, tuple[float, float]]:
    """The nearest change of this rank, and the squares of the norms that it has and had."""
    down, up = factors.down.flatten(1), factors.folded().flatten(1)
    if factors.rank <= rank:
        whole = max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
        return factors, (whole, whole)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    into, values, out = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept, squares = min(rank, len(values)), values.square()
    root = values[:kept].sqrt()  # to both sides, so that neither is small enough to vanish in 16 bits
    new_up, new_down = left @ into[:, :kept] * root, (right @ out[:kept].T * root).T
    shaped = Factors(
        new_down.reshape(kept, *factors.down.shape[1:]),
        new_up.reshape(-1, kept, *factors.up.shape[2:]),
        float(kept),
    )
    return shaped, (float(squares[:kept].sum()), float(squares.sum()))


def _finished(factors: Factors, dtype: torch.dtype, path: str) -> Factors:
    down, up = factors.down.to(dtype).contiguous(), factors.up.to(dtype).contiguous()
    if not bool(down.isfinite().all() and up.isfinite().all()):
        raise AdapterError(f"{path} of the mix holds NaN or infinity: take smaller weights, or parts that are sound")
    return Factors(down, up, factors.alpha)


def _energy(sizes: Mapping[str, tuple[float, float]]) -> Energy:
    def share(kept: float, of: float) -> float:
        return min(1.0, kept / of) if of else 1.0

    kept, of = (math.fsum(pair[place] for pair in sizes.values()) for place in (0, 1))
    return Energy(share(kept, of), {name: share(*pair) for name, pair in sizes.items()})


# --- what is said of it ----------------------------------------------------------------------------------------------


def _base(parts: Sequence[_Part]) -> Base:
    bases = [part.adapter.base for part in parts]
    families = {name: family for base in reversed(bases) for name, family in base.families.items()}
    known = {
        name: next((value for base in bases if (value := getattr(base, name))), "")
        for name in ("base_model", "base_class", "prediction")
    }
    return Base(families=families, **known)


def _metadata(parts: Sequence[_Part]) -> dict[str, str]:
    """What was mixed, and what all parts have in common."""
    listed = []
    for part in parts:
        about = {name: text for name in ("reward", "window") if (text := said_of(part.adapter, name))}
        listed.append({"adapter": part.name, "weight": part.weight, **about})
    found = {"mix.parts": json.dumps(listed, ensure_ascii=False)}
    for name in ("reward", "window"):
        texts = {said_of(part.adapter, name) for part in parts}
        if len(texts) == 1 and (text := texts.pop()):
            found[name] = text
        elif name == "window" and len(texts) > 1:
            logger.warning(
                "the parts work in different windows of the denoising steps (%s), which one adapter cannot: the mix "
                "works in every step",
                ", ".join(sorted(text or "all" for text in texts)),
            )
    return found
