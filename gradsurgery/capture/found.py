"""One backward pass, or a few, and what the meetings of parameters with samples kept of it."""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.capture.fallback import one_by_one, spread
from gradsurgery.capture.junctions import prepare
from gradsurgery.capture.layout import Layout, compress
from gradsurgery.capture.leaves import Derived, oriented, vjps
from gradsurgery.capture.rules import OPAQUE, base_name
from gradsurgery.capture.trace import Leaf, Meeting, Mixing, Trace, roots, trace, under
from gradsurgery.capture.uses import RowsUse, Use, numbers, occurring, plane_of
from gradsurgery.capture.views import Place, resolve, shape_of
from gradsurgery.errors import InputError
from gradsurgery.grads import own

if TYPE_CHECKING:
    from gradsurgery.capture.tape import Tape


class Found:
    """Collects the uses of every parameter, pass by pass."""

    def __init__(self, owner: "Tape", losses: Tensor, uses: list[list[Use]]) -> None:
        self.owner, self.losses, self.uses = owner, losses, uses
        self.place = {id(p): k for k, p in enumerate(owner.parameters)}
        self.derived: list[Derived] = []
        self.rowwise: dict[int, str] = {}  # parameters whose rows are got one by one: why
        self.warned: list[str] = []
        self.slow: dict[str, dict[str, None]] = {}  # operations without a rule: names

    def run(self, rows: Tensor, retain_graph: bool) -> None:
        distinct = occurring(rows)
        if len(distinct) == 1:
            self._whole(rows, int(distinct), retain_graph)
            return
        found = self._trace(rows)
        passes = [(rows, found)]
        if found.mixed or found.scattered:
            apart = self._apart(rows)
            if len(apart) > 1:
                tried = [(part, self._trace(part)) for part in apart]
                if not any(f.mixed or f.scattered for _, f in tried):
                    passes = tried
        for mixing, parameters in passes[0][1].mixed.items():
            self._coupled(mixing, parameters)
        for p in self.owner.parameters:
            if p._backward_hooks:
                self.rowwise.setdefault(self.place[id(p)], "it has a hook")
        self._spread([leaf for _, found in passes for leaf in found.leaves])
        last = len(passes) - 1
        rowwise = bool(self.rowwise)
        for k, (part, found) in enumerate(passes):
            self._pass(part, found, retain_graph or k < last or rowwise or bool(self.derived))
        if rowwise:
            self._row_by_row(rows)
        self._reach_all()
        self.warned += [
            f"{', '.join(names)}: there is no rule for {operation}, so the rows are got one by "
            f"one, exactly but slowly, and stored.{_compiled(operation)}"
            for operation, names in self.slow.items()
        ]
        if self.warned:
            warnings.warn("; ".join(self.warned), UserWarning, stacklevel=3)

    def _reach_all(self) -> None:
        """Parameters in the graph get a gradient, though it be zero, as from a backward pass."""
        made = {self.place[id(p)] for derived in self.derived for p in derived.parameters}
        unused = {k for k, uses in enumerate(self.uses) if not uses} - made
        if not unused:
            return
        _, parameters = under(roots(self.losses))
        for k in {self.place[id(p)] for p in parameters if id(p) in self.place} & unused:
            none = self.owner.parameters[k].new_zeros(0, *self.owner.parameters[k].shape)
            self._add(k, RowsUse(none.detach(), torch.zeros(0, dtype=torch.int64, device="cpu")))

    def _trace(self, rows: Tensor) -> Trace:
        distinct = occurring(rows)
        if len(distinct) <= 1:
            return Trace()
        count = int(distinct[-1]) + 1
        layout = compress(rows.view(self.losses.shape))
        return trace(roots(self.losses), layout, self.owner.parameters, count)

    def _apart(self, rows: Tensor) -> list[Tensor]:
        """Rows in passes that do not meet: one per trailing index, or per tensor joined."""
        shape = self.losses.shape
        if len(shape) > 1:
            numbers = torch.arange(rows.numel(), device="cpu") % shape[1:].numel()
            return [torch.where(numbers == k, rows, -1) for k in range(shape[1:].numel())]
        node = self.losses.grad_fn
        if node is None or base_name(node) not in ("Stack", "Cat"):
            return []
        sizes = [1] * len(rows)
        if base_name(node) == "Cat":
            sizes = [0 if c is None else shape_of((c, nr))[0] for c, nr in node.next_functions]
            if sum(sizes) != len(rows):
                return []
        parts, start = [], 0
        for size in sizes:
            part = torch.full_like(rows, -1)
            part[start : start + size] = rows[start : start + size]
            parts.append(part)
            start += size
        return parts

    def _coupled(self, mixing: Mixing, parameters: Sequence[nn.Parameter]) -> None:
        mine = sorted({self.place[id(p)] for p in parameters if id(p) in self.place})
        if not mine:
            return
        names = ", ".join(self.owner.names[k] for k in mine)
        operations, why = mixing
        if self.owner.coupled == "refuse" and why == OPAQUE:
            raise InputError(
                f"{operations} cannot be asked which of the losses use which of its inputs, so "
                f"the losses have no rows in what is below it: {names}.{_compiled(operations)} "
                "Use another operation, or ask for gs.tape(model, coupled='exact')"
            )
        if self.owner.coupled == "refuse":
            raise InputError(
                f"{operations} computes across samples{_modules(self.owner.model, operations)}, so "
                f"the losses have no rows of their own in what is below it: {names}. Call "
                "model.eval(), use another operation, or ask for gs.tape(model, coupled='exact')"
            )
        for k in mine:
            self.rowwise[k] = (
                f"nothing is known of {operations}"
                if why == OPAQUE
                else f"{operations} computes across samples"
            )

    def _spread(self, leaves: Sequence[Leaf]) -> None:
        """A tensor has all the parameters it is computed from got one by one, or none."""
        if not self.rowwise:
            return
        mine = [
            {self.place[id(p)] for p in leaf.below[1] if id(p) in self.place} for leaf in leaves
        ]
        more = True
        while more:
            more = False
            for ks in mine:
                known = ks & set(self.rowwise)
                if known and known != ks:
                    why = self.rowwise[min(known)]
                    self.rowwise.update(dict.fromkeys(ks - known, why))
                    more = True

    def _outputs(self, rows: Tensor) -> Tensor:
        kept = (rows >= 0).to(self.losses.dtype).view(self.losses.shape)
        return kept.to(self.losses.device)

    def _whole(self, rows: Tensor, row: int, retain_graph: bool) -> None:
        """All losses make one row: an ordinary backward pass."""
        grads = list(
            torch.autograd.grad(
                self.losses,
                self.owner.parameters,
                self._outputs(rows),
                retain_graph=retain_graph,
                allow_unused=True,
            )
        )
        only = torch.tensor([row], device="cpu")
        for k, grad in enumerate(own(grads)):  # each may be scaled in its place, as a `.grad`
            if grad is not None:
                self._add(k, RowsUse(grad.unsqueeze(0), only))

    def _pass(self, rows: Tensor, found: Trace, retain_graph: bool) -> None:
        distinct = occurring(rows)
        if len(distinct) <= 1:
            if len(distinct):
                self._whole(rows, int(distinct), retain_graph)
            return
        leaves = [leaf for leaf in found.leaves if not self._is_rowwise(leaf)]
        with _recomputed_once():
            finishes = {
                id(meeting): prepare(meeting, leaf.shape)
                for leaf in leaves
                for meeting in leaf.meetings
            }
        direct = [d for d in found.direct if self.place[id(d.parameter)] not in self.rowwise]
        places: dict[Place, int] = {}
        for leaf in leaves:
            for meeting in leaf.meetings:
                for nr in meeting.outs:
                    places.setdefault((meeting.node, nr), len(places))
        for d in direct:
            places.setdefault(d.place, len(places))
        if not places:
            return
        unknown = any(finish is None for finish in finishes.values())
        grads = list(
            torch.autograd.grad(
                self.losses,
                [GradientEdge(*place) for place in places],
                self._outputs(rows),
                retain_graph=retain_graph or unknown,
                allow_unused=True,
            )
        )
        with torch.no_grad():
            for d in direct:
                self._direct(d.parameter, grads[places[d.place]], d.layout)
            for leaf in leaves:
                made = self._uses_of(leaf, finishes, places, grads)
                if made:
                    self._place(leaf, made)

    def _is_rowwise(self, leaf: Leaf) -> bool:
        return bool(self.rowwise) and any(
            self.place.get(id(p)) in self.rowwise for p in leaf.below[1]
        )

    def _uses_of(
        self, leaf: Leaf, finishes: dict, places: dict[Place, int], grads: list
    ) -> list[Use]:
        made = []
        for meeting in leaf.meetings:
            mine = [None] * len(meeting.node._input_metadata)
            for nr in meeting.outs:
                mine[nr] = grads[places[(meeting.node, nr)]]
            if all(grad is None for grad in mine):
                continue
            finish = finishes[id(meeting)]
            if finish is not None:
                use = finish(mine[0])
            else:
                use = spread(meeting, mine, leaf.shape)
                if use is None:
                    use = one_by_one(meeting, mine, leaf.shape)
                    if meeting.whole is None:
                        self._slow(leaf, meeting)
            if numbers(use.rows).some_none:
                use = use.select((use.rows >= 0).nonzero().flatten())
            made.append(use)
        return made

    def _slow(self, leaf: Leaf, meeting: Meeting) -> None:
        names = {
            self.owner.names[self.place[id(p)]]: None for p in leaf.below[1] if id(p) in self.place
        }
        self.slow.setdefault(meeting.node.name(), {}).update(names)

    def _direct(self, parameter: nn.Parameter, grad: Tensor | None, layout: Layout) -> None:
        """A parameter whose every element belongs to one row."""
        if grad is None:
            return
        elements = layout.elements(tuple(parameter.shape)).to(grad.device)
        rows = occurring(layout.rows)
        blocks = torch.stack([grad.masked_fill(elements != row, 0) for row in rows.tolist()])
        self._add(self.place[id(parameter)], RowsUse(blocks, rows))

    def _add(self, k: int, *uses: Use | None) -> bool:
        alike = _alike([*self.uses[k], *uses], plane_of(self.owner.parameters[k].shape))
        if alike is not None:
            self.uses[k] = alike
        return alike is not None

    def _place(self, leaf: Leaf, made: list[Use]) -> None:
        """To the parameter the leaf is a view of, or to those it is computed from."""
        simple = resolve(leaf.place)
        if simple is not None:
            turned = [oriented(use, simple) for use in made]
            if self._add(self.place[id(simple.parameter)], *turned):
                return
        derived = Derived([p for p in leaf.below[1] if id(p) in self.place])
        derived.leaves.append((leaf, made))
        self.derived.append(derived)

    def _row_by_row(self, rows: Tensor) -> None:
        """Exact rows of some parameters, by a backward pass per row."""
        ks = sorted(self.rowwise)
        parameters = [self.owner.parameters[k] for k in ks]
        ids = occurring(rows)
        vectors = (rows == ids[:, None]).to(self.losses.dtype).to(self.losses.device)
        vectors = vectors.view(len(ids), *self.losses.shape)
        grads = vjps([self.losses], parameters, [vectors], True)
        for k, grad in zip(ks, grads, strict=True):
            self.uses[k] = [] if grad is None else [RowsUse(grad, ids)]
        why = sorted(set(self.rowwise.values()))
        names = ", ".join(self.owner.names[k] for k in ks)
        self.warned.append(
            f"{names}: {'; '.join(why)}, so the rows are got by a backward pass each and stored"
        )


def _recomputed_once() -> AbstractContextManager:
    """What a checkpoint recomputes, it recomputes once for all reads inside, where torch can."""
    group = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
    return nullcontext() if group is None else group()


def _alike(uses: Sequence[Use | None], plane: tuple[int, int]) -> list[Use] | None:
    """Uses that see one parameter as the same plane; None where they cannot."""
    planes = {use.plane for use in uses if use is not None and not isinstance(use, RowsUse)}
    plane = planes.pop() if planes else plane
    if planes:
        return None
    found: list[Use] = []
    for use in uses:
        if use is None or math.prod(use.plane) != math.prod(plane):
            return None
        if isinstance(use, RowsUse) and use.plane != plane:
            use = use.viewed(plane)
        found.append(use)
    return found


def _compiled(operations: str) -> str:
    return " Call the compiled model inside the tape." if "CompiledFunction" in operations else ""


def _modules(model: nn.Module, operation: str) -> str:
    """Which modules an operation is likely to be, for the message."""
    if "BatchNorm" not in operation:
        return ""
    names = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or not module.track_running_stats)
    ]
    return f" ({', '.join(names)} in training mode)" if names else ""
