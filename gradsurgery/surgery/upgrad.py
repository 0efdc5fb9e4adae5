"""UPGrad: each row projected on the dual cone of all rows, then averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.ops._backend import call
from gradsurgery.ops._inputs import to_device
from gradsurgery.ops.cone import dual_projection_weights
from gradsurgery.surgery.rule import (
    Index,
    Weighting,
    check_preference,
    chosen,
    mean_of,
    preference,
)


@dataclass(frozen=True, kw_only=True)
class UPGrad(Weighting):
    """The mean of the rows, each projected on the dual cone { x : ⟨g_j, x⟩ ≥ 0 for all j }.

    No row's loss rises to first order, at any scale of the rows: they are made unit before the
    quadratic programs are solved, all against one Gramian, and nothing is added to it.

    Args:
        preference: weights of the projected rows, [m], 0 or more, those of memory rows unused;
            None for 1 / m each.

    Rows named in `memory`, past directions, must not be opposed either, but ask for nothing.

    Jacobian Descent for Multi-Objective Optimization, Quinton and Rey 2024 (arXiv:2406.16232).
    """

    formula: ClassVar[str] = "mean_i proj(g_i on { x : J x >= 0 })"
    paper: ClassVar[str] = "Quinton and Rey 2024 (arXiv:2406.16232)"
    roles: ClassVar[tuple[str, ...]] = ("memory",)
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "linear", "stationary"}
    )

    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preference(self.preference)

    def _weights(self, gram: Tensor, rtol: float, memory: Index = ()) -> Tensor:
        given = wanted(self.preference, gram, memory)
        dual, _ = call("cone_weights", gram, -gram, rtol, rtol**2)
        return given + given @ dual


@dataclass(frozen=True, kw_only=True)
class DualProj(Weighting):
    """The mean of the rows, projected on the dual cone { x : ⟨g_j, x⟩ ≥ 0 for all j }.

    Args:
        preference: weights of the rows before the projection, [m]; None for 1 / m each.

    Rows named in `memory`, past directions, must not be opposed either, but ask for nothing.

    Gradient Episodic Memory, Lopez-Paz and Ranzato 2017 (arXiv:1706.08840), with the rows as their
    own constraints.
    """

    formula: ClassVar[str] = "proj(mean_i g_i on { x : J x >= 0 })"
    paper: ClassVar[str] = "Lopez-Paz and Ranzato 2017 (arXiv:1706.08840)"
    roles: ClassVar[tuple[str, ...]] = ("memory",)
    properties: ClassVar[frozenset[str]] = frozenset(
        {"equivariant", "non-conflicting", "stationary"}
    )
    checks: ClassVar[bool] = True

    preference: Sequence[float] | None = None

    def _weights(self, gram: Tensor, rtol: float, memory: Index = ()) -> Tensor:
        mean = self.preference is None and not some(memory)
        given = None if mean else wanted(self.preference, gram, memory)
        return dual_projection_weights(gram, given, rtol, rtol**2)


def some(memory: Index) -> bool:
    """Whether rows were named at all."""
    return not (isinstance(memory, tuple) and len(memory) == 0)


def wanted(given: Sequence[float] | None, gram: Tensor, memory: Index) -> Tensor:
    """Weights [m] of the rows before surgery, 0 for those of the memory."""
    m = gram.shape[-1]
    past = chosen(memory, m, "memory") if some(memory) else []
    if not past:
        return preference(given, gram)
    if given is None:
        weights = mean_of([i for i in range(m) if i not in set(past)], m)
        return to_device(weights, gram.device)
    return preference([0 if i in set(past) else w for i, w in enumerate(given)], gram)
