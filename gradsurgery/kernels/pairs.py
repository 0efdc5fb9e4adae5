"""Gramian of weight gradients from their tokens: <G_i, G_j> = sum_tu (l_t · l_u) (r_t · r_u).

A program multiplies a tile of tokens with a tile of tokens on both sides of the plane, in
registers, and sums the products by sample; the tokens-by-tokens matrices are never written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.shared import alike
from gradsurgery.kernels.tiles import (
    Tile,
    cdiv,
    large,
    largest_of,
    on,
    options,
    power_of_two,
    precision,
    products,
    small,
)

LOST, LARGE = tl.constexpr(2.0**-116), tl.constexpr(2.0**30)  # of ops/pairs.py


@triton.jit
def pairs_kernel(
    sides,  # (left, right, other_left, other_right); left holds ids where IDS
    strides,  # of each side: (block, matrix, token)
    counts,  # (blocks, tokens, other blocks, other tokens)
    widths,  # (a, b)
    parts,  # [g, row tiles, column tiles, ROWS, OTHER_ROWS] float64, zeros
    SYMMETRIC: tl.constexpr,  # other is self: only tiles not above the diagonal
    IDS: tl.constexpr,  # left tokens are indices: one-hot
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    OTHER_ROWS: tl.constexpr,
    OTHER_TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M: tl.constexpr = ROWS * TOKENS
    N: tl.constexpr = OTHER_ROWS * OTHER_TOKENS
    across = tl.cdiv(counts[1], TOKENS)
    other_across = tl.cdiv(counts[3], OTHER_TOKENS)
    tiles = tl.cdiv(counts[0], ROWS) * across
    other_tiles = tl.cdiv(counts[2], OTHER_ROWS) * other_across
    # neighbors share operands in the cache: squares of 8 tiles one after another
    i, j = tl.swizzle2d(
        tl.program_id(0) // other_tiles, tl.program_id(0) % other_tiles, tiles, other_tiles, 8
    )
    if SYMMETRIC and j > i:
        return
    g = tl.program_id(1).to(tl.int64)
    lane, other_lane = tl.arange(0, M), tl.arange(0, N)
    block = (i // across).to(tl.int64) * ROWS + lane // TOKENS
    token = (i % across).to(tl.int64) * TOKENS + lane % TOKENS
    other = (j // other_across).to(tl.int64) * OTHER_ROWS + other_lane // OTHER_TOKENS
    other_token = (j % other_across).to(tl.int64) * OTHER_TOKENS + other_lane % OTHER_TOKENS
    inside = ((block < counts[0]) & (token < counts[1]))[:, None]
    other_inside = ((other < counts[2]) & (other_token < counts[3]))[None, :]

    x = sides[0] + block * strides[0][0] + g * strides[0][1] + token * strides[0][2]
    y = sides[2] + other * strides[2][0] + g * strides[2][1] + other_token * strides[2][2]
    if IDS:
        ids = tl.load(x[:, None], mask=inside, other=-1)
        first = (ids == tl.load(y[None, :], mask=other_inside, other=-1)) & (ids >= 0)
        if tl.max(first.to(tl.int32)) == 0:  # most tiles of a large vocabulary
            return
    else:
        first = products(x[:, None], y[None, :], inside, other_inside, widths[0], DEPTH, PRECISION)
    x = sides[1] + block * strides[1][0] + g * strides[1][1] + token * strides[1][2]
    y = sides[3] + other * strides[3][0] + g * strides[3][1] + other_token * strides[3][2]
    second = products(x[:, None], y[None, :], inside, other_inside, widths[1], DEPTH, PRECISION)
    # rows divided by their largest value: products stay in float32's range, but for those of
    # gradients whose norms are 1e19 times apart, which may vanish
    scale = tl.full((M,), 1, tl.float64)
    if IDS:
        pairs = tl.where(first, second, 0.0)
    else:
        first_size, second_size = power_of_two(largest_of(first)), power_of_two(largest_of(second))
        pairs = (first / first_size[:, None]) * (second / second_size[:, None])
        scale = first_size.to(tl.float64) * second_size.to(tl.float64)
        if SYMMETRIC and first.dtype == tl.float32:
            # a token that is lost on one side and large on the other
            lost = (tl.minimum(first, second) < LOST) & (tl.maximum(first, second) > LARGE)
            own = (lane[:, None] == other_lane[None, :]) & (i == j)
            pairs = tl.where(own & lost, float("nan"), pairs)
    sums = tl.sum(tl.reshape(pairs, (ROWS, TOKENS, OTHER_ROWS, OTHER_TOKENS)), axis=3)
    sums = sums.to(tl.float64) * tl.reshape(scale, (ROWS, TOKENS))[:, :, None]
    total = tl.sum(sums, axis=1)
    if SYMMETRIC and i == j:
        total = total / 2  # the caller adds the transpose
    at = ((g * tiles + i) * other_tiles + j) * (ROWS * OTHER_ROWS)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, OTHER_ROWS)[None, :]
    tl.store(parts + at + row * OTHER_ROWS + column, total)


def token_pairs(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    """As `gradsurgery.ops.pairs.token_pairs`."""
    symmetric = other_left is None or other_right is None
    sides = [left, right, left, right] if symmetric else [left, right, other_left, other_right]
    ids = not left.is_floating_point()
    if ids:
        sides[1::2] = alike(*sides[1::2])
    else:
        sides = alike(*sides)
    right = sides[1]
    # [n, g, T, .]; of ids [n, g, T]
    grouped = right.dim() == 4
    sides = [side if grouped else side.unsqueeze(1) for side in sides]
    sides = [
        side if (ids and s % 2 == 0) or side.stride(-1) == 1 else side.contiguous()
        for s, side in enumerate(sides)
    ]
    (n, g, tokens, b), (k, _, other_tokens, _) = sides[1].shape, sides[3].shape
    if min(n, g, tokens, k, other_tokens) == 0:
        return right.new_zeros(n, k, dtype=torch.float64)
    tile = tile_of(n * tokens, k * other_tokens, right.dtype, sides)
    shape = samples_of(tile.rows, tokens) + samples_of(tile.columns, other_tokens)
    rows, held, other_rows, other_held = shape
    across, other_across = cdiv(tokens, held), cdiv(other_tokens, other_held)
    down, other_down = cdiv(n, rows), cdiv(k, other_rows)
    parts = right.new_zeros(
        g, down, across, other_down, other_across, rows, other_rows, dtype=torch.float64
    )
    with on(right):
        pairs_kernel[(down * across * other_down * other_across, g)](
            tuple(sides),
            tuple(side.stride()[:3] for side in sides),
            (n, tokens, k, other_tokens),
            (1 if ids else sides[0].shape[-1], b),
            parts,
            symmetric,
            ids,
            *shape,
            tile.depth,
            precision(right.dtype),
            **options(tile.warps, tile.stages),
        )
    out = parts.sum((0, 2, 4)).transpose(1, 2).reshape(down * rows, other_down * other_rows)
    out = out[:n, :k]
    return out + out.mT if symmetric else out.contiguous()


def tile_of(tokens: int, others: int, dtype: torch.dtype, sides: Sequence[Tensor]) -> Tile:
    """Square, for what lies above the diagonal; large where there is work for most of a GPU.

    Large ones leave no registers for ids, nor for rows that are not read 16 bytes at a time.
    """
    tile = large(dtype)
    full = cdiv(tokens, tile.rows) * cdiv(others, tile.columns) >= 64
    plain = all(
        side.dtype == dtype
        and all(step * side.element_size() % 16 == 0 for step in side.stride()[:3])
        for side in sides
    )
    return tile if full and plain and tile.rows == tile.columns else small(dtype)


def samples_of(size: int, tokens: int) -> tuple[int, int]:
    """Samples in a tile of tokens, and tokens of each; powers of two."""
    held = min(size, triton.next_power_of_2(tokens))
    return size // held, held
