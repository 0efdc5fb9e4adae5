"""Weighted sum of weight gradients from the tokens each is a sum over."""

import torch
from torch import Tensor

from gradsurgery.kernels.shared import alike
from gradsurgery.ops._backend import _C, OPERATORS, choose, runs_cuda
from gradsurgery.ops._inputs import wide


def plane_sum(left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float = 0) -> None:
    """out = beta out + Σ_i weights_i G_i, G_i = Σ_t left_it right_itᵀ, in place.

    Args:
        left, right: [n, T, a] and [n, T, b].
        weights: [n], any dtype.
        out: [a, b] in the dtype of the tokens, float32 for 16-bit ones, one of its strides 1. It is
            not read if beta is 0.
    """
    choose("plane_sum", IMPLEMENTATIONS, left.device.type)(left, right, weights, out, beta)


def plane_sum_reference(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float
) -> None:
    left, right = wide(left), wide(right)
    weights = weights.to(left.dtype)[:, None, None]
    if left.shape[-1] <= right.shape[-1]:
        left = left * weights
    else:
        right = right * weights
    out.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1), beta=beta)


def plane_sum_native(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float
) -> None:
    if runs_cuda(left):  # of a test build
        plane_sum_reference(left, right, weights, out, beta)
        return
    left, right, weights = wide(left), wide(right), weights.double().contiguous()
    _C.plane_sum_cpu(left, right, weights, beta, out, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)  # as torch's own in-place operations do


def plane_sum_cuda(left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float) -> None:
    """By cuBLAS, which no kernel of ours keeps up with; 16-bit tokens into a float32 sum.

    Weighted tokens are rounded as the tokens were. float16 ones could leave their range, and go
    through Triton.
    """
    left, right = alike(left, right)
    if left.dtype == torch.float16 or not left.is_cuda:  # or its interpreter
        from gradsurgery.kernels import plane_sum as kernels

        kernels.plane_sum(left, right, weights, out, beta)
    else:
        each = weights.to(wide(left[:0]).dtype)[:, None, None]
        if left.shape[-1] <= right.shape[-1]:
            left = torch.mul(left, each, out=torch.empty_like(left))
        else:
            right = torch.mul(right, each, out=torch.empty_like(right))
        x, y = left.flatten(0, 1), right.flatten(0, 1)
        to = out
        if out.stride(-1) != 1:
            x, y, to = y, x, out.mT
        if x.dtype == to.dtype:
            to.addmm_(x.mT, y, beta=beta)
        elif beta == 0:
            torch.mm(x.mT, y, out_dtype=to.dtype, out=to)
        else:
            torch.addmm(to, x.mT, y, out_dtype=to.dtype, beta=beta, out=to)
    torch.autograd.graph.increment_version(out)


IMPLEMENTATIONS = {
    ("torch", "any"): plane_sum_reference,
    ("native", "cpu"): plane_sum_native,
    ("triton", "cuda"): plane_sum_cuda,
}
OPERATORS["plane_sum"] = IMPLEMENTATIONS
