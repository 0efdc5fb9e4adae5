"""Gramian of rows that exist: G = J Jᵀ, a share of the columns for each program.

Products of a few hundred columns are summed in float32, by tensor cores, and these sums in
float64, each share in its order: the same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.tiles import cdiv, multiply, on, options, precision

PROGRAMS = 1024  # per launch at most; the same on every GPU, and so are the sums
FEW_COLUMNS = 1 << 14  # take no longer in float64, and float32 sums of few average nothing out
RUN = 256  # columns, or a step, whose products are summed before they go into the float64 sum


@triton.jit
def rows_of(sources, strides, counts, first, column, columns, ROWS: tl.constexpr):
    """Values [ROWS, len(column)] of rows first, first + 1, ... of all sources; zeros past them."""
    row = first + tl.arange(0, ROWS)
    out = tl.zeros((ROWS, column.shape[0]), sources[0].dtype.element_ty)
    for s in tl.static_range(len(sources)):
        inside = (row >= 0) & (row < counts[s])
        at = row.to(tl.int64)[:, None] * strides[s] + column[None, :]
        mask = inside[:, None] & (column < columns)[None, :]
        out += tl.load(sources[s] + at, mask=mask, other=0)
        row -= counts[s]
    return out


@triton.jit
def precise_products(x, y, total):
    """total + x yᵀ in float64."""
    left, right = x.to(tl.float64), y.to(tl.float64)
    if x.dtype == tl.float64 or x.dtype == tl.float32:
        return multiply(left, tl.trans(right), total, "ieee")
    # before Triton 3.9, tensor cores take no float64 that was loaded as 16 bits
    return total + tl.sum(left[:, None, :] * right[None, :, :], axis=2)


@triton.jit
def gramian_kernel(
    sources,  # tensors [m_s, n], one below the other
    strides,  # from a row to the next; a row's values are neighbors
    counts,  # m_s
    columns,  # n
    parts,  # [shares, tiles, tiles, ROWS, ROWS] float64, added to
    repeat,  # int32: where PRECISE, whether there is anything to do
    SINGLE: tl.constexpr,  # one tile holds all rows
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISE: tl.constexpr,  # float64 products
):
    share, shares = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, j, tiles = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    if j > i:
        return
    if PRECISE:
        if tl.load(repeat) == 0:
            return
    sums = tl.float64 if PRECISE else tl.float32
    total = tl.zeros((ROWS, ROWS), tl.float64)
    for start in range(share * RUN * DEPTH, columns, shares * RUN * DEPTH):
        part = tl.zeros((ROWS, ROWS), sums)
        for step in range(RUN):
            column = start + step * DEPTH + tl.arange(0, DEPTH)
            x = rows_of(sources, strides, counts, i * ROWS, column, columns, ROWS)
            if SINGLE:
                y = x
            else:
                y = rows_of(sources, strides, counts, j * ROWS, column, columns, ROWS)
            if PRECISE:
                part = precise_products(x, y, part)
            else:
                part = multiply(x, tl.trans(y), part, PRECISION)
        total += part.to(tl.float64)
    at = parts + ((share * tiles + i) * tiles + j) * (ROWS * ROWS)
    at = at + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(at, tl.load(at) + total)


def gramian(
    sources: Sequence[Sequence[Tensor]], precise: bool = False, repeat: bool = True
) -> Tensor:
    """[m, m] float64 over the rows of all sources, without waiting for the device.

    A source is the blocks [m_s, n_k] of some rows. As on the CPU, what leaves float32's range is
    done again in float64, if it is to `repeat`.
    """
    m = sum(source[0].shape[0] for source in sources)
    n = sum(block.shape[1] for block in sources[0])
    first = sources[0][0]
    if first.dtype == torch.float64 or precise or n <= FEW_COLUMNS:
        return _sum(sources, m, True, first.new_ones((), dtype=torch.int32))
    out = _sum(sources, m, False, first.new_zeros((), dtype=torch.int32))
    if not repeat:
        return out
    squares = out.diagonal()
    # products of values below 1e-17 lose digits in float32
    leaves = ~((squares >= 1e-34 * n) & (squares < torch.inf)).all()
    return torch.where(leaves, _sum(sources, m, True, leaves.int()), out)


def _sum(sources: Sequence[Sequence[Tensor]], m: int, precise: bool, repeat: Tensor) -> Tensor:
    first = sources[0][0]
    rows, depth, warps = tile_of(m, first.dtype, precise)
    tiles = cdiv(m, rows)
    widest = max(block.shape[1] for block in sources[0])
    run = max(1, RUN // depth)
    shares = max(1, min(cdiv(widest, depth * run), PROGRAMS // max(1, tiles * (tiles + 1) // 2)))
    parts = first.new_zeros(shares, tiles, tiles, rows, rows, dtype=torch.float64)
    for blocks in zip(*sources, strict=True):
        blocks = tuple(block if block.stride(1) == 1 else block.contiguous() for block in blocks)
        if blocks[0].shape[1] and m:
            with on(first):
                gramian_kernel[(shares, tiles, tiles)](
                    blocks,
                    tuple(block.stride(0) for block in blocks),
                    tuple(block.shape[0] for block in blocks),
                    blocks[0].shape[1],
                    parts,
                    repeat,
                    tiles == 1,
                    rows,
                    depth,
                    run,
                    precision(first.dtype),
                    precise,
                    **options(warps, 4),
                )
    out = parts.sum(0).transpose(1, 2).reshape(tiles * rows, tiles * rows)[:m, :m]
    return out.tril() + out.tril(-1).mT


def tile_of(m: int, dtype: torch.dtype, precise: bool) -> tuple[int, int, int]:
    """Rows of a tile, columns of a step, warps: as much as stays in registers."""
    if precise:
        return (16 if m <= 16 or dtype.itemsize == 2 else 32), 16, 4
    depth = 1 if dtype == torch.float32 else 2  # tf32x3 splits both operands
    if m <= 16:
        return 16, 32 if dtype == torch.float32 else 256, 4
    if m <= 32 or (m > 64 and dtype == torch.float32):  # two tiles of 64 would not
        return 32, 16 * depth, 4
    return 64, 16 * depth, 8
