"""GRU: forgetting without what opposes the retain gradients of late."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.jacobian import Jacobian
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.forget_retain import ForgetRetain, off
from gradsurgery.surgery.rule import Index, Solution, Weighting


@dataclass(frozen=True, kw_only=True)
class GRU(ForgetRetain):
    """f without its part against r, if it opposes that; r may be a moving average.

    Args:
        momentum: in [0, 1): r ← momentum r + (1 - momentum) (mean of the retain rows), kept from
            call to call, as large as the model, and begun by the first call's. Above 0, the rule
            must be called on rows: the average is no combination of those of one Gramian. For
            granularity "model" only.

    GRU: Mitigating the Trade-off between Unlearning and Retention, Wang et al. 2025
    (arXiv:2503.09117).
    """

    formula: ClassVar[str] = "f - min(0, ⟨f, r⟩) / |r|² r, r averaged over steps"
    paper: ClassVar[str] = "Wang et al. 2025 (arXiv:2503.09117)"
    remembers: ClassVar[tuple[str, ...]] = ("average",)

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}")
        check(
            self.momentum == 0 or self.granularity == "model",
            "momentum needs granularity='model'",
        )
        check(
            self.momentum == 0 or self.precondition is None,
            "GRU with momentum has no inner products to precondition",
        )

    # an option decides what for other rules the class does
    @property
    def weighting(self) -> Weighting | None:
        return self if self.momentum == 0 else None

    def _of_columns(self) -> str:
        return "an average" if "average" in self._state else super()._of_columns()

    def _mix(self, gram: Tensor, rtol: float) -> Tensor:
        return off(gram, 0, 1)

    def weights(self, gramian: Tensor, *given: Index, **roles: Any) -> Tensor:
        if self.momentum > 0:
            raise InputError("GRU with momentum is no function of one Gramian: call it on rows")
        return super().weights(gramian, *given, **roles)

    def solve(
        self,
        jacobian: Jacobian,
        *given: Index,
        metric: Sequence[Tensor] | None = None,
        **roles: Any,
    ) -> Solution:
        if self.momentum > 0:
            raise InputError("GRU with momentum is no function of one Gramian: call it on rows")
        return super().solve(jacobian, *given, metric=metric, **roles)

    def _update(self, jacobian: Jacobian, **roles: Any) -> list[Tensor]:
        if self.momentum == 0:
            return super()._update(jacobian, **roles)
        forget = roles.get("forget", 0)
        directions = self._directions(jacobian.m, forget)
        f, r = (jacobian.combine(direction) for direction in directions)
        average = torch.cat([part.flatten() for part in r])
        if "average" in self._state:
            before = self._state["average"]
            check(
                before.shape == average.shape,
                f"GRU remembers an average of {len(before)} values, rows have {len(average)}",
            )
            average = before.lerp(average, 1 - self.momentum)
        self._state["average"] = average
        pair = torch.stack([torch.cat([part.flatten() for part in f]), average]).double()
        update = (off(pair @ pair.mT, 0, 1) @ pair).to(average)
        sizes = [part.numel() for part in f]
        return [u.view(part.shape) for u, part in zip(update.split(sizes), f, strict=True)]
