"""Gramian of weight gradients that are formed slice by slice and dropped."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradsurgery.ops._backend import _C, OPERATORS, choose, runs_cuda
from gradsurgery.ops._inputs import alike, wide
from gradsurgery.ops.gramian import gramian_of_parts

CHUNK = 1 << 21  # values of all rows' slices that the reference forms at a time
# Bytes of slices made by matrix products: 17 planes of 8192 x 2048 in 16 bits. An H200 moves a
# tenth of that in the time of the launches for each
SLICE = 640 << 20
ALIGNED = 64  # rows: matrix products of operands that begin anywhere take four times as long
# Of planes of fewer values, bfloat16 ones would cost accuracy: each rounding is 2^-9 of a value, in
# the products of two planes some 2^-9 / sqrt(values) of the norms
SMALL = 1 << 16
# Padded to the longest row, a token costs 2 flops a value at 650 TFLOP/s, 3.1 fs; the kernel that
# takes rows as long as they are reads its operands from the cache, 32 flops a byte, at 5.5 TB/s:
# 8.5 fs. From counting, for an H200.
PADDING = 2.7
MOST_ROWS = 64  # of that kernel
# Squared norms between which no products of planes are lost: those of float32 values below 1e-17
# lose digits, 1e-34 each
PLANES = 2.0**-80, 2.0**100


def formed_gramian(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    """Inner products of rows R_i = Σ_k Σ_t left_kt right_ktᵀ, over the blocks k of row i.

    K_ij = ⟨R_i, R_j⟩

    Args:
        left, right: any number of [n, T, a] and [n, T, b], n and T each time their own.
        rows: [n] int64 for each of these, the row of every block, 0 .. count - 1.
        count: rows. One without a block is zero.
        kept: [a, b], one more row, the last, which exists.

    Returns:
        [m, m] float64, m = count or, with `kept`, count + 1. Planes are formed in the dtype of
        their tokens, 16-bit ones in float32, and multiplied as by `gramian`. A GPU rounds large
        planes of bfloat16 tokens to 16 bits in between: some 1e-5 of the norms, 4e-4 where rows
        have few tokens or equal values, which round alike.
    """
    device = left[0].device.type
    return choose("formed_gramian", IMPLEMENTATIONS, device)(left, right, rows, count, kept)


def formed_gramian_reference(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    left, right = [wide(x) for x in left], [wide(y) for y in right]
    height, width = left[0].shape[-1], right[0].shape[-1]
    m = count + (kept is not None)
    out = left[0].new_zeros(m, m, dtype=torch.float64)
    step = max(1, CHUNK // max(1, m * width))
    for lo in range(0, height, step):
        hi = min(lo + step, height)
        planes = left[0].new_zeros(m, hi - lo, width)
        for x, y, which in zip(left, right, rows, strict=True):
            planes.index_add_(0, which.to(x.device), x[..., lo:hi].mT @ y)
        if kept is not None:
            planes[-1] = kept[lo:hi]
        slices = planes.flatten(1).double()
        out += slices @ slices.mT
    return out.tril() + out.tril(-1).mT  # a BLAS need not make it symmetric


def formed_gramian_native(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    if runs_cuda(left[0]):  # of a test build
        return formed_gramian_reference(left, right, rows, count, kept)
    left, right = [wide(x) for x in left], [wide(y) for y in right]
    m = count + (kept is not None)
    out = left[0].new_empty(m, m, dtype=torch.float64)
    _C.formed_gramian_cpu(left, right, rows, count, kept, out, torch.get_num_threads())
    return out


def formed_gramian_triton(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    count: int,
    kept: Tensor | None = None,
) -> Tensor:
    """Slices of the planes by matrix products, or tiles of them by a kernel."""
    x, y, lengths = by_row(left, right, rows, count)
    if count + (kept is not None) > MOST_ROWS or _pads(lengths):
        return formed_gramian_chunked(x, y, lengths, kept)
    from gradsurgery.kernels import formed_gramian as kernels

    offsets = torch.tensor([0, *accumulate(lengths)], device="cpu").to(x.device)
    return kernels.formed_gramian(x, y, offsets, kept, stored_dtype(x, y))


def formed_gramian_chunked(
    left: Tensor, right: Tensor, lengths: Sequence[int], kept: Tensor | None
) -> Tensor:
    """Of [N, a] and [N, b], the tokens of row after row, a slice of the planes at a time."""
    n = len(lengths)
    stored = stored_dtype(left, right)
    left, right = left.to(stored), right.to(stored)
    if _pads(lengths):
        parts = [(slice(0, n), padded(left, lengths), padded(right, lengths))]
    else:  # a row at a time
        ends = list(accumulate(lengths))
        parts = [
            (slice(r, r + 1), left[None, end - t : end], right[None, end - t : end])
            for r, (t, end) in enumerate(zip(lengths, ends, strict=True))
        ]
    slices = _Slices(n + (kept is not None), left, right)
    found = list(slices.gramians(parts, kept))
    if not found:
        return left.new_zeros(slices.m, slices.m, dtype=torch.float64)
    return torch.stack(found).sum(0)


class _Slices:
    """Memory for slices of m planes, formed of tokens [*, H] and [*, W], and multiplied."""

    def __init__(self, m: int, left: Tensor, right: Tensor) -> None:
        self.m, self.height, self.width = m, left.shape[-1], right.shape[-1]
        step = max(1, min(self.height, SLICE // max(1, m * self.width * left.element_size())))
        self.step = step + -step % ALIGNED
        self.buffer = left.new_empty(m * min(self.step, self.height) * self.width)

    def gramians(
        self,
        parts: Sequence[tuple[slice, Tensor, Tensor]],
        kept: Tensor | None,
        repeat: bool = True,
    ) -> Iterator[Tensor]:
        """Of each slice, [m, m]; `parts`: planes, and their tokens [n, T, H] and [n, T, W]."""
        for lo in range(0, self.height, self.step):
            hi = min(lo + self.step, self.height)
            planes = self.buffer[: self.m * (hi - lo) * self.width]
            planes = planes.view(self.m, hi - lo, self.width)
            for which, x, y in parts:
                torch.bmm(x[..., lo:hi].mT, y, out=planes[which])
            if kept is not None:
                planes[-1] = kept[lo:hi]
            rows = planes.flatten(1)
            sources = [[rows]] if kept is None else [[rows[:-1]], [rows[-1:]]]
            yield gramian_of_parts(sources, repeat=repeat)


def formed_gramians(
    left: Sequence[Tensor], right: Sequence[Tensor], kept: Sequence[Tensor] | None = None
) -> Tensor:
    """`formed_gramian` of several planes of one shape, each of whose blocks is a row, on a GPU.

    Products that leave float32's range are not made again, which would take as many launches more:
    where a squared norm is not within `PLANES`, values may be lost.

    Args:
        left, right: of each plane [n, T, a] and [n, T, b].
        kept: of each plane one more row, the last, [a, b].

    Returns:
        [planes, m, m] float64.
    """
    n, slices = len(left[0]), None
    found: list[Tensor] = []
    for k, sides in enumerate(zip(left, right, strict=True)):
        x, y = alike(*sides)
        stored = stored_dtype(x, y)
        x, y = x.to(stored), y.to(stored)
        slices = slices or _Slices(n + (kept is not None), x, y)  # of all, which are of one shape
        mine = None if kept is None else kept[k]
        found += slices.gramians([(slice(0, n), x, y)], mine, repeat=False)
    out = torch.stack(found)
    several = len(found) // len(left)
    return out if several == 1 else out.view(len(left), several, *out.shape[1:]).sum(1)


def stored_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """What a GPU keeps planes of such tokens in: float32 where they are small, or would leave
    float16's range; else the tokens' dtype."""
    small = left.shape[-1] * right.shape[-1] < SMALL
    return wide(left[:0]).dtype if small or left.dtype == torch.float16 else left.dtype


def _pads(lengths: Sequence[int]) -> bool:
    """Whether rows are nearly enough alike in length."""
    return max(lengths, default=0) * len(lengths) <= PADDING * sum(lengths)


def by_row(
    left: Sequence[Tensor], right: Sequence[Tensor], rows: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor, list[int]]:
    """[N, a] and [N, b], the tokens of row after row, and how many each has."""
    if len(left) == 1 and torch.equal(rows[0].cpu(), torch.arange(count, device="cpu")):
        x, y = alike(left[0].flatten(0, 1), right[0].flatten(0, 1))
        return x, y, [left[0].shape[1]] * count
    which = torch.cat(
        [r.cpu().repeat_interleave(x.shape[1]) for x, r in zip(left, rows, strict=True)]
    )
    sides = [
        torch.cat([tokens.flatten(0, 1) for tokens in side]) if len(side) > 1
        else side[0].flatten(0, 1)
        for side in (left, right)
    ]  # fmt: skip
    sides = alike(*sides)
    if bool((which[1:] < which[:-1]).any()):
        order = which.argsort(stable=True).to(sides[0].device)
        sides = [side[order] for side in sides]
    return sides[0], sides[1], which.bincount(minlength=count).tolist()


def padded(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """[n, T, .] with zeros after the tokens of shorter rows; a view where there are none."""
    longest = max(lengths, default=0)
    if longest * len(lengths) == len(tokens):
        return tokens.view(len(lengths), longest, tokens.shape[-1])
    inside = torch.arange(longest, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
    places = inside.flatten().nonzero().flatten().to(tokens.device)
    out = tokens.new_zeros(len(lengths) * longest, tokens.shape[-1])
    return out.index_copy_(0, places, tokens).view(len(lengths), longest, -1)


IMPLEMENTATIONS = {
    ("torch", "any"): formed_gramian_reference,
    ("native", "cpu"): formed_gramian_native,
    ("triton", "cuda"): formed_gramian_triton,
}
OPERATORS["formed_gramian"] = IMPLEMENTATIONS
