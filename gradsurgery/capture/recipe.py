"""What a walk found, kept for graphs that are the same in all that it read.

A model's graph is nearly always that of the step before. A recipe has what a walk read of one, and
what followed, with numbers for its nodes: no node, and nothing that a node saved. Another graph is
matched node by node, what depends on values is asked again, and if all answers are equal, so is
what follows. Else there is a walk, and another recipe.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gradsurgery.capture.graph import Notes, Place, variable_of
from gradsurgery.capture.layout import Layout
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.trace import Junction, Leaf, Trace, Unshared, trace
from gradsurgery.capture.views import Simple

KEPT = 8  # recipes of a model: batches of a few shapes, which take turns
TRIED = 2  # graphs' worth of nodes that are compared: more would cost as much as a walk
RARELY = 16  # steps, of which one is compared, where none was followed for long
LARGE = 1 << 22  # numbers that the recipes of a model may hold; a node takes some 40
TABLES = 6  # times as many numbers as rows, at most, with the tables made of them
UNMET = object()  # in the place of a node that no edge has led to yet
UNTOLD = "CppFunction"  # the kind of nodes that have none of their own

_recipes = WeakIdKeyDictionary()  # `_Kept` by model
_lock = Lock()
_replays: ContextVar[bool] = ContextVar("replays", default=True)


@contextmanager
def walking_anew() -> Iterator[None]:
    """Inside, no recipe is followed and none is kept."""
    token = _replays.set(False)
    try:
        yield
    finally:
        _replays.reset(token)


def retrace(
    model: nn.Module, place: Place, layout: Layout, parameters: Sequence[nn.Parameter], count: int
) -> Trace:
    """As `trace`, by a recipe of the model's where one fits."""
    wanted, notes = {id(p) for p in parameters}, Notes()
    if not _replays.get():
        return trace(place, layout, wanted, count, notes)
    with _lock:
        kept = cast(_Kept, _recipes.setdefault(model, _Kept()))
        kept.missed += 1
        # a graph that changes in every step pays for little but its walks
        rare = kept.missed > KEPT and kept.missed % RARELY
        known = list(kept.recipes)
    if rare:
        return trace(place, layout, wanted, count, notes)
    compared, outdated = 0.0, None
    for recipe in known:
        nodes, part = recipe.matched(place, layout, count)
        compared += part
        if nodes is not None:
            found = recipe.follow(nodes, wanted)
            if found is not None:
                kept.keep(recipe, instead=recipe)
                return found
        if compared >= TRIED:
            outdated = recipe  # the one to come takes the place of one that did not fit
            break
    found = trace(place, layout, wanted, count, notes)
    recipe = Recipe(place, layout, count, notes, found)
    if recipe.told:
        kept.keep(recipe, instead=outdated, missed=kept.missed)
    return found


class _Kept:
    """The recipes of a model, those used last first, and the steps since one was followed."""

    def __init__(self) -> None:
        self.recipes: list[Recipe] = []
        self.missed = 0

    def keep(self, recipe: "Recipe", instead: "Recipe | None", missed: int = 0) -> None:
        with _lock:
            others = [each for each in self.recipes if each is not instead]
            self.recipes = [recipe, *others][:KEPT]
            while sum(each.size for each in self.recipes) > LARGE:
                self.recipes.pop()
            self.missed = missed


class _Met(NamedTuple):
    """A leaf, or a parameter that is not shared, by numbers of nodes and layouts."""

    node: int
    nr: int
    shape: tuple[int, ...]
    junctions: list[tuple[int, int, int, int | None]]  # node, k, outs, whole
    accumulating: int | None = None  # the node of the parameter that a leaf is a view of
    view: tuple = ()
    layout: int | None = None  # of one that is not shared


class _Numbered:
    """Layouts, and those of a node's outputs, by numbers: as they are before any step uses them."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, RowNumbers]] = {}
        self.layouts: dict[tuple[int, int], int] = {}
        self.outs: dict[tuple[tuple[int, int], ...], int] = {}

    def layout(self, layout: Layout) -> int:
        k, _ = self.rows.setdefault(id(layout.numbers), (len(self.rows), layout.numbers))
        return self.layouts.setdefault((layout.stride, k), len(self.layouts))

    def of(self, outs: dict[int, Layout]) -> int:
        key = tuple((nr, self.layout(layout)) for nr, layout in outs.items())
        return self.outs.setdefault(key, len(self.outs))


class Recipe:
    """What a walk read, its `notes`, and what it found.

    Attributes:
        size: how many numbers it holds.
        told: whether each parameter has one node, by which it is known.
    """

    def __init__(
        self, place: Place, layout: Layout, count: int, notes: Notes, found: Trace
    ) -> None:
        self._losses, self._of = (place[1], count, layout.stride), layout.rows
        nodes = list(notes.order)
        number: dict[Any, int] = {node: i for i, node in enumerate(nodes)}
        number[None] = len(nodes)
        variables = {i: v for i, node in enumerate(nodes) if (v := variable_of(node)) is not None}
        self.told = len({id(variable) for variable in variables.values()}) == len(variables)
        self._nodes, shared = [], {}
        for i, (node, following) in enumerate(notes.order.items()):
            edges = [(number[child], nr) for child, nr in following]
            shapes = None
            if node in notes.shapes and i not in variables:
                shapes = tuple(notes.shapes[node])
                if shapes not in shared:  # as they will be read, which is no tuple
                    shared[shapes] = [meta.shape for meta in node._input_metadata]
                shapes = shared[shapes]
            # a Function's kind may be one that its forward pass made, and hold what that knew
            self._nodes.append((weakref.ref(type(node)), edges, shapes))
        self._names = [(i, n.name()) for i, n in enumerate(nodes) if type(n).__name__ == UNTOLD]
        self._parameters = [(i, notes.shapes.get(nodes[i], (None,))[0]) for i in variables]
        self._numbers = []
        for node, read in notes.numbers.items():
            if not read:
                continue
            get = attrgetter(*read)
            self._numbers.append((number[node], get, get(node)))

        known = _Numbered()
        self._asked = [
            (ask, number[node], known.of(outs), rest, list(map(_alone, answers)))
            for ask, node, (outs, *rest), answers in notes.asked
        ]
        self._sampled = [(number[node], known.of(outs)) for node, outs in found.sampled.items()]
        accumulating = {id(variable): i for i, variable in variables.items()}

        def met(place: Place, shape: tuple[int, ...], junctions: list[Junction]) -> _Met:
            mine = []
            for junction in junctions:
                whole = None if junction.whole is None else known.layout(junction.whole)
                mine.append((number[junction.node], junction.k, known.of(junction.outs), whole))
            return _Met(number[place[0]], place[1], shape, mine)

        self._leaves = []
        for leaf in found.leaves:
            mine = met(leaf.place, leaf.shape, leaf.junctions)
            if leaf.simple is not None:
                parameter, *view = leaf.simple
                mine = mine._replace(accumulating=accumulating[id(parameter)], view=tuple(view))
            self._leaves.append(mine)
        self._unshared = [
            met(each.place, (), each.junctions)._replace(layout=known.layout(each.layout))
            for each in found.unshared
        ]
        self._coupled = [
            (coupling, [accumulating[id(parameter)] for parameter in parameters])
            for coupling, parameters in found.coupled.items()
        ]
        self._scattered = found.scattered
        # tables that a step makes of them, and copies on a GPU, are there in the next
        rows = [RowNumbers(numbers.tensor) for _, numbers in known.rows.values()]
        self._layouts = [Layout(stride, rows[k]) for stride, k in known.layouts]
        self._outs = list(known.outs)
        answered = [a.rows for *_, answers in self._asked for a in answers if isinstance(a, Layout)]
        held = (self._of, *(TABLES * [each.tensor for each in rows]), *answered)
        self.size = sum(each.untyped_storage().nbytes() // 8 for each in held) + 40 * len(nodes)

    def matched(self, place: Place, layout: Layout, count: int) -> tuple[list[Any] | None, float]:
        """The nodes of a graph by their numbers, if kinds, shapes and edges are what they were, and
        what part of them was compared."""
        if (place[1], count, layout.stride) != self._losses:
            return None, 0.0
        if not torch.equal(layout.rows, self._of):
            return None, 0.0
        nodes: list[Any] = [UNMET] * len(self._nodes) + [None]  # the last number is of no node
        nodes[0] = place[0]
        for i, (kind, edges, shapes) in enumerate(self._nodes):
            node = nodes[i]
            if type(node) is not kind():
                return None, i / len(self._nodes)
            if shapes is not None and [meta.shape for meta in node._input_metadata] != shapes:
                return None, i / len(self._nodes)
            following = node.next_functions
            if len(following) != len(edges):
                return None, i / len(self._nodes)
            for (child, nr), (k, known_nr) in zip(following, edges, strict=True):
                known = nodes[k]
                if known is UNMET:
                    nodes[k] = child
                elif known is not child:
                    return None, i / len(self._nodes)
                if nr != known_nr:
                    return None, i / len(self._nodes)
        nodes.pop()
        return (nodes if len(set(nodes)) == len(nodes) else None), 1.0  # no two are the same one

    def follow(self, nodes: list[Any], wanted: set[int]) -> Trace | None:
        """What a walk would find, without it; None where it would read something else."""
        if not self._reads_the_same(nodes, wanted):
            return None
        layouts = self._layouts
        outs = [{nr: layouts[k] for nr, k in each} for each in self._outs]
        for ask, i, of, rest, known in self._asked:
            answers = ask(nodes[i], outs[of], *rest, Notes())
            if not all(map(_same, answers, known)):
                return None
        return self._found(nodes, outs)

    def _reads_the_same(self, nodes: list[Any], wanted: set[int]) -> bool:
        for i, shape in self._parameters:
            variable = nodes[i].variable
            if (variable.shape if id(variable) in wanted else None) != shape:
                return False
        return all(nodes[i].name() == name for i, name in self._names) and all(
            get(nodes[i]) == known for i, get, known in self._numbers
        )

    def _found(self, nodes: list[Any], outs: list[dict]) -> Trace:
        layouts = self._layouts

        def junctions(each: _Met) -> list[Junction]:
            return [
                Junction(nodes[i], k, outs[of], None if whole is None else layouts[whole])
                for i, k, of, whole in each.junctions
            ]

        found = Trace(scattered=self._scattered)
        found.sampled = {nodes[i]: outs[of] for i, of in self._sampled}
        for each in self._leaves:
            leaf = Leaf((nodes[each.node], each.nr), each.shape, junctions(each))
            if each.accumulating is not None:
                leaf.simple = Simple(nodes[each.accumulating].variable, *each.view)
            found.leaves.append(leaf)
        for each in self._unshared:
            node = nodes[each.node]
            assert each.layout is not None
            found.unshared.append(
                Unshared(node.variable, (node, 0), layouts[each.layout], junctions(each))
            )
        for coupling, numbers in self._coupled:
            found.coupled[coupling] = [nodes[i].variable for i in numbers]
        return found


def _alone(answer: Layout | str | None) -> Layout | str | None:
    """A layout without the tables that steps make of its numbers."""
    return Layout(answer.stride, RowNumbers(answer.rows)) if isinstance(answer, Layout) else answer


def _same(a: Layout | str | None, b: Layout | str | None) -> bool:
    return a.same(b) if isinstance(a, Layout) and isinstance(b, Layout) else a == b
