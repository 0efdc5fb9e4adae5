"""FactoredJacobian: rows of a model, never stored."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from gradsurgery.capture.fallback import Fallback
from gradsurgery.capture.gramians import of_model, of_parameters, one_call, summed, zeros
from gradsurgery.capture.leaves import Derived, dense_rows, without_autocast
from gradsurgery.capture.moments import Moment, moment, moments, stacked
from gradsurgery.capture.plane import Plane
from gradsurgery.capture.ranges import WEIGHTS, unit, within
from gradsurgery.capture.row_losses import SummedLosses
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.rowwise import hooks_are_linear
from gradsurgery.capture.seen_as import seen_alike
from gradsurgery.capture.stack import plane_for
from gradsurgery.capture.together import sums
from gradsurgery.capture.uses import HALVES, Renumbered, RowsUse, Use, largest_group
from gradsurgery.capture.weighted import Graph
from gradsurgery.errors import InputError
from gradsurgery.grads import add_to, run_hooks
from gradsurgery.ops._inputs import check as require
from gradsurgery.ops._inputs import check_shapes, check_weights_finite, to_device, wide
from gradsurgery.ops.combine import combine_unchecked

WIDE = dict.fromkeys(HALVES, torch.float32)  # rows of a parameter may be wider than it
RELEASED = "this Jacobian was released by backward(weights, release=True)"


def check_weights(weights: Tensor, m: int, count: int) -> None:
    """Raise `InputError` unless these are weights of m rows, or those of each tensor."""
    kind = type(weights).__name__
    require(isinstance(weights, Tensor), f"weights must be a Tensor, got {kind}")
    require(
        tuple(weights.shape) in ((m,), (count, m)),
        f"weights must be [{m}] or [{count}, {m}], got {list(weights.shape)}",
    )


class FactoredJacobian:
    """The rows of a model's losses as the pairs of activations and gradients they are made of.

    Made by `Tape.jacobian`. Its memory is that of the activations, not m x n. With
    combine="backward" the pairs are dropped once their Gramian is known, and weighted sums of rows
    come from the kept graph, by an ordinary backward pass of weighted losses.

    Attributes:
        names: of the model's trainable parameters, in its order.
        parameters: the parameters, which `backward` adds to.
        sizes: their numel.
        m: rows.
        losses: the losses the rows are of, [m]; those of one group summed.
        fallbacks: for which parameters, and why, the rows were got one at a time and are stored.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[nn.Parameter],
        m: int,
        losses: Tensor,
        uses: list[list[Use]],
        derived: Sequence[Derived] = (),
        graph: Graph | None = None,
        fallbacks: Sequence[Fallback] = (),
        unsettled: Sequence[SummedLosses] = (),
    ) -> None:
        self.names, self.parameters, self.m, self.losses = names, parameters, m, losses
        self._unsettled = list(unsettled)  # losses not yet known to be finite
        self.fallbacks = list(fallbacks)
        self.sizes = [p.numel() for p in parameters]
        self._column = {id(p): k for k, p in enumerate(parameters)}
        self._uses, self._derived = uses, list(derived)
        # uses hold tensors of the forward pass: whoever writes to one would change the rows unseen
        leaves = [mine for part in derived for _, mine in part.leaves]
        every = [use for mine in (*uses, *leaves) for use in mine]
        self._versions = [(t, t._version) for use in every for t in use.values]
        self._gramians: list[Tensor | None] | None = None  # of each parameter
        self._gramian: Tensor | None = None  # of the model
        self._graph, self._released = graph, False
        self._far = False  # some of the weights last given are far from 1
        self._at_host: Tensor | None = None  # those, where they were not given on a GPU
        if graph is not None:  # sums come from the graph, so only the Gramian needs the pairs
            self._gramians = of_parameters(self, None)
            self._drop()

    @cached_property
    def _planes(self) -> list[Plane | None]:
        group = largest_group(self._uses)
        return [
            plane_for(p, mine, group) if mine else None
            for p, mine in zip(self.parameters, self._uses, strict=True)
        ]

    def _drop(self) -> None:
        self._uses, self._derived, self._versions = [[] for _ in self._uses], [], []
        self._planes = [None] * len(self._uses)

    @classmethod
    def concat(cls, jacobians: "Sequence[FactoredJacobian]") -> "FactoredJacobian":
        """As `gradsurgery.concat`, which checks that they go together."""
        first, start = jacobians[0], 0
        for jacobian in jacobians:
            jacobian._need_pairs("gs.concat")
            jacobian._check_usable()
        uses: list[list[Use]] = [[] for _ in first.parameters]
        derived: list[Derived] = []
        # uses are not copied, only numbered on; those of one parameter multiply each other later
        for jacobian in jacobians:
            moved = Renumbered(start)
            for into, mine in zip(uses, jacobian._uses, strict=True):
                into.extend(moved(use) for use in mine)
            derived.extend(part.with_uses(moved) for part in jacobian._derived)
            start += jacobian.m
        uses = [seen_alike(mine) for mine in uses]
        losses = torch.cat([jacobian.losses for jacobian in jacobians])
        fallbacks = dict.fromkeys(each for j in jacobians for each in j.fallbacks)
        return cls(
            first.names, first.parameters, start, losses, uses, derived, fallbacks=list(fallbacks)
        )

    @property
    def reached(self) -> list[bool]:
        """Which parameters the losses depend on, though it be with a zero gradient."""
        derived = {id(p) for part in self._derived for p in part.parameters}
        return [
            bool(mine) or id(p) in derived
            for p, mine in zip(self.parameters, self._uses, strict=True)
        ]

    def columns(self, which: Sequence[int]) -> "FactoredJacobian":
        """The same rows, of some of the parameters only."""
        self._need_pairs("columns")
        names, kept = [self.names[k] for k in which], [self.parameters[k] for k in which]
        uses = [self._uses[k] for k in which]
        derived = [part.of(kept) for part in self._derived]
        derived = [part for part in derived if part.parameters]
        fallbacks = [part for each in self.fallbacks if (part := each.of(names)) is not None]
        return FactoredJacobian(
            names,
            kept,
            self.m,
            self.losses,
            uses,
            derived,
            fallbacks=fallbacks,
            unsettled=self._unsettled,
        )

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Inner products of the rows, [m, m] float64; [L, m, m] for per="tensor".

        Args:
            per: "model" sums over all parameters; "tensor" keeps one Gramian per parameter.
            metric: one tensor [*p.shape] of weights per parameter: <a, metric * b>.

        Raises:
            NonFiniteError: a row with NaN or infinity; the message names row and parameter.
        """
        require(per in ("model", "tensor"), f"per must be 'model' or 'tensor', got {per!r}")
        if metric is not None:
            check_shapes(metric, "metric", [p.shape for p in self.parameters])
            self._need_pairs("metric")
        return to_device(self._gramian_found(per, metric), self.parameters[0].device)

    def _gramian_found(self, per: str, metric: Sequence[Tensor] | None) -> Tensor:
        if metric is not None:
            grams = of_parameters(self, metric)
        elif per == "model":
            if self._gramian is None:
                known = self._gramians
                self._gramian = of_model(self) if known is None else summed(self, known)
            return self._gramian.clone()
        else:
            if self._gramians is None:
                self._gramians = of_parameters(self, None)
            grams = self._gramians
        if per == "model":
            return summed(self, grams)
        known = [gram for gram in grams if gram is not None]
        zero = torch.zeros_like(known[0]) if known else zeros(self)
        return torch.stack([zero if gram is None else gram for gram in grams])

    def _through_derived(self) -> dict[int, list[Use]]:
        """Rows of parameters that reached the losses through tensors computed from them."""
        found: dict[int, list[Use]] = {}
        for derived in self._derived:
            for parameter, rows in zip(derived.parameters, derived.rows(self.m), strict=True):
                use = RowsUse(rows, RowNumbers(torch.arange(self.m, device="cpu")))
                found.setdefault(self._column[id(parameter)], []).append(use)
        return found

    def _check_usable(self, settle: bool = True) -> None:
        """`settle` losses, unless a Gramian is to be asked for, which says it too."""
        if self._released:
            raise InputError(RELEASED)
        if settle:
            self.settle()
        for tensor, version in self._versions:
            if tensor._version != version:
                raise InputError(
                    f"a tensor {list(tensor.shape)} of the forward pass was modified in place "
                    "while its rows were needed; clone it, or modify it when they are done with"
                )

    def settle(self) -> None:
        """Raise `NonFiniteError` where a loss is not finite. Waits for a GPU."""
        for losses in self._unsettled:
            losses.settle()
            self.losses = losses.values  # sums may have left their dtype's range
        self._unsettled = []

    def _weights(self, weights: Tensor) -> Tensor:
        m, count = self.m, len(self.parameters)
        check_weights(weights, m, count)
        # looked at before anything is multiplied: most weights are near 1, and cost no second look
        self._far = not bool((within(weights.abs(), WEIGHTS) | (weights == 0)).all())
        if self._far:
            check_weights_finite(weights)
        weights = weights.detach().clone()  # which nobody writes to
        self._at_host = None if weights.is_cuda else weights.expand(count, m)
        return to_device(weights, self.parameters[0].device).expand(count, m)

    def input_moments(self) -> list[Moment | None]:
        """Of each parameter that multiplies activations, the sum of x xᵀ over their tokens.

        As rules need it that keep updates off the inputs seen. None for biases, norms, embeddings,
        grouped convolutions, and parameters that other tensors are computed from.
        """
        return [moment(uses) for uses in self._met("input_moments")]

    def inputs_seen(self, row: int | None = None) -> list[dict[int, Tensor] | None]:
        """Of each parameter the sums of x xᵀ over all that it multiplies, as `moments` has them.

        {} for a parameter that no loss depends on; None where more is done with it than that.
        `row`: over the samples of one row only.
        """
        with torch.no_grad(), without_autocast(self.parameters[0]):
            return [moments(uses, row) for uses in self._met("inputs_seen")]

    def inputs_stacked(self) -> list[dict[int, Tensor] | None]:
        """As `inputs_seen`, rows [g, r, d] whose moments these are: the inputs, or fewer."""
        with torch.no_grad(), without_autocast(self.parameters[0]):
            return [stacked(uses) for uses in self._met("inputs_stacked")]

    def _met(self, what: str) -> list[list[Use] | None]:
        """The uses of each parameter; None where tensors are computed from it."""
        self._need_pairs(what)
        made = {id(p) for derived in self._derived for p in derived.parameters}
        pairs = zip(self.parameters, self._uses, strict=True)
        return [None if id(p) in made else uses for p, uses in pairs]

    def _need_pairs(self, what: str) -> None:
        if self._released:
            raise InputError(RELEASED)
        if self._graph is not None:
            raise InputError(f"{what} needs tape.jacobian(losses, combine='stored'): no pairs kept")

    def _updates(
        self, weights: Tensor, add: bool, release: bool = False, exact: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """w^T J per parameter that the losses depend on; one may come several times.

        `exact`: in the dtype it was summed in, which may be wider than the parameter's.
        """
        self._check_usable()
        # a hook may ask for another sum before this one is whole
        far, at_host = self._far, self._at_host
        if release:
            self._versions = []  # which hold what is to be freed
        if self._graph is not None:
            yield from self._graph.combine(weights, self.parameters)
        exist: dict[tuple, list[tuple[int, list[RowsUse]]]] = {}
        small = {} if far else self._small(weights)
        # rows that exist are summed last, those of many parameters in one call
        for k, plane in enumerate(self._planes):
            if plane is None:
                continue
            uses, dtype = plane.rows, self.parameters[k].dtype
            if uses and uses[0].blocks.dtype in (dtype, WIDE.get(dtype)):
                exist.setdefault(one_call(uses), []).append((k, uses))
                continue
            if k in small:
                out = small.pop(k).view(plane.parameter.shape)
                yield k, out if exact else out.to(dtype)
            else:
                kept = plane.group
                beta = None if at_host is None or kept is None else float(at_host[k, kept])
                yield k, plane.update(weights[k], add, release, far, exact, beta)
            if release:  # this parameter's pairs are freed before the next one's are used
                self._planes[k], self._uses[k] = None, []
        for group in exist.values():
            ks = [k for k, _ in group]
            parts = list(zip(*(uses for _, uses in group), strict=True))
            first, *others = [part[0].rows for part in parts]
            rows = first.join(*others).on(weights.device)
            mine = (weights[:1] if weights.stride(0) == 0 else weights[ks])[:, rows]
            sums = combine_unchecked([[use.flat for use in part] for part in parts], mine)
            for k, total in zip(ks, sums, strict=True):
                parameter = self.parameters[k]
                total = total.view_as(parameter)
                yield k, total if exact else total.to(parameter.dtype)
        for derived in self._derived:
            ks = [self._column[id(p)] for p in derived.parameters]
            # one way back gives the gradients of all its parameters, where their weights agree
            known: list[tuple[Tensor, list[Tensor | None]]] = []
            for i, k in enumerate(ks):
                grads = next((g for w, g in known if torch.equal(w, weights[k])), None)
                if grads is None:
                    grads = derived.combine(weights[k], far, exact)
                    known.append((weights[k], grads))
                grad = grads[i]
                if grad is not None:
                    yield k, grad

    def _small(self, weights: Tensor) -> dict[int, Tensor]:
        """Of parameters whose w^T J take one launch together, by column."""
        ks = [k for k, plane in enumerate(self._planes) if plane is not None and not plane.rows]
        planes = [cast(Plane, self._planes[k]) for k in ks]
        return {ks[i]: out for i, out in sums(planes, [weights[k] for k in ks])}

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T J as a list like the parameters; weights [m], or [L, m] per parameter."""
        updates = [torch.zeros_like(p) for p in self.parameters]
        with torch.no_grad(), without_autocast(self.parameters[0]):
            for k, grad in self._updates(self._weights(weights), False):
                updates[k] += grad
        return updates

    def backward(self, weights: Tensor, *, release: bool = False) -> None:
        """Add w^T J to the parameters' `.grad`, as `Tensor.backward` would.

        A parameter that no loss depends on is left without. Every `.grad` made is memory of its
        own, laid out like its parameter. Hooks registered by `register_post_accumulate_grad_hook`
        run once for each parameter, with all of its gradient. Where one raises, some parameters
        have all of their gradient and the others none of it.

        Args:
            weights: [m], or [L, m] per parameter.
            release: free what the Jacobian holds as soon as it is used. Nothing can be asked of it
                afterwards, but less memory is taken, and time.
        """
        weights = self._weights(weights)
        self._check_usable()
        # a Jacobian that is released is so whatever happens: its pairs may be gone already
        try:
            if self._graph is None or not self._graph.backward(weights, self.parameters):
                self._add(weights, release)
        finally:  # what a hook interrupts is not half there
            if release:
                self._graph, self._released = None, True
                self._drop()

    def _add(self, weights: Tensor, release: bool, hooks: bool = True) -> None:
        # what comes in several parts is summed first: `.grad` gets it, and hooks run, once
        several = {self._column[id(p)] for derived in self._derived for p in derived.parameters}
        sums: dict[int, Tensor] = {}
        with torch.no_grad(), without_autocast(self.parameters[0]):
            for k, grad in self._updates(weights, True, release):
                if k not in several:
                    self._add_whole(k, grad, hooks)
                elif k in sums:
                    sums[k] += grad
                else:
                    sums[k] = grad
            for k in list(sums):
                self._add_whole(k, sums.pop(k), hooks)

    def _add_whole(self, k: int, grad: Tensor, hooks: bool) -> None:
        add_to(self.parameters[k], grad)
        if hooks:
            run_hooks(self.parameters[k])

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of every row with `vectors`, tensor by tensor, [L, m] float64.

        Args:
            vectors: one tensor [*p.shape] per parameter.
        """
        check_shapes(vectors, "vectors", [p.shape for p in self.parameters])
        self._need_pairs("products")
        self._check_usable()
        device = self.parameters[0].device
        out = torch.zeros(len(self.parameters), self.m, dtype=torch.float64, device=device)
        with torch.no_grad(), without_autocast(self.parameters[0]):
            through = self._through_derived()
            for k, mine in enumerate(self._uses):
                size = unit(vectors[k])
                vector = wide(vectors[k])
                vector = vector / size.to(vector.dtype)  # whose products with tokens are in range
                for use in (*mine, *through.get(k, ())):
                    part = use.wide().products(vector.reshape(use.plane)) * size.to(device)
                    out[k].index_add_(0, use.rows.on(device), part.to(device))
        return out

    @cached_property
    def bent(self) -> list[str]:
        """Parameters whose rows of sums of losses are not the sums of rows: hooks or Functions are
        not linear.
        """
        found = {id(p) for derived in self._derived if derived.bent for p in derived.parameters}
        return [
            name
            for name, p in zip(self.names, self.parameters, strict=True)
            if id(p) in found or (p._backward_hooks and not hooks_are_linear(p))
        ]

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, [m] float64."""
        return self.gramian().diagonal().sqrt()

    def materialize(self) -> Tensor:
        """The rows as one matrix, [m, n]: for tests and small models."""
        self._need_pairs("materialize")
        self._check_usable()
        rows = [p.new_zeros(self.m, p.numel()) for p in self.parameters]
        with torch.no_grad(), without_autocast(self.parameters[0]):
            through = self._through_derived()
            for k, mine in enumerate(self._uses):
                parts = [*mine, *through.get(k, ())]
                if parts:
                    rows[k] += dense_rows(parts, self.m).flatten(1)
        return torch.cat(rows, dim=1)
