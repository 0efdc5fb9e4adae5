"""GDR-GMA: both directions rectified, mixed by how well the model still retains."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check, check_number, check_values
from gradsurgery.surgery.forget_retain import ForgetRetain, off


@dataclass(frozen=True, kw_only=True)
class GDRGMA(ForgetRetain):
    """λ f' + (1 - λ) r', f' and r' each made orthogonal to the other's original if they conflict.

    λ = 1 / (1 + exp(gamma (L_r - eps))): once the retain loss L_r exceeds eps, the update turns to
    retaining. The authors' code rectifies the second direction against the first one as already
    rectified; this is the symmetric form that their paper states.

    Args:
        gamma: steepness of the switch.
        eps: retain loss at which both count the same.
        mix: a fixed λ in [0, 1]; None for the one above, and then the call takes `retain_loss`.

    GDR-GMA: Machine Unlearning via Direction-Rectified and Magnitude-Adjusted Gradients,
    Lin et al. 2024 (ACM Multimedia).
    """

    formula: ClassVar[str] = "λ orth(f, r) + (1 - λ) orth(r, f)"
    paper: ClassVar[str] = "Lin et al. 2024 (ACM Multimedia)"
    roles: ClassVar[tuple[str, ...]] = ("forget", "retain_loss")

    gamma: float = 100.0
    eps: float = 0.02
    mix: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.mix is None or 0 <= self.mix <= 1, f"mix must be in [0, 1], got {self.mix}")

    def _mix(self, gram: Tensor, rtol: float, retain_loss: Any = None) -> Tensor:
        if retain_loss is not None:
            _check_loss(retain_loss)
        if self.mix is not None:
            share: Any = 1 - self.mix
        elif retain_loss is None:
            raise InputError("GDRGMA needs retain_loss, the present retain loss, or a fixed mix")
        else:
            excess = self.gamma * (retain_loss - self.eps)
            if isinstance(excess, Tensor):
                share = excess.to(gram).sigmoid()
            else:
                share = 1 / (1 + math.exp(-max(min(excess, 700.0), -700.0)))
        return (1 - share) * off(gram, 0, 1) + share * off(gram, 1, 0)


def _check_loss(loss: Any) -> None:
    if isinstance(loss, Tensor):
        check_values(loss, "retain_loss")
        got = f"{loss.dtype} {list(loss.shape)}"
        good = loss.numel() == 1 and not loss.is_complex() and loss.dtype != torch.bool
        check(good, f"retain_loss must be a number, got {got}")
    else:
        check_number("retain_loss", loss)
