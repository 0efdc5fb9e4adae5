"""A parameter that is several matrices, one below the other, each of which meets other tokens."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradsurgery.capture.plane import Plane, like_the_others
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import RowsUse, Use, Within
from gradsurgery.ops._inputs import wide

Lines = tuple[int, int]  # from the first on, up to the one behind the last


def plane_for(parameter: Tensor, uses: list[Use], group: int | None) -> Plane:
    """A Stack where the uses are of lines that do not meet; else one Plane."""
    there = like_the_others([use for use in uses if use.n])
    lines = cut(there)
    return Stack(parameter, there, lines, group) if lines else Plane(parameter, uses, group)


class Stack(Plane):
    """A Plane for each matrix: their Gramians add up, and their updates lie one below the other.

    So each takes its own way to the Gramian, and tokens of different experts never meet.
    """

    def __init__(
        self, parameter: Tensor, uses: list[Use], lines: dict[Lines, list[Use]], group: int | None
    ) -> None:
        self.parameter, self.uses, self.group, self.whole = parameter, uses, group, None
        planes = parameter.detach().reshape(uses[0].plane)
        self.sections = {
            (lo, hi): Plane(planes[lo:hi], mine, group) for (lo, hi), mine in lines.items()
        }
        plans = [plan for each in self.sections.values() if (plan := each.plan) is not None]
        self.plan = max(plans, key=lambda plan: plan.multiplications, default=None)

    def gramian(self, m: int, metric: Tensor | None, precise: bool = False) -> Tensor:
        total = torch.zeros(m, m, dtype=torch.float64, device=self.parameter.device)
        if metric is not None:
            metric = metric.reshape(self.uses[0].plane)
        for (lo, hi), plane in self.sections.items():
            total += plane.gramian(m, None if metric is None else metric[lo:hi], precise)
        return total

    def bounds(self, metric: Tensor | None) -> tuple[float, float] | None:
        # those that are formed are multiplied one by one here, in any range
        each = [p for p in self.sections.values() if metric is not None or p.formed is None]
        found = (plane.bounds(metric) for plane in each)
        return next((bounds for bounds in found if bounds is not None), None)

    def _lost(self, rows: Tensor, any_value: bool) -> bool:
        return any(plane._lost(rows, any_value) for plane in self.sections.values())

    def _sum(
        self,
        weights: Tensor,
        add: bool,
        release: bool,
        far: bool,
        into: Tensor | None = None,
        beta: float | None = None,
    ) -> Tensor:
        out, end = wide(self.parameter.detach()[:0]).new_empty(self.uses[0].plane), 0
        for (lo, hi), plane in self.sections.items():
            out[end:lo] = 0
            # a matrix may keep the plane of another row than the whole does
            known = beta if plane.group == self.group else None
            part = plane._sum(weights, add, release, far, out[lo:hi], known)
            if part.data_ptr() != out[lo:hi].data_ptr():  # a plane that was kept
                out[lo:hi] = part
            end = hi
        out[end:] = 0
        return out


def cut(uses: Sequence[Use]) -> dict[Lines, list[Use]] | None:
    """The uses of each matrix, in its order; None where they are not of such."""
    found: dict[Lines, list[Use]] = {}
    rows: list[RowsUse] = []
    for use in uses:
        if isinstance(use, Within):
            lines = use.start, use.start + use.inner.plane[0]
            found.setdefault(lines, []).append(use.inner)
        elif isinstance(use, TokenUse):
            for k, tokens in use.each():
                lines = k * use.height, (k + 1) * use.height
                found.setdefault(lines, []).append(use.of(tokens))
        elif isinstance(use, RowsUse):
            rows.append(use)
        else:
            return None
    order = sorted(found)
    if not order or any(before[1] > after[0] for before, after in pairwise(order)):
        return None
    height = uses[0].plane[0]
    if rows:  # which have all lines, those between too
        ends = [0, *(hi for _, hi in order)]
        starts = [*(lo for lo, _ in order), height]
        order = sorted(
            {*order, *(gap for gap in zip(ends, starts, strict=True) if gap[0] < gap[1])}
        )
    if order == [(0, height)]:
        return None
    return {
        (lo, hi): [
            *found.get((lo, hi), ()),
            *(RowsUse(use.blocks.reshape(use.n, *use.plane)[:, lo:hi], use.rows) for use in rows),
        ]
        for lo, hi in order
    }
