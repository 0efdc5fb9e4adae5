"""The recorder: `tape(model)` around a forward pass, `jacobian(losses)` for its rows."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from gradsurgery.capture.factored import FactoredJacobian, Graph
from gradsurgery.capture.found import Found
from gradsurgery.capture.leaves import unmixed
from gradsurgery.capture.trace import misused
from gradsurgery.capture.uses import Use, numbers
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.jacobian import trainable
from gradsurgery.ops._inputs import DTYPES, check


class Tape:
    """What `tape` gives: turns losses of the forward pass inside it into a Jacobian."""

    def __init__(self, model: nn.Module, named: dict[str, nn.Parameter], coupled: str) -> None:
        self.model, self.coupled = model, coupled
        self.names, self.parameters = list(named), list(named.values())

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
            InputError: losses that do not depend on the parameters; samples that depend on each
                other (unless the tape was made with coupled="exact").
        """
        check(
            combine in ("stored", "backward"),
            f"combine must be 'stored' or 'backward', got {combine!r}",
        )
        rows = self._rows(losses, groups)
        known = numbers(rows)
        m = int(known.ids[-1]) + 1 if rows.numel() else 0
        flat, into = losses.detach().flatten(), rows
        if known.some_none:
            flat, into = flat[rows >= 0], rows[rows >= 0]
        wide = flat.new_zeros(m, dtype=torch.float64)
        wide.index_add_(0, into.to(flat.device), flat.double())
        summed = wide.to(flat.dtype)
        uses: list[list[Use]] = [[] for _ in self.parameters]
        found = Found(self, losses, uses)
        if m > 0:
            if not bool(summed.isfinite().all()):
                summed = wide  # the sum of finite losses may leave their dtype's range
                bad = (~wide.isfinite()).nonzero().flatten().tolist()
                if bad:
                    value = float(wide[bad[0]])
                    raise NonFiniteError(f"losses: row {bad[0]} is not finite: {value}")
            try:
                with unmixed(losses):
                    found.run(rows, retain_graph or combine == "backward")
            except RuntimeError as error:
                why = misused(error)
                if why is None:
                    raise
                raise InputError(why) from error
        graph = Graph(losses, rows) if combine == "backward" else None
        return FactoredJacobian(
            list(self.names), list(self.parameters), m, summed, uses, found.derived, graph
        )

    def _rows(self, losses: Tensor, groups: Tensor | None) -> Tensor:
        check(isinstance(losses, Tensor), f"losses must be a Tensor, got {type(losses).__name__}")
        check(losses.is_floating_point(), f"losses must be floating point, got {losses.dtype}")
        check(
            losses.requires_grad or losses.numel() == 0,
            "losses do not depend on the model's parameters: they were detached, computed under "
            "torch.no_grad, or every parameter is frozen",
        )
        if groups is None:
            return torch.arange(losses.numel(), device="cpu")
        check(isinstance(groups, Tensor), f"groups must be a Tensor, got {type(groups).__name__}")
        check(groups.dtype == torch.int64, f"groups must be int64, got {groups.dtype}")
        check(
            groups.shape == losses.shape,
            f"groups must be {list(losses.shape)} like losses, got {list(groups.shape)}",
        )
        lowest = int(groups.min()) if groups.numel() else 0
        check(lowest >= -1, f"groups must be -1 or rows, got {lowest}")
        return groups.detach().flatten().cpu().clone()  # whoever made them may go on writing


@contextmanager
def tape(
    model: nn.Module,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    coupled: Literal["refuse", "exact"] = "refuse",
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
    """
    check(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    check(coupled in ("refuse", "exact"), f"coupled must be 'refuse' or 'exact', got {coupled!r}")
    named = trainable(model, parameters)
    for name, parameter in named.items():
        if parameter.dtype not in DTYPES:
            raise InputError(f"parameter {name} must be floating point, got {parameter.dtype}")
    recorder = Tape(model, named, coupled)
    # whoever compiled a model has imported the compiler; nobody else should wait for that
    compiles = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        yield recorder
