"""Backward passes by autograd's engine, from the losses down to where parameters meet samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradsurgery.capture.graph import Place, roots, under
from gradsurgery.capture.hooks import (
    Sampled,
    Watch,
    bending,
    bits,
    coupling,
    culprit,
    dtypes_under,
    linear,
    register,
    scale_of,
)
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.snapshot import Snapshot, as_before, is_function
from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import to_device

MODULE_HOOKS = {"BackwardHookFunctionBackward"}  # torch's own, which only pass on


class Arrived(NamedTuple):
    """What a pass brought."""

    grads: dict[Place, Tensor | None]  # of outputs, as the nodes below take them
    handed: Mapping[Any, Sequence[Tensor | None]]  # what some nodes gave, edge by edge


class CoupledByHook(Exception):
    """A hook, or what answers differently each time, has rows depend on one another."""

    def __init__(self, name: str, nodes: Sequence[Any]) -> None:
        super().__init__(name)
        self.name, self.nodes = name, nodes  # what is below them has no rows of its own


class Descent:
    """One pass, and those that ask whether it can be trusted.

    Args:
        losses: where it starts.
        places: whose gradients are wanted.
        below: tensors just below nodes that have to be called.
        handing: nodes whose gradients are wanted as they give them.
        fresh: of the places, those that a Function gives to, which may use its memory again.
        watched: all nodes between, where gradients may be changed; None where nothing could.
        hooked: whether there may be hooks, which are asked.
        weighted: where passes of weighted losses will follow, what these must find as it was.
        start: where other passes will follow, the same.
        summed: whether rows will be summed over several passes.
        taking: by nodes that the pass comes to, who is given what they take.
    """

    def __init__(
        self,
        losses: Tensor,
        places: Iterable[Place],
        *,
        below: Iterable[Place] = (),
        handing: Iterable[Any] = (),
        fresh: Iterable[Place] = (),
        watched: Sampled | None = None,
        hooked: bool = False,
        weighted: Snapshot | None = None,
        start: Snapshot | None = None,
        summed: bool = False,
        taking: Mapping[Any, Callable[[Any, Sequence[Tensor | None]], None]] | None = None,
    ) -> None:
        self.losses, self.root = losses, roots(losses)
        self.places, self.below = list(places), list(below)
        self.handing, self.fresh = list(handing), list(fresh)
        self.watched, self.hooked, self.weighted = watched, hooked, weighted
        self.start, self.summed, self.taking = start, summed, taking or {}
        self.functions = [node for node in watched or () if is_function(node)]

    def run(self, rows: RowNumbers, model: nn.Module, retain_graph: bool) -> Arrived:
        """The gradients, for the sum of all losses that have a row.

        rows: [numel] of each loss; -1 for none.

        Raises:
            CoupledByHook: a hook that has rows depend on one another.
            InputError: what is not linear, where it has to be.
        """
        taken = (rows.tensor >= 0).to(self.losses.dtype).view(self.losses.shape)
        outputs = to_device(taken, self.losses.device)
        # nothing on the way can do more than carry gradients: one plain pass, and no questions
        if self.watched is None:
            arrived = self._pass(outputs, retain_graph)[0]
            return arrived if self.start is None else _owned(arrived, self.start)
        # the pass that counts comes first: those that ask only compare with it
        before = Snapshot(self.functions)
        arrived, full = self._pass(outputs, True)
        full.look(before)
        arrived = _owned(arrived, before)
        self._refuse_hooks_of_junctions(full)
        if self.hooked or self.summed or self.weighted is not None:
            # a hook of somebody may fail too: what Functions keep is put back then as well
            with as_before(self.functions):

                def again(outputs: Tensor) -> tuple[Arrived, Watch]:
                    before.put_back()
                    arrived, watch = self._pass(outputs, True)
                    watch.look(before)
                    return arrived, watch

                if self.hooked:
                    self._ask_for_rows(full, rows.tensor, outputs, model, again)
                if self.summed or self.weighted is not None:
                    self._ask_for_linearity(full, arrived, outputs, model, again)
                if self.weighted is not None:
                    self.weighted.note_changes()
        return arrived

    def _refuse_hooks_of_junctions(self, full: Watch) -> None:
        # such a hook sees the gradients of the parameter too, which rows never form
        met = {node for node, _ in self.places}
        for hook in full.hooks:
            if hook.nr is None and hook.node in met and hook.node.name() not in MODULE_HOOKS:
                raise InputError(
                    f"{hook.node.name()} has a hook of its own, by grad_fn.register_hook, which "
                    "may change what its parameters get; hook the tensor, by Tensor.register_hook"
                )

    def _pass(self, outputs: Tensor, retain_graph: bool) -> tuple[Arrived, Any]:
        handed: dict[Any, Sequence[Tensor | None]] = {}
        found: dict[Place, Tensor | None] = {}
        copies: dict[Place, Tensor | None] = {}
        # autograd calls a node only for the sake of a tensor below it that is asked for
        edges = dict.fromkeys([*self.places, *self.below])
        with ExitStack() as stack:
            watch = None
            if self.watched is not None:
                outputs = outputs.clone()  # a hook may write to it
                watch = stack.enter_context(Watch(self.watched, self.root, outputs))
            for node in self.handing:
                take = partial(_copy_all, handed, node)
                stack.callback(register(node.register_hook, take).remove)
            # copied when it is handed over: the Function may write to it before the pass ends
            for place in self.fresh:
                take = partial(_copy_one, copies, place)
                stack.callback(register(place[0].register_prehook, take).remove)
            for node, take in self.taking.items():
                stack.callback(register(node.register_prehook, partial(take, node)).remove)
            grads = torch.autograd.grad(
                self.losses,
                [GradientEdge(*place) for place in edges],
                outputs,
                retain_graph=retain_graph,
                allow_unused=True,
            )
        found.update(zip(edges, grads, strict=True))
        if watch is not None:
            for node, nr in self.places:
                # what a node takes, after its hooks; autograd returns what came before them
                if node in watch.taken:
                    found[node, nr] = watch.taken[node][nr]
        found.update(copies)
        return Arrived(found, handed), watch

    def _ask_for_rows(
        self,
        full: Watch,
        rows: Tensor,
        outputs: Tensor,
        model: nn.Module,
        again: Callable[[Tensor], tuple[Arrived, Watch]],
    ) -> None:
        # of each bit of the row numbers, the rows that have it and then those that have not: so for
        # any two rows there is a pass with the one and without the other
        for bit, value in product(range(bits(int(rows.max()) + 1)), (1, 0)):

            def inside(numbers: Tensor, bit: int = bit, value: int = value) -> Tensor:
                return (numbers >> bit) & 1 == value

            mask = inside(rows).view(outputs.shape).to(outputs.device)
            _, masked = again(outputs * mask)
            found = coupling(full, masked, inside)
            if found is not None:
                nodes = [hook.node for watch in (full, masked) for hook in watch.hooks]
                raise CoupledByHook(culprit((full, masked), found, model), [*nodes, found.node])

    def _ask_for_linearity(
        self,
        full: Watch,
        arrived: Arrived,
        outputs: Tensor,
        model: nn.Module,
        again: Callable[[Tensor], tuple[Arrived, Watch]],
    ) -> None:
        # linear is what makes of losses times a factor its result times that: a hook that clips
        # does not for large ones, one that adds noise does not for small ones
        scale = scale_of(dtypes_under(self.losses))
        for factor in (-scale, 1 / scale):
            below, scaled = again(outputs * factor)
            found = bending(full, scaled, factor)
            if found is not None:
                name = culprit((full, scaled), found, model)
                raise InputError(not_linear(name, self.weighted is not None))
            # what is below a node that is called: its own linearity, not only that of what it takes
            for place in self.below:
                whole, part = arrived.grads[place], below.grads[place]
                if whole is None or part is None:
                    continue
                if not linear(whole.to_dense(), part.to_dense(), factor):
                    below_it = {id(p) for p in under(place)[1]}
                    names = [n for n, p in model.named_parameters() if id(p) in below_it]
                    name = f"what {', '.join(names)} passes through"
                    raise InputError(not_linear(name, self.weighted is not None))


def _copy_all(into: dict, node: Any, grads: Sequence[Tensor | None], _: object) -> None:
    into[node] = [None if g is None else g.clone() for g in grads]


def _copy_one(into: dict, place: Place, grads: Sequence[Tensor | None]) -> None:
    grad = grads[place[1]]
    into[place] = None if grad is None else grad.clone()


def _owned(arrived: Arrived, snapshot: Snapshot) -> Arrived:
    """What does not change when Functions find again what they kept."""
    grads = dict(zip(arrived.grads, snapshot.owned(arrived.grads.values()), strict=True))
    handed = {node: snapshot.owned(given) for node, given in arrived.handed.items()}
    return Arrived(grads, handed)


def not_linear(name: str, weighted: bool = True) -> str:
    if not weighted:
        return (
            f"{name} is not linear in its gradient, so a row whose losses are taken in several "
            "backward passes is not their sum: take whole batches, and each row's losses at once"
        )
    return (
        f"{name} is not linear in its gradient, so a backward pass of weighted losses does not "
        "give the weighted sum of their rows; use combine='stored'"
    )
