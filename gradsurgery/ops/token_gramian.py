"""Gramian of weight gradients from the tokens each is a sum over."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, OPERATORS, choose, runs_cuda
from gradsurgery.ops._inputs import addresses, alike, of_one_shape, wide

TILE = 128  # tokens the reference multiplies with all later ones at a time

# A register tile is 8 x 16 tokens: of fewer, the kernel multiplies what nobody asked for. Measured
# on two threads, torch and the kernel: 2 x 2 tokens of 2 x 4096 values 39 and 44 us, 4 x 4 of
# 16384 + 1024 55 and 87 us; but 6 x 6 of 8192 + 2048 56 and 54 us, 2 x 2 of 2 x 16 values 30 and
# 6 us. From 64 pairs on the kernel is faster at any width.
FEW_PAIRS = 16
MANY_VALUES = 8192

MOST = (1 << 16) - 1  # planes in a launch

# float32 squares of values below 2^-63 lose digits. Beside 2^30 on a token's other side that may be
# much of a row whose squared norm is 2^-60; the kernels have the same bounds.
LOST, LARGE = 2.0**-116, 2.0**30


def token_gramian(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    """Inner products of G_i = sum_t left_it right_itᵀ, none of which is formed.

    K_ij = ⟨G_i, G'_j⟩ = sum_tu (left_it · left'_ju) (right_it · right'_ju)

    Args:
        left, right: [n, T, a] and [n, T, b], or [n, g, T, .] for g matrices, one below the other.
            Or left [n, T] int64, the row of G_i that token right_it is added to; -1 for none.
        other_left, other_right: the same of G', with any n' and T'. By default G itself.

    Returns:
        [n, n'] float64; symmetric where there is no other. The products over a and b are summed in
        the dtype of the arguments, of 16-bit ones in float32, and K in float64. Where there is no
        other, K_ii is NaN if a token of G_i has a left side of products below float32's range and a
        right side of large ones, or the reverse: it is lost, while it may be large.
    """
    implementation = choose("token_gramian", IMPLEMENTATIONS, right.device.type)
    return implementation(left, right, other_left, other_right)


def token_gramians(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """`token_gramian` of several planes, [planes, n, n]; on a GPU in one launch where they are of
    one shape.
    """
    implementation = choose("token_gramian", IMPLEMENTATIONS, right[0].device.type)
    if implementation is token_gramian_triton and of_one_shape(left) and of_one_shape(right):
        sides = left[0], right[0]
        if len(left) > 1 and len(left) <= MOST and sides[0].dtype == sides[1].dtype:
            from gradsurgery.kernels import token_gramian as kernels

            return kernels.token_gramians(*sides, addresses([left, right]))
    if len(left) == 1:
        return implementation(left[0], right[0])[None]
    return torch.stack([implementation(*sides) for sides in zip(left, right, strict=True)])


def token_gramian_reference(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    symmetric = other_left is None or other_right is None
    left, right = wide(left), wide(right)
    if other_left is None or other_right is None:
        other_left, other_right = left, right
    other_left, other_right = wide(other_left), wide(other_right)
    n, tokens, k, others = len(right), right.shape[-2], len(other_right), other_right.shape[-2]
    out = right.new_zeros(n, k, dtype=torch.float64)
    if tokens == 0 or others == 0:
        return out
    step = max(1, TILE // tokens)
    for lo in range(0, n, step):
        hi, start = min(lo + step, n), lo if symmetric else 0
        pairs = _tokens(right[lo:hi]) @ _tokens(other_right[start:]).mT
        products = _products(left[lo:hi], other_left[start:])
        lost = _lost(pairs, products) if symmetric else None
        pairs *= products
        if lost is not None:
            pairs.diagonal(dim1=-2, dim2=-1).masked_fill_(lost, torch.nan)
        if pairs.dim() == 3:
            pairs = pairs.sum(0)
        blocks = pairs.view(hi - lo, tokens, k - start, others)
        out[lo:hi, start:] = blocks.sum(3).sum(1, dtype=torch.float64)
    return out.triu() + out.triu(1).mT if symmetric else out


def _products(left: Tensor, other: Tensor) -> Tensor:
    """Of all tokens of the left sides; of two rows, whether they are the same."""
    if left.is_floating_point():
        return _tokens(left) @ _tokens(other).mT
    ids = left.flatten()[:, None]
    return (ids == other.flatten()) & (ids >= 0)


def _lost(pairs: Tensor, products: Tensor) -> Tensor | None:
    """Which tokens' products with themselves are lost on one side and large on the other."""
    if pairs.dtype == torch.float64 or not products.is_floating_point():
        return None
    one, other = (side.diagonal(dim1=-2, dim2=-1) for side in (pairs, products))
    return (torch.minimum(one, other) < LOST) & (torch.maximum(one, other) > LARGE)


def _tokens(side: Tensor) -> Tensor:
    """[n, T, .] -> [n T, .]; [n, g, T, .] -> [g, n T, .]."""
    return side.flatten(0, 1) if side.dim() == 3 else side.transpose(0, 1).flatten(1, 2)


def token_gramian_native(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    if runs_cuda(right) or not left.is_floating_point():  # a test build; and no user on a CPU
        return token_gramian_reference(left, right, other_left, other_right)
    left, right = wide(left), wide(right)
    other = None
    if other_left is not None and other_right is not None:
        other = wide(other_left), wide(other_right)
    second = left if other is None else other[0]
    pairs = left.shape[0] * left.shape[-2] * second.shape[0] * second.shape[-2]
    if pairs <= FEW_PAIRS and left.shape[-1] + right.shape[-1] >= MANY_VALUES:
        return token_gramian_reference(left, right, other_left, other_right)
    out = left.new_zeros(len(left), len(second), dtype=torch.float64)
    threads = torch.get_num_threads()
    if left.dim() == 3:
        _C.token_gramian_cpu(left, right, *(other or (None, None)), out, threads)
        return out
    for g in range(left.shape[1]):
        part = (None, None) if other is None else (other[0][:, g], other[1][:, g])
        _C.token_gramian_cpu(left[:, g], right[:, g], *part, out, threads)
    return out


def token_gramian_triton(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    from gradsurgery.kernels import token_gramian as kernels

    sides = [left, right]
    if other_left is not None and other_right is not None:
        sides += [other_left, other_right]
    if left.is_floating_point():
        sides = alike(*sides)
    else:  # left sides are numbers of rows
        sides[1::2] = alike(*sides[1::2])
    return kernels.token_gramian(*sides)


IMPLEMENTATIONS = {
    ("torch", "any"): token_gramian_reference,
    ("native", "cpu"): token_gramian_native,
    ("triton", "cuda"): token_gramian_triton,
}
OPERATORS["token_gramian"] = IMPLEMENTATIONS
