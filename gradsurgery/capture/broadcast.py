"""What was broadcast, as biases and the weights of norms: its rows are sums over where it went.

A GPU takes the sums of a whole pass together: a launch costs the host as much as such a sum takes.
"""

import math
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsurgery.capture.graph import Place
from gradsurgery.capture.layout import Axis
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.trace import Junction
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.ops._backend import runs_triton
from gradsurgery.ops.row_sums import Summand, row_sums

Shape = tuple[int, ...]

HELD = 1 << 26  # bytes that wait to be summed together, while a pass goes on


class Sum(NamedTuple):
    """Rows that are still to be summed."""

    summand: Summand
    shape: Shape  # of the leaf
    rows: RowNumbers


class Factors(NamedTuple):
    """What a gradient is multiplied by, element by element: (x - mean) rstd."""

    x: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    each: int = 1  # neighbors among what is kept that share a mean and a rstd


def blocks(tensor: Tensor, axis: Axis | None, dim: int = 0) -> Tensor:
    """Samples first: [n, outer * inner] in place of dimension `dim`, other dimensions as before.

    A view where the samples are contiguous or alternate.
    """
    if axis is None:
        return tensor.unsqueeze(0)
    if dim == 0 and axis.outer == 1:
        return tensor.unflatten(0, (-1, axis.inner))
    split = tensor.unflatten(dim, (axis.outer, -1, axis.inner)).movedim(dim + 1, 0)
    return split.flatten(dim + 1, dim + 2)


def reduce_to(grad: Tensor, axis: Axis | None, shape: Shape) -> Tensor:
    """[n, *shape]: the sums of a gradient over what was broadcast, sample by sample."""
    parts = blocks(grad, axis, 0 if axis is None else axis.dim)
    over = _over(parts.shape, shape)
    if over:
        parts = parts.sum(over, keepdim=True)
    return parts.reshape(parts.shape[0], *shape)


def _over(parts: Sequence[int], shape: Shape) -> list[int]:
    """The dimensions of blocks [n, *] that are summed over, for what has a shape."""
    lead = len(parts) - 1 - len(shape)
    ones = [k for k, size in enumerate(shape) if size == 1 and parts[1 + lead + k] != 1]
    return [*range(1, 1 + lead), *[1 + lead + k for k in ones]]


def later(
    grad: Tensor, rows: RowNumbers, axis: Axis | None, broadcast: Shape, shape: Shape, by: Factors
) -> Sum | None:
    """The rows of a leaf as a sum for `added_up`; None where they are summed at once."""
    if by.each > 1 and axis is not None and axis.dim > 0:
        return None
    given = [tensor for tensor in (grad, *by[:3]) if tensor is not None]
    plain = all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device == grad.device
        and not (tensor.is_meta or tensor.is_neg() or tensor.is_complex())
        for tensor in given
    )
    if not plain or not runs_triton(grad, among=True):
        return None
    if by.x is None and len(rows) * math.prod(shape) == grad.numel():
        return None  # every value is a sum of its own

    def seen(tensor: Tensor | None, each: int = 1) -> Tensor | None:
        return None if tensor is None else _tokens(tensor, axis, broadcast, grad.shape, each)

    try:
        values = _tokens(grad, axis, broadcast, grad.shape)
        mean, rstd = seen(by.mean, by.each), seen(by.rstd, by.each)
        return Sum(Summand(values, seen(by.x), mean, rstd, by.each), shape, rows)
    except RuntimeError:  # no view has samples first, then all that is summed, then the rest
        return None


def _tokens(
    tensor: Tensor, axis: Axis | None, broadcast: Shape, out: Sequence[int], each: int = 1
) -> Tensor:
    """A view [n, T, C / each] of a tensor that is broadcast to the shape of a gradient."""
    if each > 1:  # groups in place of their channels
        out, broadcast = (out[0], out[1] // each, *out[2:]), (broadcast[0] // each, *broadcast[1:])
    tensor = tensor.detach().expand(out)
    if axis is None:
        parts = tensor.unsqueeze(0)
    else:
        dim = axis.dim
        split = tensor.unflatten(dim, (axis.outer, -1, axis.inner)).movedim(dim + 1, 0)
        merged = axis.outer * axis.inner
        parts = split.view(*split.shape[: dim + 1], merged, *split.shape[dim + 3 :])
    over = _over(parts.shape, broadcast)
    kept = [dim for dim in range(1, parts.dim()) if dim not in over]
    count = math.prod(parts.shape[dim] for dim in over)
    return parts.permute(0, *over, *kept).view(len(parts), count, -1)


def added_up(uses: Sequence[Use | Sum]) -> list[Use]:
    """The uses, with all sums taken together, without the blocks that belong to no row."""
    sums = [use for use in uses if isinstance(use, Sum)]
    totals = iter(row_sums([each.summand for each in sums]))
    found = [_rows(next(totals), use) if isinstance(use, Sum) else use for use in uses]
    return [
        use.select((use.rows.tensor >= 0).nonzero().flatten()) if use.rows.some_none else use
        for use in found
    ]


def _rows(total: Tensor, of: Sum) -> RowsUse:
    return RowsUse(total.view(len(total), *of.shape), of.rows)


class Broadcast(NamedTuple):
    """Makes of a gradient the rows of a leaf: the sums of `factor` of it."""

    factor: Callable[[Tensor], Tensor]
    rows: RowNumbers
    axis: Axis | None
    broadcast: Shape  # the leaf's shape as it met the gradient, [C, 1, 1] for channels
    shape: Shape
    by: Factors | None = None  # `factor` as a product, where it is one

    def __call__(self, grad: Tensor) -> Use | Sum:
        found = None if self.by is None else later(grad, *self[1:5], self.by)
        if found is not None:
            return found
        parts = reduce_to(self.factor(grad), self.axis, self.broadcast)
        same = self.shape == self.broadcast
        return RowsUse(parts if same else parts.view(len(parts), *self.shape), self.rows)


Finishes = dict[int, Callable[[Tensor], Use | Sum] | None]  # by the ids of junctions


class OnTheWay:
    """Sums that a pass takes on its way, so that what they are of is not held until its end.

    On a GPU, of nodes that the pass calls for the sake of others: norms below which something is
    whose gradient is wanted, as convolutions are. None of those `given` memory that may be written
    to again before the pass ends.
    """

    def __init__(
        self, junctions: Sequence[Junction], finishes: Finishes, given: Container[Place]
    ) -> None:
        self._finishes, self._waiting, self._held = finishes, list[tuple[int, Sum]](), 0
        self.uses: dict[int, Use] = {}  # by the junction's id
        by_node: dict[Any, list[Junction]] = {}
        for junction in junctions:
            by_node.setdefault(junction.node, []).append(junction)
        known = {
            node: all(self._sums(j) and not any((node, nr) in given for nr in j.outs) for j in met)
            for node, met in by_node.items()
        }
        places = {(j.node, nr) for j in junctions if not known[j.node] for nr in j.outs}
        self.nodes = {
            node: met
            for node, met in by_node.items()
            if known[node] and any(place in places for place in node.next_functions)
        }

    def _sums(self, junction: Junction) -> bool:
        finish = self._finishes[id(junction)]
        on_gpu = junction.node._input_metadata[0].device.type == "cuda"
        return on_gpu and isinstance(finish, Broadcast) and finish.by is not None

    def take(self, node: Any, grads: Sequence[Tensor | None]) -> None:
        """What a node takes."""
        grad = grads[0]
        if grad is None:
            return
        for junction in self.nodes[node]:
            finish = self._finishes.pop(id(junction))  # what it holds is needed no longer
            assert finish is not None
            made = finish(grad.detach())
            if isinstance(made, Sum):
                self._waiting.append((id(junction), made))
                self._held += sum(tensor.nbytes for tensor in made.summand.known)
            else:
                self.uses[id(junction)] = made
        if self._held > HELD:
            self.end()

    def end(self) -> None:
        """Sums what is left."""
        ids = [key for key, _ in self._waiting]
        sums = [made for _, made in self._waiting]
        self._waiting, self._held = [], 0
        self.uses.update(zip(ids, added_up(sums), strict=True))
