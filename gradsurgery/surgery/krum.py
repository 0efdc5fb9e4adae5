"""Krum: the rows that are nearest to their neighbours, whatever a few of them may be."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class Krum(Weighting):
    """The row with the least sum of squared distances to those nearest to it, or a mean of such.

    Of m rows, a row's score is the sum over the m - n_byzantine - 2 others nearest to it; the
    update is the mean of the `n_selected` rows of least score (Multi-Krum), of equal scores the
    earlier ones. Up to n_byzantine rows may be anything, as those of ranks that fail, where m is
    2 n_byzantine + 3 or more. Distances come of the Gramian, which resolves them to its rounding.

    Args:
        n_byzantine: rows that may be anything, 0 or more; m must be n_byzantine + 3 or more.
        n_selected: rows in the mean, 1 to m.

    Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, Blanchard et al. 2017
    (arXiv:1703.02757).
    """

    formula: ClassVar[str] = "mean of the rows of least Σ |g_i - g_j|², over the j nearest to i"
    paper: ClassVar[str] = "Blanchard et al. 2017 (arXiv:1703.02757)"

    n_byzantine: int
    n_selected: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.n_byzantine >= 0, f"n_byzantine must be 0 or more, got {self.n_byzantine}")
        check(self.n_selected >= 1, f"n_selected must be 1 or more, got {self.n_selected}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        m, n = gram.shape[-1], self.n_selected
        nearest = m - self.n_byzantine - 2
        check(
            nearest >= 1,
            f"Krum needs {self.n_byzantine + 3} rows or more for n_byzantine={self.n_byzantine}, "
            f"got {m}",
        )
        check(n <= m, f"n_selected must be at most the number of rows, {m}, got {n}")
        squares = gram.diagonal(dim1=-2, dim2=-1)
        distances = squares[..., :, None] + squares[..., None, :] - 2 * gram  # squared
        itself = torch.eye(m, dtype=torch.bool, device=gram.device)
        others = distances.clamp_min(0).masked_fill(itself, torch.inf)
        scores = others.sort(-1).values[..., :nearest].sum(-1)
        best = scores.argsort(dim=-1, stable=True)[..., :n]
        return torch.zeros_like(scores).scatter(-1, best, 1 / n)
