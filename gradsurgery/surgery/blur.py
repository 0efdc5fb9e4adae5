"""BLUR: retaining within what forgetting allows, as one level of two."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import check
from gradsurgery.surgery.forget_retain import ForgetRetain


@dataclass(frozen=True, kw_only=True)
class BLUR(ForgetRetain):
    """r without its part along f, plus gamma f: forgetting is the lower of two levels.

    Args:
        gamma: of the forget direction, 0 or more.

    BLUR: A Bi-Level Optimization Approach for LLM Unlearning, Reisizadeh et al. 2025
    (arXiv:2506.08164).
    """

    formula: ClassVar[str] = "r + (gamma - ⟨r, f⟩ / |f|²) f"
    paper: ClassVar[str] = "Reisizadeh et al. 2025 (arXiv:2506.08164)"

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.gamma >= 0, f"gamma must be 0 or more, got {self.gamma}")

    def _mix(self, gram: Tensor, rtol: float) -> Tensor:
        square = gram[..., 0, 0]
        nonzero = square > 0
        along = torch.where(nonzero, gram[..., 0, 1] / torch.where(nonzero, square, 1), 0)
        return torch.stack([self.gamma - along, torch.ones_like(along)], -1)
