"""Remove from a gradient its projection on the span of rows: g⊥ = g - Jᵀ (J Jᵀ)⁺ J g."""

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import (
    Rows,
    as_blocks,
    as_vector,
    check_alike,
    check_finite,
    check_number,
    check_rtol,
    flat,
)
from gradsurgery.ops._range import LEAST, factors, times
from gradsurgery.ops.combine import combine_into
from gradsurgery.ops.gramian import gramian_of
from gradsurgery.ops.weighting import default_rtol

# the largest |cos(g_i, g⊥)| left without a warning; a 16-bit g⊥ cannot do better than its rounding
PROMISE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# float32 arithmetic, some 1e-8 off in a Gramian and 1e-7 in a sum, leaves a tenth of the promise at
# most while squared distances stay above, and the sum of the parts taken out below these
SAFE_MARGIN = 1e-4
SAFE_PARTS = 8.0


class Projection(NamedTuple):
    """What `project_out` found, as tensors on the rows' device."""

    rank: Tensor  # [] int64, of the rows
    kept_norm: Tensor  # [] float64, |g⊥| / |g| in [0, 1]; 0 for a zero gradient
    max_cosine: Tensor  # [] float64, max_i |cos(g_i, g⊥)|, measured on the result


def project_out(
    grad: Rows,
    rows: Rows,
    *,
    rtol: float | None = None,
    refine: int = 1,
    return_info: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Projection]:
    """Remove from `grad` its orthogonal projection on the span of `rows`.

    g⊥ = g - Jᵀ c, (J Jᵀ) c = J g

    The rank is revealed on the normalized rows: zero, duplicate and dependent rows add nothing.
    A gradient nearer to the span than `rtol` times its norm lies in it, and gives exact zeros.
    The cosines of the result with all rows are measured in the pass that forms it; for condition
    numbers up to 1e4 they stay within the promise below. A GPU waits for these decisions.

    Args:
        grad: g, [n], or a sequence of [*p.shape].
        rows: J, [m, n], or a sequence of [m, *p.shape].
        rtol: relative distance to the span below which a vector lies in it; None for
            sqrt(8 m eps), the smallest that float64 resolves (1e-7 to 1e-6).
        refine: how many correction passes may follow: the first if rows are near dependent, any
            if a cosine exceeds the promise: 1e-5 in float32, 1e-9 in float64, 1e-2 in 16 bits.
        return_info: also return a `Projection` (rank, kept norm, largest cosine).

    Returns:
        g⊥, like `grad`; on request with a `Projection`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        NonFiniteError: a row or the gradient holds NaN or infinity, or g⊥ overflows the dtype.

    Warns:
        RuntimeWarning: the promise was missed after all corrections; names the cosine reached.

    Go Beyond Your Means, Shamsian et al. 2025 (arXiv:2503.02312), the projection of OrthoGrad.
    """
    blocks, vector = as_blocks(rows), as_vector(grad, "grad")
    check_alike(vector, "grad", [block.shape[1:] for block in blocks], blocks[0], "rows")
    m = blocks[0].shape[0]
    rtol = default_rtol(m + 1) if rtol is None else rtol
    check_rtol(rtol)
    check_number("refine", refine, Integral)
    if refine < 0:
        raise InputError(f"refine must be 0 or more, got {refine}")
    perp, *info = call("project_out", vector, blocks, rtol, refine)
    out = perp[0] if isinstance(grad, Tensor) else perp
    return (out, Projection(*info)) if return_info else out


def project_out_reference(
    grad: Sequence[Tensor], rows: Sequence[Tensor], rtol: float, refine: int = 1
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gram-Schmidt in float64, the row farthest from the span of those taken first, twice.

    It has nothing to refine.
    """
    jacobian = torch.cat(flat(rows), dim=1).double()
    g = torch.cat([tensor.flatten() for tensor in grad]).double()
    norms = jacobian.norm(dim=1)
    check_finite(norms, rows, "rows")
    check_finite(g.norm()[None], [tensor[None] for tensor in grad], "grad")
    scaled = _scaled(grad, rows, torch.cat([norms, g.norm()[None]]) ** 2)
    if scaled is not None:
        outs, rank, kept, worst = project_out_reference(*scaled[:2], rtol, refine)
        return [out / scaled[2] for out in outs], rank, kept, worst
    unit = torch.where(norms[:, None] > 0, jacobian / norms[:, None], 0)
    rest, basis = unit.clone(), unit[:0]
    for _ in range(min(unit.shape)):
        i = int(rest.norm(dim=1).argmax())
        if rest[i].norm() <= rtol:
            break
        q = rest[i] / rest[i].norm()
        q = q - (basis @ q) @ basis
        basis = torch.cat([basis, (q / q.norm())[None]])
        rest = rest - torch.outer(rest @ basis[-1], basis[-1])
    perp = g
    for _ in range(2):
        perp = perp - (perp @ basis.mT) @ basis
    kept = torch.where(g.norm() > 0, perp.norm() / g.norm(), 0).clamp(max=1)
    perp, kept = (perp, kept) if kept > rtol else (torch.zeros_like(perp), torch.zeros_like(kept))
    perp = perp.to(grad[0].dtype)
    _check_overflow(bool(perp.isfinite().all()), perp)
    scale = perp.double().norm()
    cosines = torch.where(scale > 0, unit @ (perp.double() / scale), 0).abs()
    worst = cosines.max() if len(unit) else kept * 0
    _warn(worst.item(), grad[0].dtype)
    parts = perp.split([tensor.numel() for tensor in grad])
    out = [part.reshape(tensor.shape).clone() for part, tensor in zip(parts, grad, strict=True)]
    return out, torch.tensor(basis.shape[0], device=g.device), kept, worst


def project_out_cpu(
    grad: Sequence[Tensor], rows: Sequence[Tensor], rtol: float, refine: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The decisions of `project_out_native` in one call, for what a step of it costs Python.

    What is not finite or out of range is left to that, which scales it or says what it is.
    """
    if runs_cuda(grad[0]):
        return project_out_native(grad, rows, rtol, refine)
    outs, rank, kept, worst = _fake(grad, rows, rtol, refine)
    vectors = [[t if t.dim() == 1 else t.reshape(-1) for t in side] for side in (grad, outs)]
    limits = PROMISE[outs[0].dtype], SAFE_MARGIN, SAFE_PARTS, LEAST
    sources, figures = [flat(rows), vectors[0]], [rank, kept, worst]
    options = figures, rtol, refine, *limits, torch.get_num_threads()
    cosine = _C.project_out_cpu(sources, vectors[1], *options)
    if cosine is None:
        return project_out_native(grad, rows, rtol, refine)
    _warn(cosine, outs[0].dtype)
    return outs, rank, kept, worst


def project_out_native(
    grad: Sequence[Tensor], rows: Sequence[Tensor], rtol: float, refine: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    m, dtype = rows[0].shape[0], rows[0].dtype
    blocks, vector = flat(rows), [tensor.reshape(1, -1) for tensor in grad]
    columns = sum(tensor.numel() for tensor in grad)

    def solve(precise: bool) -> tuple[Tensor, ...]:
        gram = gramian_of([blocks, vector], precise)
        check_finite(gram.diagonal()[:m], rows, "rows")
        check_finite(gram[m:, m], [tensor[None] for tensor in grad], "grad")
        k, square = gram[:m, m], gram[m, m]
        c, rank, margin = torch.ops.gradsurgery.projection_weights(gram[:m, :m], k, rtol)
        kept = torch.where(square > 0, 1 - (c @ k) / square, 0)  # |g⊥|² / |g|²
        return gram, c, rank, torch.minimum(margin, kept)

    # float64 products cost little where the rows fit in cache
    precise = dtype == torch.float64 or columns <= 1 << 15
    gram, c, rank, margin = solve(precise)
    scaled = _scaled(grad, rows, gram.diagonal())
    if scaled is not None:
        outs, rank, kept, worst = project_out_native(*scaled[:2], rtol, refine)
        return [out / scaled[2] for out in outs], rank, kept, worst
    if not precise and margin <= SAFE_MARGIN:
        precise = True
        gram, c, rank, margin = solve(precise)
    norms, square = gram.diagonal()[:m].sqrt(), gram[m, m]
    precise_sums = precise or bool(c.abs() @ norms > SAFE_PARTS * (margin * square).sqrt())

    outs = [tensor.new_empty(tensor.shape) for tensor in grad]
    perp = [out.view(1, -1) for out in outs]
    cross, square_perp = gram.new_empty(1, m + 1), gram.new_empty(1, 1)
    # a float64 solve is some 1e-15 / margin off
    settled = bool(PROMISE[dtype] * margin >= 1e-15)
    source, kept, worst = vector, margin, margin
    for correction in range(refine + 1):
        weights = torch.cat([-c, c.new_ones(1)])[None]
        finite = combine_into([blocks, source], weights, [perp], cross, square_perp, precise_sums)
        if not outs[0].is_cpu:  # whose kernel has looked
            finite = all(bool(out.isfinite().all()) for out in outs)
        _check_overflow(finite, outs[0])
        products, left = cross[0, :m], square_perp[0, 0]
        if dtype != torch.float64 and not _float32_holds(norms**2, left, columns):
            exact = gramian_of([blocks, perp], True)
            products, left = exact[m, :m], exact[m, m]
        kept = torch.where(square > 0, left / square, 0).sqrt().clamp(max=1)
        if not kept > rtol:
            for out in outs:
                out.zero_()
            return outs, rank, torch.zeros_like(kept), torch.zeros_like(kept)
        cosines = torch.where(norms > 0, products / (norms * left.sqrt()), 0).abs()
        worst = cosines.max() if m else torch.zeros_like(kept)
        if correction == refine or (worst <= PROMISE[dtype] and (settled or correction > 0)):
            break
        if not precise:
            precise = precise_sums = True
            gram, _, rank, _ = solve(precise)
        if dtype != torch.float64:
            # the solve divides their error by the distance of near duplicates
            products = gramian_of([blocks, perp], True)[m, :m]
        c, _, _ = torch.ops.gradsurgery.projection_weights(
            gram[:m, :m], products.contiguous(), rtol
        )
        source = perp
    _warn(worst.item(), dtype)
    return outs, rank, kept, worst


def project_out_gpu(
    grad: Sequence[Tensor], rows: Sequence[Tensor], rtol: float, refine: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """As project_out_native where its first pass is all there is to do, and that asked once.

    Everything is launched as if it were; the GPU is waited for when there is nothing left to
    launch. Rows that are near dependent or out of range, and errors, start again there.
    """
    m, dtype = rows[0].shape[0], rows[0].dtype
    blocks, vector = flat(rows), [tensor.reshape(1, -1) for tensor in grad]
    columns = sum(tensor.numel() for tensor in grad)
    precise = dtype == torch.float64 or columns <= 1 << 15
    gram = gramian_of([blocks, vector], precise)
    squares, k = gram.diagonal(), gram[:m, m]
    c, rank, margin = torch.ops.gradsurgery.projection_weights(gram[:m, :m], k, rtol)
    outs = [tensor.new_empty(tensor.shape) for tensor in grad]
    cross, square_perp = gram.new_empty(1, m + 1), gram.new_empty(1, 1)
    weights = torch.cat([-c, c.new_ones(1)])[None]
    combine_into([blocks, vector], weights, [[out.view(1, -1) for out in outs]], cross, square_perp)
    square, left = squares[m], square_perp[0, 0]
    kept = (left / square).sqrt().clamp(max=1)
    sizes = squares[:m].sqrt() * left.sqrt()
    cosines = torch.where(sizes > 0, cross[0, :m] / sizes, 0).abs()
    worst = cosines.max() if m else torch.zeros_like(kept)
    # comparisons with NaN are False
    margin = torch.minimum(margin, 1 - (c @ k) / square)
    least = 1e-15 / PROMISE[dtype] if precise else max(1e-15 / PROMISE[dtype], SAFE_MARGIN)
    settled = (margin > least) & (worst <= PROMISE[dtype]) & (kept > rtol)
    if bool(settled & _in_range(torch.cat([squares, left[None]]), dtype, columns)):
        return outs, rank, kept, worst
    return project_out_native(grad, rows, rtol, refine)


def _scaled(
    grad: Sequence[Tensor], rows: Sequence[Tensor], squares: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor] | None:
    """Gradient and rows in range, and the factor of the gradient; None where they are.

    The span is that of the rows at any scale, and the projection is linear in the gradient.
    """
    vector = [tensor.reshape(1, -1) for tensor in grad]
    short, small = factors(flat(rows), squares[:-1]), factors(vector, squares[-1:])
    if short is None and small is None:
        return None
    grad_scale = squares.new_ones(()) if small is None else small[0]
    scaled = list(rows) if short is None else times(flat(rows), short)
    return [tensor * grad_scale for tensor in grad], scaled, grad_scale


def _in_range(squares: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """Whether float64 and, of other dtypes, float32 hold products of rows of these norms."""
    if dtype == torch.float64:
        return ((squares >= LEAST) & (squares < torch.inf)).all()
    return ((squares == 0) | ((squares > 1e-34 * columns) & (squares < 1e38))).all()


def _float32_holds(squares: Tensor, left: Tensor, columns: int) -> bool:
    """Whether products of rows and g⊥ of these squared norms neither under- nor overflow."""
    low, high = 1e-34 * columns, 1e38
    fits = (squares == 0) | ((squares > low) & (squares < high))
    return bool(fits.all() & (left > low) & (left < high))


def _check_overflow(finite: bool, perp: Tensor) -> None:
    # g⊥ is shorter than g, but a value of it may be larger
    if not finite:
        raise NonFiniteError(f"project_out: the result overflows {perp.dtype}; scale grad down")


def _warn(worst: float, dtype: torch.dtype) -> None:
    if worst > PROMISE[dtype]:
        warnings.warn(
            f"project_out: a cosine of {worst:.1e} with a row is left, above "
            f"{PROMISE[dtype]:.0e}: the rows are near dependent; raise rtol, refine or precision",
            RuntimeWarning,
            stacklevel=2,
        )


def _fake(
    grad: Sequence[Tensor], rows: Sequence[Tensor], rtol: float, refine: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    rank, kept, worst = (
        grad[0].new_empty(size=(), dtype=dtype)
        for dtype in (torch.int64, torch.float64, torch.float64)
    )
    return [tensor.new_empty(size=tensor.shape) for tensor in grad], rank, kept, worst


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, rows, ctx.rtol, ctx.refine = inputs
    ctx.count = len(rows)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*grad, *rows, *output[0])


def _backward(ctx: Any, d_perp: list[Tensor], *_: Tensor) -> tuple:
    # g⊥ = (I - P) g: dg = (I - P) dg⊥, dJ = -c dgᵀ - b g⊥ᵀ with c, b the coefficients of g, dg⊥
    saved, count = list(ctx.saved_tensors), ctx.count
    grad, rows, perp = saved[:count], saved[count : 2 * count], saved[2 * count :]
    d_grad = torch.ops.gradsurgery.project_out(d_perp, rows, ctx.rtol, ctx.refine)[0]
    gram = torch.ops.gradsurgery.gramian(rows, False, True)

    def coefficients(vector: Sequence[Tensor]) -> Tensor:
        products = [
            (row.flatten(1) if row.dim() > 1 else row[:, None]) @ v.flatten()
            for row, v in zip(rows, vector, strict=True)
        ]
        k = torch.stack(products).sum(0).double()
        return torch.ops.gradsurgery.projection_weights(gram, k, ctx.rtol)[0]

    c, b = coefficients(grad), coefficients(d_perp)
    d_rows = [-_outer(c, d) - _outer(b, p) for d, p in zip(d_grad, perp, strict=True)]
    return d_grad, d_rows, None, None


def _outer(weights: Tensor, vector: Tensor) -> Tensor:
    return weights.to(vector.dtype).view(-1, *[1] * vector.dim()) * vector


register(
    "project_out",
    "(Tensor[] grad, Tensor[] rows, float rtol, int refine) -> (Tensor[], Tensor, Tensor, Tensor)",
    {
        ("torch", "any"): project_out_reference,
        ("native", "cpu"): project_out_cpu,
        ("native", "cuda"): project_out_gpu,
        ("triton", "cuda"): project_out_gpu,
    },
    device_of=lambda grad, *_: grad[0].device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
