"""LTU's gradient harmonization: remembering and forgetting, made orthogonal where they conflict."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.surgery.forget_retain import ForgetRetain, off
from gradsurgery.surgery.rule import one_of


@dataclass(frozen=True, kw_only=True)
class LTUHarmonize(ForgetRetain):
    """f + r, with f, r or both first made orthogonal to the other's original if they conflict.

    Args:
        mode: what gives way: "forget", "retain", or "both", which is PCGrad. That it is the forget
            direction is inferred: the paper's text leaves it open.

    Learning to Unlearn for Robust Machine Unlearning, Huang et al. 2024 (arXiv:2407.10494).
    """

    formula: ClassVar[str] = "orth(f, r) + r, or f + orth(r, f), or orth of both"
    paper: ClassVar[str] = "Huang et al. 2024 (arXiv:2407.10494)"

    mode: Literal["forget", "retain", "both"] = "forget"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mode", self.mode, ("forget", "retain", "both"))

    def _mix(self, gram: Tensor, rtol: float) -> Tensor:
        f, r = off(gram, 0, 1), off(gram, 1, 0)
        if self.mode == "forget":  # r as it is
            return f + torch.stack([torch.zeros_like(r[..., 0]), torch.ones_like(r[..., 0])], -1)
        if self.mode == "retain":
            return r + torch.stack([torch.ones_like(f[..., 0]), torch.zeros_like(f[..., 0])], -1)
        return f + r
