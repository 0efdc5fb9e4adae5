"""Rows held between passes: in the smaller of two forms, and sums of rows as they come."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsurgery.capture.convolution import ConvolutionUse
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.leaves import Derived, without_autocast
from gradsurgery.capture.ranges import SQUARES, in_range, within
from gradsurgery.capture.row_numbers import RowNumbers, as_slice
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.ops._inputs import wide

Hold = Literal["auto", "pairs", "rows"]


def held(jacobian: FactoredJacobian, hold: Hold = "auto") -> FactoredJacobian:
    """The same rows, to be kept while others are made.

    Args:
        hold: of each parameter keep "pairs" of tokens, as the pass left them, or "rows", formed
            from these; "auto" takes the smaller. A tensor that several parameters need counts in
            parts.
    """
    jacobian._check_usable()
    if hold == "pairs":
        return jacobian
    # memory that two parameters' pairs need, as an input of two layers, is not freed by forming one
    sharers = Counter(
        storage
        for uses in (*jacobian._uses, *(_of_leaves(each) for each in jacobian._derived))
        for storage in storages(uses)
    )

    def formed_is_smaller(uses: Sequence[Use], rows: int, values: int) -> bool:
        pairs = sum(size / max(sharers[key], 1) for key, size in storages(uses).items())
        return hold == "rows" or rows * values * _itemsize(uses) < pairs

    with torch.no_grad(), without_autocast(jacobian.parameters[0]):
        kept, through = [], {}
        for derived in jacobian._derived:
            values = sum(parameter.numel() for parameter in derived.parameters)
            if not formed_is_smaller(_of_leaves(derived), jacobian.m, values):
                kept.append(derived)
                continue
            ids = RowNumbers(torch.arange(jacobian.m, device="cpu"))
            pairs = zip(derived.parameters, derived.rows(jacobian.m), strict=True)
            for parameter, rows in pairs:
                through.setdefault(id(parameter), []).append(RowsUse(rows, ids))
        uses = []
        for parameter, mine in zip(jacobian.parameters, jacobian._uses, strict=True):
            mine = [*through.get(id(parameter), ()), *(use for use in mine if use.n)]
            if mine and not all(isinstance(use, RowsUse) for use in mine):
                rows = _occurring(mine)
                smaller = formed_is_smaller(mine, len(rows), parameter.numel())
                mine = [_formed(mine, rows, parameter.shape)] if smaller else mine
            uses.append(mine)
    return _like(jacobian, jacobian.m, jacobian.losses, uses, kept)


class Sums:
    """Rows of several passes, added up: row i of each to row i of all.

    They exist, one [m, *p.shape] for each parameter that a loss depends on, in float32 or wider.
    """

    def __init__(self, like: FactoredJacobian) -> None:
        self._like, self.m = _like(like, like.m, like.losses, [[] for _ in like.parameters]), like.m
        self._totals: list[Tensor | None] = [None] * len(like.parameters)

    def add(self, jacobian: FactoredJacobian, weight: float) -> None:
        """The rows of another pass, times `weight`."""
        jacobian._check_usable()
        with torch.no_grad(), without_autocast(jacobian.parameters[0]):
            through = jacobian._through_derived()
            for k, mine in enumerate(jacobian._uses):
                uses = [use for use in (*through.pop(k, ()), *mine) if use.n]
                if uses:
                    self._add(k, uses, weight)

    def _add(self, k: int, uses: Sequence[Use], weight: float) -> None:
        shape = self._like.parameters[k].shape
        for use in uses:
            total = self._totals[k]
            # blocks in float64 where float32 would lose them; then the sums are, from there on
            fine = isinstance(use, RowsUse) or in_range(use)
            use = use.wide() if fine else use.double()
            like = wide(use.values[-1][:0])
            if total is None or total.dtype.itemsize < like.dtype.itemsize:
                grown = like.new_zeros(self.m, *shape)
                total = self._totals[k] = grown if total is None else grown.add_(total)
            planes = total.view(self.m, *use.plane)
            if self.m == 1:  # all blocks are of one row: a weighted sum, without their planes
                weights = torch.full((use.n,), weight, dtype=total.dtype, device=total.device)
                use.combine(weights, planes[0])
            else:
                part = torch.zeros_like(planes)
                use.add_rows(part, use.rows, 0, use.plane[0])
                planes.add_(part, alpha=weight)

    @property
    def reached(self) -> list[bool]:
        """Which parameters the losses depend on."""
        return [total is not None for total in self._totals]

    def jacobian(self) -> FactoredJacobian:
        """Of the sums. It holds them: nothing is to be added afterwards."""
        ids = RowNumbers(torch.arange(self.m, device="cpu"))
        uses: list[list[Use]] = [
            [] if total is None else [RowsUse(total, ids)] for total in self._totals
        ]
        return _like(self._like, self.m, self._like.losses, uses)


def rows_of(jacobian: FactoredJacobian, first: int, count: int) -> FactoredJacobian:
    """Some of the rows, `count` from `first` on; views of what has them side by side."""
    jacobian._check_usable()
    if (first, count) == (0, jacobian.m):
        return jacobian
    known: dict[int, tuple[Tensor | slice, RowNumbers]] = {}

    def part(use: Use) -> Use:
        if id(use.rows) not in known:
            rows = use.rows.tensor
            blocks = ((rows >= first) & (rows < first + count)).nonzero().flatten()
            known[id(use.rows)] = as_slice(blocks), RowNumbers(rows[blocks] - first)
        return use.select(*known[id(use.rows)])

    uses = [[part(use) for use in mine] for mine in jacobian._uses]
    derived = [each.with_uses(part) for each in jacobian._derived]
    losses = jacobian.losses[first : first + count]
    return _like(jacobian, count, losses, uses, derived)


def _like(
    jacobian: FactoredJacobian,
    m: int,
    losses: Tensor,
    uses: list[list[Use]],
    derived: Sequence[Derived] = (),
) -> FactoredJacobian:
    return FactoredJacobian(
        jacobian.names,
        jacobian.parameters,
        m,
        losses,
        uses,
        derived,
        fallbacks=jacobian.fallbacks,
    )


def _formed(uses: Sequence[Use], rows: RowNumbers, shape: Sequence[int]) -> RowsUse:
    """The rows themselves, in float64 where float32 would lose products of tokens."""
    best = [use.best() if isinstance(use, ConvolutionUse) else use for use in uses]
    index = [RowNumbers(torch.searchsorted(rows.tensor, use.rows.tensor)) for use in uses]

    def formed(parts: Sequence[Use]) -> Tensor:
        widest = max((use.values[-1] for use in parts), key=lambda tensor: tensor.dtype.itemsize)
        out = wide(widest[:0]).new_empty(len(rows), *parts[0].plane)
        for k, (use, where) in enumerate(zip(parts, index, strict=True)):
            (use.add_rows if k else use.write_rows)(out, where, 0, use.plane[0])
        return out.flatten(1)

    out = formed([use.wide() for use in best])
    if out.dtype == torch.float32 and not out.is_meta:
        # of rows near 1 nothing was lost; else tokens tell, and they are many
        squares = torch.linalg.vector_norm(out, dim=1).square()
        if not bool(within(squares, SQUARES).all()) and not all(map(in_range, uses)):
            out = formed([use.double() for use in best])
    return RowsUse(out.view(len(rows), *shape), rows)


def _occurring(uses: Sequence[Use]) -> RowNumbers:
    if all(use.rows is uses[0].rows for use in uses):
        return uses[0].rows.occurring
    return RowNumbers(torch.cat([use.rows.tensor for use in uses]).unique())


def _of_leaves(derived: Derived) -> list[Use]:
    return [use for _, uses in derived.leaves for use in uses]


def storages(uses: Iterable[Use]) -> dict[int, int]:
    """Memory of some uses, in bytes by what holds it, which has no address of its own on meta."""
    storages = [tensor.untyped_storage() for use in uses for tensor in use.values]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _itemsize(uses: Sequence[Use]) -> int:
    return max(4, max(use.values[-1].dtype.itemsize for use in uses))
