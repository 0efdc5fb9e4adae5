"""The direction near the mean row that serves the worst row best: CAGrad's, on a Gramian."""

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import (
    as_gramian,
    check,
    check_gramian_finite,
    check_number,
    check_rtol,
    is_number,
    shown,
)
from gradsurgery.ops.cone import cone_weights_reference
from gradsurgery.ops.weighting import default_rtol, scratch_for


def conflict_averse_weights(
    gramian: Tensor, c: float, *, rtol: float | None = None, noise: float | None = None
) -> Tensor:
    """Weights of the d that makes min_i ⟨g_i, d⟩ greatest within |d - g₀| ≤ c |g₀|.

    g₀ is the mean row. d is the projection of g₀ on { ⟨g_i, d⟩ ≥ level }, at the level where it is
    c |g₀| away: a root of one convex function, each value of it a projection on a cone, instead of
    the second-order cone program that others hand to a solver. Zero rows are left out of the
    minimum. Where a positive combination of rows vanishes, no level above 0 exists, and d is the
    projection for level 0, or for the level that c allows.

    Args:
        gramian: K, [..., m, m].
        c: radius of the ball in units of |g₀|, 0 or more.
        rtol: as of `cone_weights`.
        noise: as of `cone_weights`.

    Returns:
        [..., m] float64.

    Raises:
        InputError: shapes that do not fit, a negative c.
        NonFiniteError: a Gramian with NaN or infinity (CPU).

    Conflict-Averse Gradient Descent for Multi-task Learning, Liu et al. 2021 (arXiv:2110.14048).
    """
    check(is_number(c) and c >= 0, f"c must be 0 or more, got {shown(c)}")
    gram = as_gramian(gramian)
    least = default_rtol(gram.shape[-1], gramian.dtype)
    rtol = least if rtol is None else rtol
    noise = least**2 if noise is None else noise
    check_rtol(rtol)
    check_number("noise", noise)
    return call("conflict_averse_weights", gram, c, rtol, noise)


def conflict_averse_weights_reference(
    gramian: Tensor, c: float, rtol: float, noise: float
) -> Tensor:
    """By bisection of the level."""
    check_gramian_finite(gramian)
    m = gramian.shape[-1]
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    counts = norms > 0
    mean = gramian.sum(-1) / max(m, 1)  # ⟨g_i, g₀⟩
    radius = c * (mean.sum(-1) / max(m, 1)).clamp_min(0).sqrt()
    x = torch.zeros_like(mean)
    if m:
        low = torch.where(counts, mean, torch.inf).amin(-1)
        high = torch.where(counts, mean + radius[..., None] * norms, torch.inf).amin(-1)
        for _ in range(200):
            level = torch.where((low < 0) & (high > 0), 0, low / 2 + high / 2)
            products = torch.where(counts, level[..., None] - mean, 0)
            found, residual = cone_weights_reference(gramian, products.unsqueeze(-2), rtol, noise)
            found, residual = found.squeeze(-2), residual.squeeze(-1)
            distance = (found * products).sum(-1).clamp_min(0).sqrt()
            # what rounding leaves of the residual, in whose units max b_i = 1
            largest = torch.where(counts, products / norms, 0).amax(-1)
            total = torch.where(largest > 0, (found * norms).sum(-1) / largest, 0)
            rounding = 4 * noise * (1 + total)
            within = (residual <= rounding) & (total * rtol <= 1) & (distance <= radius)
            x = torch.where(within[..., None], found, x)
            low, high = torch.where(within, level, low), torch.where(within, high, level)
    return 1 / max(m, 1) + x


def conflict_averse_weights_native(gramian: Tensor, c: float, rtol: float, noise: float) -> Tensor:
    gramian = gramian.contiguous()
    check_gramian_finite(gramian)
    weights = _fake(gramian, c, rtol, noise)
    if runs_cuda(gramian):
        scratch = scratch_for("conflict_averse", gramian.shape[:-2].numel(), gramian)
        _C.conflict_averse_weights_cuda(gramian, weights, scratch, c, rtol, noise)
    else:
        _C.conflict_averse_weights_cpu(gramian, weights, c, rtol, noise, torch.get_num_threads())
    return weights


def _fake(gramian: Tensor, c: float, rtol: float, noise: float) -> Tensor:
    return gramian.new_empty(size=gramian.shape[:-1])


register(
    "conflict_averse_weights",
    "(Tensor gramian, float c, float rtol, float noise) -> Tensor",
    {
        ("torch", "any"): conflict_averse_weights_reference,
        ("native", "cpu"): conflict_averse_weights_native,
        ("native", "cuda"): conflict_averse_weights_native,
        ("triton", "cuda"): conflict_averse_weights_reference,
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
)
