"""Aligned-MTL: the rows made orthogonal and of one length, then averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.surgery.rule import Weighting, preference
from gradsurgery.surgery.spectral import InverseRoot


@dataclass(frozen=True, kw_only=True)
class AlignedMTL(Weighting):
    """The rows with all their singular values replaced by the least one, averaged.

    K = V Λ Vᵀ: w = sqrt(λ_min) V Λ^(-1/2) Vᵀ p, over the eigenvalues that are not zero.

    Args:
        preference: p, weights of the aligned rows, [m]; None for 1 / m each.

    Independent Component Alignment for Multi-Task Learning, Senushkin et al. 2023
    (arXiv:2305.19000).
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, w = sqrt(λ_min) K^(-1/2) p"
    paper: ClassVar[str] = "Senushkin et al. 2023 (arXiv:2305.19000)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    preference: Sequence[float] | None = None

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        given = preference(self.preference, gram)
        if gram.shape[-1] == 0:
            return gram.new_zeros(gram.shape[:-1])
        return (InverseRoot.apply(gram, rtol) @ given.unsqueeze(-1)).squeeze(-1)
