"""Nash-MTL: the bargaining solution of the rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.ops import bargaining_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class NashMTL(Weighting):
    """Weights w > 0 with K w = 1 / w: every row gains in proportion to what it gives.

    Found exactly, by Newton's method on the convex function that has it as its minimum; the
    paper's own sequence of approximations needs a state, this needs none. The update's squared
    norm is the number of rows that are not zero. Where a positive combination of rows vanishes
    there is no solution; the update is zero then.

    Args:
        max_norm: the update is shortened to this norm if longer; None for never.

    Multi-Task Learning as a Bargaining Game, Navon et al. 2022 (arXiv:2202.01017).
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, K w = 1 / w, w > 0"
    paper: ClassVar[str] = "Navon et al. 2022 (arXiv:2202.01017)"
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "invariant", "stationary"}
    )

    max_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.max_norm
        check(given is None or given > 0, f"max_norm must be above 0 or None, got {given}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        weights = bargaining_weights(gram, 1.0, rtol=rtol)
        if self.max_norm is None:
            return weights
        square = (weights.unsqueeze(-2) @ gram @ weights.unsqueeze(-1)).squeeze(-1)
        longest = square.clamp_min(self.max_norm**2).sqrt()
        return weights * (self.max_norm / longest)
