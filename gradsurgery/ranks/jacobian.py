"""RanksJacobian: the rows of all ranks, of which each holds its own."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.factored import check_weights
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.grads import add_to, run_hooks
from gradsurgery.jacobian import DenseJacobian
from gradsurgery.ops._inputs import check, check_shapes, wide
from gradsurgery.ranks.gramian import Exchange
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.places import Place, as_grad, place_of, whole_of
from gradsurgery.ranks.update import Buckets


class RanksJacobian:
    """The rows of all ranks, as one Jacobian; every method is to be called by all of them.

    Each rank keeps the pairs of its own samples. No rank ever has the rows of all: see
    `gradsurgery.ranks.table` for what passes between them. Where a rank raises, all do.

    Args:
        own: this rank's rows, of which there may be none.
        ranks: who has the others.
        ids: of this rank's rows, which of all ranks' each adds to, [own.m] int64 on the CPU.
        factors: what each is multiplied by before, [own.m] float64 on the CPU.
        m: rows of all ranks.
        reached: the parameters that the losses of any rank depend on.
        parameters: whose `.grad` weighted sums are left in, where this rank has shards of them,
            and `own` has stand-ins.
    """

    def __init__(
        self,
        own: FactoredJacobian | DenseJacobian,
        ranks: Group,
        ids: Tensor,
        factors: Tensor,
        m: int,
        reached: Sequence[bool],
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.own = own if isinstance(own, FactoredJacobian) else captured(own)
        self.ranks, self.m, self.reached = ranks, m, list(reached)
        self.names, self.sizes = own.names, own.sizes
        self.parameters = list(self.own.parameters if parameters is None else parameters)
        self._ids, self._factors = ids, factors
        self._exchange = Exchange(self.own, ranks, ids, factors, m)
        self._grams: dict[bool, Tensor] = {}

    @classmethod
    def concat(cls, jacobians: "Sequence[RanksJacobian]") -> "RanksJacobian":
        """As `gradsurgery.concat`, which checks that they go together."""
        first, starts = jacobians[0], accumulate((each.m for each in jacobians), initial=0)
        pairs = list(zip(jacobians, starts, strict=False))
        return cls(
            FactoredJacobian.concat([each.own for each in jacobians]),
            first.ranks,
            torch.cat([each._ids + start for each, start in pairs]),
            torch.cat([each._factors for each in jacobians]),
            sum(each.m for each in jacobians),
            [any(used) for used in zip(*(each.reached for each in jacobians), strict=True)],
            first.parameters,
        )

    @property
    def bytes_sent(self) -> int:
        """What this rank sent to others for Gramians so far; updates are not counted."""
        return self._exchange.bytes

    def gramian(
        self,
        *,
        per: Literal["model", "tensor"] = "model",
        metric: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Inner products of all rows, [m, m] float64, or [L, m, m] by parameter; on every rank.

        Raises:
            NonFiniteError: a row with NaN or infinity; the message names rank, row and parameter.
        """
        with self.ranks.agreed("gramian", wait=False):
            check(per in ("model", "tensor"), f"per must be 'model' or 'tensor', got {per!r}")
            if metric is not None:
                check_shapes(metric, "metric", [p.shape for p in self.parameters])
                metric = list(map(whole_of, metric))
                return self._exchange.gramians(metric, per == "tensor")
            apart = per == "tensor"
            if apart not in self._grams:
                self._grams[apart] = self._exchange.gramians(None, apart)
            return self._grams[apart].clone()

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T J as a list like the parameters, whole and the same on every rank."""
        with self.ranks.agreed("combine"):
            out = [torch.zeros_like(p) for p in self.own.parameters]
            self._sum(weights, False, lambda k, grad: out[k].copy_(grad))
        return out

    def backward(self, weights: Tensor, *, release: bool = False) -> None:
        """Add w^T J to the parameters' `.grad`, the same on every rank.

        It is the sum over ranks, and no mean: weights have all there is to divide by. Of a sharded
        parameter each gets its shard. Hooks run when all gradients are there.
        """

        def take(k: int, grad: Tensor) -> None:
            add_to(self.parameters[k], as_grad(grad, self.parameters[k], owned=True))

        with self.ranks.agreed("backward"), torch.no_grad():
            self._sum(weights, release, take, list(map(place_of, self.parameters)))
            for used, parameter in zip(self.reached, self.parameters, strict=True):
                if used:
                    run_hooks(parameter)

    def _sum(
        self,
        weights: Tensor,
        release: bool,
        take: Callable[[int, Tensor], Any],
        places: Sequence[Place | None] | None = None,
    ) -> None:
        """Give w^T J of all ranks to `take`, by parameter; by `places`, this rank's shard of it."""
        own = self.own
        check_weights(weights, self.m, len(self.parameters))
        mine = weights.double()[..., self._ids.to(weights.device)]
        mine = own._weights(mine * self._factors.to(weights.device))
        derived = {own._column[id(p)] for each in own._derived for p in each.parameters}
        there = {k for k, used in enumerate(own.reached) if used}
        with torch.no_grad(), without_autocast(own.parameters[0]):
            buckets = Buckets(own.parameters, self.reached, derived, self.ranks, places)
            self.ranks.settled("sums")
            buckets.sums(own._updates(mine, False, release, exact=True), there, take)
        if release:
            own._released = True
            own._drop()

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of every row with `vectors`, tensor by tensor, [L, m] float64."""
        with self.ranks.agreed("products"):
            if isinstance(vectors, Sequence):
                vectors = list(map(whole_of, vectors))
            part = self.own.products(vectors) * self._factors.to(self.own.parameters[0].device)
            out = part.new_zeros(len(part), self.m)
            out.index_add_(1, self._ids.to(part.device), part)
        return self.ranks.sum_(out)

    def row_norms(self) -> Tensor:
        """Euclidean norms of the rows, [m] float64."""
        return self.gramian().diagonal().clamp_min(0).sqrt()

    def materialize(self) -> Tensor:
        """The rows as one matrix, [m, n], on every rank: for rules that need them, and tests."""
        with self.ranks.agreed("materialize"):
            rows = wide(self.own.materialize())
            each = rows * self._factors.to(rows)[:, None]
            out = rows.new_zeros(self.m, rows.shape[1])
            out.index_add_(0, self._ids.to(rows.device), each)
        return self.ranks.sum_(out)


def captured(dense: DenseJacobian) -> FactoredJacobian:
    """Stored rows, as those of a tape are."""
    parameters: list[nn.Parameter] = dense.parameters or []
    ids = RowNumbers(torch.arange(dense.m, device="cpu"))
    reached = dense.reached or [True] * len(dense.blocks)
    uses: list[list[Use]] = [
        [RowsUse(block, ids)] if used else []
        for block, used in zip(dense.blocks, reached, strict=True)
    ]
    losses = dense.losses if dense.losses is not None else dense.blocks[0].new_zeros(dense.m)
    return FactoredJacobian(dense.names, parameters, dense.m, losses, uses)
