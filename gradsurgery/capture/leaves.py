"""From the tensors that met samples back to the parameters they were computed from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.capture.graph import variable_of
from gradsurgery.capture.hooks import linear, near, scale_of
from gradsurgery.capture.probe import steady, unsteady
from gradsurgery.capture.ranges import in_range, unit
from gradsurgery.capture.snapshot import as_before, functions
from gradsurgery.capture.tokens import TokenUse
from gradsurgery.capture.trace import Leaf, misused
from gradsurgery.capture.uses import MatrixUse, RowsUse, Use, Within, plane_of
from gradsurgery.capture.views import Simple
from gradsurgery.errors import InputError
from gradsurgery.grads import own
from gradsurgery.ops._inputs import wide

ROOM = 16.0  # sums of many values near 1 leave float16's range


def oriented(use: Use, simple: Simple) -> Use | None:
    """A use of a leaf as a use of its parameter; None where it cannot be turned."""
    if simple.transposed:
        if not isinstance(use, (MatrixUse, TokenUse, RowsUse)):
            return None
        use = use.transposed()
    if simple.height is not None:
        use = Within(use, simple.start, simple.height)
    # a view may have another first dimension. Blocks that exist are reshaped; others keep the
    # leaf's plane, and are derived if the parameter has uses of another
    plane = plane_of(simple.parameter.shape)
    if use.plane[0] != plane[0] and isinstance(use, RowsUse):
        return use.viewed(plane)
    return use


class Derived:
    """Leaves computed from the same parameters, and the way back: their graph, kept.

    Rows of leaves are turned into rows of parameters by vector-Jacobian products: vmapped, and
    sums of rows by one, unless hooks or Functions on the way are `bent`, not linear. Hooks that may
    be there, `hooked`, do not meet vmap.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], bent: bool = False, hooked: bool = False
    ) -> None:
        self.parameters, self.bent, self.hooked = list(parameters), bent, hooked
        self.leaves: list[tuple[Leaf, list[Use]]] = []

    def with_uses(self, change: Callable[[Use], Use]) -> "Derived":
        """The same leaves with other uses."""
        other = Derived(self.parameters, self.bent, self.hooked)
        other.leaves = [(leaf, [change(use) for use in uses]) for leaf, uses in self.leaves]
        return other

    def is_linear(self) -> bool:
        """Whether the way back from all leaves together is linear, by random gradients."""
        generator = torch.Generator().manual_seed(0)

        def gradients() -> list[Tensor]:
            return [
                torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu")
                for leaf, _ in self.leaves
            ]

        one, other = gradients(), gradients()
        leaves = [leaf for leaf, _ in self.leaves]
        asked = Derived(self.parameters, bent=True)  # which scales nothing
        dtypes = {*(m.dtype for m in metas_of(leaves)), *(p.dtype for p in self.parameters)}
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

        def back(grads: Sequence[Tensor], factor: float = 1) -> list[Tensor]:
            found = asked._back(leaves, [self._on_device(g * factor) for g in grads], False)
            return [
                p.new_zeros(()) if g is None else g
                for g, p in zip(found, self.parameters, strict=True)
            ]

        # the same twice, first: what answers differently each time is refused, not called bent
        whole, scale = back(one), scale_of(dtypes)
        if not all(map(steady, whole, back(one))):
            names = {node.name() for leaf in leaves for node in functions([leaf.place[0]])}
            raise InputError(unsteady(", ".join(sorted(names)) or "a hook"))
        if any(
            not linear(a, b, factor)
            for factor in (-scale, 1 / scale)
            for a, b in zip(whole, back(one, factor=factor), strict=True)
        ):
            return False
        # and a sum: a gradient over its norm, times another norm, passes the factors
        sums = back([a + b for a, b in zip(one, other, strict=True)])
        both = zip(whole, back(other), sums, strict=True)
        return all(near(c, a + b, a.abs() + b.abs(), coarsest) for a, b, c in both)

    def _on_device(self, grad: Tensor) -> Tensor:
        return grad.to(self.parameters[0].device)

    def of(self, parameters: Sequence[nn.Parameter]) -> "Derived":
        """The same leaves, for those of these parameters alone that they are computed from."""
        own = {id(parameter) for parameter in parameters}
        mine = [p for p in self.parameters if id(p) in own]
        other = Derived(mine, self.bent, self.hooked)
        other.leaves = self.leaves
        return other

    def rows(self, m: int) -> list[Tensor]:
        """[m, *p.shape] per parameter."""
        totals = [wide(p.new_zeros(m, *p.shape)) for p in self.parameters]
        # a way that is bent takes all leaves' gradients at once, as a backward pass does. Else one
        # leaf after another, so that rows of one only exist at a time
        groups = [self.leaves] if self.bent else [[each] for each in self.leaves]
        for group in groups:
            leaves = [leaf for leaf, _ in group]
            dense = [dense_rows(uses, m).view(m, *leaf.shape) for leaf, uses in group]
            for total, grad in zip(totals, self._back(leaves, dense, True), strict=True):
                if grad is not None:
                    total += grad
        return totals

    def combine(
        self, weights: Tensor, far: bool = False, exact: bool = False
    ) -> list[Tensor | None]:
        """w^T J per parameter, each in memory of its own; `far`, `exact` as for `Plane.update`."""
        if self.bent:  # the way back of a sum is not the sum of the ways back
            rows = self.rows(len(weights))
            sums = [torch.tensordot(weights.double(), row.double(), 1) for row in rows]
        else:
            leaves = [leaf for leaf, _ in self.leaves]
            sums = own(self._back(leaves, self._sums(weights, far), False))
        return [
            grad if grad is None or exact else grad.to(p.dtype)
            for grad, p in zip(sums, self.parameters, strict=True)
        ]

    def _sums(self, weights: Tensor, far: bool) -> list[Tensor]:
        """w^T J per leaf."""
        grads = []
        for leaf, uses in self.leaves:
            mine = [weights[use.rows.on(weights.device)] for use in uses]
            precise = far and not all(map(in_range, uses, mine))
            out = wide(uses[0].values[-1][:0]).new_zeros(uses[0].plane)
            out = out.double() if precise else out
            for use, w in zip(uses, mine, strict=True):
                (use.double() if precise else use.wide()).combine(w, out)
            grads.append(out.view(leaf.shape))
        return grads

    def _back(
        self, leaves: Sequence[Leaf], grads: Sequence[Tensor], batched: bool
    ) -> list[Tensor | None]:
        """Gradients of the parameters from those of leaves, in float32 or wider.

        On the way those that a dtype would not hold, and any in float16, are scaled to be near 1,
        if it is linear.
        """
        dtypes = [meta.dtype for meta in metas_of(leaves)]
        # rows may be of 1e-30 or 1e30, which a leaf in 16 bits does not hold. A way back that is
        # linear gives the same for what is scaled by a power of two
        scale = None
        if not self.bent and any(
            dtype == torch.float16 or dtype.itemsize < g.dtype.itemsize == 8
            for g, dtype in zip(grads, dtypes, strict=True)
        ):
            scale = torch.stack([unit(g, batched) for g in grads]).amax(0) * ROOM
            grads = [g.double() / _over(scale, g) for g in grads]
        grads = [g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        edges = [GradientEdge(*leaf.place) for leaf in leaves]
        nodes = functions(leaf.place[0] for leaf in leaves)
        try:
            found = [
                g if g is None else wide(g)
                for g in vjps(edges, self.parameters, grads, batched, nodes, not self.hooked)
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


def metas_of(leaves: Sequence[Leaf]) -> list[Any]:
    """Of each leaf, its dtype and the like."""
    found = []
    for leaf in leaves:
        node, nr = leaf.place
        variable = variable_of(node)
        found.append(node._input_metadata[nr] if variable is None else variable)
    return found


def vjps(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    grads: Sequence[Tensor],
    batched: bool,
    nodes: Sequence[Any] = (),
    vmapped: bool = True,
) -> Sequence[Tensor | None]:
    """autograd.grad, with a leading dimension of vectors if `batched`; the graph stays.

    Args:
        nodes: Functions on the way, which keep what they kept, vector by vector. They are no code
            for vmap: what they do to its tensors may end the process.
        vmapped: whether vmap may meet what else is on the way.
    """
    options = {"retain_graph": True, "allow_unused": True}
    with as_before(nodes) as snapshot:
        if not batched:
            return snapshot.owned(torch.autograd.grad(outputs, inputs, grads, **options))
        if vmapped and not nodes:
            try:
                found = torch.autograd.grad(
                    outputs, inputs, grads, is_grads_batched=True, **options
                )
                return snapshot.owned(found)
            except RuntimeError:  # an operation that vmap cannot batch
                pass
        # one vector after another, each with what Functions keep as it was
        each = []
        for i in range(len(grads[0])):
            snapshot.put_back()
            found = torch.autograd.grad(outputs, inputs, [g[i] for g in grads], **options)
            each.append([None if g is None else g.to_dense() for g in snapshot.owned(found)])
        return [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Every tensor is computed with in its own dtype, inside a user's autocast too."""
    kind = like.device.type
    known = torch.amp.is_autocast_available(kind)  # of tensors on meta there is none
    enabled = known and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def dense_rows(uses: Sequence[Use], m: int) -> Tensor:
    """[m, H, W]: the rows themselves."""
    out = wide(uses[0].values[-1][:0]).new_zeros(m, *uses[0].plane)
    for use in uses:
        use = use.wide()
        use.add_rows(out.view(m, *use.plane), use.rows, 0, use.plane[0])
    return out
