"""From the tensors that met samples back to the parameters they were computed from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.capture.ranges import in_range, unit
from gradsurgery.capture.trace import Leaf, misused
from gradsurgery.capture.uses import MatrixUse, RowsUse, Use, Within, placed, plane_of
from gradsurgery.capture.views import Simple
from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import wide

ROOM = 16.0  # sums of many values near 1 leave float16's range


def oriented(use: Use, simple: Simple) -> Use | None:
    """A use of a leaf as a use of its parameter; None where it cannot be turned."""
    if simple.transposed:
        if not isinstance(use, (MatrixUse, RowsUse)):
            return None
        if isinstance(use, MatrixUse) and use.left.dim() != 3:
            return None
        use = use.transposed()
    if simple.height is not None:
        use = Within(use, simple.start, simple.height)
    plane = plane_of(simple.parameter.shape)
    if use.plane[0] != plane[0] and isinstance(use, RowsUse):
        return use.viewed(plane)
    return use


class Derived:
    """Leaves computed from the same parameters, and the way back: their graph, kept.

    Rows of leaves are turned into rows of parameters by vmapped vector-Jacobian products.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.leaves: list[tuple[Leaf, list[Use]]] = []

    def with_uses(self, change: Callable[[Use], Use]) -> "Derived":
        """The same leaves with other uses."""
        other = Derived(self.parameters)
        other.leaves = [(leaf, [change(use) for use in uses]) for leaf, uses in self.leaves]
        return other

    def rows(self, m: int) -> list[Tensor]:
        """[m, *p.shape] per parameter."""
        totals = [wide(p.new_zeros(m, *p.shape)) for p in self.parameters]
        for leaf, uses in self.leaves:
            dense = dense_rows(uses, m).view(m, *leaf.shape)
            for total, grad in zip(totals, self._back([leaf], [dense], True), strict=True):
                if grad is not None:
                    total += grad
        return totals

    def combine(self, weights: Tensor, far: bool = False) -> list[Tensor | None]:
        """w^T J per parameter; `far` as for `Plane.update`."""
        grads = []
        for leaf, uses in self.leaves:
            mine = [weights[placed(use.rows, weights.device)] for use in uses]
            precise = far and not all(map(in_range, uses, mine))
            out = wide(uses[0].values[-1][:0]).new_zeros(uses[0].plane)
            out = out.double() if precise else out
            for use, w in zip(uses, mine, strict=True):
                (use.double() if precise else use.wide()).combine(w, out)
            grads.append(out.view(leaf.shape))
        grads = self._back([leaf for leaf, _ in self.leaves], grads, False)
        return [
            None if grad is None else grad.to(p.dtype)
            for grad, p in zip(grads, self.parameters, strict=True)
        ]

    def _back(
        self, leaves: Sequence[Leaf], grads: Sequence[Tensor], batched: bool
    ) -> list[Tensor | None]:
        """Gradients of the parameters from those of leaves, in float32 or wider.

        On the way those that a dtype would not hold, and any in float16, are scaled to be near 1.
        """
        dtypes = [leaf.place[0]._input_metadata[leaf.place[1]].dtype for leaf in leaves]
        scale = None
        if any(
            dtype == torch.float16 or dtype.itemsize < g.dtype.itemsize == 8
            for g, dtype in zip(grads, dtypes, strict=True)
        ):
            scale = torch.stack([unit(g, batched) for g in grads]).amax(0) * ROOM
            grads = [g.double() / _over(scale, g) for g in grads]
        grads = [g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        edges = [GradientEdge(*leaf.place) for leaf in leaves]
        try:
            found = [
                g if g is None else wide(g) for g in vjps(edges, self.parameters, grads, batched)
            ]
        except RuntimeError as error:
            why = misused(error)
            if why is None:
                raise
            raise InputError(why) from error
        if scale is None:
            return found
        return [g if g is None else (g.double() * _over(scale, g)).to(g.dtype) for g in found]


def _over(scale: Tensor, grad: Tensor) -> Tensor:
    """One for all, [], or one a row, [m], beside gradients that begin with the rows."""
    return scale.reshape(*scale.shape, *[1] * (grad.dim() - scale.dim()))


def vjps(
    outputs: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Tensor], batched: bool
) -> Sequence[Tensor | None]:
    """autograd.grad, with a leading dimension of vectors if `batched`; the graph stays."""
    options = {"retain_graph": True, "allow_unused": True}
    if not batched:
        return torch.autograd.grad(outputs, inputs, grads, **options)
    try:
        return torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, **options)
    except RuntimeError:  # an operation that vmap cannot batch
        each = [
            torch.autograd.grad(outputs, inputs, [g[i] for g in grads], **options)
            for i in range(len(grads[0]))
        ]
        return [
            None if g[0] is None else torch.stack([part.to_dense() for part in g])
            for g in zip(*each, strict=True)
        ]


def unmixed(like: Tensor) -> AbstractContextManager:
    """Every tensor is computed with in its own dtype, inside a user's autocast too."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def dense_rows(uses: Sequence[Use], m: int) -> Tensor:
    """[m, H, W]: the rows themselves."""
    out = wide(uses[0].values[-1][:0]).new_zeros(m, *uses[0].plane)
    for use in uses:
        use = use.wide()
        use.add_rows(out, use.rows, 0, use.plane[0])
    return out
