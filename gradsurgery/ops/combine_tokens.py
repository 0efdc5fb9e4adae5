"""Weighted sum of weight gradients from the tokens each is a sum over."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, OPERATORS, choose, runs_cuda
from gradsurgery.ops._inputs import addresses, alike, of_one_shape, wide

MOST = (1 << 16) - 1  # planes in a launch


def combine_tokens(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float = 0
) -> None:
    """out = beta out + Σ_i weights_i G_i, G_i = Σ_t left_it right_itᵀ, in place.

    Args:
        left, right: [n, T, a] and [n, T, b].
        weights: [n], any dtype.
        out: [a, b] in the dtype of the tokens, float32 for 16-bit ones, one of its strides 1. It is
            not read if beta is 0.
    """
    choose("combine_tokens", IMPLEMENTATIONS, left.device.type)(left, right, weights, out, beta)


def combine_tokens_of(
    left: Sequence[Tensor], right: Sequence[Tensor], weights: Tensor, out: Sequence[Tensor]
) -> None:
    """`combine_tokens` of several planes, beta = 0; on a GPU in one launch where they are of one
    shape.

    Args:
        weights: [planes, n].
    """
    implementation = choose("combine_tokens", IMPLEMENTATIONS, left[0].device.type)
    known = all(map(of_one_shape, (left, right, out)))
    if implementation is combine_tokens_triton and known and 1 < len(left) <= MOST:
        sides = left[0], right[0]
        if sides[0].dtype == sides[1].dtype:
            from gradsurgery.kernels import combine_tokens as kernels

            kernels.combine_tokens_of(*sides, weights, out[0], addresses([left, right, out]))
            for each in out:
                torch.autograd.graph.increment_version(each)
            return
    for one, other, mine, to in zip(left, right, weights, out, strict=True):
        implementation(one, other, mine, to, 0)


def combine_tokens_reference(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float
) -> None:
    left, right = wide(left), wide(right)
    weights = weights.to(left.dtype)[:, None, None]
    if left.shape[-1] <= right.shape[-1]:
        left = left * weights
    else:
        right = right * weights
    out.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1), beta=beta)


def combine_tokens_native(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float
) -> None:
    if runs_cuda(left):  # of a test build
        combine_tokens_reference(left, right, weights, out, beta)
        return
    left, right, weights = wide(left), wide(right), weights.double().contiguous()
    _C.combine_tokens_cpu(left, right, weights, beta, out, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)  # as torch's own in-place operations do


def combine_tokens_triton(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float
) -> None:
    """float16 tokens by Triton, for weighted ones could leave their range; others by cuBLAS.

    No kernel of ours keeps up with that. Weighted tokens are rounded as the tokens were, and 16-bit
    ones go into a float32 sum.
    """
    left, right = alike(left, right)
    if left.dtype == torch.float16 or not left.is_cuda:  # or its interpreter
        from gradsurgery.kernels import combine_tokens as kernels

        kernels.combine_tokens(left, right, weights, out, beta)
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
    ("torch", "any"): combine_tokens_reference,
    ("native", "cpu"): combine_tokens_native,
    ("triton", "cuda"): combine_tokens_triton,
}
OPERATORS["combine_tokens"] = IMPLEMENTATIONS
