"""Eigenvalues and eigenvectors of Gramians, batched, without a host sync on a GPU."""

from typing import Any

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import as_gramian, check_gramian_finite
from gradsurgery.ops.weighting import scratch_for


def eigen(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """K = Σ λ_k v_k v_kᵀ.

    Jacobi's rotations on a GPU, where torch's eigh waits for the host, and wherever rows differ
    in norm by more than a thousand: they give each eigenvalue to a relative precision, if the unit
    rows are not near dependent, while eigh gives it to that of the largest. Else eigh, which is
    faster.

    Args:
        gramian: K, [..., m, m], symmetric.

    Returns:
        values [..., m] float64, ascending, and vectors [..., m, m] float64, v_k in ROW k. Signs,
        and bases where values are equal, are arbitrary.
    """
    return call("eigen", as_gramian(gramian))


def eigen_reference(gramian: Tensor) -> tuple[Tensor, Tensor]:
    check_gramian_finite(gramian)
    values, vectors = torch.linalg.eigh(gramian)
    return values, vectors.mT.contiguous()


def eigen_native(gramian: Tensor) -> tuple[Tensor, Tensor]:
    check_gramian_finite(gramian)
    values, vectors = _fake(gramian)
    if runs_cuda(gramian):
        scratch = scratch_for("eigen", gramian.shape[:-2].numel(), gramian)
        _C.eigen_cuda(gramian.contiguous(), values, vectors, scratch)
        return values, vectors
    if gramian.numel() and not _graded(gramian):
        return eigen_reference(gramian)
    _C.eigen_cpu(gramian.contiguous(), values, vectors, torch.get_num_threads())
    return values, vectors


def _graded(gramian: Tensor) -> bool:
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    least = torch.where(squares > 0, squares, torch.inf).amin(-1)
    return bool((squares.amax(-1) > 1e6 * least).any())


def _fake(gramian: Tensor) -> tuple[Tensor, Tensor]:
    return gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output)


def _backward(ctx: Any, d_values: Tensor, d_vectors: Tensor) -> Tensor:
    # dK = V (diag(dλ) + (Vᵀ dV) / (λ_j - λ_i)) Vᵀ; equal values contribute nothing
    values, rows = ctx.saved_tensors
    gaps = values[..., None, :] - values[..., :, None]
    apart = gaps.abs() > 1e-14 * values.abs().amax(-1)[..., None, None]
    inner = torch.where(apart, rows @ d_vectors.mT / torch.where(apart, gaps, 1), 0)
    return rows.mT @ (inner + torch.diag_embed(d_values)) @ rows


register(
    "eigen",
    "(Tensor gramian) -> (Tensor, Tensor)",
    {
        ("torch", "any"): eigen_reference,
        ("native", "cpu"): eigen_native,
        ("native", "cuda"): eigen_native,
        ("triton", "cuda"): eigen_reference,
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
