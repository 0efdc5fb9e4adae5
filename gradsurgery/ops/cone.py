"""Projection on the convex cone of rows: min ½ xᵀ K x - bᵀ x, x ≥ 0, on a Gramian K."""

from typing import Any

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, backend_of, call, plain, register, runs_cuda
from gradsurgery.ops._inputs import (
    as_gramian,
    check_beside,
    check_dense,
    check_gramian_finite,
    check_number,
    check_rtol,
)
from gradsurgery.ops.weighting import default_rtol, scratch_for


def cone_weights(
    gramian: Tensor, products: Tensor, *, rtol: float | None = None, noise: float | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients x ≥ 0 of the orthogonal projection of vectors on the cone of rows.

    x minimizes |Jᵀ x - v|, K = J Jᵀ, b = J v: non-negative least squares, solved to rounding by
    block principal pivoting and, where that does not settle, by Lawson and Hanson's active sets.

    Rows are made unit first, so that no scale of a row matters. A zero row gets coefficient zero,
    and so does a row nearer to the span of those in use than `rtol` times its norm.

    Args:
        gramian: K, [..., m, m].
        products: b, [..., p, m]: p vectors share a Gramian.
        rtol: relative distance; None for the smallest that the Gramian's dtype resolves,
            sqrt(8 m eps).
        noise: rounding of the Gramian of unit rows, below which a condition counts as met; None
            for 8 m eps of its dtype.

    Returns:
        coefficients [..., p, m] float64, and the residual [..., p] float64: by how much the
        conditions x ≥ 0, K x ≥ b, xᵀ (K x - b) = 0 are missed, for unit rows and max b_i = 1.
        It is of rounding's size unless no minimum exists.

    Raises:
        InputError: shapes that do not fit.
        NonFiniteError: a Gramian with NaN or infinity (CPU).

    Fast Nonnegative Least Squares, Kim and Park 2011 (doi:10.1137/110821172).
    """
    gram = as_gramian(gramian)
    check_dense(products, "products")
    if not products.is_floating_point():
        raise InputError(f"products must be floating point, got {products.dtype}")
    (*batch, m, _), shape = gram.shape, list(products.shape)
    if len(shape) < 2 or shape != [*batch, shape[-2], m]:
        raise InputError(f"products must be {[*batch, 'p', m]} to match gramian, got {shape}")
    check_beside(products, "products", gram)
    least = default_rtol(m, gramian.dtype)
    rtol = least if rtol is None else rtol
    noise = least**2 if noise is None else noise
    check_rtol(rtol)
    check_number("noise", noise)
    return call("cone_weights", gram, products.double(), rtol, noise)


def cone_weights_reference(
    gramian: Tensor, products: Tensor, rtol: float, noise: float
) -> tuple[Tensor, Tensor]:
    """Lawson and Hanson's way, a vector at a time; waits for the device."""
    check_gramian_finite(gramian)
    m = gramian.shape[-1]
    coefficients, residual = _fake(gramian, products, rtol, noise)
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    unit = gramian * scale[..., :, None] * scale[..., None, :]
    targets = products * scale[..., None, :]
    if m == 0:
        return coefficients, residual.zero_()
    sizes = targets.amax(-1, keepdim=True).clamp_min(0)
    targets = torch.where(sizes > 0, targets / sizes, 0)
    flat_x, flat_residual = coefficients.view(-1, m), residual.view(-1)
    matrices = unit.unsqueeze(-3).expand(*targets.shape[:-1], m, m).reshape(-1, m, m)
    for k, (matrix, target) in enumerate(zip(matrices, targets.reshape(-1, m), strict=True)):
        x, gradient = _active_set(matrix, target, rtol, noise)
        flat_x[k] = x
        missed = torch.where(x > 0, gradient.abs(), gradient.clamp_min(0))
        flat_residual[k] = missed.max()
    return coefficients * scale[..., None, :] * sizes, residual


def _active_set(matrix: Tensor, target: Tensor, rtol: float, noise: float) -> tuple[Tensor, Tensor]:
    m = len(target)
    x, gradient = torch.zeros_like(target), target.clone()
    inside: list[int] = []
    banned = {i for i in range(m) if matrix[i, i] == 0}
    for _ in range(10 * m):
        tolerance = noise * (1 + float(x.sum()))
        free = [i for i in range(m) if i not in inside and i not in banned]
        j = max(free, key=gradient.tolist().__getitem__, default=-1)
        if j < 0 or gradient[j] <= tolerance:
            break
        cross = matrix[inside, j]
        along = torch.linalg.solve(matrix[inside][:, inside], cross)
        if 1 - cross @ along > rtol**2:
            both = [*inside, j]
            z = torch.linalg.solve(matrix[both][:, both], target[both])
            if z[-1] <= 0:  # by rounding
                banned.add(j)
                continue
            inside = both
        else:  # j depends on the others: it takes the place of the first one in its way
            stops = [i for i, share in zip(inside, along.tolist(), strict=True) if share > 1e-12]
            if not stops:
                break  # no minimum
            shares = dict(zip(inside, along.tolist(), strict=True))
            out = min(stops, key=lambda i: float(x[i]) / shares[i])
            length = float(x[out]) / shares[out]
            x[inside] = (x[inside] - length * along).clamp_min(0)
            x[out], x[j] = 0, length
            inside = [i for i in [*inside, j] if x[i] > 0]
            z = torch.linalg.solve(matrix[inside][:, inside], target[inside])
        while bool((z <= 0).any()):
            low = (z <= 0).nonzero().flatten()
            before = x[inside]
            share = (before[low] / (before[low] - z[low]).clamp_min(1e-300)).min()
            moved = before + share * (z - before)
            moved[low] = torch.where(moved[low] <= 1e-15 * before[low], 0, moved[low])
            x[inside] = moved
            inside = [i for i, at in zip(inside, moved.tolist(), strict=True) if at > 0]
            z = torch.linalg.solve(matrix[inside][:, inside], target[inside])
        x = torch.zeros_like(target)
        x[inside] = z
        gradient = target - matrix @ x
        banned = {i for i in banned if matrix[i, i] == 0}
    return x, gradient


def cone_weights_native(
    gramian: Tensor, products: Tensor, rtol: float, noise: float
) -> tuple[Tensor, Tensor]:
    gramian = gramian.contiguous()
    check_gramian_finite(gramian)
    x, residual = _fake(gramian, products, rtol, noise)
    args = (gramian, products.contiguous(), x, residual)
    if runs_cuda(gramian):
        _C.cone_weights_cuda(*args, scratch_for("cone", residual.numel(), gramian), rtol, noise)
    else:
        _C.cone_weights_cpu(*args, rtol, noise, torch.get_num_threads())
    return x, residual


def dual_projection_weights(
    gramian: Tensor, given: Tensor | None, rtol: float, noise: float
) -> Tensor:
    """given + x: givenᵀ J projected on the dual cone { v : J v ≥ 0 }, as weights [..., m].

    Args:
        gramian: [..., m, m] float64.
        given: [m] float64; None for the mean of the rows.

    Raises:
        NonFiniteError: a Gramian with NaN or infinity (CPU).
    """
    seen = [gramian] if given is None else [gramian, given]
    if backend_of("cone_weights", gramian.device.type) == "native" and plain(seen):
        # one call, on the thread that it came from: the rest of a rule takes longer than to solve
        weights = gramian.new_empty(size=gramian.shape[:-1])
        args = (gramian.contiguous(), given, weights, rtol, noise)
        if not _C.dual_projection_weights_cpu(*args, torch.get_num_threads()):
            check_gramian_finite(gramian)
        return weights
    if given is None:
        given = gramian.new_full(gramian.shape[-1:], 1 / max(gramian.shape[-1], 1))
    x, _ = call("cone_weights", gramian, -(given @ gramian).unsqueeze(-2), rtol, noise)
    return given + x.squeeze(-2)


def _fake(gramian: Tensor, products: Tensor, rtol: float, noise: float) -> tuple[Tensor, Tensor]:
    return products.new_empty(size=products.shape), products.new_empty(size=products.shape[:-1])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    # on the rows in use K x = b: db = K⁻¹ dx, dK = -db xᵀ
    gramian, x = ctx.saved_tensors
    used = x > 0
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    unit = (gramian * scale[..., :, None] * scale[..., None, :]).unsqueeze(-3)
    both = used[..., :, None] & used[..., None, :]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    matrix = torch.where(both, unit, eye)
    right = torch.where(used, grad * scale[..., None, :], 0)
    solved = torch.linalg.solve(matrix, right.unsqueeze(-1)).squeeze(-1) * scale[..., None, :]
    return -(solved.mT @ x), solved, None, None


register(
    "cone_weights",
    "(Tensor gramian, Tensor products, float rtol, float noise) -> (Tensor, Tensor)",
    {
        ("torch", "any"): cone_weights_reference,
        ("native", "cpu"): cone_weights_native,
        ("native", "cuda"): cone_weights_native,
        ("triton", "cuda"): cone_weights_reference,
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
