"""What the Jacobian of two samples tells of the whole batch's: the path of every parameter."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.uses import RowsUse, Use, Within
from gradsurgery.ops._inputs import wide

SLOW, STORED, UNREACHED = "one row at a time", "stored rows", "not reached"


def at_batch(
    jacobian: FactoredJacobian, rows: Tensor, m: int, summed: Sequence[int] = ()
) -> FactoredJacobian:
    """What two samples' Jacobian would be for samples of these rows; without memory.

    `summed`: those of the rows that exist, as sums of what was made in parts.
    """
    # tensors of device "meta" have shapes only: paths are planned from these
    like = [p.detach().to("meta") for p in jacobian.parameters]
    derived = {id(p) for part in jacobian._derived for p in part.parameters}
    alone = rows.masked_fill(torch.isin(rows, torch.tensor(summed, dtype=torch.int64)), -1)
    known: dict[tuple[int, int], RowNumbers] = {}

    def exist(parameter: Tensor, which: Sequence[int]) -> RowsUse:
        blocks = wide(parameter.new_empty(0)).new_empty(len(which), *parameter.shape)
        return RowsUse(blocks, RowNumbers(torch.tensor(which, dtype=torch.int64, device="cpu")))

    uses: list[list[Use]] = []
    for p, meta, mine in zip(jacobian.parameters, like, jacobian._uses, strict=True):
        made: list[Use] = []
        if id(p) in derived or (mine and m == 1):
            made = [exist(meta, range(m))]
        elif mine:
            made = [_scaled(use, alone, known) for use in mine if bool((alone >= 0).any())]
            made += [exist(meta, summed)] if summed else []
        uses.append(made)
    losses = torch.zeros(m, device="meta")
    return FactoredJacobian(jacobian.names, jacobian.parameters, m, losses, uses)


def _scaled(use: Use, rows: Tensor, known: dict[tuple[int, int], RowNumbers]) -> Use:
    """A use of two samples as one of many, which are like those two in turns."""
    if isinstance(use, Within):
        return Within(_scaled(use.inner, rows, known), use.start, use.plane[0])
    if isinstance(use, TokenUse):
        return _tokens_scaled(use, rows)
    counts = int((use.rows.tensor == 0).sum()), int((use.rows.tensor == 1).sum())
    if counts not in known:
        samples = (rows >= 0).nonzero().flatten()
        # every other sample is like the first of the two, and has as many blocks
        blocks = torch.tensor(counts, device="cpu")[samples % 2]  # of each sample
        known[counts] = RowNumbers(rows[samples].repeat_interleave(blocks))
    part = copy.copy(use)
    part.rows = known[counts]
    for name in use.tensors:
        tensor = getattr(use, name)
        setattr(part, name, tensor.new_empty(len(part.rows), *tensor.shape[1:], device="meta"))
    return part


def _tokens_scaled(use: TokenUse, rows: Tensor) -> TokenUse:
    samples = (rows >= 0).nonzero().flatten()
    mine = [use.which[use.rows.tensor == k] for k in (0, 1)]  # of each of the two
    each = [mine[k] for k in (samples % 2).tolist()]
    lengths = torch.tensor([len(which) for which in each], device="cpu")
    which, order = torch.cat(each).sort(stable=True)
    left, right = (
        side.new_empty(len(which), side.shape[1], device="meta") for side in (use.left, use.right)
    )
    known = RowNumbers(rows[samples].repeat_interleave(lengths)[order])
    return TokenUse(which, left, right, known, use.matrices, use.inputs)


def paths_of(jacobian: FactoredJacobian, whole: FactoredJacobian) -> dict[str, str]:
    """How the Gramian of each parameter is got, by name; `whole` is `jacobian` at the batch."""
    slow = {name for fallback in jacobian.fallbacks for name in fallback.parameters}
    derived = {id(p) for part in jacobian._derived for p in part.parameters}
    found = {}
    for name, p, plane in zip(whole.names, whole.parameters, whole._planes, strict=True):
        if name in slow:
            found[name] = SLOW
        elif id(p) in derived:
            found[name] = STORED
        elif plane is None:
            found[name] = UNREACHED
        else:
            found[name] = STORED if plane.plan is None else plane.plan.path
    return found
