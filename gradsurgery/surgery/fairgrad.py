"""FairGrad: rows share the gain fairly, as alpha says."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.ops import bargaining_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class FairGrad(Weighting):
    """Weights w > 0 with K w = w^(-1 / alpha), the alpha-fair share of the rows' gains.

    Found as Nash-MTL's, which is alpha = 1; below alpha = 0.3 rounding may hide it. Where a
    positive combination of rows vanishes there is no solution; the update is zero then.

    Args:
        alpha: above 0: towards 0 the sum of gains counts, 1 is proportional, beyond, the least
            gain counts more and more.

    Fair Resource Allocation in Multi-Task Learning, Ban and Ji 2024 (arXiv:2402.15638).
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, K w = w^(-1 / alpha), w > 0"
    paper: ClassVar[str] = "Ban and Ji 2024 (arXiv:2402.15638)"
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "stationary"}
    )

    alpha: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha > 0, f"alpha must be above 0, got {self.alpha}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        return bargaining_weights(gram, 1 / self.alpha, rtol=rtol)
