"""MGDA: the point of the rows' convex hull nearest to zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops import cone_weights
from gradsurgery.surgery.rule import Rule


@dataclass(frozen=True, kw_only=True)
class MGDA(Rule):
    """The shortest convex combination of the rows: min |Jᵀ w| over w ≥ 0, Σ w = 1.

    Exact: the hull is a cone's section, so that one non-negative least squares problem, that of
    rows with one more coordinate, gives it. With a zero row, the update is zero.

    Multiple-gradient descent algorithm, Désidéri 2012; Sener and Koltun 2018 (arXiv:1810.04650).
    """

    formula: ClassVar[str] = "argmin |Σ_i w_i g_i|, w >= 0, Σ w = 1"
    paper: ClassVar[str] = "Sener and Koltun 2018 (arXiv:1810.04650)"
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "stationary"}
    )

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        m = gram.shape[-1]
        if m == 0:
            return gram.new_zeros(gram.shape[:-1])
        squares = gram.diagonal(dim1=-2, dim2=-1)
        least = squares.amin(-1, keepdim=True)  # no less than what is sought, and of its scale
        raised = gram + least.unsqueeze(-1)
        x, _ = cone_weights(
            raised, least.unsqueeze(-1).expand(*least.shape[:-1], 1, m), rtol=rtol, noise=rtol**2
        )
        x = x.squeeze(-2)
        zero = (squares == 0).double()
        x = torch.where(zero.any(-1, keepdim=True), zero, x)
        return x / x.sum(-1, keepdim=True)
