"""Weighted sum of weight gradients: out = beta out + Σ_i w_i Σ_t left_it right_itᵀ.

One matrix product over all tokens; the weights are applied to the left tokens on their way from
memory to the tensor cores, rounded to the tokens' dtype as the tokens themselves were. float16
tokens, whose range weights would leave, become float32, by three products of tf32: one alone cuts
bits off where float16 rounds. A GPU's own library is faster for all others (`ops.combine_tokens`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import (
    KINDS,
    Tile,
    cdiv,
    large,
    multiply,
    narrow,
    on,
    one_of,
    options,
    precision,
    small,
)


@triton.jit
def combine_tokens_kernel(
    left,  # [n, T, a], or where KIND a table of the addresses of such
    right,  # [n, T, b]
    weights,  # [n] float64, of each plane
    out,  # [a, b]
    strides,  # (block, token) of left and of right, (row, column) of out, (plane, block) of weights
    count,  # n T
    tokens,  # T
    height,  # a
    width,  # b
    beta,  # [] float64
    KIND: tl.constexpr,  # of the tokens of several planes; None of one
    OUT: tl.constexpr,  # and of `out`
    ADD: tl.constexpr,  # out is read
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    i, j = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, 8)
    row = i.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = j.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if KIND is not None:
        plane = tl.program_id(1)
        left, right = one_of(left, plane, KIND), one_of(right, plane, KIND)
        out = one_of(out, plane, OUT)
    weights += tl.program_id(1) * strides[3][0]
    sums = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    to = out + row[:, None] * strides[2][0] + column[None, :] * strides[2][1]
    mask = (row < height)[:, None] & (column < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), sums)
    for k in range(0, count, DEPTH):
        at = k + tl.arange(0, DEPTH)
        block, token = (at // tokens).to(tl.int64), (at % tokens).to(tl.int64)
        inside = at < count
        x = tl.load(
            left + (block * strides[0][0] + token * strides[0][1])[None, :] + row[:, None],
            mask=inside[None, :] & (row < height)[:, None],
            other=0,
        )
        y = tl.load(
            right + (block * strides[1][0] + token * strides[1][1])[:, None] + column[None, :],
            mask=inside[:, None] & (column < width)[None, :],
            other=0,
        )
        weight = tl.load(weights + block * strides[3][1], mask=inside, other=0).to(sums)
        if x.dtype == tl.float16:
            x, y = x.to(tl.float32) * weight[None, :], y.to(tl.float32)
        else:
            x = narrow(x.to(sums) * weight[None, :], x.dtype)
        total = multiply(x, y, total, PRECISION)
    if ADD:
        total += tl.load(beta).to(sums) * tl.load(to, mask=mask, other=0).to(sums)
    tl.store(to, narrow(total, out.dtype.element_ty), mask=mask)


def combine_tokens(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, beta: float | Tensor
) -> None:
    """As `gradsurgery.ops.combine_tokens.combine_tokens`."""
    left, right = (s if s.stride(-1) == 1 else s.contiguous() for s in (left, right))
    weights = weights.double()
    add = isinstance(beta, Tensor) or beta != 0
    beta = beta.double() if isinstance(beta, Tensor) else weights.new_full((), beta)
    _launched(left, right, weights[None], out, beta, add, None)


def combine_tokens_of(
    left: Tensor, right: Tensor, weights: Tensor, out: Tensor, addresses: Tensor
) -> None:
    """The same of several planes, in one launch, in memory that holds nothing yet.

    Args:
        left, right, out: of one plane, whose last strides are 1.
        weights: [planes, n].
        addresses: [3, planes] int64, of those of each, laid out as these; multiples of 16.
    """
    weights = weights.double()
    _launched(left, right, weights, out, weights[0], False, addresses)


def _launched(
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    out: Tensor,
    beta: Tensor,
    add: bool,
    addresses: Tensor | None,
) -> None:
    (n, tokens, height), width = left.shape, right.shape[-1]
    if out.numel() == 0:
        return
    computed = torch.float32 if left.dtype == torch.float16 else left.dtype
    planes = len(weights)
    tile = tile_of(height, width, computed, add, planes)
    many = addresses is not None
    with on(left):
        combine_tokens_kernel[(cdiv(height, tile.rows) * cdiv(width, tile.columns), planes)](
            *((left, right) if addresses is None else addresses[:2]),
            weights,
            out if addresses is None else addresses[2],
            (left.stride()[:2], right.stride()[:2], out.stride(), weights.stride()),
            n * tokens,
            max(tokens, 1),
            height,
            width,
            beta,
            KINDS[left.dtype] if many else None,
            KINDS[out.dtype] if many else None,
            add,
            tile.rows,
            tile.columns,
            tile.depth,
            precision(left.dtype) if computed == left.dtype else "tf32x3",
            **options(tile.warps, tile.stages),
        )


def tile_of(height: int, width: int, dtype: torch.dtype, add: bool, planes: int = 1) -> Tile:
    tile = large(dtype)
    if planes * cdiv(height, tile.rows) * cdiv(width, tile.columns) < 64:
        return small(dtype)
    return tile._replace(columns=min(tile.columns, 64)) if add else tile  # registers
