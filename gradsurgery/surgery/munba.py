"""MUNBa: the Nash bargain of forgetting and retaining, in closed form."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.surgery.forget_retain import ForgetRetain, inverse_norms


@dataclass(frozen=True, kw_only=True)
class MUNBa(ForgetRetain):
    """(f / |f| + r / |r|) / sqrt(1 + cos(f, r)): Nash-MTL's solution for two players.

    Of two opposed directions there is no bargain: the update is zero.

    MUNBa: Machine Unlearning via Nash Bargaining, Wu and Harandi 2025 (ICCV).
    """

    formula: ClassVar[str] = "(f / |f| + r / |r|) / sqrt(1 + cos(f, r))"
    paper: ClassVar[str] = "Wu and Harandi 2025 (ICCV)"
    properties: ClassVar[frozenset[str]] = frozenset({"invariant"})

    def _mix(self, gram: Tensor, rtol: float) -> Tensor:
        inverse = inverse_norms(gram)
        gain = 1 + gram[..., 0, 1] * inverse[..., 0] * inverse[..., 1]
        apart = gain > rtol**2  # what the Gramian resolves
        share = torch.where(apart, torch.where(apart, gain, 1).rsqrt(), 0)
        return inverse * share.unsqueeze(-1)
