"""GradVac: rows turned towards each other until their cosines reach a moving target."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from gradsurgery.ops import deconflict_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.pcgrad import PCGrad


@dataclass(frozen=True, kw_only=True)
class GradVac(PCGrad):
    """As PCGrad, but a row is turned towards another until their cosine is what it was on average.

    Where φ = cos(v, g_j) is below its target t, the multiple of g_j is added that makes it t;
    then t ← (1 - beta) t + beta φ. Targets begin at 0, and anew where the
    number of rows changes: the first call is PCGrad's.

    Args:
        beta: in [0, 1], how fast targets follow the cosines seen.

    Gradient Vaccine, Wang et al. 2020 (arXiv:2010.05874).
    """

    formula: ClassVar[str] = "Σ_i g_i turned to cos(v, g_j) >= target_ij"
    paper: ClassVar[str] = "Wang et al. 2020 (arXiv:2010.05874)"
    remembers: ClassVar[tuple[str, ...]] = ("draws", "targets")

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta <= 1, f"beta must be in [0, 1], got {self.beta}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        targets = self._state.get("targets")
        if targets is None or targets.shape != gram.shape:
            targets = torch.zeros_like(gram)
        targets = targets.to(gram)
        changed, moved = deconflict_weights(gram, self._orders(gram), targets, self.beta)
        self._state["targets"] = cast(Tensor, moved)
        return changed.sum(-2) if self.reduction == "sum" else changed.mean(-2)
