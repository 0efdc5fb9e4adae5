"""MGDA: the point of the rows' convex hull nearest to zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops import cone_weights
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class MGDA(Weighting):
    """The shortest convex combination of the rows: min |Jᵀ w| over w ≥ 0, Σ w = 1.

    Exact: the hull is a cone's section, so that one non-negative least squares problem, that of
    rows with one more coordinate, gives it. With a zero row the update is zero, but a row that is
    zero in one tensor or module only, as of a task that does not reach it, does not count there.

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
        there = squares > 0
        # no more than what is sought can be, and of its scale
        least = torch.where(there, squares, torch.inf).amin(-1, keepdim=True)
        least = torch.where(there, least, 0)
        raised = gram + torch.where(there[..., None], least.unsqueeze(-2), 0)
        x, _ = cone_weights(raised, least.unsqueeze(-2), rtol=rtol, noise=rtol**2)
        x = x.squeeze(-2)
        if self.granularity == "model":
            x = torch.where(there.all(-1, keepdim=True), x, (~there).double())
        total = x.sum(-1, keepdim=True)
        return torch.where(total > 0, x / torch.where(total > 0, total, 1), 0)
