"""The walk through autograd's graph that finds where parameters meet samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from gradsurgery.capture.carriers import CARRIERS, COUPLED, MANY, OPAQUE, base_name
from gradsurgery.capture.graph import Noted, Notes, Place, ordered, under, variable_of
from gradsurgery.capture.layout import Layout, constant, merge
from gradsurgery.capture.probe import probe
from gradsurgery.capture.snapshot import is_function
from gradsurgery.capture.views import Simple, resolve
from gradsurgery.errors import InputError


@dataclass
class Junction:
    """Input k of the operation `node`, which is shared by all rows that its outputs belong to.

    `outs`: the layouts of those outputs that losses depend on, by their numbers.
    `whole`: of the input, where this operation alone keeps the rows apart in it; None elsewhere.
    """

    node: Any
    k: int
    outs: dict[int, Layout]
    whole: Layout | None = None


@dataclass
class Leaf:
    """A parameter, or a tensor computed from parameters alone, and where it meets samples."""

    place: Place
    shape: tuple[int, ...]
    junctions: list[Junction]
    coupled: bool = False  # rows meet in it without being summed in a parameter
    opaque: bool = False  # nothing is known of the rows in it
    simple: Simple | None = None  # how it comes from one parameter

    @cached_property
    def below(self) -> tuple[set[Any], list[nn.Parameter]]:
        """The nodes and the parameters that it is computed from, itself included."""
        return under(self.place)


class Coupling(NamedTuple):
    """Operations that have rows meet."""

    operations: str
    why: str  # COUPLED or OPAQUE


class Unshared(NamedTuple):
    """A parameter whose every element belongs to one row."""

    parameter: nn.Parameter
    place: Place
    layout: Layout
    junctions: list[Junction]


@dataclass
class Trace:
    """What a walk found."""

    leaves: list[Leaf] = field(default_factory=list)
    unshared: list[Unshared] = field(default_factory=list)
    # operations that samples went through, losses first, and the layouts of their outputs
    sampled: dict[Any, dict[int, Layout]] = field(default_factory=dict)
    # parameters below operations that have rows meet: they have no rows of their own
    coupled: dict[Coupling, list[nn.Parameter]] = field(default_factory=dict)
    scattered: bool = False  # rows meet a leaf from several dimensions: no formula knows that


def trace(place: Place, layout: Layout, wanted: set[int], count: int, notes: Notes) -> Trace:
    """Follow a layout from the losses down to the parameters, operation by operation.

    Args:
        place: of the losses.
        layout: theirs.
        wanted: the ids of parameters that rows are wanted of.
        count: one more than the largest row.
        notes: takes what is read of the graph.
    """
    notes.order = order = ordered(place[0])
    # what has a wanted parameter below it. Nothing else needs a layout, such as frozen layers that
    # are first in the model
    useful: set[Any] = set()
    variables: dict[Any, nn.Parameter] = {}  # nodes that accumulate
    for node, following in reversed(order.items()):
        if not following:
            variable = variable_of(node)
            if variable is not None:
                variables[node] = variable
                if id(variable) in wanted:
                    useful.add(node)
        elif any(child in useful for child, _ in following):
            useful.add(node)

    traced = Trace()
    # what each consumer of a tensor says of the tensor's rows. `order` has every node after all
    # that consume its outputs, so when a node's turn comes its arrivals are complete
    arrivals: dict[Place, list[tuple[Junction | None, Layout | str]]] = {place: [(None, layout)]}
    shapes = notes.shapes
    for node in useful:
        variable = variables.get(node)
        if variable is not None:
            shapes[node] = [tuple(variable.shape)]
            continue
        metas = node._input_metadata
        if any(meta.is_nested_tensor for meta in metas):
            raise InputError(f"{node.name()}: nested tensors have no layout; use padded ones")
        shapes[node] = [tuple(meta.shape) for meta in metas]
    for node, following in order.items():
        if node.name() == "CheckpointFunctionBackward":
            raise InputError(
                "torch.utils.checkpoint with use_reentrant=True hides what it computes from "
                "autograd's graph; use use_reentrant=False"
            )
        if node not in useful:
            continue
        variable = variables.get(node)
        outs: dict[int, Layout] = {}
        came: list[Junction] = []
        for nr, shape in enumerate(shapes[node]):
            arrived = arrivals.pop((node, nr), None)
            if arrived is None:
                continue
            whole = _agreed([answer for _, answer in arrived], shape)
            if whole is None and variable is None:
                # Functions were taken at their word; before rows are said to meet, they are asked
                arrived = [_not_assumed(each, count, notes) for each in arrived]
                whole = _agreed([answer for _, answer in arrived], shape)
            came = [junction for junction, _ in arrived if junction is not None]
            if whole is not None and not (whole.constant and _own(arrived, (node, nr), notes)):
                # every element belongs to one row: an activation, and the walk goes on below it
                outs[nr] = whole
            else:
                # rows share the tensor: the walk ends in a leaf, if what is below is parameters
                # alone, which _set_aside_coupled looks at when all is known
                answers = [answer for _, answer in arrived]
                # parts of samples that meet again: unless it is a parameter used row by row
                crossed = all(isinstance(a, Layout) for a in answers) and not all(
                    a.constant for a in answers if isinstance(a, Layout)
                )
                coupled = variable is None and (COUPLED in answers or crossed)
                opaque = OPAQUE in answers
                traced.leaves.append(Leaf((node, nr), shape, came, coupled or opaque, opaque))
        if not outs:
            continue
        if variable is not None:
            traced.unshared.append(Unshared(variable, (node, 0), outs[0], came))
            continue
        traced.sampled[node] = outs
        ins = [shapes[child][nr] if child in useful else None for child, nr in following]
        for k, answer in enumerate(answers_of(node, outs, shapes[node], ins, count, notes)):
            if isinstance(answer, Layout) and answer.empty:
                continue  # the operation drops this input: no loss depends on it here
            if ins[k] is not None and answer is not None:
                child, nr = following[k]
                junction = Junction(node, k, outs, answer if isinstance(answer, Layout) else None)
                arrivals.setdefault((child, nr), []).append((junction, answer))
    _set_aside_coupled(traced)
    _share_again(traced)
    for leaf in traced.leaves:
        leaf.simple = resolve(leaf.place, notes)
        for junction in leaf.junctions:
            for nr, layout in junction.outs.items():
                several = layout.axis(shapes[junction.node][nr]) is None and not layout.constant
                traced.scattered |= several
    return traced


def _own(arrived: list[tuple[Junction | None, Layout | str]], place: Place, notes: Notes) -> bool:
    """A view of a parameter, met by one row only: the junction has it as any other has."""
    return resolve(place, notes) is not None and all(
        junction is not None and all(layout.constant for layout in junction.outs.values())
        for junction, _ in arrived
    )


def _agreed(answers: list[Layout | str], shape: tuple[int, ...]) -> Layout | None:
    """The one layout that all consumers of a tensor can agree on; None where rows meet in it."""
    whole: Layout | None = None
    for answer in answers:
        if not isinstance(answer, Layout):
            return None
        whole = answer if whole is None else merge(whole, answer, shape)
        if whole is None:
            return None
    return whole


def answers_of(
    node: Any,
    outs: dict[int, Layout],
    shapes: Sequence[tuple[int, ...]],
    ins: list[tuple[int, ...] | None],
    count: int,
    notes: Notes,
) -> list[Layout | str | None]:
    """Of the carrier; of the operation itself where there is none or it does not know."""
    answers = _carried(node, outs, shapes, ins, notes)
    if any(s is not None and a is None for s, a in zip(ins, answers, strict=True)):
        row = _assumed(node, outs)
        asked = [row] * len(ins) if row is not None else _asked(node, outs, ins, count, notes)
        answers = [b if a is None else a for a, b in zip(answers, asked, strict=True)]
    return answers


def _carried(
    node: Any,
    outs: dict[int, Layout],
    shapes: Sequence[tuple[int, ...]],
    ins: list[tuple[int, ...] | None],
    notes: Notes,
) -> list[Layout | str | None]:
    name, numbers = base_name(node), {}
    answers: list[Layout | str | None] = [None] * len(ins)
    carrier = CARRIERS.get(name) if set(outs) == {0} or name in MANY else None
    if carrier is not None:
        read = Noted(node, numbers)
        answers = (list(carrier(read, outs, shapes, ins)) + answers)[: len(ins)]
        if read.values:
            notes.asked.append((_carried, node, (outs, shapes, ins), answers))
        elif numbers:
            notes.numbers.setdefault(node, {}).update(numbers)
    return answers


def _assumed(node: Any, outs: dict[int, Layout]) -> Layout | None:
    """The answer of a Function whose outputs are all of one row: so are its inputs' gradients.

    Functions are not to be called more often than needed: who knows what they keep.
    """
    if not is_function(node):
        return None
    rows = {int(row) for layout in outs.values() for row in layout.rows} - {-1}
    return constant(rows.pop()) if len(rows) == 1 else None


def _not_assumed(
    arrived: tuple["Junction | None", Layout | str], count: int, notes: Notes
) -> tuple["Junction | None", Layout | str]:
    """Where rows seem to meet, a Function is asked all the same: it may use one sample of many."""
    junction, _ = arrived
    if junction is None or _assumed(junction.node, junction.outs) is None:
        return arrived
    node, shapes = junction.node, notes.shapes
    ins = [shapes[child][nr] if child in shapes else None for child, nr in node.next_functions]
    asked = _asked(node, junction.outs, ins, count, notes)[junction.k]
    if not isinstance(asked, Layout):
        return arrived
    return Junction(node, junction.k, junction.outs, asked), asked


def _asked(
    node: Any,
    outs: dict[int, Layout],
    ins: list[tuple[int, ...] | None],
    count: int,
    notes: Notes,
) -> list[Layout | str | None]:
    """As `probe`; OPAQUE where the operation's backward cannot be called by itself."""
    try:
        answers: list[Layout | str | None] = probe(node, outs, ins, count)
    except InputError:
        raise
    except Exception as error:
        if misused(error) is not None:
            raise
        answers = [OPAQUE] * len(ins)
    notes.asked.append((_asked, node, (outs, ins, count), answers))
    return answers


def misused(error: Exception) -> str | None:
    """What an error of autograd says about how the graph was used; None for any other error."""
    text = str(error)
    if "second time" in text or "have already been freed" in text:
        return (
            "the graph of losses was freed by an earlier backward pass: give that one "
            "retain_graph=True, or compute the losses again"
        )
    if "donated" in text:
        return f"losses: a compiled forward pass has to be run inside the tape: {text}"
    if "modified by an inplace operation" in text:
        return f"losses: a tensor that their gradients need was modified in place: {text}"
    return None


def _set_aside_coupled(traced: Trace) -> None:
    """A tensor that rows share, computed from what belongs to single rows, couples the rows."""
    leaves = []
    for leaf in traced.leaves:
        nodes, parameters = leaf.below
        # samples below it as well as above: it is no leaf, rows meet in an activation
        if not leaf.coupled and not any(node in traced.sampled for node in nodes):
            leaves.append(leaf)
            continue
        operations = sorted({junction.node.name() for junction in leaf.junctions})
        why = OPAQUE if leaf.opaque else COUPLED
        traced.coupled.setdefault(Coupling(", ".join(operations), why), []).extend(parameters)
    traced.leaves = leaves


def _share_again(traced: Trace) -> None:
    """A parameter that a leaf is computed from too is met like any other, use by use."""
    below = {node for leaf in traced.leaves for node in leaf.below[0]}
    shared = [each for each in traced.unshared if each.place[0] in below]
    traced.unshared = [each for each in traced.unshared if each.place[0] not in below]
    traced.leaves += [
        Leaf(each.place, tuple(each.parameter.shape), each.junctions) for each in shared
    ]
