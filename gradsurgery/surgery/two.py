"""Rules of any rows, for two directions: one that forgets and one that retains."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.forget_retain import ForgetRetain
from gradsurgery.surgery.rule import Weighting


@dataclass(frozen=True, kw_only=True)
class TwoDirections(ForgetRetain):
    """A rule for any rows, given two: what forgets, f, and what retains, r, one task each.

        gs.TwoDirections(rule=gs.PCGrad(), objective="lower")  # of NPO's rows and a retain loss's

    f is the mean of the forget rows, turned where their loss is to be raised, and r that of all
    others. The rule's own `granularity` and `precondition` are given here.

    Args:
        rule: one that tells no forget rows apart, such as `PCGrad`, `UPGrad`, `MGDA` or `Mean`.
        objective: as in `ForgetRetain`.

    Raises:
        InputError: a rule that knows forget rows itself, has no weights, or needs a memory.
    """

    rule: Weighting

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.rule).__name__
        if not isinstance(self.rule, Weighting):
            raise InputError(f"rule must be a rule with weights, got {name}")
        check("forget" not in self.rule.roles, f"rule: {name} tells forget rows apart: take it")
        check(
            not self.rule.merges,
            f"rule: {name} is of a memory: it takes retain samples as memory= in a step",
        )
        for option in ("granularity", "precondition"):
            default = getattr(Weighting, option)
            given = getattr(self.rule, option)
            check(
                given == default,
                f"{option} must be given to TwoDirections, not to its {name}, got {given}",
            )
        # what the rule remembers is what this one remembers
        object.__setattr__(self, "_state", self.rule._state)

    # an option decides what for other rules the class does
    @property
    def remembers(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.rule.remembers

    def _mix(self, gram: Tensor, rtol: float, **given: Any) -> Tensor:
        return self.rule._weights(gram, rtol, **given)
