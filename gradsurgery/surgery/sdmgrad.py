"""SDMGrad: weights near to preferred ones, found by steps along the products of two batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import preference
from gradsurgery.surgery.two_batches import TwoBatches, on_simplex


@dataclass(frozen=True, kw_only=True)
class SDMGrad(TwoBatches):
    """(w + pull p)ᵀ J / (1 + pull), with w on the simplex that makes it short.

    In a call w goes `steps` steps of projected descent on |Jᵀ (w + pull p)|² / 2, along
    K (w + pull p) / s², from where it was, s = mean_i sqrt(max(K_ii, 0)); where s is 0 it stays.

    Args:
        pull: λ of the paper, 0 or more: towards the preferred direction pᵀ J.
        preference: p, weights that tasks should have, one each; all alike if none are given.
        lr: rate of w, above 0.
        momentum: of the steps of one call, in [0, 1).
        steps: how many a call takes, 1 or more.

    Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms, Xiao et
    al. 2023 (arXiv:2305.18409), with the update of both batches; a third batch for it alone, as in
    their algorithm, is not drawn. Dividing by s² and 1 + pull is that of their code; where noise
    outweighs what batches share, s is noise as well, and the mean of K / s² not that of K.
    """

    formula: ClassVar[str] = (
        "Σ_i (w_i + pull p_i) g_i / (1 + pull), w by steps along K (w + pull p)"
    )
    paper: ClassVar[str] = "Xiao et al. 2023 (arXiv:2305.18409)"

    pull: float = 0.3
    preference: Sequence[float] | None = None
    lr: float = 10.0
    momentum: float = 0.5
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pull >= 0, f"pull must be 0 or more, got {self.pull}")
        check(self.lr > 0, f"lr must be above 0, got {self.lr}")
        check(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")
        check(self.steps >= 1, f"steps must be 1 or more, got {self.steps}")

    def _moved(self, cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        pulled = self.pull * preference(self.preference, cross)
        scale = cross.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().mean(-1)[..., None, None]
        there = scale > 0
        unit = torch.where(there, cross / torch.where(there, scale, 1).square(), 0)
        velocity = torch.zeros_like(weights)
        for _ in range(self.steps):
            slope = (unit @ (weights + pulled).unsqueeze(-1)).squeeze(-1)
            velocity = self.momentum * velocity + slope
            weights = on_simplex(weights - self.lr * velocity)
        return weights, (weights + pulled) / (1 + self.pull)
