"""Gramian of weight gradients that exist only tile by tile: K_ij = ⟨R_i, R_j⟩.

A program forms one tile of every row's plane after another, in a buffer of its own that never
leaves the cache, multiplies the tiles with one another, and goes on to the next tile. Rows may
have any number of tokens each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import (
    cdiv,
    largest_of,
    multiply,
    narrow,
    on,
    options,
    power_of_two,
    precision,
)

PROGRAMS = 256
BUFFER = 32 << 20  # bytes of all programs' tiles: an H200 caches 50 MiB


@triton.jit
def formed_gramian_kernel(
    left,  # [N, a], the tokens of row after row
    right,  # [N, b]
    kept,  # [a, b], the last row where KEPT
    offsets,  # [count + 1] int64, where each row's tokens begin
    buffer,  # [programs, m, HEIGHT, WIDTH]
    parts,  # [programs, ROWS, ROWS] float64
    count,  # rows of tokens
    height,  # a
    width,  # b
    strides,  # token of left, token of right, (row, column) of kept
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BUFFER_PRECISION: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, WIDTH)
    m = count + 1 if KEPT else count
    mine = buffer + program * m * SIZE
    sums = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    here = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    line = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ROWS), tl.float64)
    for tile in range(tl.program_id(0), tl.cdiv(height, HEIGHT) * across, tl.num_programs(0)):
        row = tl.cast(tile // across, tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
        column = tl.cast(tile % across, tl.int64) * WIDTH + tl.arange(0, WIDTH)
        to = mine + here
        for r in range(count):
            plane = tl.zeros((HEIGHT, WIDTH), sums)
            stop = tl.load(offsets + r + 1)
            for t in range(tl.load(offsets + r), stop, TOKENS):
                token = t + tl.arange(0, TOKENS)
                x = tl.load(
                    left + token[None, :] * strides[0] + row[:, None],
                    mask=(token < stop)[None, :] & (row < height)[:, None],
                    other=0,
                )
                y = tl.load(
                    right + token[:, None] * strides[1] + column[None, :],
                    mask=(token < stop)[:, None] & (column < width)[None, :],
                    other=0,
                )
                plane = multiply(x, y, plane, PRECISION)
            tl.store(to, narrow(plane.to(sums), buffer.dtype.element_ty))
            to += SIZE
        if KEPT:
            plane = tl.load(
                kept + row[:, None] * strides[2][0] + column[None, :] * strides[2][1],
                mask=(row < height)[:, None] & (column < width)[None, :],
                other=0,
            )
            tl.store(to, narrow(plane.to(sums), buffer.dtype.element_ty))
        tl.debug_barrier()  # the whole tile is written
        # of values near one in every row, float32 holds the products, whatever the rows' scale
        largest = tl.zeros((ROWS,), tl.float32)
        for k in range(0, SIZE, DEPTH):
            at = line[:, None] * SIZE + k + tl.arange(0, DEPTH)[None, :]
            x = tl.load(mine + at, mask=(line < m)[:, None], other=0)
            largest = tl.maximum(largest, largest_of(x))
        scale = power_of_two(largest)
        part = tl.zeros((ROWS, ROWS), sums)
        for k in range(0, SIZE, DEPTH):
            at = line[:, None] * SIZE + k + tl.arange(0, DEPTH)[None, :]
            x = tl.load(mine + at, mask=(line < m)[:, None], other=0)
            x = narrow(x.to(sums) / scale[:, None].to(sums), x.dtype)
            part = multiply(x, tl.trans(x), part, BUFFER_PRECISION)
        scale64 = scale.to(tl.float64)
        total += part.to(tl.float64) * scale64[:, None] * scale64[None, :]
        tl.debug_barrier()  # and read, before the next one
    at = (program * ROWS + line[:, None]) * ROWS + line[None, :]
    tl.store(parts + at, total)


def formed_gramian(
    left: Tensor, right: Tensor, offsets: Tensor, kept: Tensor | None, stored: torch.dtype
) -> Tensor:
    """[m, m] float64, m = len(offsets) - 1, and one more with `kept`; 64 at most.

    Args:
        left, right: [N, a] and [N, b], the tokens of row after row, in one dtype.
        offsets: [count + 1] int64, where each row's tokens begin, and N.
        kept: [a, b], one more row.
        stored: what planes are rounded to before they are multiplied.
    """
    left, right = (s if s.stride(-1) == 1 else s.contiguous() for s in (left, right))
    count, height, width = len(offsets) - 1, left.shape[-1], right.shape[-1]
    m = count + (kept is not None)
    if m == 0 or height == 0 or width == 0:
        return left.new_zeros(m, m, dtype=torch.float64)
    rows, high, wide, tokens, depth, warps, stages = tile_of(m, left.dtype, stored)
    size = m * high * wide * stored.itemsize
    tiles = cdiv(height, high) * cdiv(width, wide)
    programs = max(1, min(tiles, PROGRAMS, BUFFER // size))
    parts = left.new_empty(programs, rows, rows, dtype=torch.float64)
    with on(left):
        formed_gramian_kernel[(programs,)](
            left,
            right,
            left if kept is None else kept,
            offsets,
            left.new_empty(programs * m * high * wide, dtype=stored),
            parts,
            count,
            height,
            width,
            (left.stride(0), right.stride(0), (0, 0) if kept is None else kept.stride()),
            kept is not None,
            rows,
            high,
            wide,
            tokens,
            depth,
            precision(left.dtype),
            precision(stored),
            **options(warps, stages),
        )
    out = parts.sum(0)[:m, :m]
    return out.tril() + out.tril(-1).mT


def tile_of(m: int, dtype: torch.dtype, stored: torch.dtype) -> tuple[int, ...]:
    """Rows, height and width of a tile, tokens and columns of a step, warps, stages."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    depth = 64 if stored.itemsize == 2 else 16
    if dtype == torch.float64:
        return rows, 32, 32, 16, depth, 8, 3
    if dtype == torch.float32:
        return rows, 64, 64 if rows < 64 else 32, 16, depth, 8, 3
    if rows == 16 and stored.itemsize == 2:  # of those tried on an H200
        return rows, 128, 64, 64, depth, 4, 4
    return rows, 64, 64, 64, depth, 8, 3
