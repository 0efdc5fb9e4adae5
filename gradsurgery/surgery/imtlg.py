"""IMTL-G: a direction with the same projection on every row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.surgery.forget_retain import inverse_norms
from gradsurgery.surgery.rule import Weighting, preference
from gradsurgery.surgery.spectral import PseudoInverse


@dataclass(frozen=True, kw_only=True)
class IMTLG(Weighting):
    """Weights of sum 1 for which all unit rows have the same product with the update.

    w ∝ pinv(K) sqrt(diag K): the update before scaling is the shortest u with the least
    Σ_i (⟨g_i, u⟩ - |g_i|)², and of the weights that make it the shortest are taken. For independent
    rows all ⟨g_i, u⟩ / |g_i| are the same; dependent ones may not have that, and then long rows
    come nearer to it than short ones. The sum may be negative, and then every row is opposed: the
    definition is the paper's. Where it vanishes, the weights are zero.

    Towards Impartial Multi-task Learning, Liu et al. 2021 (ICLR).
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, w ~ pinv(K) sqrt(diag K), Σ w = 1"
    paper: ClassVar[str] = "Liu et al. 2021 (ICLR)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        scale = inverse_norms(gram)
        nonzero = scale > 0
        norms = torch.where(nonzero, 1 / torch.where(nonzero, scale, 1), 0)
        unit = gram * scale[..., :, None] * scale[..., None, :]
        inverse = PseudoInverse.apply(unit, rtol)
        rank = (inverse * unit).detach().sum((-2, -1)).round()
        # of independent rows D⁻¹ U⁻¹ 1, to which the norms D say nothing
        apart = _solved(inverse, nonzero.double(), rtol) * scale
        whole = _solved(PseudoInverse.apply(gram, rtol, rank), norms, rtol)
        weights = torch.where((rank < nonzero.sum(-1))[..., None], whole, apart)
        total = weights.sum(-1, keepdim=True)
        vanishes = total.abs() <= 1e-12 * weights.abs().sum(-1, keepdim=True)
        return torch.where(vanishes, 0, weights / torch.where(vanishes, 1, total))


def _solved(inverse: Tensor, wanted: Tensor, rtol: float) -> Tensor:
    """K⁺ b, [..., m]; of opposed rows nothing is left but rounding."""
    weights = (inverse @ wanted.unsqueeze(-1)).squeeze(-1)
    size = (inverse.abs() @ wanted.abs().unsqueeze(-1)).squeeze(-1)
    return torch.where(weights.abs() > rtol**2 * size, weights, 0)


@dataclass(frozen=True, kw_only=True)
class ConFIG(Weighting):
    """The direction of equal cosine to every row, as long as the rows are along it together.

    u = pinv(U) 1 with the unit rows in U; the update is Σ_i ⟨g_i, u⟩ u / |u|².

    Args:
        preference: in place of 1, what the unit rows' products with u are in proportion to, [m].

    ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, Liu et al. 2024
    (arXiv:2408.11104).
    """

    formula: ClassVar[str] = "Σ_i ⟨g_i, u⟩ u / |u|², u = pinv(g_i / |g_i|) 1"
    paper: ClassVar[str] = "Liu et al. 2024 (arXiv:2408.11104)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant", "linear"})

    preference: Sequence[float] | None = None

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        given = None if self.preference is None else preference(self.preference, gram)
        weights, products = equal_cosines(gram, rtol, given)
        square = (weights * products).sum(-1, keepdim=True)  # |u|²
        nonzero = square > 0
        length = products.sum(-1, keepdim=True) / torch.where(nonzero, square, 1)
        length = torch.where(nonzero, length, 0)
        return weights * length


def equal_cosines(gram: Tensor, rtol: float, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights of u = pinv(U) 1, U the unit rows, and the products of the rows with u.

    `given` [m] in place of 1.
    """
    scale = inverse_norms(gram)
    wanted = (scale > 0).double() * (1 if given is None else given)
    inverse = PseudoInverse.apply(gram * scale[..., :, None] * scale[..., None, :], rtol)
    weights = _solved(inverse, wanted, rtol) * scale
    return weights, (gram @ weights.unsqueeze(-1)).squeeze(-1)
