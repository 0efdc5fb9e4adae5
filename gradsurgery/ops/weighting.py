"""Coefficients of a projection on the span of rows, solved on their Gramian K: K c = k.

As all solves: m x m, float64, batched, on the Gramian's device, without a host sync.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import (
    DTYPES,
    as_gramian,
    check_beside,
    check_dense,
    check_gramian_finite,
    check_rtol,
)

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}  # asking takes microseconds


def default_rtol(m: int, dtype: torch.dtype = torch.float64) -> float:
    """The smallest relative distance to a span that a Gramian of m rows resolves.

    A Gramian squares distances: its rounding, some m eps, is a distance of sqrt(m eps).
    """
    return math.sqrt(min(8 * max(m, 1) * EPS[dtype], 0.5))


def projection_weights(
    gramian: Tensor, products: Tensor, *, rtol: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the orthogonal projection of a vector on the span of rows.

    K c = k, K = J Jᵀ, k = J g: then Jᵀ c is the projection of g.

    Rows are normalized, then taken greedily, the one farthest from the span of those taken
    first (a Cholesky factorization with pivoting). A row nearer to that span than `rtol` times
    its norm is dependent and gets coefficient zero; so does a zero row.

    Args:
        gramian: K, [..., m, m]. Its scale does not matter, nor that of single rows.
        products: k, [..., m].
        rtol: relative distance; None for the smallest that the Gramian's dtype resolves,
            sqrt(8 m eps).

    Returns:
        coefficients [..., m] float64; rank [...] int64; margin [...] float64, the squared
        relative distance of the row taken or dropped last, in [0, 1]: its inverse bounds how
        far errors of the Gramian are magnified.

    Raises:
        InputError: shapes that do not fit.
        NonFiniteError: a Gramian with NaN or infinity (CPU; on a GPU it is not looked for, for
            want of a host sync).
    """
    gram = as_gramian(gramian)
    check_dense(products, "products")
    if not products.is_floating_point():
        raise InputError(f"products must be floating point, got {products.dtype}")
    *batch, m, _ = gram.shape
    if products.shape != (*batch, m):
        raise InputError(
            f"products must be {[*batch, m]} to match gramian, got {list(products.shape)}"
        )
    check_beside(products, "products", gram)
    rtol = default_rtol(m, gramian.dtype) if rtol is None else rtol
    check_rtol(rtol)
    return call("projection_weights", gram, products.double(), rtol)


def projection_weights_reference(
    gramian: Tensor, products: Tensor, rtol: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_gramian_finite(gramian)
    batch, m = gramian.shape[:-2], gramian.shape[-1]
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    k_matrix = gramian * scale[..., :, None] * scale[..., None, :]
    k = products * scale

    distance = (norms > 0).double()  # squared, of each row to the span of the rows taken
    factor = torch.zeros_like(k_matrix)  # K ≈ factor factorᵀ, column j from pivot j
    solved = torch.zeros_like(k)  # forward substitution, entry j from pivot j
    pivots = torch.zeros_like(k, dtype=torch.int64)
    taken = torch.zeros_like(k, dtype=torch.bool)
    rank = torch.zeros(batch, dtype=torch.int64, device=gramian.device)
    margin = torch.ones(batch, dtype=torch.float64, device=gramian.device)
    for j in range(m):
        value, pivot = distance.masked_fill(taken | (norms == 0), -1).max(-1)
        keep = value > rtol**2
        at = pivot[..., None]
        root = torch.where(keep, value, 1).sqrt()
        row = factor.take_along_dim(at[..., None], -2).squeeze(-2)
        column = k_matrix.take_along_dim(at[..., None, :], -1).squeeze(-1)
        column = (column - (factor * row[..., None, :]).sum(-1)) / root[..., None]
        column = torch.where(keep[..., None] & ~taken, column, 0).scatter(
            -1, at, torch.where(keep, root, 0)[..., None]
        )
        factor[..., :, j] = column
        rest = k.take_along_dim(at, -1).squeeze(-1) - (row * solved).sum(-1)
        solved[..., j] = torch.where(keep, rest / root, 0)
        counts = (rank == j) & (value > -0.5)  # -1 where only zero rows are left
        margin = torch.where(counts, torch.minimum(margin, value.clamp(min=0)), margin)
        distance = distance - column**2
        taken = taken.scatter(-1, at, taken.take_along_dim(at, -1) | keep[..., None])
        pivots[..., j] = pivot
        rank = rank + keep

    c = torch.zeros_like(k)
    for j in reversed(range(m)):
        at = pivots[..., j : j + 1]
        root = factor[..., :, j].take_along_dim(at, -1)
        value = (solved[..., j : j + 1] - (factor[..., :, j] * c).sum(-1, keepdim=True)) / root
        c = torch.where(j < rank[..., None], c.scatter(-1, at, value), c)
    return c * scale, rank, margin


def scratch_for(problem: str, count: int, gramian: Tensor) -> Tensor:
    """What a CUDA launch of `count` problems works in."""
    return gramian.new_empty(_C.weighting_scratch(problem, count, gramian.shape[-1]))


def projection_weights_native(
    gramian: Tensor, products: Tensor, rtol: float
) -> tuple[Tensor, Tensor, Tensor]:
    gramian = gramian.contiguous()
    check_gramian_finite(gramian)
    c, rank, margin = _fake(gramian, products, rtol)
    args = (gramian, products.contiguous(), c, rank, margin)
    if runs_cuda(gramian):
        scratch = scratch_for("projection", margin.numel(), gramian)
        _C.projection_weights_cuda(*args, scratch, rtol)
    else:
        _C.projection_weights_cpu(*args, rtol, torch.get_num_threads())
    return c, rank, margin


def _fake(gramian: Tensor, products: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    # torch reads a size that is named in a third of the time
    batch = products.shape[:-1]
    rank = products.new_empty(size=batch, dtype=torch.int64)
    return products.new_empty(size=products.shape), rank, products.new_empty(size=batch)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    gramian, _, ctx.rtol = inputs
    ctx.save_for_backward(gramian, output[0])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    # K c = k: dk = K⁻¹ dc, dK = -dk cᵀ, on the rows taken
    gramian, c = ctx.saved_tensors
    d_products, _, _ = torch.ops.gradsurgery.projection_weights(gramian, grad, ctx.rtol)
    return -d_products[..., :, None] * c[..., None, :], d_products, None


register(
    "projection_weights",
    "(Tensor gramian, Tensor products, float rtol) -> (Tensor, Tensor, Tensor)",
    {
        ("torch", "any"): projection_weights_reference,
        ("native", "cpu"): projection_weights_native,
        ("native", "cuda"): projection_weights_native,
        ("triton", "cuda"): projection_weights_reference,  # waits for nothing either
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
