"""Orthonormal rows with the same span: batched QR of few, long rows."""

from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import NonFiniteError
from gradsurgery.ops._backend import _C, register, runs_cuda
from gradsurgery.ops._inputs import DTYPES, check, check_dense, check_rtol
from gradsurgery.ops._range import factors
from gradsurgery.ops.weighting import default_rtol


def orthonormalize(
    rows: Tensor, *, rtol: float | None = None, return_rank: bool = False
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Orthonormalize rows in their order, as Gram-Schmidt and Householder QR do.

    J = Rᵀ Q, Q Qᵀ = I, R upper triangular with a positive diagonal

    A row nearer to the span of those before it than `rtol` times its norm is dependent: its row
    of Q and its row of R are zero. Otherwise (q.mT, r) is `torch.linalg.qr(rows.mT)` up to signs.

    Args:
        rows: J, [..., m, n], any strides.
        rtol: relative distance to the span of the rows before; None for sqrt(8 m eps), the
            smallest that float64 resolves.
        return_rank: also return the number of independent rows, [...] int64.

    Returns:
        q [..., m, n] and r [..., m, m], dtype of the rows; on request the rank.

    Raises:
        InputError: rows that are no floating-point matrix.
        NonFiniteError: a row with NaN or infinity, or a value of R that overflows the rows' dtype:
            R holds their norms.

    A GPU waits for the check that all is finite. Gradients exist where all rows are
    independent; elsewhere they are not finite.

    CholeskyQR2, Fukaya et al. 2014, with Gramian and factorization in float64; one pass where that
    leaves nothing to correct in the rows' dtype.
    """
    check_dense(rows, "rows")
    check(rows.dim() >= 2, f"rows must be [..., m, n], got {list(rows.shape)}")
    check(
        rows.dtype in DTYPES,
        f"rows must be float16, bfloat16, float32 or float64, got {rows.dtype}",
    )
    rtol = default_rtol(rows.shape[-2]) if rtol is None else rtol
    check_rtol(rtol)
    q, r, rank = torch.ops.gradsurgery.orthonormalize(rows, rtol)
    return (q, r, rank) if return_rank else (q, r)


def orthonormalize_reference(rows: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Modified Gram-Schmidt in float64, each row twice."""
    jacobian = rows.double()
    norms = jacobian.norm(dim=-1)
    scale = _factors(rows, norms)
    if scale is not None:
        return _unscaled(*orthonormalize_reference(rows * scale, rtol), scale)
    q = jacobian.new_zeros(rows.shape)
    r = jacobian.new_zeros(*rows.shape[:-1], rows.shape[-2])
    for i in range(rows.shape[-2]):
        rest = jacobian[..., i, :]
        for _ in range(2):
            products = (q[..., :i, :] @ rest[..., None]).squeeze(-1)
            rest = rest - (products[..., None, :] @ q[..., :i, :]).squeeze(-2)
            r[..., :i, i] += products
        norm = rest.norm(dim=-1)
        keep = norm > rtol * norms[..., i]
        q[..., i, :] = torch.where(keep[..., None], rest / norm[..., None], 0)
        r[..., i, i] = torch.where(keep, norm, 0)
    rank = (r.diagonal(dim1=-2, dim2=-1) > 0).sum(-1)
    r = r.to(rows.dtype)
    _check_finite(norms, r)
    return q.to(rows.dtype), r, rank


def orthonormalize_native(rows: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    q, r, rank = _fake(rows, rtol)
    m, n = rows.shape[-2:]
    factor = r.new_empty(r.shape, dtype=torch.float64)
    norms = r.new_empty(r.shape[:-1], dtype=torch.float64)
    count = rank.numel()
    matrices, q_out = rows.reshape(count, m, n), q.view(count, m, n)
    views = (matrices, q_out, factor.view(count, m, m), norms.view(count, m), rank.view(count))
    if runs_cuda(rows):
        scratch = factor.new_empty(_C.orthonormalize_scratch(rank.numel(), m))
        _C.orthonormalize_cuda(*views, scratch, rtol)
    else:
        _C.orthonormalize_cpu(*views, rtol, torch.get_num_threads())
    scale = _factors(rows, norms)
    if scale is not None:
        return _unscaled(*orthonormalize_native(rows * scale, rtol), scale)
    _check_finite(norms, r.copy_(factor))
    return q, r, rank


def _check_finite(norms: Tensor, r: Tensor) -> None:
    if not bool(norms.isfinite().all() & r.isfinite().all()):
        bad = ~norms.isfinite()
        long = not bool(bad.any())
        at = (~r.isfinite().all(-2) if long else bad).nonzero()[0].tolist()
        where = f"row {at[-1]}" + (f" of matrix {at[:-1]}" if len(at) > 1 else "")
        if long:
            wider = "float" if r.dtype == torch.float16 else "double"
            raise NonFiniteError(
                f"rows: R does not fit into {r.dtype}, which the norm of {where} overflows: "
                f"pass rows.{wider}()"
            )
        raise NonFiniteError(f"rows: {where} is not finite, or its square overflows float64")


def _factors(rows: Tensor, norms: Tensor) -> Tensor | None:
    """Powers of two for rows whose squares underflow, [..., m, 1]; None if none does."""
    flat = rows.reshape(norms.numel(), rows.shape[-1])
    found = factors([flat], norms.flatten() ** 2)
    return None if found is None else found.view(*norms.shape, 1)


def _unscaled(q: Tensor, r: Tensor, rank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From those of D J, D the factors: J = (R D⁻¹)ᵀ Q."""
    return q, r / scale.mT, rank


def _fake(rows: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    m = rows.shape[-2]
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(*rows.shape[:-1], m),
        rows.new_empty(rows.shape[:-2], dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, r, rank = output
    ctx.mark_non_differentiable(rank)
    ctx.save_for_backward(q, r)


def _backward(ctx: Any, d_q: Tensor, d_r: Tensor, _: Tensor) -> tuple:
    # A = Jᵀ = Qᵀ R: dA = (dQᵀ + Qᵀ sym(M)) R⁻ᵀ with M = R dRᵀ - dQ Qᵀ
    # and sym(M) = tril(M) + tril(M, -1)ᵀ
    q, r = ctx.saved_tensors
    m = r @ d_r.mT - d_q @ q.mT
    sym = m.tril() + m.tril(-1).mT
    rest = d_q + sym @ q
    return torch.linalg.solve_triangular(r, rest, upper=True), None


register(
    "orthonormalize",
    "(Tensor rows, float rtol) -> (Tensor, Tensor, Tensor)",
    {
        ("torch", "any"): orthonormalize_reference,
        ("native", "cpu"): orthonormalize_native,
        ("native", "cuda"): orthonormalize_native,
    },
    device_of=lambda rows, _: rows.device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
