"""The low-rank change of one layer, as every file and program has it: two matrices and a number."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The low-rank change of one layer: delta-W = up @ down * alpha / rank."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def folded(self) -> Tensor:
        """`up` for readers that take alpha = rank."""
        return self.up if self.alpha == self.rank else self.up * (self.alpha / self.rank)

    def norm(self) -> float:
        """The Frobenius norm of the change, without the change: of rank x rank products alone.

        The squared norm of U D is the sum over all entries of (U' U) * (D D').
        """
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        square = float(((up.T @ up) * (down @ down.T)).sum())
        return max(square, 0.0) ** 0.5 * abs(self.alpha) / self.rank


Layers = dict[str, dict[str, Factors]]
"""Factors by component ("unet", "transformer", "transformer_2", "text_encoder") and by the layer's name in it."""


def common_shape(layers: Mapping[str, Factors]) -> tuple[int, float]:
    """The rank and alpha that most layers have."""
    return Counter((factors.rank, factors.alpha) for factors in layers.values()).most_common(1)[0][0]
