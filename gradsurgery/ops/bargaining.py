"""The w > 0 with K w = w^-p on a Gramian K: Nash-MTL's bargaining solution and FairGrad's."""

from typing import Any

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, call, register, runs_cuda
from gradsurgery.ops._inputs import (
    as_gramian,
    check,
    check_gramian_finite,
    check_rtol,
    is_number,
    shown,
)
from gradsurgery.ops.cone import cone_weights_reference
from gradsurgery.ops.weighting import default_rtol, scratch_for


def bargaining_weights(gramian: Tensor, power: float = 1.0, *, rtol: float | None = None) -> Tensor:
    """The one w > 0 with K w = w^-power, elementwise.

    It minimizes ½ wᵀ K w + Σ w_i^(1 - power) / (power - 1), with -log w_i for power 1, which is
    convex: Newton's method with a line search, to rounding, at any scale of the rows.

    Zero rows get weight zero, as players with nothing at stake. If a positive combination of rows
    vanishes, 0 being nearer than rtol / sqrt(m) to the hull of the unit rows, there is no such w
    that the Gramian could tell, and all weights are zero; so they are where Newton's equations are
    singular to rounding, as of parallel rows beside ones a million times larger, for powers above
    3.

    Args:
        gramian: K, [..., m, m].
        power: above 0.
        rtol: None for the smallest that the Gramian's dtype resolves, sqrt(8 m eps).

    Returns:
        [..., m] float64.

    Raises:
        InputError: shapes that do not fit, a power that is not above 0.
        NonFiniteError: a Gramian with NaN or infinity (CPU).
    """
    check(is_number(power) and power > 0, f"power must be above 0, got {shown(power)}")
    gram = as_gramian(gramian)
    rtol = default_rtol(gram.shape[-1], gramian.dtype) if rtol is None else rtol
    check_rtol(rtol)
    return call("bargaining_weights", gram, power, rtol)


def bargaining_weights_reference(gramian: Tensor, power: float, rtol: float) -> Tensor:
    """All Gramians at once; waits for the device."""
    check_gramian_finite(gramian)
    square = gramian.diagonal(dim1=-2, dim2=-1)
    counts = square > 0
    scale = torch.where(counts, square.clamp_min(0) ** (-1 / (1 + power)), 0)
    size = torch.where(counts, square * scale**2, 0)
    matrix = gramian * scale[..., :, None] * scale[..., None, :]

    def value(y: Tensor) -> Tensor:
        barrier = -y.log() if power == 1 else y ** (1 - power) / (power - 1)
        return (y * (matrix @ y[..., None]).squeeze(-1)).sum(-1) / 2 + (size * barrier).sum(-1)

    y = torch.ones_like(square)
    shape = square.shape[:-1]
    solved = torch.zeros(shape, dtype=torch.bool, device=gramian.device)
    stopped, last = _vanishes(gramian, rtol), torch.zeros(shape, dtype=y.dtype, device=y.device)
    for _ in range(500 if y.numel() else 0):
        pull = size * y**-power
        product = (matrix @ y[..., None]).squeeze(-1)
        curvature = torch.where(counts, power * pull / y, 1)  # zero rows stay where they are
        hessian = matrix + torch.diag_embed(curvature)
        root = hessian.diagonal(dim1=-2, dim2=-1).rsqrt()
        unit = hessian * root[..., :, None] * root[..., None, :]
        gradient = product - pull
        step = -torch.linalg.solve_ex(unit, (gradient * root)[..., None])[0].squeeze(-1) * root
        change = (step.abs() / y).amax(-1)
        stopped = stopped | ~change.isfinite()
        length = (0.9 / (-step / y).amax(-1).clamp_min(0.9)).clamp_max(1)
        before, decrease = value(y), -(step * gradient).sum(-1)
        rounding = 1e-14 * (before.abs() + (y * product).sum(-1))
        for _ in range(40):
            after = value(y + length[..., None] * step)
            worse = after > before - 1e-4 * length * decrease + rounding
            worse = worse & (change > 1e-3)
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        moves = ~(solved | stopped)
        y = torch.where(moves[..., None], y + length[..., None] * step, y)
        near = (change <= 1e-9) | ((change <= 1e-3) & (change > last / 4))
        solved, last = solved | (moves & near), change
        if bool((solved | stopped).all()):
            break
    return torch.where(solved[..., None], scale * y, 0)


def _vanishes(gramian: Tensor, rtol: float) -> Tensor:
    """Whether 0 is in the hull of the unit rows, by a cone of one dimension more."""
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    counts = norms > 0
    scale = torch.where(counts, 1 / norms, 0)
    both = counts[..., :, None] & counts[..., None, :]
    raised = torch.where(both, gramian * scale[..., :, None] * scale[..., None, :] + 1, 0)
    ones = torch.ones_like(norms).unsqueeze(-2)
    x, _ = cone_weights_reference(raised, ones, rtol, rtol**2)
    return (1 / x.sum((-2, -1)) - 1) * gramian.shape[-1] <= rtol**2


def bargaining_weights_native(gramian: Tensor, power: float, rtol: float) -> Tensor:
    gramian = gramian.contiguous()
    check_gramian_finite(gramian)
    weights = _fake(gramian, power, rtol)
    if runs_cuda(gramian):
        scratch = scratch_for("bargaining", gramian.shape[:-2].numel(), gramian)
        _C.bargaining_weights_cuda(gramian, weights, scratch, power, rtol)
    else:
        _C.bargaining_weights_cpu(gramian, weights, power, rtol, torch.get_num_threads())
    return weights


def _fake(gramian: Tensor, power: float, rtol: float) -> Tensor:
    return gramian.new_empty(size=gramian.shape[:-1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gramian, ctx.power, _ = inputs
    ctx.save_for_backward(gramian, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    # (K + diag(p w^(-p - 1))) dw = -dK w
    gramian, weights = ctx.saved_tensors
    counts = weights > 0
    safe = torch.where(counts, weights, 1)
    matrix = torch.where(counts[..., :, None] & counts[..., None, :], gramian, 0)
    matrix = matrix + torch.diag_embed(torch.where(counts, ctx.power * safe ** (-ctx.power - 1), 1))
    root = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    unit = matrix * root[..., :, None] * root[..., None, :]
    right = torch.where(counts, grad, 0) * root
    solved = torch.linalg.solve(unit, right[..., None]).squeeze(-1) * root
    return -solved[..., :, None] * weights[..., None, :], None, None


register(
    "bargaining_weights",
    "(Tensor gramian, float power, float rtol) -> Tensor",
    {
        ("torch", "any"): bargaining_weights_reference,
        ("native", "cpu"): bargaining_weights_native,
        ("native", "cuda"): bargaining_weights_native,
        ("triton", "cuda"): bargaining_weights_reference,
    },
    device_of=lambda gramian, *_: gramian.device,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
