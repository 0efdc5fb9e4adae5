"""The Gramian over all parameters of a Jacobian, and that of each.

A GPU is asked for small ones when it is asked whether they are right: these are on the CPU.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.paths import existing
from gradsurgery.capture.plane import Made, Plane, squares
from gradsurgery.capture.ranges import within
from gradsurgery.capture.stack import plane_for
from gradsurgery.capture.together import gramians
from gradsurgery.capture.uses import RowsUse
from gradsurgery.errors import NonFiniteError
from gradsurgery.ops._inputs import fetched

if TYPE_CHECKING:
    from gradsurgery.capture.factored import FactoredJacobian

TOGETHER = 1 << 22  # values of Gramians that are held, to be looked at together
SMALL = 1 << 20  # values that come from a GPU with the answer whether they are right


def zeros(jacobian: "FactoredJacobian") -> Tensor:
    m, device = jacobian.m, jacobian.parameters[0].device
    return torch.zeros(m, m, dtype=torch.float64, device=device)


def summed(jacobian: "FactoredJacobian", grams: Sequence[Tensor | None]) -> Tensor:
    """The Gramian over all parameters, from that of each; None has no part in it."""
    known = [gram for gram in grams if gram is not None]
    total = torch.zeros_like(known[0]) if known else zeros(jacobian)
    if total.is_cuda and known:
        return torch.stack(known).sum(0)  # two launches for all of them
    for gram in known:
        total += gram
    return total


def of_model(jacobian: "FactoredJacobian") -> Tensor:
    """The Gramian over all parameters, [m, m]; small ones, whose rows exist, in one call."""
    jacobian._check_usable(settle=False)
    m, planes = jacobian.m, jacobian._planes
    total, waiting = zeros(jacobian), []
    with torch.no_grad(), without_autocast(jacobian.parameters[0]):
        through = jacobian._through_derived()
        exist: dict[tuple, list[list[RowsUse]]] = {}
        for k, plane in enumerate(planes):
            if k in through:
                uses = [*through.pop(k), *jacobian._uses[k]]
                plane = plane_for(jacobian.parameters[k], uses, None)
            if plane is None:
                continue
            rows = plane.rows
            # blocks of one row are added up before they are multiplied where they are many
            if rows and sum(use.n for use in rows) <= 2 * m:
                exist.setdefault(one_call(rows), []).append(rows)
                continue
            waiting.append(plane)
            # rows of derived parameters are as large as the model m times: dropped at once
            if len(waiting) * m**2 > TOGETHER or plane is not planes[k]:
                total, _ = _added(jacobian, total, _made(waiting, m))
                waiting = []
        # rows that exist need no look: they are multiplied in any range
        for group in exist.values():
            total += existing(group, m)
        return _added(jacobian, total, _made(waiting, m))[1]


def _made(planes: Sequence[Plane], m: int) -> list[Made]:
    each = zip(planes, gramians(planes, m), strict=True)
    return [Made(plane, None, gram) for plane, gram in each]


def _added(
    jacobian: "FactoredJacobian", total: Tensor, made: Sequence[Made]
) -> tuple[Tensor, Tensor]:
    """`total` with the Gramians of some parameters, of which one look says if float32 held them.

    Twice, the second where it was looked at.
    """
    m = jacobian.m
    whole = total + summed(jacobian, [each.gram for each in made])
    looked = _held(jacobian, made, whole, [whole])
    if looked is not None:
        return whole, looked[0]
    whole = total + summed(jacobian, [plane.in_range(gram, m, own) for plane, own, gram in made])
    if not bool(whole.diagonal().isfinite().all()):
        _raise_not_finite(jacobian, of_parameters(jacobian, None))
    return whole, whole


def _held(
    jacobian: "FactoredJacobian", made: Sequence[Made], total: Tensor, wanted: list[Tensor]
) -> list[Tensor] | None:
    """What is wanted, from a GPU if it is small; None where float32 did not hold all products.

    Whether losses are finite is asked with it.
    """
    unsettled = [losses.values for losses in jacobian._unsettled]
    bounded = squares(made)
    asked = [*wanted, total.diagonal(), *bounded.values(), *unsettled]
    if total.is_cuda and sum(tensor.numel() for tensor in asked) <= SMALL:
        asked = fetched(asked)  # and all else is asked on the CPU
    found, (norms, *rest) = asked[: len(wanted)], asked[len(wanted) :]
    fine = norms.isfinite().all()
    for bounds, each in zip(bounded, rest, strict=False):
        fine &= within(each, bounds).all()
    finite = [each.isfinite().all().to(fine.device) for each in rest[len(bounded) :]]
    if bool(torch.stack([fine, *finite]).all()):
        jacobian._unsettled = []
        return found
    jacobian.settle()
    return found if finite and bool(fine) else None


def of_parameters(
    jacobian: "FactoredJacobian", metric: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """The Gramian of each parameter's rows, [m, m]; None for one that no loss depends on."""
    jacobian._check_usable(settle=False)
    m = jacobian.m
    grams: list[Tensor | None] = [None] * len(jacobian.parameters)
    made: dict[int, Made] = {}
    with torch.no_grad(), without_autocast(jacobian.parameters[0]):
        through = jacobian._through_derived()
        waiting: dict[int, Plane] = {}
        for k, plane in enumerate(jacobian._planes):
            own = None if metric is None else metric[k]
            if k in through:  # whose rows are not held for long
                parts = [*through.pop(k), *jacobian._uses[k]]
                plane = plane_for(jacobian.parameters[k], parts, None)
                grams[k] = plane.in_range(plane.gramian(m, own), m, own)
            elif plane is not None and own is None:
                waiting[k] = plane
            elif plane is not None:
                made[k] = Made(plane, own, plane.gramian(m, own))
        made |= zip(waiting, _made(list(waiting.values()), m), strict=True)
        for k, each in made.items():
            grams[k] = each.gram
        # a GPU is waited for once, not for each parameter
        wanted = [gram for gram in grams if gram is not None]
        looked = _held(jacobian, list(made.values()), summed(jacobian, grams), wanted)
        if looked is not None:
            there = iter(looked)
            return [None if gram is None else next(there) for gram in grams]
        for k, (plane, own, gram) in made.items():
            grams[k] = plane.in_range(gram, m, own)
    if not bool(summed(jacobian, grams).diagonal().isfinite().all()):
        _raise_not_finite(jacobian, grams)
    return grams


def _raise_not_finite(jacobian: "FactoredJacobian", grams: Sequence[Tensor | None]) -> None:
    for name, gram in zip(jacobian.names, grams, strict=True):
        bad = [] if gram is None else (~gram.diagonal().isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(f"losses: row {bad[0]} is not finite: its gradient of {name}")
    raise NonFiniteError("losses: the squared norm of a row overflows float64")


def one_call(uses: Sequence[RowsUse]) -> tuple:
    """What rows of several parameters must have in common to be taken in one call."""
    return uses[0].blocks.dtype, *(id(use.rows) for use in uses)
