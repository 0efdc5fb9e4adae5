"""PCGrad: rows without their parts along the rows they conflict with, one after another."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.ops._inputs import to_device
from gradsurgery.ops.deconflict import deconflict_weights, shuffled
from gradsurgery.surgery.rule import Weighting, one_of


@dataclass(frozen=True, kw_only=True)
class PCGrad(Weighting):
    """Each row, made orthogonal to every other that it conflicts with then, in random order.

    For each i: v = g_i; for j ≠ i in random order: if ⟨v, g_j⟩ < 0: v -= ⟨v, g_j⟩ / |g_j|² g_j.

    Args:
        reduction: of the changed rows, "sum" as in the paper, or "mean".
        seed: of the orders.

    Gradient Surgery for Multi-Task Learning, Yu et al. 2020 (arXiv:2001.06782).
    """

    formula: ClassVar[str] = "Σ_i g_i, made orthogonal to each g_j with ⟨v, g_j⟩ < 0"
    paper: ClassVar[str] = "Yu et al. 2020 (arXiv:2001.06782)"
    properties: ClassVar[frozenset[str]] = frozenset({"linear"})
    remembers: ClassVar[tuple[str, ...]] = ("draws",)

    reduction: Literal["sum", "mean"] = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("reduction", self.reduction, ("sum", "mean"))

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        changed, _ = deconflict_weights(gram, self._orders(gram))
        return changed.sum(-2) if self.reduction == "sum" else changed.mean(-2)

    def _orders(self, gram: Tensor) -> Tensor:
        draws = self._draw(
            self.seed,
            lambda g: torch.rand(gram.shape, dtype=torch.float32, device="cpu", generator=g),
        )
        return to_device(shuffled(draws), gram.device)
