"""Functions of a Gramian's eigenvalues, with derivatives that hold where eigenvalues are equal."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradsurgery.ops import eigen


class PseudoInverse(torch.autograd.Function):
    """pinv(K), [..., m, m]; of the `rank` [...] of K where that is known."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, rtol: float, rank: Tensor | None = None) -> Tensor:
        lifted, live = _lifted(gram)
        values, vectors = eigen(lifted)
        if rank is None:
            counts = nonzero(lifted, values, vectors, rtol)
        else:  # beside those of rows of zeros, which are the largest
            counts = foremost(lifted, values, vectors, rank + (~live).sum(-1))
        inverse = torch.where(counts, 1 / torch.where(counts, values, 1), 0)
        out = vectors.mT @ (inverse.unsqueeze(-1) * vectors) * _both(live)
        ctx.save_for_backward(gram, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # of constant rank: dP = -P dK P + P P dK (1 - K P) + (1 - P K) dK P P
        gram, out = ctx.saved_tensors
        rest = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - gram @ out
        twice = out @ out
        grad = grads[0]
        return -out @ grad @ out + twice @ grad @ rest.mT + rest @ grad @ twice, None, None


class InverseRoot(torch.autograd.Function):
    """sqrt(λ_min) K^(-1/2), [..., m, m], over the eigenvalues of K that are not zero."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, rtol: float) -> Tensor:
        lifted, live = _lifted(gram)
        values, vectors = eigen(lifted)
        counts = nonzero(lifted, values, vectors, rtol)
        safe = torch.where(counts, values, 1)
        least = torch.where(counts, values, torch.inf).amin(-1, keepdim=True)
        least = torch.where(counts.any(-1, keepdim=True), least, 0)
        root = torch.where(counts, (least / safe).sqrt(), 0)
        ctx.save_for_backward(values, vectors, counts, least, root, live)
        return vectors.mT @ (root.unsqueeze(-1) * vectors) * _both(live)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # f(λ) = sqrt(λ_min / λ): divided differences, which are f' where two λ are equal
        values, vectors, counts, least, root, live = ctx.saved_tensors
        inner = vectors @ (grads[0] * _both(live)) @ vectors.mT
        both = counts[..., :, None] & counts[..., None, :]
        one = counts[..., :, None] | counts[..., None, :]
        a = torch.where(counts, values, 0).clamp_min(0).sqrt()
        product = a[..., :, None] * a[..., None, :]
        bottom = product * (a[..., :, None] + a[..., None, :])
        apart = -least.sqrt().unsqueeze(-1) / torch.where(both, bottom, 1)
        sums = (a[..., :, None] + a[..., None, :]) ** 3  # with a zero one: f(λ) / λ
        edge = least.sqrt().unsqueeze(-1) / torch.where(one & ~both, sums, 1)
        slopes = torch.where(both, apart, torch.where(one, edge, 0))
        # λ_min itself: the mean over those equal to it
        lowest = counts & (values <= least * (1 + 1e-12))
        shares = lowest / lowest.sum(-1, keepdim=True).clamp_min(1)
        gain = (inner.diagonal(dim1=-2, dim2=-1) * root).sum(-1, keepdim=True)
        move = gain / (2 * torch.where(least > 0, least, 1)) * shares
        return vectors.mT @ (slopes * inner + torch.diag_embed(move)) @ vectors, None


def _lifted(gram: Tensor) -> tuple[Tensor, Tensor]:
    """K with twice its trace as the square of rows of zeros, and which rows are none, [..., m].

    Such a row has no scale that rounding could be judged by, and vectors of eigenvalue zero would
    mix with its own. Above all others it is alone, and it is left out of what is made.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    live = squares > 0
    above = torch.where(live, 0, 2 * squares.sum(-1, keepdim=True))
    return gram + torch.diag_embed(above), live


def _both(live: Tensor) -> Tensor:
    return live.unsqueeze(-1) & live.unsqueeze(-2)


def nonzero(gram: Tensor, values: Tensor, vectors: Tensor, rtol: float) -> Tensor:
    """Which eigenvalues exceed what rounding of K's entries makes of zero.

    Rounding of K_ij is eps |g_i| |g_j|, and of vᵀ K v no more than eps m Σ v_i² |g_i|²: a small row
    is judged by its own scale.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return values > rtol**2 * (vectors**2 @ squares.unsqueeze(-1)).squeeze(-1)


def foremost(gram: Tensor, values: Tensor, vectors: Tensor, rank: Tensor) -> Tensor:
    """Which eigenvalues exceed rounding most, as many as are not zero."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    rounding = (vectors**2 @ squares.unsqueeze(-1)).squeeze(-1)
    above = torch.where(rounding > 0, values / torch.where(rounding > 0, rounding, 1), 0)
    place = above.argsort(-1, descending=True).argsort(-1)
    return (place < rank.unsqueeze(-1)) & (values > 0)
