"""Gramian of weight gradients from their tokens: ⟨G_i, G_j⟩ = sum_tu (l_t · l_u) (r_t · r_u).

A program multiplies a tile of tokens with a tile of tokens on both sides of the plane, in
registers, and sums the products by sample; the tokens-by-tokens matrices are never written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import (
    KINDS,
    Tile,
    cdiv,
    large,
    largest_of,
    on,
    one_of,
    options,
    power_of_two,
    precision,
    products,
    small,
)

LOST, LARGE = tl.constexpr(2.0**-116), tl.constexpr(2.0**30)  # of ops/token_gramian.py


@triton.jit
def token_gramian_kernel(
    sides,  # (left, right, other_left, other_right), tables where KIND; left holds ids where IDS
    matrices,  # g
    strides,  # of each side: (block, matrix, token)
    counts,  # (blocks, tokens, other blocks, other tokens)
    widths,  # (a, b)
    parts,  # [planes, g, row tiles, column tiles, ROWS, OTHER_ROWS] float64
    KIND: tl.constexpr,  # of the values of several planes; None of one
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
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, OTHER_ROWS)[None, :]
    parts += ((tl.program_id(1).to(tl.int64) * tiles + i) * other_tiles + j) * (ROWS * OTHER_ROWS)
    parts += row * OTHER_ROWS + column
    if SYMMETRIC and j > i:
        tl.store(parts, 0.0)
        return
    plane, g = tl.program_id(1) // matrices, (tl.program_id(1) % matrices).to(tl.int64)
    if KIND is None:
        left, right, other_left, other_right = sides[0], sides[1], sides[2], sides[3]
    else:
        left, right = one_of(sides[0], plane, KIND), one_of(sides[1], plane, KIND)
        other_left, other_right = one_of(sides[2], plane, KIND), one_of(sides[3], plane, KIND)
    lane, other_lane = tl.arange(0, M), tl.arange(0, N)
    block = (i // across).to(tl.int64) * ROWS + lane // TOKENS
    token = (i % across).to(tl.int64) * TOKENS + lane % TOKENS
    other = (j // other_across).to(tl.int64) * OTHER_ROWS + other_lane // OTHER_TOKENS
    other_token = (j % other_across).to(tl.int64) * OTHER_TOKENS + other_lane % OTHER_TOKENS
    inside = ((block < counts[0]) & (token < counts[1]))[:, None]
    other_inside = ((other < counts[2]) & (other_token < counts[3]))[None, :]

    x = left + block * strides[0][0] + g * strides[0][1] + token * strides[0][2]
    y = other_left + other * strides[2][0] + g * strides[2][1] + other_token * strides[2][2]
    if IDS:
        ids = tl.load(x[:, None], mask=inside, other=-1)
        first = (ids == tl.load(y[None, :], mask=other_inside, other=-1)) & (ids >= 0)
        if tl.max(first.to(tl.int32)) == 0:  # most tiles of a large vocabulary
            tl.store(parts, 0.0)
            return
    else:
        first = products(x[:, None], y[None, :], inside, other_inside, widths[0], DEPTH, PRECISION)
    x = right + block * strides[1][0] + g * strides[1][1] + token * strides[1][2]
    y = other_right + other * strides[3][0] + g * strides[3][1] + other_token * strides[3][2]
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
    tl.store(parts, total)


def token_gramian(
    left: Tensor, right: Tensor, other_left: Tensor | None = None, other_right: Tensor | None = None
) -> Tensor:
    """As `gradsurgery.ops.token_gramian.token_gramian`, of sides of one dtype."""
    symmetric = other_left is None or other_right is None
    sides = [left, right] if symmetric else [left, right, other_left, other_right]
    ids = not left.is_floating_point()
    # [n, g, T, .]; of ids [n, g, T]
    grouped = right.dim() == 4
    sides = [side if grouped else side.unsqueeze(1) for side in sides]
    sides = [
        side if (ids and s % 2 == 0) or side.stride(-1) == 1 else side.contiguous()
        for s, side in enumerate(sides)
    ]
    return _launched(sides * 2 if symmetric else sides, symmetric, None, 1)[0]


def token_gramians(left: Tensor, right: Tensor, addresses: Tensor) -> Tensor:
    """The same of several planes, [planes, n, n], in one launch.

    Args:
        left, right: the sides of one, [n, T, .], whose last stride is 1.
        addresses: [2, planes] int64, of the sides of each, laid out as these; multiples of 16.
    """
    sides = [left.unsqueeze(1), right.unsqueeze(1)] * 2
    return _launched(sides, True, addresses, addresses.shape[1])


def _launched(
    sides: Sequence[Tensor], symmetric: bool, addresses: Tensor | None, planes: int
) -> Tensor:
    ids, first = not sides[0].is_floating_point(), sides[1]
    (n, g, tokens, b), (k, _, other_tokens, _) = first.shape, sides[3].shape
    if min(n, g, tokens, k, other_tokens) == 0:
        return first.new_zeros(planes, n, k, dtype=torch.float64)
    tile = tile_of(n * tokens, k * other_tokens, first.dtype, sides, planes)
    shape = samples_of(tile.rows, tokens) + samples_of(tile.columns, other_tokens)
    rows, held, other_rows, other_held = shape
    across, other_across = cdiv(tokens, held), cdiv(other_tokens, other_held)
    down, other_down = cdiv(n, rows), cdiv(k, other_rows)
    parts = first.new_empty(
        planes, g, down, across, other_down, other_across, rows, other_rows, dtype=torch.float64
    )
    with on(first):
        token_gramian_kernel[(down * across * other_down * other_across, planes * g)](
            tuple(sides) if addresses is None else tuple(addresses) * 2,
            g,
            tuple(side.stride()[:3] for side in sides),
            (n, tokens, k, other_tokens),
            (1 if ids else sides[0].shape[-1], b),
            parts,
            None if addresses is None else KINDS[first.dtype],
            symmetric,
            ids,
            *shape,
            tile.depth,
            precision(first.dtype),
            **options(tile.warps, tile.stages),
        )
    several = g * across * other_across > 1
    out = parts.sum((1, 3, 5)) if several else parts.squeeze((1, 3, 5))
    out = out.transpose(2, 3).reshape(planes, down * rows, other_down * other_rows)
    out = out[:, :n, :k]
    return out + out.mT if symmetric else out.contiguous()


def tile_of(
    tokens: int, others: int, dtype: torch.dtype, sides: Sequence[Tensor], planes: int = 1
) -> Tile:
    """Square, for what lies above the diagonal; large where there is work for most of a GPU.

    Large ones leave no registers for ids, nor for rows that are not read 16 bytes at a time.
    """
    tile = large(dtype)
    full = planes * cdiv(tokens, tile.rows) * cdiv(others, tile.columns) >= 64
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
