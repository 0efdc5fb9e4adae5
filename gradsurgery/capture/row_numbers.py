"""Which row of the Jacobian each of some blocks belongs to, and tables made of that once."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.ops._inputs import to_device

JOINS = 16  # that are kept: others may be new ones in every step


class Selection(NamedTuple):
    """Some of the blocks: which, as a slice where they are neighbors, and their rows."""

    blocks: Tensor | slice
    rows: "RowNumbers"


class _Tables(NamedTuple):
    ids: "RowNumbers"  # [R] those that occur, sorted; -1 first, where some blocks belong to none
    where: "RowNumbers"  # [n] the position in `ids` of each block's
    distinct: bool
    some_none: bool
    splits: dict[int, tuple[Selection, Selection]]
    joins: dict[tuple[int, ...], tuple["RowNumbers", tuple["RowNumbers", ...]]]
    copies: dict[torch.device, Tensor]


class RowNumbers:
    """The row that each block, or each loss, belongs to: `tensor` [n] int64 on the CPU; -1 is none.

    All uses of one layout share one of these, in every step that follows one recipe. What is
    derived from the numbers is made when it is first asked for and kept here, so it is made once
    for a model of any depth, and not in every step. Nobody writes to the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._picked: tuple[Tensor, torch.dtype, Tensor] | None = None

    def __len__(self) -> int:
        return self.tensor.shape[0]

    @cached_property
    def _tables(self) -> _Tables:
        ids, where = self.tensor.unique(return_inverse=True)
        distinct = torch.equal(where, torch.arange(len(ids), device="cpu"))
        some_none = len(ids) > 0 and int(ids[0]) < 0
        return _Tables(RowNumbers(ids), RowNumbers(where), distinct, some_none, {}, {}, {})

    @property
    def ids(self) -> "RowNumbers":
        """[R] those that occur, sorted; -1 is first where some blocks belong to no row."""
        return self._tables.ids

    @property
    def where(self) -> "RowNumbers":
        """[n] the position in `ids` of each block's number."""
        return self._tables.where

    @property
    def distinct(self) -> bool:
        """Whether every block has a row of its own, in order."""
        return self._tables.distinct

    @property
    def some_none(self) -> bool:
        """Whether some blocks belong to no row."""
        return self._tables.some_none

    @property
    def occurring(self) -> "RowNumbers":
        """The rows that occur, sorted, without -1."""
        ids = self._tables.ids
        return RowNumbers(ids.tensor[1:]) if self._tables.some_none else ids

    def split(self, row: int) -> tuple[Selection, Selection]:
        """The blocks of other rows, and those of `row`."""
        known = self._tables.splits
        if row not in known:
            inside = self.tensor == row
            known[row] = self._selection(~inside), self._selection(inside)
        return known[row]

    def _selection(self, mask: Tensor) -> Selection:
        blocks = mask.nonzero().flatten()
        return Selection(as_slice(blocks), RowNumbers(self.tensor[blocks]))

    def join(self, *others: "RowNumbers") -> "RowNumbers":
        """These and others, one after another."""
        if not others:
            return self
        known = self._tables.joins
        key = tuple(map(id, others))
        found = known.get(key)
        if found is None:
            if len(known) >= JOINS:  # another thread may add one, and clear them, between two lines
                known.clear()
            # the others are held, so that no new object gets the id of one that is gone
            found = RowNumbers(torch.cat([self.tensor, *(o.tensor for o in others)])), others
            known[key] = found
        return found[0]

    def pick(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of each block, [n], by its row, in a dtype.

        Those of the last weights are kept: of all parameters that have these rows they are the
        same. Nobody may write to `weights` [m], or to what they are a view of.
        """
        if self._picked is not None:
            of, kind, found = self._picked
            if kind == dtype and _are_same(of, weights):
                return found
        found = weights[self.on(weights.device)].to(dtype)
        self._picked = weights, dtype, found  # held, so that no others get their memory
        return found

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if self.tensor.device == device:
            return self.tensor
        known = self._tables.copies
        if device not in known:
            known[device] = to_device(self.tensor, device)
        return known[device]


def index_of(rows: "list[RowNumbers]") -> tuple[RowNumbers, list[RowNumbers]]:
    """The rows that occur in any of these, sorted, and where in them the numbers of each are."""
    if not rows:
        return RowNumbers(torch.zeros(0, dtype=torch.int64, device="cpu")), []
    first = rows[0]
    if all(each is first for each in rows):
        # where they are their own ids they have their tables already
        return first if first.distinct else first.ids, [first.where] * len(rows)
    ids = torch.cat([each.tensor for each in rows]).unique()
    return RowNumbers(ids), [RowNumbers(torch.searchsorted(ids, each.tensor)) for each in rows]


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same memory."""
    known = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (one, other))
    return one is other or next(known) == next(known)


def as_slice(blocks: Tensor) -> Tensor | slice:
    """Indices [k], as a slice where they are neighbors: it selects views, without copying."""
    start, n = (int(blocks[0]) if len(blocks) else 0), len(blocks)
    neighbors = torch.equal(blocks, torch.arange(start, start + n, device="cpu"))
    return slice(start, start + n) if neighbors else blocks
