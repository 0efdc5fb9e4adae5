"""Gramian of weight gradients that are formed slice by slice and dropped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, choose, runs_cuda

CHUNK = 1 << 21  # values of all rows' slices that the reference forms at a time


def plane_gramian(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    """Inner products of rows R_i = Σ_k Σ_t left_kt right_ktᵀ, over the blocks k of row i.

    K_ij = <R_i, R_j>

    Args:
        left, right: any number of [n, T, a] and [n, T, b], n and T each time their own; float32 or
            float64.
        rows: [n] int64 for each of these, the row of every block, 0 .. count - 1.
        count: rows. One without a block is zero.
        kept: [a, b], one more row, the last, which exists.

    Returns:
        [m, m] float64, m = count or, with `kept`, count + 1. Planes are formed in the dtype of
        their tokens, and multiplied as by `gramian`.
    """
    device = left[0].device.type
    return choose("plane_gramian", IMPLEMENTATIONS, device)(left, right, rows, count, kept)


def plane_gramian_reference(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    height, width = left[0].shape[-1], right[0].shape[-1]
    m = count + (kept is not None)
    out = left[0].new_zeros(m, m, dtype=torch.float64)
    step = max(1, CHUNK // max(1, m * width))
    for lo in range(0, height, step):
        hi = min(lo + step, height)
        planes = left[0].new_zeros(m, hi - lo, width)
        for x, y, which in zip(left, right, rows, strict=True):
            planes.index_add_(0, which.to(x.device), x[..., lo:hi].mT @ y)
        if kept is not None:
            planes[-1] = kept[lo:hi]
        wide = planes.flatten(1).double()
        out += wide @ wide.mT
    return out.tril() + out.tril(-1).mT  # a BLAS need not make it symmetric


def plane_gramian_native(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    if runs_cuda(left[0]):  # of a test build
        return plane_gramian_reference(left, right, rows, count, kept)
    m = count + (kept is not None)
    out = left[0].new_empty(m, m, dtype=torch.float64)
    _C.plane_gramian_cpu(left, right, rows, count, kept, out, torch.get_num_threads())
    return out


IMPLEMENTATIONS = {
    ("torch", "any"): plane_gramian_reference,
    ("native", "cpu"): plane_gramian_native,
}
