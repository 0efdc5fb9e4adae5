"""One backward pass, or a few, and what the meetings of parameters with samples kept of it."""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gradsurgery.capture.carriers import base_name
from gradsurgery.capture.descent import Arrived, Descent, Mixed, not_linear
from gradsurgery.capture.formulas import prepare
from gradsurgery.capture.graph import Place, ordered, roots, under
from gradsurgery.capture.hooks import Sampled
from gradsurgery.capture.layout import Layout, compress
from gradsurgery.capture.leaves import Derived, oriented
from gradsurgery.capture.probe import dense
from gradsurgery.capture.recomputed import read_again, recomputed_once
from gradsurgery.capture.rowwise import Rowwise, compiled
from gradsurgery.capture.snapshot import Kept, as_before, functions, is_function
from gradsurgery.capture.trace import Leaf, Meeting, Trace, trace
from gradsurgery.capture.unknown import apart, one_by_one, spread
from gradsurgery.capture.uses import RowsUse, Use, numbers, occurring, plane_of
from gradsurgery.capture.views import resolve, shape_of
from gradsurgery.capture.weighted import expect_linear
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
        self.weighted: Kept | None = None
        self.start: Kept | None = None  # what Functions kept before the first of several passes
        self.asked: bool | None = None  # whether all passes showed what weighted losses change
        self.summed = False  # whether rows are summed over several passes
        self.unsure = False  # whether the ways back from leaves are linear
        self.rowwise = Rowwise(owner)
        self.warned: list[str] = []
        self.slow: dict[str, dict[str, None]] = {}  # operations without a rule: names

    def run(self, rows: Tensor, retain_graph: bool, weighted: bool = False) -> Kept | None:
        """Goes down from the losses.

        Args:
            rows: [numel] of each loss; -1 for none.
            retain_graph: keep the graph for others.
            weighted: backward passes of weighted losses will follow: what they need to find as it
                was is returned.
        """
        if not weighted:
            self._run(rows, retain_graph)
            return None
        self.weighted = self.start = kept = Kept(functions([roots(self.losses)[0]]))
        self._run(rows, True)
        if self.asked and not self.unsure:  # no pass here showed what those of leaves change
            kept.forget_the_rest()
        return kept

    def _run(self, rows: Tensor, retain_graph: bool) -> None:
        distinct = occurring(rows)
        if len(distinct) == 1:
            self._whole(rows, int(distinct), retain_graph)
            return
        with recomputed_once():
            self._descend(rows, retain_graph)
        if self.unsure:
            self._bend()
        if self.rowwise.reasons:
            for k, use in self.rowwise.rows(self.losses, rows, self.start):
                self.uses[k] = [] if use is None else [use]
            if self.weighted is not None:
                sums = list(self.rowwise.sums(self.uses))
                expect_linear(self.losses, self._outputs(rows), sums, self.weighted)
            self.warned.append(self.rowwise.warning())
        self._reach_all()
        self.warned += [
            f"{', '.join(names)}: there is no rule for {operation}, so the rows are got one by "
            f"one, exactly but slowly, and stored.{compiled(operation)}"
            for operation, names in self.slow.items()
        ]
        if self.warned:
            warnings.warn("; ".join(self.warned), UserWarning, stacklevel=4)

    def _descend(self, rows: Tensor, retain_graph: bool) -> None:
        found = self._trace(rows)
        passes = [(rows, found)]
        if found.mixed or found.scattered:
            apart = self._apart(rows)
            if len(apart) > 1:
                tried = [(part, self._trace(part)) for part in apart]
                if not any(f.mixed or f.scattered for _, f in tried):
                    passes = tried
        for mixing, parameters in passes[0][1].mixed.items():
            self.rowwise.coupled(mixing, parameters)
        for p in self.owner.parameters:
            if p._backward_hooks:
                self.rowwise.reasons.setdefault(self.place[id(p)], "it has a hook")
        self.rowwise.spread(leaf for _, found in passes for leaf in found.leaves)
        last = len(passes) - 1
        if last > 0:
            read_again(ordered(roots(self.losses)[0]))
        hooked = any(self.owner.clock.may_be_hooked(found.sampled) for _, found in passes)
        counts = [occurring(part) for part, _ in passes]
        self.summed = sum(map(len, counts)) > len(torch.cat(counts).unique())
        if self.start is None and (last > 0 or self.rowwise.reasons or hooked):
            self.start = Kept(functions([roots(self.losses)[0]]))
        for k, (part, found) in enumerate(passes):
            again = bool(self.rowwise.reasons or self.derived)
            keep = retain_graph or k < last or again
            if k > 0 and self.start is not None:
                self.start.put_back()
            try:
                self._pass(part, found, keep)
            except Mixed as mixed:
                for k in self.rowwise.mixed(mixed):
                    self.uses[k] = []
                self.rowwise.spread(leaf for _, each in passes for leaf in each.leaves)
                if self.start is not None:
                    self.start.put_back()
                self._pass(part, found, True)

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

    def _outputs(self, rows: Tensor) -> Tensor:
        kept = (rows >= 0).to(self.losses.dtype).view(self.losses.shape)
        return kept.to(self.losses.device)

    def _whole(self, rows: Tensor, row: int, retain_graph: bool) -> None:
        """All losses make one row: an ordinary backward pass."""
        asks = (self.weighted is not None or self.owner.summed) and self._may_bend()
        kept = self.weighted or Kept(functions([roots(self.losses)[0]]) if asks else ())
        grads = list(
            torch.autograd.grad(
                self.losses,
                self.owner.parameters,
                self._outputs(rows),
                retain_graph=retain_graph or asks,
                allow_unused=True,
            )
        )
        if asks:
            grads = [None if g is None else g.to_dense() for g in kept.owned(grads)]
            self._expect_linear(grads, rows, kept)
            self.asked = True
        only = torch.tensor([row], device="cpu")
        for k, grad in enumerate(own(grads)):  # each may be scaled in its place, as a `.grad`
            if grad is not None:
                self._add(k, RowsUse(grad.unsqueeze(0), only))

    def _may_bend(self) -> bool:
        """Whether there is a hook or a Function, which may not be linear."""
        nodes = [n for n in ordered(roots(self.losses)[0]) if not hasattr(n, "variable")]
        hooked = any(p._backward_hooks for p in self.owner.parameters)
        return hooked or self.owner.clock.may_be_hooked(nodes) or any(map(is_function, nodes))

    def _expect_linear(self, grads: Sequence[Tensor | None], rows: Tensor, kept: Kept) -> None:
        named = zip(self.owner.names, self.owner.parameters, grads, strict=True)
        parts = [(name, p, g, g.abs()) for name, p, g in named if g is not None]
        weighted = self.weighted is not None
        expect_linear(self.losses, self._outputs(rows), parts, kept, weighted)

    def _pass(self, rows: Tensor, found: Trace, retain_graph: bool) -> None:
        distinct = occurring(rows)
        if len(distinct) <= 1:
            if len(distinct):
                self._whole(rows, int(distinct), retain_graph)
            return
        leaves = [leaf for leaf in found.leaves if not self.rowwise.has(leaf)]
        watched = self._watched(found)
        met = [meeting for leaf in leaves for meeting in leaf.meetings]
        read_again(ordered(roots(self.losses)[0]) if watched is not None else (m.node for m in met))
        finishes = {
            id(meeting): prepare(meeting, leaf.shape)
            for leaf in leaves
            for meeting in leaf.meetings
        }
        direct = [
            d for d in found.direct if self.place[id(d.parameter)] not in self.rowwise.reasons
        ]
        places: dict[Place, None] = dict.fromkeys(
            (meeting.node, nr) for meeting in met for nr in meeting.outs
        )
        places.update(dict.fromkeys(d.place for d in direct))
        if not places:
            return
        unknown = [
            (leaf, meeting)
            for leaf in leaves
            for meeting in leaf.meetings
            if finishes[id(meeting)] is None
        ]
        own = [(leaf, meeting) for leaf, meeting in unknown if is_function(meeting.node)]
        functions_here = [node for node in found.sampled if is_function(node)]
        given = {place for node in functions_here for place in node.next_functions}
        fresh = [place for place in places if place in given]
        called = {meeting.node for _, meeting in own} | {node for node, _ in fresh}
        below = [
            leaf.place
            for leaf in leaves
            if watched is not None or any(m.node in called for m in leaf.meetings)
        ]
        descent = Descent(
            self.losses,
            places,
            below=below,
            handing=dict.fromkeys(meeting.node for _, meeting in own if meeting.whole is not None),
            fresh=fresh,
            watched=watched,
            hooked=self.owner.clock.may_be_hooked(found.sampled),
            weighted=self.weighted,
            start=self.start,
            summed=self.summed and watched is not None,
        )
        self.asked = watched is not None and self.asked is not False
        before = Kept(meeting.node for _, meeting in own if meeting.whole is None)
        arrived = descent.run(rows, self.owner.model, retain_graph or bool(unknown))
        with torch.no_grad():
            for d in direct:
                self._direct(d.parameter, arrived.grads[d.place], d.layout)
            for leaf in leaves:
                made = self._uses_of(leaf, finishes, arrived, before)
                if made:
                    self._place(leaf, made)

    def _watched(self, found: Trace) -> Sampled | None:
        """The operations that gradients pass, where a hook or a Function may do more to them."""
        if self.owner.clock.may_be_hooked(found.sampled):
            return found.sampled
        asks = self.summed or self.weighted is not None
        if asks and any(is_function(node) for node in found.sampled):
            return found.sampled
        return None

    def _uses_of(self, leaf: Leaf, finishes: dict, arrived: Arrived, before: Kept) -> list[Use]:
        made = []
        for meeting in leaf.meetings:
            mine: list[Tensor | None] = [None] * len(meeting.node._input_metadata)
            for nr in meeting.outs:
                mine[nr] = arrived.grads[meeting.node, nr]
            if all(grad is None for grad in mine):
                continue
            finish = finishes[id(meeting)]
            if finish is not None:
                grad = mine[0]
                assert grad is not None
                use = finish(grad)
            else:
                use = self._asked(leaf, meeting, mine, arrived, before)
            if numbers(use.rows).some_none:
                use = use.select((use.rows >= 0).nonzero().flatten())
            made.append(use)
        return made

    def _asked(
        self,
        leaf: Leaf,
        meeting: Meeting,
        grads: list[Tensor | None],
        arrived: Arrived,
        before: Kept,
    ) -> RowsUse:
        """The rows of a meeting that no junction knows."""
        use = spread(meeting, grads, leaf.shape)
        if use is not None:
            return use
        handed = arrived.handed.get(meeting.node)
        if handed is not None:
            child, nr = meeting.node.next_functions[meeting.k]
            return apart(meeting, dense(handed[meeting.k], child, nr), grads, leaf.shape)
        if meeting.whole is None:
            self._slow(leaf, meeting)
        if not is_function(meeting.node):
            return one_by_one(meeting, grads, leaf.shape)
        with as_before([meeting.node]):
            before.put_back()  # the pass may have changed what it kept
            return one_by_one(meeting, grads, leaf.shape)

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
        itself = hasattr(leaf.place[0], "variable")
        hooked = not itself and self.owner.clock.may_be_hooked(leaf.below[0])
        simple = None if hooked else resolve(leaf.place)
        if simple is not None:
            turned = [oriented(use, simple) for use in made]
            if self._add(self.place[id(simple.parameter)], *turned):
                return
        below = [p for p in leaf.below[1] if id(p) in self.place]
        derived = Derived(below, hooked=hooked)
        derived.leaves.append((leaf, made))
        self.derived.append(derived)
        self.unsure |= hooked or any(map(is_function, leaf.below[0]))

    def _bend(self) -> None:
        """Leaves whose way back is not linear take it together, row by row."""
        every = Derived(list({id(p): p for d in self.derived for p in d.parameters}.values()))
        every.leaves = [leaf for derived in self.derived for leaf in derived.leaves]
        if every.is_linear():
            return
        names = ", ".join(self.owner.names[self.place[id(p)]] for p in every.parameters)
        if self.weighted is not None:
            raise InputError(not_linear(f"what {names} passes through"))
        every.bent = True
        every.hooked = any(derived.hooked for derived in self.derived)
        self.derived = [every]
        self.warned.append(
            f"{names}: a hook or a Function on what is computed from them is not linear in its "
            "gradient, so the rows are got one by one, exactly but slowly, and stored"
        )


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
