"""Gramian of weight gradients from the tokens each is a sum over."""

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, choose, runs_cuda

TILE = 128  # tokens the reference multiplies with all later ones at a time

# A register tile is 8 x 16 tokens: of fewer, the kernel multiplies what nobody asked for. Measured
# on two threads, torch and the kernel: 2 x 2 tokens of 2 x 4096 values 39 and 44 us, 4 x 4 of
# 16384 + 1024 55 and 87 us; but 6 x 6 of 8192 + 2048 56 and 54 us, 2 x 2 of 2 x 16 values 30 and
# 6 us. From 64 pairs on the kernel is faster at any width.
FEW_PAIRS = 16
MANY_VALUES = 8192


def token_pairs(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    """Inner products of G_i = sum_t left_it right_itᵀ, none of which is formed.

    K_ij = <G_i, G'_j> = sum_tu (left_it · left'_ju) (right_it · right'_ju)

    Args:
        left, right: [n, T, a] and [n, T, b], or [n, g, T, .] for g matrices, one below the other.
        other_left, other_right: the same of G', with any n' and T'. By default G itself.

    Returns:
        [n, n'] float64; symmetric where there is no other. The products over a and b are summed in
        the dtype of the arguments, float32 or float64, and K in float64.
    """
    implementation = choose("token_pairs", IMPLEMENTATIONS, left.device.type)
    return implementation(left, right, other_left, other_right)


def token_pairs_reference(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    symmetric = other_left is None or other_right is None
    if other_left is None or other_right is None:
        other_left, other_right = left, right
    n, tokens = len(left), left.shape[-2]
    out = left.new_zeros(n, len(other_left), dtype=torch.float64)
    if tokens == 0 or other_left.shape[-2] == 0:
        return out
    step = max(1, TILE // tokens)
    for lo in range(0, n, step):
        hi, start = min(lo + step, n), lo if symmetric else 0
        pairs = _tokens(left[lo:hi]) @ _tokens(other_left[start:]).mT
        pairs *= _tokens(right[lo:hi]) @ _tokens(other_right[start:]).mT
        if pairs.dim() == 3:
            pairs = pairs.sum(0)
        blocks = pairs.view(hi - lo, tokens, len(other_left) - start, other_left.shape[-2])
        out[lo:hi, start:] = blocks.sum(3).sum(1, dtype=torch.float64)
    return out.triu() + out.triu(1).mT if symmetric else out


def _tokens(side: Tensor) -> Tensor:
    """[n, T, .] -> [n T, .]; [n, g, T, .] -> [g, n T, .]."""
    return side.flatten(0, 1) if side.dim() == 3 else side.transpose(0, 1).flatten(1, 2)


def token_pairs_native(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    if runs_cuda(left):  # of a test build
        return token_pairs_reference(left, right, other_left, other_right)
    other = None if other_left is None or other_right is None else (other_left, other_right)
    second = left if other is None else other[0]
    pairs = left.shape[0] * left.shape[-2] * second.shape[0] * second.shape[-2]
    if pairs <= FEW_PAIRS and left.shape[-1] + right.shape[-1] >= MANY_VALUES:
        return token_pairs_reference(left, right, other_left, other_right)
    out = left.new_zeros(len(left), len(second), dtype=torch.float64)
    threads = torch.get_num_threads()
    if left.dim() == 3:
        _C.token_pairs_cpu(left, right, other_left, other_right, out, threads)
        return out
    for g in range(left.shape[1]):
        part = (None, None) if other is None else (other[0][:, g], other[1][:, g])
        _C.token_pairs_cpu(left[:, g], right[:, g], *part, out, threads)
    return out


IMPLEMENTATIONS = {
    ("torch", "any"): token_pairs_reference,
    ("native", "cpu"): token_pairs_native,
}
