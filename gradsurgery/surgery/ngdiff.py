"""NGDiff: the two directions at one length."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurgery.surgery.forget_retain import ForgetRetain, inverse_norms


@dataclass(frozen=True, kw_only=True)
class NGDiff(ForgetRetain):
    """f / |f| + r / |r|: with an ordinary forget loss, r / |r| - g_f / |g_f|.

    Unlearning as multi-task optimization: a normalized gradient difference approach, Bu et al. 2024
    (arXiv:2410.22086).
    """

    formula: ClassVar[str] = "f / |f| + r / |r|"
    paper: ClassVar[str] = "Bu et al. 2024 (arXiv:2410.22086)"
    properties: ClassVar[frozenset[str]] = frozenset({"invariant"})

    def _mix(self, gram: Tensor, rtol: float) -> Tensor:
        return inverse_norms(gram)
