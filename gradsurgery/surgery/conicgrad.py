"""ConicGrad: within an angle of the mean row, the direction that serves the worst row best."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops import cone_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting

STEPS = 100  # halvings: rows of norms 1e-12 beside 1e12 are told apart by levels 1e-24 of others
LEAST = 1e-4  # of the rows that d is made of: a direction is then known to 1e-8


@dataclass(frozen=True, kw_only=True)
class ConicGrad(Weighting):
    """The d as long as the mean row g₀ that makes min_i ⟨g_i, d⟩ greatest within cos(d, g₀) ≥ c.

    The direction is one of CAGrad's, g₀ + Σ_i x_i g_i with x ≥ 0, which turn from g₀ to MGDA's as
    its radius grows: the one on the cone, or the last, if all are inside. Zero rows are left out of
    the minimum. Where no direction in the cone serves all rows, the one taken opposes the worst
    least for its product with g₀.

    Args:
        c: the least cosine, in [0, 1]: 1 is the mean row alone.

    Inferred, for want of the whole paper: the length of d, the default of c, and that the weights
    of the worst case are solved for in each call; so no option regularizes steps towards them.

    Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone, Hassanpour et al. 2025
    (arXiv:2502.00217).
    """

    formula: ClassVar[str] = "argmax min_i ⟨g_i, d⟩, cos(d, g₀) >= c, |d| = |g₀|"
    paper: ClassVar[str] = "Hassanpour et al. 2025 (arXiv:2502.00217)"
    properties: ClassVar[frozenset[str]] = frozenset({"equivariant"})

    c: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.c <= 1, f"c must be in [0, 1], got {self.c}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        if gram.shape[-1] == 0:
            return gram.new_zeros(gram.shape[:-1])
        if self.c == 1:
            return gram.new_full(gram.shape[:-1], 1 / gram.shape[-1])
        return _Found.apply(gram, self.c, rtol)


class _Found(torch.autograd.Function):
    """Weights [..., m], by bisection, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, c: float, rtol: float) -> Tensor:
        m = gram.shape[-1]
        norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        counts = norms > 0
        mean = gram.sum(-1) / m  # ⟨g_i, g₀⟩
        square = mean.sum(-1) / m
        # s in [-1, 1] is a path: levels from the least ⟨g_i, g₀⟩ to 0, then to those of MGDA, where
        # g₀ has no share
        below = torch.where(counts, mean, torch.inf).amin(-1).clamp_max(0)
        above = torch.where(counts, norms, torch.inf).amin(-1) * square.clamp_min(0).sqrt()
        above = torch.where(counts.any(-1), above, 0)

        def reached(s: Tensor) -> tuple[Tensor, Tensor]:
            """Weights there, and whether there are any within the cone."""
            share = (1 - s.clamp_min(0))[..., None]
            level = torch.where(s < 0, -s * below, s * above)[..., None]
            products = torch.where(counts, level - share * mean, 0)
            x, missed = cone_weights(gram, products.unsqueeze(-2), rtol=rtol, noise=rtol**2)
            x, missed = x.squeeze(-2), missed.squeeze(-1)
            # by rounding, in whose units max b_i = 1
            most = torch.where(counts, products / torch.where(counts, norms, 1), 0).amax(-1)
            total = torch.where(most > 0, (x * norms).sum(-1) / torch.where(most > 0, most, 1), 0)
            exists = (missed <= 4 * rtol**2 * (1 + total)) & (total * rtol <= 1)
            weights = share / m + x
            length, size = _length(gram, weights), (weights * norms).sum(-1)
            # where rows cancel, d vanishes at level 0: its direction is that of levels below
            left = length > torch.where(s < 0, max(rtol, LEAST) * size, rtol * size)
            along = (weights * mean).sum(-1)
            return weights, exists & left & (along >= c * length * square.clamp_min(0).sqrt())

        weights, last = reached(torch.ones_like(square))
        low, high = -torch.ones_like(square), torch.ones_like(square)
        best = torch.where(last[..., None], weights, 1 / m)
        for _ in range(STEPS):
            middle = low / 2 + high / 2
            weights, inside = reached(middle)
            best = torch.where((inside & ~last)[..., None], weights, best)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        length = square.clamp_min(0).sqrt()
        left = length > rtol * norms.mean(-1)  # of a mean that cancels nothing is
        times = torch.where(left, length / torch.where(left, _length(gram, best), 1), 0)
        return best * times[..., None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InputError("ConicGrad has no derivative here: detach its result or its arguments")


def _length(gram: Tensor, weights: Tensor) -> Tensor:
    """|Jᵀ w|, [...]."""
    return (weights * (gram @ weights.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp_min(0).sqrt()
