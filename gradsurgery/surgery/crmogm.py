"""CR-MOGM: the weights of any rule, averaged over calls."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.rule import Weighting, preference


@dataclass(frozen=True, kw_only=True)
class CRMOGM(Weighting):
    """w ← alpha w + (1 - alpha) (the weights that a rule gives), kept from call to call.

        gs.CRMOGM(rule=gs.PCGrad(), alpha=0.9)

    Weights of one batch depend on its noise, and so does a sum of its rows with them; an average
    hardly does. It begins with the first weights, anew where the number of rows changes. What the
    rule promises, such as to oppose no row, holds of the average over steps, not of each. The
    rule's own `granularity` and `precondition` are given here.

    Args:
        rule: one with weights that tells no forget rows apart; for two directions, give this one
            to `TwoDirections`.
        alpha: in [0, 1]: of the weights before. With 0 this is the rule, with 1 the first weights
            stay.
        initial: weights before the first call, [m]; None for what the first call gives.

    Raises:
        InputError: a rule that knows forget rows, has no weights, or is smoothed already.

    On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, Zhou et al.
    2022 (NeurIPS).
    """

    formula: ClassVar[str] = "Σ_i w_i g_i, w averaged over steps of a rule's weights"
    paper: ClassVar[str] = "Zhou et al. 2022 (NeurIPS)"
    remembers: ClassVar[tuple[str, ...]] = ("weights",)

    rule: Weighting = field(default_factory=MGDA)
    alpha: float = 0.9
    initial: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.rule).__name__
        if not isinstance(self.rule, Weighting):
            raise InputError(f"rule must be a rule with weights, got {name}")
        check("forget" not in self.rule.roles, f"rule: {name} tells forget rows apart")
        check("weights" not in self.rule.remembers, f"rule: {name} is smoothed already")
        for option in ("granularity", "precondition"):
            default, given = getattr(Weighting, option), getattr(self.rule, option)
            check(
                given == default,
                f"{option} must be given to CRMOGM, not to its {name}, got {given}",
            )
        check(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        # what the rule tells apart and remembers, this one does, of one state
        for known in ("roles", "merges"):
            object.__setattr__(self, known, getattr(self.rule, known))
        object.__setattr__(self, "remembers", ("weights", *self.rule.remembers))
        object.__setattr__(self, "_state", self.rule._state)

    def _weights(self, gram: Tensor, rtol: float, **given: Any) -> Tensor:
        found = self.rule._weights(gram, rtol, **given)
        before = self._state.get("weights")
        if before is None or before.shape != found.shape:
            before = found if self.initial is None else preference(self.initial, gram, "initial")
        weights = self.alpha * before.to(found) + (1 - self.alpha) * found
        self._state["weights"] = weights.detach()
        return weights
