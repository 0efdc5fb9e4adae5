"""GradOPS: rows that conflict, made orthogonal to the span of all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops import projection_weights
from gradsurgery.surgery.rule import Weighting, check_preference, preference


@dataclass(frozen=True, kw_only=True)
class GradOPS(Weighting):
    """The sum of the rows, each orthogonal to all others if it conflicts with one of them.

    v_i = g_i - proj(g_i on span{ g_j : j ≠ i }) if ⟨g_i, g_j⟩ < 0 for any j, else v_i = g_i. No v_i
    opposes a row, so neither does a sum of them. A row that conflicts and is in the span of the
    others, as one that is there twice, gives nothing. All m problems are solved at once, in m³
    values.

    Args:
        preference: weights of the v_i, [m], 0 or more; None for 1 each.

    Inferred, for want of the whole paper: that a row without conflict stays as it is, and that the
    v_i are summed. Weights that follow the rows' shares of the update, the paper's alpha, are not
    here.

    Gradient Deconfliction via Orthogonal Projections onto Subspaces For Multi-task Learning, Zhu et
    al. 2025 (arXiv:2503.03438).
    """

    formula: ClassVar[str] = "Σ_i g_i, orthogonal to { g_j : j ≠ i } if any ⟨g_i, g_j⟩ < 0"
    paper: ClassVar[str] = "Zhu et al. 2025 (arXiv:2503.03438)"
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "linear", "stationary"}
    )

    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preference(self.preference)

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        m = gram.shape[-1]
        squares = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        norms = squares.sqrt()
        # a cosine of rounding's size is none
        least = -(rtol**2) * norms[..., :, None] * norms[..., None, :]
        conflicts = (gram < least).any(-1)
        # of each row, what the others are: for itself a row of zeros, which has no share
        eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
        others, products = 1 - eye, gram * (1 - eye)
        apart = gram.unsqueeze(-3) * others[:, :, None] * others[:, None, :]
        shares, _, _ = projection_weights(apart, products, rtol=rtol)
        inside = (shares * products).sum(-1)  # |proj(g_i)|²
        size = squares + (shares * products).abs().sum(-1)
        gone = conflicts & (squares - inside <= rtol**2 * size)
        kept = torch.where(gone[..., None], 0, eye - torch.where(conflicts[..., None], shares, 0))
        given = gram.new_ones(m) if self.preference is None else preference(self.preference, gram)
        return (given.unsqueeze(-2) @ kept).squeeze(-2)
