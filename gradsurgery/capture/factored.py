"""FactoredJacobian: rows of a model, never stored."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradsurgery.capture.leaves import Derived, dense_rows, unmixed
from gradsurgery.capture.moments import Moment, moment, moments
from gradsurgery.capture.paths import existing
from gradsurgery.capture.plane import Plane
from gradsurgery.capture.uses import HALVES, RowsUse, Use, joined, placed
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.ops._inputs import check, check_weights_finite
from gradsurgery.ops.combine import combine_unchecked

WIDE = dict.fromkeys(HALVES, torch.float32)  # rows of a parameter may be wider than it
RELEASED = "this Jacobian was released by backward(weights, release=True)"


class Graph(NamedTuple):
    """The losses with their graph, and the row of each."""

    losses: Tensor
    rows: Tensor  # [numel], -1 for none

    def outputs(self, weights: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Parameters of the same weights, of [L, m], and what to start their backward pass with."""
        rows = self.rows.to(weights.device)
        sets, which = weights.unique(dim=0, return_inverse=True)
        for k, w in enumerate(sets):
            outputs = torch.where(rows >= 0, w[rows.clamp(min=0)], 0).to(self.losses)
            yield (which == k).nonzero().flatten().tolist(), outputs.view(self.losses.shape)

    def combine(
        self, weights: Tensor, parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[int, Tensor]]:
        for mine, outputs in self.outputs(weights):
            held = [parameters[i] for i in mine]
            grads = torch.autograd.grad(
                self.losses, held, outputs, retain_graph=True, allow_unused=True
            )
            yield from ((i, grad) for i, grad in zip(mine, grads, strict=True) if grad is not None)

    def backward(self, weights: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """As an ordinary backward pass does, hooks of parameters included."""
        for mine, outputs in self.outputs(weights):
            held = [parameters[i] for i in mine]
            torch.autograd.backward(self.losses, outputs, retain_graph=True, inputs=held)


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
    ) -> None:
        self.names, self.parameters, self.m, self.losses = names, parameters, m, losses
        self.sizes = [p.numel() for p in parameters]
        self._place = {id(p): k for k, p in enumerate(parameters)}
        self._uses, self._derived = uses, list(derived)
        self._versions = [(t, t._version) for mine in uses for use in mine for t in use.values]
        self._gramians: list[Tensor | None] | None = None  # of each parameter
        self._gramian: Tensor | None = None  # of the model
        self._graph, self._released = graph, False
        if graph is not None:
            self._gramians = self._compute(None)
            self._drop()

    @cached_property
    def _planes(self) -> list[Plane | None]:
        group = _largest(self._uses)
        return [
            Plane(p, mine, group) if mine else None
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
        uses: list[list[Use]] = [[] for _ in first.parameters]
        derived: list[Derived] = []
        for jacobian in jacobians:
            moved = _Moved(start)
            for into, mine in zip(uses, jacobian._uses, strict=True):
                into.extend(moved(use) for use in mine)
            derived.extend(part.with_uses(moved) for part in jacobian._derived)
            start += jacobian.m
        losses = torch.cat([jacobian.losses for jacobian in jacobians])
        return cls(first.names, first.parameters, start, losses, uses, derived)

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
        check(per in ("model", "tensor"), f"per must be 'model' or 'tensor', got {per!r}")
        if metric is not None:
            self._need_pairs("metric")
            grams = self._compute(metric)
        elif per == "model":
            if self._gramian is None:
                known = self._gramians
                self._gramian = self._of_model() if known is None else self._sum(known)
            return self._gramian.clone()
        else:
            if self._gramians is None:
                self._gramians = self._compute(None)
            grams = self._gramians
        if per == "tensor":
            zero = self._zeros()
            return torch.stack([zero if g is None else g for g in grams])
        return self._sum(grams)

    def _zeros(self) -> Tensor:
        device = self.parameters[0].device
        return torch.zeros(self.m, self.m, dtype=torch.float64, device=device)

    def _sum(self, grams: Sequence[Tensor | None]) -> Tensor:
        total = self._zeros()
        for gram in grams:
            if gram is not None:
                total += gram
        return total

    def _of_model(self) -> Tensor:
        """The Gramian over all parameters; small ones, whose rows exist, in one call."""
        self._check_usable()
        total = self._zeros()
        with torch.no_grad(), unmixed(self.parameters[0]):
            through = self._through_derived()
            exist: dict[tuple, list[list[RowsUse]]] = {}
            for k, plane in enumerate(self._planes):
                if k in through:
                    plane = Plane(self.parameters[k], [*through.pop(k), *self._uses[k]], None)
                if plane is None:
                    continue
                uses = plane.rows
                # blocks of one row are added up by themselves where they are many
                if uses and sum(use.n for use in uses) <= 2 * self.m:
                    exist.setdefault(_key(uses), []).append(uses)
                else:
                    total += plane.gramian(self.m, None)
            for planes in exist.values():
                total += existing(planes, self.m)
        if not bool(total.diagonal().isfinite().all()):
            self._raise_not_finite(self._compute(None))
        return total

    def _compute(self, metric: Sequence[Tensor] | None) -> list[Tensor | None]:
        self._check_usable()
        grams: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad(), unmixed(self.parameters[0]):
            through = self._through_derived()
            for k, plane in enumerate(self._planes):
                if k in through:
                    parts = [*through.pop(k), *self._uses[k]]
                    plane = Plane(self.parameters[k], parts, None)
                if plane is not None:
                    grams[k] = plane.gramian(self.m, None if metric is None else metric[k])
        if not bool(self._sum(grams).diagonal().isfinite().all()):
            self._raise_not_finite(grams)
        return grams

    def _through_derived(self) -> dict[int, list[Use]]:
        """Rows of parameters that reached the losses through tensors computed from them."""
        found: dict[int, list[Use]] = {}
        for derived in self._derived:
            for parameter, rows in zip(derived.parameters, derived.rows(self.m), strict=True):
                use = RowsUse(rows, torch.arange(self.m, device="cpu"))
                found.setdefault(self._place[id(parameter)], []).append(use)
        return found

    def _raise_not_finite(self, grams: Sequence[Tensor | None]) -> None:
        for name, gram in zip(self.names, grams, strict=True):
            bad = [] if gram is None else (~gram.diagonal().isfinite()).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteError(f"losses: row {bad[0]} is not finite: its gradient of {name}")
        raise NonFiniteError("losses: the squared norm of a row overflows float64")

    def _check_usable(self) -> None:
        if self._released:
            raise InputError(RELEASED)
        for tensor, version in self._versions:
            if tensor._version != version:
                raise InputError(
                    f"a tensor {list(tensor.shape)} of the forward pass was modified in place "
                    "after tape.jacobian; clone it, or modify it when the Jacobian is done with"
                )

    def _weights(self, weights: Tensor) -> Tensor:
        m, count = self.m, len(self.parameters)
        kind = type(weights).__name__
        check(isinstance(weights, Tensor), f"weights must be a Tensor, got {kind}")
        check(
            tuple(weights.shape) in ((m,), (count, m)),
            f"weights must be [{m}] or [{count}, {m}], got {list(weights.shape)}",
        )
        check_weights_finite(weights)
        return weights.detach().to(self.parameters[0].device).expand(count, m)

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
        with torch.no_grad(), unmixed(self.parameters[0]):
            return [moments(uses, row) for uses in self._met("inputs_seen")]

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
        self, weights: Tensor, add: bool, release: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """w^T J per parameter that the losses depend on; one may come several times."""
        self._check_usable()
        if release:
            self._versions = []  # which hold what is to be freed
        if self._graph is not None:
            yield from self._graph.combine(weights, self.parameters)
        exist: dict[tuple, list[tuple[int, list[RowsUse]]]] = {}
        for k, plane in enumerate(self._planes):
            if plane is None:
                continue
            uses, dtype = plane.rows, self.parameters[k].dtype
            if uses and uses[0].blocks.dtype in (dtype, WIDE.get(dtype)):
                exist.setdefault(_key(uses), []).append((k, uses))
                continue
            yield k, plane.update(weights[k], add, release)
            if release:
                self._planes[k], self._uses[k] = None, []
        for alike in exist.values():
            ks = [k for k, _ in alike]
            parts = list(zip(*(uses for _, uses in alike), strict=True))
            rows = placed(joined(*(part[0].rows for part in parts)), weights.device)
            mine = (weights[:1] if weights.stride(0) == 0 else weights[ks])[:, rows]
            sums = combine_unchecked([[use.flat for use in part] for part in parts], mine)
            for k, total in zip(ks, sums, strict=True):
                parameter = self.parameters[k]
                yield k, total.view_as(parameter).to(parameter.dtype)
        for derived in self._derived:
            ks = [self._place[id(p)] for p in derived.parameters]
            known: list[tuple[Tensor, list[Tensor | None]]] = []
            for i, k in enumerate(ks):
                grads = next((g for w, g in known if torch.equal(w, weights[k])), None)
                if grads is None:
                    grads = derived.combine(weights[k])
                    known.append((weights[k], grads))
                grad = grads[i]
                if grad is not None:
                    yield k, grad

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T J as a list like the parameters; weights [m], or [L, m] per parameter."""
        updates = [torch.zeros_like(p) for p in self.parameters]
        with torch.no_grad(), unmixed(self.parameters[0]):
            for k, grad in self._updates(self._weights(weights), False):
                updates[k] += grad
        return updates

    def backward(self, weights: Tensor, *, release: bool = False) -> None:
        """Add w^T J to the parameters' `.grad`, as `Tensor.backward` would.

        A parameter that no loss depends on is left without.

        Args:
            weights: [m], or [L, m] per parameter.
            release: free what the Jacobian holds as soon as it is used. Nothing can be asked of it
                afterwards, but less memory is taken, and time.
        """
        weights = self._weights(weights)
        self._check_usable()
        try:
            if self._graph is not None:
                self._graph.backward(weights, self.parameters)
            else:
                self._add(weights, release)
        finally:  # what a hook interrupts is not half there
            if release:
                self._graph, self._released = None, True
                self._drop()

    def _add(self, weights: Tensor, release: bool) -> None:
        with torch.no_grad(), unmixed(self.parameters[0]):
            for k, grad in self._updates(weights, True, release):
                parameter = self.parameters[k]
                if parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad += grad
                hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
                for hook in list(hooks.values()):
                    hook(parameter)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of every row with `vectors`, tensor by tensor, [L, m] float64.

        Args:
            vectors: one tensor [*p.shape] per parameter.
        """
        self._need_pairs("products")
        self._check_usable()
        device = self.parameters[0].device
        out = torch.zeros(len(self.parameters), self.m, dtype=torch.float64, device=device)
        with torch.no_grad(), unmixed(self.parameters[0]):
            through = self._through_derived()
            for k, mine in enumerate(self._uses):
                for use in (*mine, *through.get(k, ())):
                    part = use.wide().products(vectors[k].reshape(use.plane))
                    out[k].index_add_(0, placed(use.rows, device), part.to(device))
        return out

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, [m] float64."""
        return self.gramian().diagonal().sqrt()

    def materialize(self) -> Tensor:
        """The rows as one matrix, [m, n]: for tests and small models."""
        self._need_pairs("materialize")
        self._check_usable()
        rows = [p.new_zeros(self.m, p.numel()) for p in self.parameters]
        with torch.no_grad(), unmixed(self.parameters[0]):
            through = self._through_derived()
            for k, mine in enumerate(self._uses):
                parts = [*mine, *through.get(k, ())]
                if parts:
                    rows[k] += dense_rows(parts, self.m).flatten(1)
        return torch.cat(rows, dim=1)


def _key(uses: Sequence[RowsUse]) -> tuple:
    """What rows of several parameters must have in common to be taken in one call."""
    return uses[0].blocks.dtype, *(id(use.rows) for use in uses)


class _Moved:
    """Uses whose rows follow those of other Jacobians; what shared its rows still does."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.known: dict[int, Tensor] = {}

    def __call__(self, use: Use) -> Use:
        if id(use.rows) not in self.known:
            self.known[id(use.rows)] = use.rows + self.start
        return use.select(slice(None), self.known[id(use.rows)])


def _largest(uses: list[list[Use]]) -> int | None:
    """The row that sums most samples; None where each has its own."""
    longest = max((use for mine in uses for use in mine), key=lambda use: use.n, default=None)
    if longest is None or longest.n < 2:
        return None
    counts = torch.bincount(longest.rows)
    row = int(counts.argmax())
    return row if int(counts[row]) > 1 else None
