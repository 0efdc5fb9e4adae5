"""Rows of small planes, dealt out: each rank gets some columns of the rows of all ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.paths import to_rows
from gradsurgery.capture.ranges import SQUARES, in_range, within
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.seen_as import seen_as
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.ops.gramian import gramian_unchecked
from gradsurgery.ranks.kept import formed
from gradsurgery.ranks.table import Way, share

VALUES = 1 << 22  # that a rank forms at a time


class Piece(NamedTuple):
    """Lines lo .. hi of the plane of a parameter."""

    column: int
    lo: int
    hi: int
    width: int

    @property
    def values(self) -> int:
        return (self.hi - self.lo) * self.width


class Slices:
    """Pieces of planes that are dealt out together.

    Args:
        pieces: of parameters whose rows have one dtype.
        dtype: of the rows on the way.
        counts: of each rank, how many rows it sends.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: torch.dtype, counts: Sequence[int]) -> None:
        self.pieces, self.dtype, self.counts = pieces, dtype, counts
        self.width = sum(piece.values for piece in pieces)

    def size(self, sender: int, receiver: int) -> int:
        """Bytes that one rank sends to another."""
        part = share(self.width, len(self.counts), receiver)
        return self.counts[sender] * (part.stop - part.start) * self.dtype.itemsize

    def fill(self, own: "Rows", parts: Sequence[Tensor]) -> None:
        """Write what this rank sends, bytes for each rank."""
        rows = own.count
        if rows == 0:
            return
        made = [own.formed(piece, self.dtype) for piece in self.pieces]
        whole = made[0] if len(made) == 1 else torch.cat(made, 1)
        for k, part in enumerate(parts):
            mine = whole[:, share(self.width, len(parts), k)]
            part.view(self.dtype).view(mine.shape).copy_(mine)

    def gramians(
        self, received: Tensor, rank: int, ids: RowNumbers, m: int, apart: bool
    ) -> list[tuple[int, Tensor]]:
        """Of this rank's columns, [m, m] by parameter; of all at once unless `apart`."""
        mine = share(self.width, len(self.counts), rank)
        rows = received.view(self.dtype).view(len(ids), mine.stop - mine.start)
        if not apart:
            return [(self.pieces[0].column, to_rows(gramian_unchecked([rows]), ids, m))]
        found, start = [], 0
        for piece in self.pieces:
            lo, hi = max(start, mine.start), min(start + piece.values, mine.stop)
            start += piece.values
            if lo < hi:
                part = rows[:, lo - mine.start : hi - mine.start].contiguous()
                found.append((piece.column, to_rows(gramian_unchecked([part]), ids, m)))
        return found


class Rows:
    """This rank's rows, to be formed piece by piece.

    Args:
        uses: of each parameter.
        planes: as all ranks see them.
        count: rows.
        factors: of the rows, [count] float64; None where all are 1.
        metric: of each parameter, what inner products are weighted by.
        like: a tensor on the device.
    """

    def __init__(
        self,
        uses: Sequence[Sequence[Use]],
        ways: Sequence[Way | None],
        count: int,
        factors: Tensor | None,
        metric: Sequence[Tensor] | None,
        like: Tensor,
    ) -> None:
        self.uses, self.ways, self.count = uses, ways, count
        self.factors, self.metric, self.like = factors, metric, like
        self.lost = False  # whether float32 lost some of them
        self._turned: dict[int, Use] = {}  # uses that others see as another matrix, by their id
        self._fine: dict[int, bool] = {}  # by parameter: whether its tokens are in float32's range

    def formed(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """[count, values]; zeros for rows that do not depend on the parameter."""
        k, lo, hi, width = piece
        out = self.like.new_empty(self.count, hi - lo, width, dtype=dtype)
        uses = [self._seen(use, self._plane(k)) for use in self.uses[k] if use.n]
        for i, use in enumerate(uses):
            use = use.double() if dtype == torch.float64 else use.wide()
            (use.add_rows if i else use.write_rows)(out, use.rows, lo, hi)
        flat = out.view(self.count, -1) if uses else out.zero_().view(self.count, -1)
        if dtype == torch.float32 and uses:
            self._look(k, uses, flat)
        if self.factors is not None:
            flat *= self.factors.to(flat)[:, None]
        if self.metric is not None:
            part = self.metric[k].detach().reshape(self._plane(k))[lo:hi]
            flat *= part.reshape(-1).sqrt().to(flat)
        return flat

    def _plane(self, k: int) -> tuple[int, int]:
        known = self.ways[k]
        assert known is not None
        return known.plane

    def _look(self, k: int, uses: Sequence[Use], formed: Tensor) -> None:
        """Of rows near 1 nothing was lost; else tokens tell."""
        made = [use for use in uses if not isinstance(use, RowsUse)]
        if not made or self.lost:
            return
        squares = torch.linalg.vector_norm(formed, dim=1).square()
        if bool(within(squares, SQUARES).all()):
            return
        if k not in self._fine:
            self._fine[k] = all(map(in_range, made))
        self.lost = not self._fine[k]

    def _seen(self, use: Use, plane: tuple[int, int]) -> Use:
        use = formed(use)
        if use.plane == plane:
            return use.best() if isinstance(use, ConvolutionUse) else use
        if isinstance(use, RowsUse):
            return use.viewed(plane)
        if id(use) not in self._turned:  # for all pieces of it
            self._turned[id(use)] = seen_as(use, plane)
        return self._turned[id(use)]


def cut(ways: Sequence[Way | None], counts: Sequence[int]) -> list[Slices]:
    """The planes of rows in pieces, and small pieces together; alike on all ranks."""
    most = max(1, VALUES // max(1, *counts))
    made: list[Slices] = []
    open_: dict[torch.dtype, tuple[list[Piece], int]] = {}
    for k, known in enumerate(ways):
        if known is None or known.tiles is not None:
            continue
        height, width = known.plane
        step = max(1, most // max(1, width * known.grain)) * known.grain
        for lo in range(0, height, step):
            piece = Piece(k, lo, min(lo + step, height), width)
            pieces, total = open_.get(known.dtype, ([], 0))
            if pieces and total + piece.values > most:
                made.append(Slices(pieces, known.dtype, counts))
                pieces, total = [], 0
            open_[known.dtype] = [*pieces, piece], total + piece.values
    made += [Slices(pieces, dtype, counts) for dtype, (pieces, _) in open_.items()]
    return [each for each in made if each.width]
