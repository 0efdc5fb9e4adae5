"""MoDo: weights that go a step down the norm of the update, by two batches."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.ops._inputs import check
from gradsurgery.surgery.two_batches import TwoBatches, on_simplex


@dataclass(frozen=True, kw_only=True)
class MoDo(TwoBatches):
    """w ← proj(w - gamma (K w + rho w)) on the simplex, one step a call; the update is wᵀ J.

    Over many steps w follows that of `MGDA`, without a solve, and without the bias that
    the noise of one batch has there.

    Args:
        gamma: rate of the weights, above 0, in units of one over a squared gradient norm.
        rho: 0 or more, draws the weights to equal ones.

    Three-Way Trade-Off in Multi-Objective Learning, Chen et al. 2023 (arXiv:2305.20057), with the
    update of both batches; a third batch for it alone, as in their Algorithm 1, is not drawn.
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, w ← proj(w - gamma (K w + rho w)) on the simplex"
    paper: ClassVar[str] = "Chen et al. 2023 (arXiv:2305.20057)"

    gamma: float = 0.1
    rho: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gamma > 0, f"gamma must be above 0, got {self.gamma}")
        check(self.rho >= 0, f"rho must be 0 or more, got {self.rho}")

    def _moved(self, cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        slope = (cross @ weights.unsqueeze(-1)).squeeze(-1) + self.rho * weights
        moved = on_simplex(weights - self.gamma * slope)
        return moved, moved
