"""Collects the uses of every parameter, by one backward pass or a few."""

import warnings
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gradsurgery.capture import grouped, picking  # noqa: F401  which register what they know
from gradsurgery.capture.broadcast import OnTheWay, Sum, added_up
from gradsurgery.capture.descent import Arrived, CoupledByHook, Descent, not_linear
from gradsurgery.capture.fallback import Fallback
from gradsurgery.capture.formulas import Finish, prepare
from gradsurgery.capture.graph import Place, ordered, roots, under, variable_of
from gradsurgery.capture.hooked import Hooked
from gradsurgery.capture.hooks import Sampled
from gradsurgery.capture.layout import Layout, compress
from gradsurgery.capture.leaves import Derived, oriented
from gradsurgery.capture.partial_rows import PartialRows
from gradsurgery.capture.probe import dense
from gradsurgery.capture.recipe import retrace
from gradsurgery.capture.recomputed import read_again, recomputed_once
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.rowwise import Rowwise
from gradsurgery.capture.separate import separate
from gradsurgery.capture.snapshot import Snapshot, as_before, functions, is_function
from gradsurgery.capture.split import settled
from gradsurgery.capture.trace import Junction, Leaf, Trace
from gradsurgery.capture.unknown import by_row, of_broadcast, one_by_one
from gradsurgery.capture.uses import RowsUse, Use, on_one_plane, plane_of
from gradsurgery.capture.weighted import expect_linear, expect_sums, out_of_proportion
from gradsurgery.errors import InputError
from gradsurgery.grads import own
from gradsurgery.spread import is_split

if TYPE_CHECKING:
    from gradsurgery.capture.tape import Tape


class Collector:
    """One backward pass, or a few: what comes to junctions becomes uses of the parameters.

    `run` in order: trace the graph; choose parameters that go the slow way; take the passes, each
    of which asks formulas what to keep before it starts and finishes the uses when it has ended;
    give what a leaf met to the parameter it is a view of, or note it as derived.
    """

    def __init__(self, owner: "Tape", losses: Tensor, uses: list[list[Use]]) -> None:
        self.owner, self.losses, self.uses = owner, losses, uses
        self.column = {id(p): k for k, p in enumerate(owner.parameters)}
        self.derived: list[Derived] = []
        self.weighted: Snapshot | None = None
        self.start: Snapshot | None = None  # what Functions kept before the first of several passes
        # whether hooks and Functions were watched in all passes, which shows what they write to
        self.all_watched: bool | None = None
        self.summed = False  # whether rows are summed over several passes
        self.unsure = False  # whether the ways back from leaves are linear
        self.rowwise = Rowwise(owner)
        self.bent: list[Fallback] = []
        self.unknown: dict[str, dict[str, None]] = {}  # operations without a formula: parameters

    @property
    def fallbacks(self) -> list[Fallback]:
        """What was got one row at a time."""
        unknown = [
            Fallback(operation, tuple(names), "no formula")
            for operation, names in self.unknown.items()
        ]
        return [*self.bent, *self.rowwise.fallbacks(), *unknown]

    def run(self, rows: RowNumbers, retain_graph: bool, weighted: bool = False) -> Snapshot | None:
        """Goes down from the losses.

        Args:
            rows: [numel] of each loss; -1 for none.
            retain_graph: keep the graph for others.
            weighted: backward passes of weighted losses will follow: what they need to find as it
                was is returned.
        """
        outputs = partial(_outputs, self.losses, rows)
        self.hooked = Hooked(self.losses, outputs, self.owner.parameters)
        if not weighted:
            self._run(rows, retain_graph)
            return None
        self.weighted = self.start = snapshot = Snapshot(functions([roots(self.losses)[0]]))
        self._run(rows, True)
        # the ways back from leaves were not watched: what they write to is not known
        if self.all_watched and not self.unsure:
            snapshot.forget_the_rest()
        return snapshot

    def _run(self, rows: RowNumbers, retain_graph: bool) -> None:
        occurring = rows.occurring
        if len(occurring) == 1:
            self._whole(rows, int(occurring.tensor), retain_graph)
            return
        apart: list[list[Use]] = []
        with recomputed_once():
            partial = self.owner.partial
            if partial is not None and partial.rows and self._asks(partial):
                rows = self._without_partial(rows, partial)
                if not len(rows.occurring):
                    return
                apart, self.uses[:] = list(self.uses), [[] for _ in self.uses]
            self._descend(rows, retain_graph)
        if self.unsure:
            self._bend()
        if self.rowwise.reasons:
            for k, use in self.rowwise.rows(self.losses, rows, self.start, self.hooked):
                self.uses[k] = [] if use is None else [use]
            if self.weighted is not None:
                sums = list(self.rowwise.sums(self.uses))
                expect_linear(self.losses, _outputs(self.losses, rows), sums, self.weighted)
        self._reach_all()
        for k, mine in enumerate(apart):
            self._add(k, *mine)
        fallbacks = self.fallbacks
        if fallbacks:
            # from here: run, Tape.jacobian, and the line that called that
            warnings.warn("; ".join(map(str, fallbacks)), UserWarning, stacklevel=4)

    def _descend(self, rows: RowNumbers, retain_graph: bool) -> None:
        passes = self._passes(rows)
        for coupling, parameters in passes[0][1].coupled.items():
            self.rowwise.couple(coupling, parameters)
        for p in self.owner.parameters:
            if p._backward_hooks:
                self.rowwise.hooked(self.column[id(p)])
        self.rowwise.complete(leaf for _, traced in passes for leaf in traced.leaves)
        last = len(passes) - 1
        # several passes read what nodes saved several times
        if last > 0:
            read_again(ordered(roots(self.losses)[0]))
        hooked = any(self.hooked.among(traced.sampled) for _, traced in passes)
        if self.owner.partial is not None:
            self.owner.partial.hooked |= hooked
            self.owner.partial.met |= hooked
        # a row that occurs in two passes is a sum of both, which hooks have to be linear for
        counts = [part.occurring.tensor for part, _ in passes]
        self.summed = sum(map(len, counts)) > len(torch.cat(counts).unique())
        if self.start is None and (last > 0 or self.rowwise.reasons or hooked):
            self.start = Snapshot(functions([roots(self.losses)[0]]))
        for i, (part, traced) in enumerate(passes):
            # the graph is needed once more for rows got by a pass each, and for the ways back
            again = bool(self.rowwise.reasons or self.derived)
            if i > 0 and self.start is not None:
                self.start.put_back()
            try:
                self._pass(part, traced, retain_graph or i < last or again)
            except CoupledByHook as hook:
                # nothing was collected by the pass yet; taken again, it leaves out what is below
                for k in self.rowwise.couple_by_hook(hook):
                    self.uses[k] = []
                self.rowwise.complete(leaf for _, each in passes for leaf in each.leaves)
                if self.start is not None:
                    self.start.put_back()
                self._pass(part, traced, True)

    def _passes(self, rows: RowNumbers) -> list[tuple[RowNumbers, Trace]]:
        """One pass of all losses; several, if samples meet in the one but in none of these."""
        traced = self._trace(rows)
        if traced.coupled or traced.scattered:
            parts = separate(self.losses, rows)
            if len(parts) > 1:
                tried = [(part, self._trace(part)) for part in parts]
                if not any(each.coupled or each.scattered for _, each in tried):
                    return tried
        return [(rows, traced)]

    def _reach_all(self) -> None:
        """Parameters in the graph get a gradient, though it be zero, as from a backward pass."""
        made = {self.column[id(p)] for derived in self.derived for p in derived.parameters}
        # a use without blocks says so: the parameter is reached, by a gradient of zero
        unused = {k for k, uses in enumerate(self.uses) if not uses} - made
        if not unused:
            return
        _, parameters = under(roots(self.losses))
        for k in {self.column[id(p)] for p in parameters if id(p) in self.column} & unused:
            none = self.owner.parameters[k].new_zeros(0, *self.owner.parameters[k].shape)
            rows = RowNumbers(torch.zeros(0, dtype=torch.int64, device="cpu"))
            self._add(k, RowsUse(none.detach(), rows))

    def _trace(self, rows: RowNumbers) -> Trace:
        occurring = rows.occurring.tensor
        if len(occurring) <= 1:
            return Trace()
        count = int(occurring[-1]) + 1
        layout = compress(rows.tensor.view(self.losses.shape))
        owner, place = self.owner, roots(self.losses)
        return retrace(owner.model, place, layout, owner.parameters, count)

    def _asks(self, partial: PartialRows) -> bool:
        """Whether rows that others are added to get a pass each, which shows if they may be."""
        hooked, functions = self._bending()
        return hooked or bool(partial.new(functions))

    def _without_partial(self, rows: RowNumbers, partial: PartialRows) -> RowNumbers:
        """Those left, after a backward pass for each row that others are added to."""
        place = roots(self.losses)[0]
        read_again(ordered(place))
        start, numbers = Snapshot(functions([place])), rows.tensor
        mine = sorted(partial.rows & set(rows.occurring.tensor.tolist()))
        for row in mine:
            self._whole(RowNumbers(numbers.where(numbers == row, -1)), row, True)
            start.put_back()
        left = torch.isin(numbers, torch.tensor(mine, device="cpu"), invert=True)
        return RowNumbers(numbers.where(left, -1))

    def _whole(self, rows: RowNumbers, row: int, retain_graph: bool) -> None:
        """All losses make one row: an ordinary backward pass."""
        # one row is right whatever hooks do; a sum with rows of other passes need not be
        owner, partial = self.owner, self.owner.partial
        sums, multiples, new = self._questions(rows, row)
        asks = sums or multiples
        snapshot = self.weighted or Snapshot(functions([roots(self.losses)[0]]) if asks else ())
        held = [p for p in self.owner.parameters if p.requires_grad]  # the loss may freeze some
        with nullcontext() if partial is None else partial.asking(new):
            found = torch.autograd.grad(
                self.losses,
                held,
                _outputs(self.losses, rows),
                retain_graph=retain_graph or asks,
                allow_unused=True,
            )
        by_parameter = dict(zip(map(id, held), found, strict=True))
        grads: list[Tensor | None] = [by_parameter.get(id(p)) for p in self.owner.parameters]
        del found, by_parameter
        if asks:
            grads = [None if g is None else g.to_dense() for g in snapshot.owned(grads)]
            named = zip(owner.names, owner.parameters, grads, strict=True)
            parts = [(name, p, g, g.abs()) for name, p, g in named if g is not None]
            known = self.losses, _outputs(self.losses, rows), parts, snapshot
            if partial is None:
                expect_linear(*known)
            elif sums:
                expect_sums(*known)
            if partial is not None and multiples:
                partial.bent = partial.bent or out_of_proportion(*known) or ""
            self.all_watched = True
        only = RowNumbers(torch.tensor([row], device="cpu"))
        for k, parameter in enumerate(self.owner.parameters):
            if is_split(parameter) and (grad := grads[k]) is not None:
                self._add(k, RowsUse(settled(grad, parameter).unsqueeze(0), only))
                grads[k] = None
        for k, grad in enumerate(own(grads)):  # each may be scaled in its place, as a `.grad`
            if grad is not None:
                self._add(k, RowsUse(grad.unsqueeze(0), only))

    def _questions(self, rows: RowNumbers, row: int) -> tuple[bool, bool, list[Any]]:
        """What hooks and Functions are asked of a row that has a pass of its own.

        Returns: whether what they make of sums; whether what of multiples; those that say whether
            the answer holds for others of their kind.
        """
        partial = self.owner.partial
        if self.weighted is None and partial is None:
            return False, False, []
        hooked, functions = self._bending()
        if partial is None:
            return hooked or bool(functions), hooked or bool(functions), []
        new = partial.new(functions)
        met = hooked or bool(functions if partial.always else new)
        partial.hooked |= hooked
        partial.met |= met
        if row not in partial.rows:
            return False, False, []
        multiples = partial.scaled and (hooked or bool(new))
        sums = met and int((rows.tensor >= 0).sum()) > 1
        return sums, multiples, new if multiples else []

    def _bending(self) -> tuple[bool, list[Any]]:
        """What may not be linear: whether there is a hook, and the Functions."""
        nodes = [n for n in ordered(roots(self.losses)[0]) if variable_of(n) is None]
        hooked = any(p._backward_hooks for p in self.owner.parameters)
        return hooked or self.hooked.among(nodes), list(filter(is_function, nodes))

    def _pass(self, rows: RowNumbers, traced: Trace, retain_graph: bool) -> None:
        occurring = rows.occurring
        if len(occurring) <= 1:
            if len(occurring):
                self._whole(rows, int(occurring.tensor), retain_graph)
            return
        leaves = [leaf for leaf in traced.leaves if not self.rowwise.has(leaf)]
        watched = self._watched(traced)
        met = [junction for leaf in leaves for junction in leaf.junctions]
        # formulas read what nodes saved, here; the pass reads it again, and frees it
        read_again(ordered(roots(self.losses)[0]) if watched is not None else (j.node for j in met))
        finishes = {
            id(junction): prepare(junction, leaf.shape)
            for leaf in leaves
            for junction in leaf.junctions
        }
        unshared = [
            each
            for each in traced.unshared
            if self.column[id(each.parameter)] not in self.rowwise.reasons
        ]
        # a Function may give memory that it writes to later: what comes from one is copied
        given = {
            place for node in traced.sampled if is_function(node) for place in node.next_functions
        }
        plain = watched is None and self.start is None
        early = OnTheWay(met if plain else (), finishes, given)
        places: dict[Place, None] = dict.fromkeys(
            (junction.node, nr)
            for junction in met
            if junction.node not in early.nodes
            for nr in junction.outs
        )
        places.update(dict.fromkeys(each.place for each in unshared))
        if not places:
            return
        unknown = [junction for junction in met if finishes[id(junction)] is None]
        own_unknown = [junction for junction in unknown if is_function(junction.node)]
        fresh = [place for place in places if place in given]
        # autograd calls a node only if something below it is asked for
        called = {junction.node for junction in own_unknown} | {node for node, _ in fresh}
        below = [
            leaf.place
            for leaf in leaves
            if watched is not None or any(j.node in called for j in leaf.junctions)
        ]
        descent = Descent(
            self.losses,
            places,
            below=below,
            handing=dict.fromkeys(j.node for j in own_unknown if j.whole is not None),
            fresh=fresh,
            watched=watched,
            hooked=self.hooked.among(traced.sampled),
            weighted=self.weighted,
            start=self.start,
            summed=self.summed and watched is not None,
            taking=dict.fromkeys(early.nodes, early.take),
        )
        self.all_watched = watched is not None and self.all_watched is not False
        before = Snapshot(j.node for j in own_unknown if j.whole is None)
        arrived = descent.run(rows, self.owner.model, retain_graph or bool(unknown))
        with torch.no_grad():
            for each in unshared:
                self._add_unshared(each.parameter, arrived.grads[each.place], each.layout)
            # what nodes saved, and the gradients, are both there now: uses can be made
            early.end()
            made = [self._uses_of(leaf, finishes, early.uses, arrived, before) for leaf in leaves]
            uses = iter(added_up([use for mine in made for use in mine]))
            for leaf, mine in zip(leaves, made, strict=True):
                if mine:
                    self._assign(leaf, list(islice(uses, len(mine))))

    def _watched(self, traced: Trace) -> Sampled | None:
        """The operations that gradients pass, where a hook or a Function may do more to them."""
        if self.hooked.among(traced.sampled):
            return traced.sampled
        asks = self.summed or self.weighted is not None
        if asks and any(is_function(node) for node in traced.sampled):
            return traced.sampled
        return None

    def _uses_of(
        self,
        leaf: Leaf,
        finishes: dict[int, Finish | None],
        early: dict[int, Use],
        arrived: Arrived,
        before: Snapshot,
    ) -> list[Use | Sum]:
        made: list[Use | Sum] = []
        for junction in leaf.junctions:
            if id(junction) in early:
                made.append(early[id(junction)])
                continue
            mine: list[Tensor | None] = [None] * len(junction.node._input_metadata)
            for nr in junction.outs:
                mine[nr] = arrived.grads.get((junction.node, nr))
            if all(grad is None for grad in mine):
                continue
            finish = finishes[id(junction)]
            if finish is not None:
                grad = mine[0]
                assert grad is not None
                made.append(finish(grad))
            else:
                made.append(self._asked(leaf, junction, mine, arrived, before))
        return made

    def _asked(
        self,
        leaf: Leaf,
        junction: Junction,
        grads: list[Tensor | None],
        arrived: Arrived,
        before: Snapshot,
    ) -> RowsUse:
        """The rows of a junction that no formula knows: the cheapest way that serves."""
        use = of_broadcast(junction, grads, leaf.shape)
        if use is not None:
            return use
        handed = arrived.handed.get(junction.node)
        if handed is not None:  # the pass itself called the operation, and no row met another
            child, nr = junction.node.next_functions[junction.k]
            return by_row(junction, dense(handed[junction.k], child, nr), grads, leaf.shape)
        if junction.whole is None:
            names = [self.owner.names[k] for k in self._columns(leaf)]
            self.unknown.setdefault(junction.node.name(), {}).update(dict.fromkeys(names))
        if not is_function(junction.node):
            return one_by_one(junction, grads, leaf.shape)
        with as_before([junction.node]):
            before.put_back()  # the pass may have changed what it kept
            return one_by_one(junction, grads, leaf.shape)

    def _columns(self, leaf: Leaf) -> list[int]:
        """Of the parameters that a leaf is computed from."""
        return [self.column[id(p)] for p in leaf.below[1] if id(p) in self.column]

    def _add_unshared(self, parameter: nn.Parameter, grad: Tensor | None, layout: Layout) -> None:
        """A parameter whose every element belongs to one row."""
        if grad is None:
            return
        elements = layout.elements(tuple(parameter.shape)).to(grad.device)
        rows = layout.numbers.occurring
        blocks = [grad.masked_fill(elements != row, 0) for row in rows.tensor.tolist()]
        self._add(self.column[id(parameter)], RowsUse(torch.stack(blocks), rows))

    def _add(self, k: int, *uses: Use | None) -> bool:
        """Whether the uses could be added to those that parameter k has."""
        together = on_one_plane([*self.uses[k], *uses], plane_of(self.owner.parameters[k].shape))
        if together is not None:
            self.uses[k] = together
        return together is not None

    def _assign(self, leaf: Leaf, made: list[Use]) -> None:
        """To the parameter the leaf is a view of, or to those it is computed from."""
        itself = variable_of(leaf.place[0]) is not None
        hooked = not itself and self.hooked.among(leaf.below[0])
        simple = None if hooked else leaf.simple
        if simple is not None:
            # a view: its uses are the parameter's, turned; no way back has to be taken
            turned = [oriented(use, simple) for use in made]
            if self._add(self.column[id(simple.parameter)], *turned):
                return
        below = [self.owner.parameters[k] for k in self._columns(leaf)]
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
        names = [self.owner.names[self.column[id(p)]] for p in every.parameters]
        if self.weighted is not None:
            raise InputError(not_linear(f"what {', '.join(names)} passes through"))
        every.bent = True
        every.hooked = any(derived.hooked for derived in self.derived)
        self.derived = [every]
        self.bent.append(Fallback("", tuple(names), "not linear"))


def _outputs(losses: Tensor, rows: RowNumbers) -> Tensor:
    """What a backward pass of all rows starts from."""
    taken = (rows.tensor >= 0).to(losses.dtype).view(losses.shape)
    return taken.to(losses.device)
