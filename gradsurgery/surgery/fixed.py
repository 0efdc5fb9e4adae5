"""Weights that do not depend on the rows: the mean, the sum, given ones, random ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import check, to_device
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class Mean(Weighting):
    """The mean of the rows: training as usual."""

    formula: ClassVar[str] = "mean_i g_i"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant", "linear"})

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        return gram.new_full(gram.shape[:-1], 1 / max(gram.shape[-1], 1))


@dataclass(frozen=True, kw_only=True)
class Sum(Weighting):
    """The sum of the rows."""

    formula: ClassVar[str] = "Σ_i g_i"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant", "linear"})

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        return gram.new_ones(gram.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class Constant(Weighting):
    """Given weights.

    Args:
        values: one weight per row.
    """

    formula: ClassVar[str] = "Σ_i w_i g_i"
    properties: ClassVar[frozenset[str]] = frozenset({"linear"})

    values: Sequence[float]

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        m = gram.shape[-1]
        check(len(self.values) == m, f"values has {len(self.values)} weights for {m} rows")
        weights = torch.tensor(list(self.values), dtype=gram.dtype, device="cpu")
        return to_device(weights, gram.device).expand(gram.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class Random(Weighting):
    """Positive weights of sum 1, drawn anew at each call: the softmax of a normal vector.

    Args:
        seed: of the draws.

    Reasonable Effectiveness of Random Weighting, Lin et al. 2022 (arXiv:2111.10603).
    """

    formula: ClassVar[str] = "Σ_i softmax(ξ)_i g_i, ξ ~ N(0, I)"
    paper: ClassVar[str] = "Lin et al. 2022 (arXiv:2111.10603)"
    properties: ClassVar[frozenset[str]] = frozenset({"linear"})

    remembers: ClassVar[tuple[str, ...]] = ("draws",)

    seed: int = 0

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        shape = gram.shape[:-1]
        drawn = self._draw(
            self.seed, lambda g: torch.randn(shape, dtype=gram.dtype, device="cpu", generator=g)
        )
        return to_device(drawn.softmax(-1), gram.device)
