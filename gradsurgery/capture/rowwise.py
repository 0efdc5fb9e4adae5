"""Parameters whose rows are got one by one, by a backward pass for each row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from gradsurgery.capture.carriers import OPAQUE
from gradsurgery.capture.descent import CoupledByHook
from gradsurgery.capture.fallback import Fallback, Reason, compiled
from gradsurgery.capture.graph import ordered, roots, under, variable_of
from gradsurgery.capture.hooked import Hooked
from gradsurgery.capture.hooks import linear, near, scale_of
from gradsurgery.capture.leaves import vjps
from gradsurgery.capture.probe import steady, unsteady
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.snapshot import Snapshot, as_before, functions
from gradsurgery.capture.trace import Coupling, Leaf
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.errors import CoupledSamplesError, InputError

if TYPE_CHECKING:
    from gradsurgery.capture.tape import Tape


class Rowwise:
    """Which parameters, by their columns, and why: `reasons`."""

    def __init__(self, owner: "Tape") -> None:
        self.owner = owner
        self.reasons: dict[int, tuple[str, Reason]] = {}  # operation, and what it does
        self._column = {id(p): k for k, p in enumerate(owner.parameters)}

    def has(self, leaf: Leaf) -> bool:
        return bool(self.reasons) and any(
            self._column.get(id(p)) in self.reasons for p in leaf.below[1]
        )

    def hooked(self, k: int) -> None:
        """Parameter k has a hook, which may do anything to a sum of rows."""
        self.reasons.setdefault(k, ("", "hook"))

    def couple(self, coupling: Coupling, parameters: Iterable[nn.Parameter]) -> None:
        """Refuses what is below operations that have rows meet, or has its rows got one by one."""
        mine = sorted({self._column[id(p)] for p in parameters if id(p) in self._column})
        if not mine:
            return
        names = [self.owner.names[k] for k in mine]
        operations, why = coupling
        if self.owner.coupled == "refuse" and why == OPAQUE:
            raise InputError(
                f"{operations} cannot be asked which of the losses use which of its inputs, so "
                f"the losses have no rows in what is below it: {', '.join(names)}."
                f"{compiled(operations)} "
                "Use another operation, or ask for gs.tape(model, coupled='exact')"
            )
        if self.owner.coupled == "refuse":
            modules = _modules(self.owner.model, operations)
            told = f" ({', '.join(map(str, modules))} in training mode)" if modules else ""
            raise CoupledSamplesError(
                f"{operations} computes across samples{told}, so the losses have no rows of their "
                f"own in what is below it: {', '.join(names)}. Call model.eval(), use another "
                "operation, or ask for gs.tape(model, coupled='exact')",
                operations,
                names,
                [module.name for module in modules],
            )
        reason: Reason = "opaque" if why == OPAQUE else "coupled"
        self.reasons.update(dict.fromkeys(mine, (operations, reason)))

    def couple_by_hook(self, hook: CoupledByHook) -> list[int]:
        """The same of a hook; the columns of the parameters below."""
        parameters = {id(p) for node in hook.nodes for p in under((node, 0))[1]}
        mine = sorted(self._column[p] for p in parameters & set(self._column))
        names = [self.owner.names[k] for k in mine]
        if self.owner.coupled == "refuse":
            raise CoupledSamplesError(
                f"{hook.name} computes across samples, or answers differently each time, so the "
                f"losses have no rows of their own in what is below it: {', '.join(names)}. Have "
                "it work sample by sample, or ask for gs.tape(model, coupled='exact')",
                hook.name,
                names,
            )
        self.reasons.update(dict.fromkeys(mine, (hook.name, "coupled")))
        return mine

    def fallbacks(self) -> list[Fallback]:
        """One for each reason."""
        names: dict[tuple[str, Reason], list[str]] = {}
        for k in sorted(self.reasons):
            names.setdefault(self.reasons[k], []).append(self.owner.names[k])
        return [
            Fallback(operation, tuple(mine), reason) for (operation, reason), mine in names.items()
        ]

    def complete(self, leaves: Iterable[Leaf]) -> None:
        """Adds parameters, until every leaf has all that it is computed from here, or none."""
        if not self.reasons:
            return
        # until nothing changes: a parameter that joins may be below other leaves too
        mine = [{self._column[id(p)] for p in x.below[1] if id(p) in self._column} for x in leaves]
        more = True
        while more:
            more = False
            for ks in mine:
                known = ks & set(self.reasons)
                if known and known != ks:
                    why = self.reasons[min(known)]
                    self.reasons.update(dict.fromkeys(ks - known, why))
                    more = True

    def rows(
        self, losses: Tensor, rows: RowNumbers, start: Snapshot | None, hooked: Hooked
    ) -> Iterator[tuple[int, RowsUse | None]]:
        """Exact rows of each parameter; None where no loss depends on it.

        start: what Functions kept before any pass.
        """
        ks, ids = sorted(self.reasons), rows.occurring
        vectors = (rows.tensor == ids.tensor[:, None]).to(losses.dtype).to(losses.device)
        vectors = vectors.view(len(ids), *losses.shape)
        nodes = functions([roots(losses)[0]])
        # passes before this one may have changed what Functions keep; each row finds it as at first
        with as_before(nodes):
            if start is not None:
                start.put_back()
            parameters = [self.owner.parameters[k] for k in ks]
            # hooks are no code for vmap: what they do to its tensors may end the process
            every = [n for n in ordered(roots(losses)[0]) if variable_of(n) is None]
            vmapped = not (any(p._backward_hooks for p in parameters) or hooked.among(every))
            # all rows in one call: a batch of vectors, each 1 for the losses of its row
            grads = vjps([losses], parameters, [vectors], True, nodes, vmapped)
            # what is somebody's own may answer differently each time; then no row is right
            if nodes or not vmapped:
                if start is not None:
                    start.put_back()
                again = vjps([losses], parameters, [vectors[:1]], True, nodes, vmapped)
                firsts = [None if g is None else g[:1] for g in grads]
                if not all(map(steady, firsts, again)):
                    names = ", ".join(sorted({node.name() for node in nodes}))
                    hooks = ", ".join(f"a hook of {self.owner.names[k]}" for k in ks)
                    raise InputError(unsteady(names or hooks))
        for k, grad in zip(ks, grads, strict=True):
            yield k, None if grad is None else RowsUse(grad, ids)

    def sums(
        self, uses: Sequence[Sequence[Use]]
    ) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """As `expect_linear` takes them."""
        for k in sorted(self.reasons):
            if uses[k]:
                (rows,) = uses[k][0].values
                yield self.owner.names[k], self.owner.parameters[k], rows.sum(0), rows.abs().sum(0)


def hooks_are_linear(parameter: nn.Parameter) -> bool:
    """Whether a parameter's hooks make of a sum of gradients the sum of what they make of each."""
    generator = torch.Generator().manual_seed(0)

    def gradient() -> Tensor:
        found = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        return found.to(parameter)

    def through(grad: Tensor) -> Tensor:
        for hook in list((parameter._backward_hooks or {}).values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    with torch.no_grad():
        a, b = gradient(), gradient()
        one, other, both = through(a.clone()), through(b.clone()), through(a + b)
        scale = scale_of([parameter.dtype])
        return near(both, one + other, one.abs() + other.abs()) and all(
            linear(one, through(a * factor), factor) for factor in (-scale, 1 / scale)
        )


class _Module(NamedTuple):
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


def _modules(model: nn.Module, operations: str) -> list[_Module]:
    """Batch norms that use the statistics of their batch, where the operations are theirs."""
    if "BatchNorm" not in operations:
        return []
    return [
        _Module(name or "model", type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or not module.track_running_stats)
    ]
