"""From the tensors that met samples back to the parameters they were computed from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.capture.trace import Leaf, misused
from gradsurgery.capture.uses import MatrixUse, RowsUse, Use, Within, placed, plane_of
from gradsurgery.capture.views import Simple
from gradsurgery.errors import InputError
from gradsurgery.grads import own
from gradsurgery.ops._inputs import wide


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
        totals = [p.new_zeros(m, *p.shape) for p in self.parameters]
        for leaf, uses in self.leaves:
            dense = dense_rows(uses, m).view(m, *leaf.shape)
            for total, grad in zip(totals, self._back([leaf], [dense], True), strict=True):
                if grad is not None:
                    total += grad
        return totals

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """w^T J per parameter, each in memory of its own."""
        return own(self._back([leaf for leaf, _ in self.leaves], self._sums(weights), False))

    def _sums(self, weights: Tensor) -> list[Tensor]:
        """w^T J per leaf."""
        grads = []
        for leaf, uses in self.leaves:
            out = wide(uses[0].values[-1][:0]).new_zeros(uses[0].plane)
            for use in uses:
                use.wide().combine(weights[placed(use.rows, weights.device)], out)
            grads.append(out.view(leaf.shape))
        return grads

    def _back(
        self, leaves: Sequence[Leaf], grads: Sequence[Tensor], batched: bool
    ) -> list[Tensor | None]:
        metas = [leaf.place[0]._input_metadata[leaf.place[1]] for leaf in leaves]
        grads = [g.to(meta.dtype) for g, meta in zip(grads, metas, strict=True)]
        edges = [GradientEdge(*leaf.place) for leaf in leaves]
        try:
            return list(vjps(edges, self.parameters, grads, batched))
        except RuntimeError as error:
            why = misused(error)
            if why is None:
                raise
            raise InputError(why) from error


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
