"""`tape(model)` around a forward pass, `jacobian(losses)` for its rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from gradsurgery.batch import trainable
from gradsurgery.capture.collector import Collector
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.graph import roots, under
from gradsurgery.capture.hooks import refuse_unseen_accumulation
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.partial_rows import PartialRows
from gradsurgery.capture.passing import refuse_passing
from gradsurgery.capture.recomputed import refusal
from gradsurgery.capture.row_losses import SummedLosses
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.split import refuse_derived, shards_of, stand_in
from gradsurgery.capture.trace import misused
from gradsurgery.capture.uncompiled import uncompiled
from gradsurgery.capture.uses import Use
from gradsurgery.capture.weighted import Graph
from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import DTYPES
from gradsurgery.ops._inputs import check as require
from gradsurgery.spread import is_split

NO_ROWS = (
    "losses do not depend on the model's parameters: they were detached, computed under "
    "torch.no_grad or by another model, such as a copy, or every parameter is frozen"
)


class NoRowsError(InputError):
    """The losses depend on no parameter of the model."""


class Tape:
    """What `tape` gives: turns losses of the forward pass inside it into a Jacobian."""

    def __init__(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        coupled: str,
        outside: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.model, self.coupled, self.own = model, coupled, len(named)
        columns = {**named, **(outside or {})}
        self.names, self.parameters = list(columns), list(columns.values())
        self.partial: PartialRows | None = None  # where passes of other rows go with these

    def jacobian(
        self,
        losses: Tensor,
        groups: Tensor | None = None,
        *,
        combine: Literal["stored", "backward"] = "stored",
        retain_graph: bool = False,
    ) -> FactoredJacobian:
        """One backward pass for activations; the gradients of all losses, as yet unformed.

        Args:
            losses: one row per loss, in any shape, not reduced over samples: a mean over the
                batch would carry 1/B. A scalar is one row.
            groups: int64, shaped like losses: the row each loss is summed into, 0 .. m-1; -1 for
                none.
            combine: how weighted sums of rows are got: "stored", from the pairs that the pass left,
                without another; "backward", by a backward pass of the weighted losses, for which
                the graph is kept while the pairs are dropped once their Gramian is known.
            retain_graph: keep the graph for another backward pass, as in `Tensor.backward`.

        Raises:
            InputError: losses that do not depend on the parameters, or do on other ranks.
            CoupledSamplesError: samples that depend on each other, unless the tape was made with
                coupled="exact"; it says by which operation, and what parameters are below.
            NonFiniteError: a loss with NaN or infinity.
        """
        require(
            combine in ("stored", "backward"),
            f"combine must be 'stored' or 'backward', got {combine!r}",
        )
        rows = self._rows(losses, groups)
        require(
            not torch.is_inference_mode_enabled(),
            "tape.jacobian: torch.inference_mode() is on, where there is no backward pass",
        )
        m = int(rows.ids.tensor[-1]) + 1 if len(rows) else 0
        summed = SummedLosses(losses, rows, m)
        uses: list[list[Use]] = [[] for _ in self.parameters]
        collector, snapshot = Collector(self, losses, uses), None
        if m > 0:
            if not losses.is_cuda:
                summed.settle()
            refuse_passing(losses, meshes=any(map(is_split, self.parameters)))
            try:
                with without_autocast(losses), self._accumulating_nothing():
                    snapshot = collector.run(rows, retain_graph, weighted=combine == "backward")
                    if self.partial is not None:
                        self.partial.settle()
            except InputError:
                summed.settle()
                raise
            except Exception as error:
                summed.settle()
                why = refusal(error, losses) or misused(error)
                if why is None:
                    raise
                raise InputError(why) from error
            if not any(uses[: self.own]) and not self.reaches(losses):
                raise NoRowsError(NO_ROWS)
        graph = Graph(losses, rows.tensor, snapshot) if combine == "backward" else None
        parameters = list(self.parameters)
        if any(map(is_split, parameters)):
            hooked = m > 0 and collector.hooked.found
            refuse_derived(self.names, parameters, collector.derived, hooked)
            named = zip(self.names, parameters, uses, strict=True)
            uses = [shards_of(name, parameter, mine) for name, parameter, mine in named]
            parameters = list(map(stand_in, parameters))
        return FactoredJacobian(
            list(self.names),
            parameters,
            m,
            summed.values,
            uses,
            collector.derived,
            graph,
            collector.fallbacks,
            unsettled=[] if summed.settled else [summed],
        )

    @contextmanager
    def _accumulating_nothing(self) -> Iterator[None]:
        """A Function that runs a backward pass of its own inside of its backward is refused."""
        # autograd.grad accumulates nothing: if there is a `.grad` after it, a backward pass inside
        # of the pass made it
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            yield
            for name, parameter in zip(self.names, self.parameters, strict=True):
                require(
                    parameter.grad is None,
                    f"a torch.autograd.Function adds to .grad of {name} in a backward pass of its "
                    "own, as reentrant checkpoints do, so its rows are not seen: use "
                    "torch.utils.checkpoint with use_reentrant=False",
                )
        finally:
            for parameter, grad in zip(self.parameters, before, strict=True):
                parameter.grad = grad

    def reaches(self, losses: Tensor) -> bool:
        """Whether autograd's graph leads from the losses to any of the model's parameters."""
        own = {id(parameter) for parameter in self.parameters[: self.own]}
        return any(id(parameter) in own for parameter in under(roots(losses))[1])

    def _rows(self, losses: Tensor, groups: Tensor | None) -> RowNumbers:
        require(isinstance(losses, Tensor), f"losses must be a Tensor, got {type(losses).__name__}")
        require(losses.is_floating_point(), f"losses must be floating point, got {losses.dtype}")
        if not losses.requires_grad and losses.numel() > 0:
            raise NoRowsError(NO_ROWS)
        if groups is None:
            return RowNumbers(torch.arange(losses.numel(), device="cpu"))
        require(isinstance(groups, Tensor), f"groups must be a Tensor, got {type(groups).__name__}")
        require(groups.dtype == torch.int64, f"groups must be int64, got {groups.dtype}")
        require(
            groups.shape == losses.shape,
            f"groups must be {list(losses.shape)} like losses, got {list(groups.shape)}",
        )
        lowest = int(groups.min()) if groups.numel() else 0
        require(lowest >= -1, f"groups must be -1 or rows, got {lowest}")
        # a copy: whoever made them may go on writing
        return RowNumbers(groups.detach().flatten().cpu().clone())


@contextmanager
def tape(
    model: nn.Module,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    coupled: Literal["refuse", "exact"] = "refuse",
    outside: Mapping[str, nn.Parameter] | None = None,
) -> Iterator[Tape]:
    """Record a forward pass of `model`, for the Jacobian of its losses.

    Inside, compiled models run uncompiled: what a compiler fused has no rows. Nothing else changes,
    and nothing stays on the model.

    Args:
        model: its parameters that require gradients make the columns.
        parameters: only these of them.
        coupled: what to do about operations that compute across samples, such as batch
            normalization in training mode: "refuse" them by name, or get the rows below them
            "exact", by a backward pass per row.
        outside: parameters that are not the model's, by name, such as learned weights of losses:
            more columns, after the model's.
    """
    require(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    require(coupled in ("refuse", "exact"), f"coupled must be 'refuse' or 'exact', got {coupled!r}")
    with recorded(model, trainable(model, parameters), coupled, outside) as recorder:
        yield recorder


@contextmanager
def recorded(
    model: nn.Module,
    named: dict[str, nn.Parameter],
    coupled: Literal["refuse", "exact"] = "refuse",
    outside: Mapping[str, nn.Parameter] | None = None,
) -> Iterator[Tape]:
    """`tape` with the columns by name, for whoever has just looked them up."""
    for name, parameter in {**named, **(outside or {})}.items():
        if parameter.dtype not in DTYPES:
            raise InputError(f"parameter {name} must be floating point, got {parameter.dtype}")
    refuse_unseen_accumulation({**named, **(outside or {})})
    recorder = Tape(model, named, coupled, outside)
    with uncompiled():
        yield recorder
