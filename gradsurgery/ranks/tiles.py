"""Tiles of large planes: each rank has one, and gets what the tokens of all ranks have there."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.stack import plane_for
from gradsurgery.capture.uses import EmbeddingUse, MatrixUse, RowsUse, Use, largest_group
from gradsurgery.ops._inputs import wide
from gradsurgery.ranks.table import Entry, Form, Way, share

ALIGNED = 16  # bytes that tensors in a buffer begin at multiples of


class Tiles:
    """The plane of one parameter, a tile each rank.

    Args:
        column: the parameter's.
        known: the way, with tiles.
        entries: what each rank has.
    """

    def __init__(self, column: int, known: Way, entries: Sequence[Entry]) -> None:
        assert known.tiles is not None
        self.column, self.plane, self.grid, self.entries = column, known.plane, known.tiles, entries

    def tile(self, rank: int) -> tuple[slice, slice]:
        """Lines and columns of a rank's."""
        (a, b), (height, width) = self.grid, self.plane
        return share(height, a, rank // b), share(width, b, rank % b)

    def size(self, sender: int, receiver: int) -> int:
        """Bytes that one rank sends to another."""
        forms = self.entries[sender].forms
        return sum(_bytes(*part) for form in forms for part in self._parts(form, receiver))

    def _parts(self, form: Form, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what a use has for a rank's tile."""
        lines, columns = self.tile(rank)
        h, w = lines.stop - lines.start, columns.stop - columns.start
        n, t = form.blocks, form.tokens
        if form.kind == "matrix":
            return list(zip([(n, t, h), (n, t, w)], form.dtypes, strict=True))
        if form.kind == "embedding":
            return list(zip([(n, t), (n, t, w)], form.dtypes, strict=True))
        return [((n, h, w), form.dtypes[0])]

    def fill(
        self,
        uses: Sequence[Use],
        parts: Sequence[Tensor],
        scaled: Callable[[Use], Tensor | None],
    ) -> None:
        """Write what this rank sends, bytes for each rank.

        `scaled`: factors of a use's blocks, [n]; None where all are 1.
        """
        uses = [use for use in uses if use.n]
        for rank, part in enumerate(parts):
            lines, columns = self.tile(rank)
            start = 0
            for use in uses:
                factors = scaled(use)
                if isinstance(use, MatrixUse):
                    tensors = [use.left[..., lines], use.right[..., columns]]
                elif isinstance(use, EmbeddingUse):
                    tensors = [use.indices, use.grads[..., columns]]
                else:
                    assert isinstance(use, RowsUse)
                    tensors = [use.blocks.reshape(use.n, *self.plane)[:, lines, columns]]
                if factors is not None:
                    each = factors.to(wide(tensors[-1][:0]))
                    each = each.view(-1, *[1] * (tensors[-1].dim() - 1))
                    tensors[-1] = wide(tensors[-1]) * each
                for tensor in tensors:
                    room = part[start : start + tensor.numel() * tensor.element_size()]
                    room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
                    start += _bytes(tuple(tensor.shape), tensor.dtype)

    def gramian(
        self,
        received: Tensor,
        rank: int,
        rows: Callable[[tuple[int, ...]], RowNumbers],
        m: int,
        metric: Tensor | None,
    ) -> Tensor:
        """Of this rank's tile, [m, m]."""
        lines, columns = self.tile(rank)
        height = lines.stop - lines.start
        uses: list[Use] = []
        existing: dict[int, RowsUse] = {}  # rows that ranks have a part of each
        start = 0
        for entry in self.entries:
            for form in entry.forms:
                tensors = []
                for shape, dtype in self._parts(form, rank):
                    room = received[start : start + torch.Size(shape).numel() * dtype.itemsize]
                    tensors.append(room.view(dtype).view(shape))
                    start += _bytes(shape, dtype)
                ids = rows(form.rows)
                if form.kind == "matrix":
                    uses.append(MatrixUse(tensors[0], tensors[1], ids))
                elif form.kind == "embedding":
                    uses.append(EmbeddingUse(tensors[0], tensors[1], ids, height))
                elif form.blocks == 1 and form.rows[0] in existing:
                    existing[form.rows[0]].blocks += tensors[0]
                else:
                    uses.append(use := RowsUse(wide(tensors[0]), ids))
                    if form.blocks == 1:
                        existing[form.rows[0]] = use
        if not uses:
            return torch.zeros(m, m, dtype=torch.float64, device=received.device)
        part = None
        if metric is not None:
            part = metric.detach().reshape(self.plane)[lines, columns].contiguous()
        like = wide(uses[0].values[-1][:0])
        plane = plane_for(like, uses, largest_group([uses]))
        return plane.in_range(plane.gramian(m, part), m, part)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = torch.Size(shape).numel() * dtype.itemsize
    return -(-size // ALIGNED) * ALIGNED
