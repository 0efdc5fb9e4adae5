"""Weights that grow with the excess risks of tasks, read off their gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import DTYPES, check, raise_not_finite
from gradsurgery.surgery import Rule

LARGEST = 1e30  # of a logarithm: like infinity, but what is added to it stays a number


@dataclass(frozen=True, kw_only=True)
class ExcessRisks(Rule):
    """w_i ← w_i exp(robust_step_size E_i / B_i) / sum, from equal weights.

    E_i = Σ_k g_ik² / sqrt(Σ g_ik²), under the root over all calls, is the excess risk of task i to
    second order, with AdaGrad's diagonal as its Hessian. B_i is the mean of E_i over the warm-up,
    in which weights stay equal. Without one B_i is the first E_i, which itself is not divided: it
    has the unit of the gradients. A task whose B_i is zero takes all weight as soon as E_i is not.

    Nothing is added under the root or to B_i. Weights are kept as logarithms, so that one that
    vanished may return. All begins anew where the shape changes.

    Args:
        robust_step_size: above 0.
        n_warmup_steps: calls of the warm-up, 0 or more; three epochs in the paper.

    Robust Multi-Task Learning with Excess Risks, He et al. 2024 (arXiv:2402.02009).
    """

    remembers: ClassVar[tuple[str, ...]] = ("roots", "baseline", "logs", "calls")

    robust_step_size: float = 1.0
    n_warmup_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        size, steps = self.robust_step_size, self.n_warmup_steps
        check(size > 0, f"robust_step_size must be above 0, got {size}")
        check(steps >= 0, f"n_warmup_steps must be 0 or more, got {steps}")

    @torch.no_grad()
    def weights(self, matrix: Tensor) -> Tensor:
        """Weights [m] float64, from gradients [m, n]; it waits for the device.

        Raises:
            InputError: a matrix that is not of floating point.
            NonFiniteError: a row with NaN or infinity; what is remembered stays as it was.
        """
        check(matrix.dtype in DTYPES, f"matrix must be floating point, got {matrix.dtype}")
        rows = matrix.double()
        roots, baseline, logs, calls = self._known(rows)
        roots = torch.hypot(roots, rows)  # squares could overflow
        excess = (rows * torch.where(roots > 0, rows / roots, 0)).sum(1)
        if not bool(excess.isfinite().all()):
            raise_not_finite([rows], "matrix", "a sum over a row overflows float64")
        if calls < self.n_warmup_steps:
            baseline = baseline + excess / self.n_warmup_steps
        else:
            growth = torch.where(excess > 0, excess / baseline, 0)
            if calls == 0:
                baseline = growth = excess
            logs = (logs + (self.robust_step_size * growth).clamp_max(LARGEST)).log_softmax(0)
        self._state.update(roots=roots, baseline=baseline, logs=logs, calls=calls + 1)
        return logs.softmax(0)

    def _known(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        roots, *rest = (self._state.get(name) for name in self.remembers)
        if roots is not None and roots.shape == rows.shape:
            baseline, logs, calls = rest
            if baseline is not None and logs is not None and calls is not None:
                return roots.to(rows), baseline.to(rows), logs.to(rows), calls
        none = rows.new_zeros(len(rows))
        calls = torch.zeros((), dtype=torch.int64, device="cpu")
        return torch.zeros_like(rows), none, none, calls
