"""What a step saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.collect import Collected
from gradsurgery.diagnosis import Diagnosis, diagnose
from gradsurgery.surgery import Rule, Solution


@dataclass(frozen=True)
class StepInfo:
    """What one update saw. Losses and gradients are those before the step."""

    losses: Tensor  # [m] float64, of the rows: the mean over the batch where a row is of a batch
    cosines: Tensor  # float64: [k], of the forget gradient with each other row; else [m, m]
    # share of the other rows whose loss forgetting raises: positive cosines, or negative ones where
    # the forget loss is to be lowered; of tasks the share of pairs of rows with a negative one
    conflict_rate: float
    seconds: float
    gramian: Tensor  # [m, m] float64, of the rows, on the CPU
    forget_loss: float | None = None  # means over the batches
    retain_loss: float | None = None
    kept_norm: float | None = None  # OrthoGrad: |g⊥| / |g_u|, in [0, 1]
    rank: float | None = None  # OrthoGrad: of the rows; the mean over groups of tensors
    frozen: Sequence[str] = ()  # tensors a projection left no unlearning signal, or exempted
    # whether rows scaled by a GradScaler overflowed: nothing moves, and tensors are empty
    skipped: bool = False

    @classmethod
    def of_none(cls) -> "StepInfo":
        """Of an update that is left out."""
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        nan = float("nan")
        return cls(none, none, nan, 0.0, none.view(0, 0), skipped=True)

    @property
    def diagnosis(self) -> Diagnosis:
        """Cosines, norms, ranks and conflicts of the rows, from the Gramian the step had."""
        return diagnose(self.gramian)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; without the Gramian."""
        known = {name: value for name, value in vars(self).items() if name != "gramian"}
        lists = {"losses": self.losses.tolist(), "cosines": self.cosines.tolist()}
        return {**known, **lists, "frozen": list(self.frozen)}


def seen(rule: Rule, rows: Collected, solution: Solution) -> tuple[StepInfo, Tensor]:
    """What a step tells of its rows, `seconds` to come, and the weights, on the CPU.

    A GPU is waited for once.
    """
    jacobian, gram = rows.jacobian, solution.gramian
    norms = gram.diagonal().sqrt()
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
    if "forget" in rows.means:
        cosines = cosines[0, 1:]
        lowered = getattr(rule, "objective", "raise") == "lower"
        rate = (cosines < 0 if lowered else cosines > 0).double().mean()
    else:
        above = cosines.triu(1)
        rate = (above < 0).double().sum() / max(jacobian.m * (jacobian.m - 1) / 2, 1)
    wanted: dict[str, Tensor | None] = {
        "conflict_rate": rate,
        "kept_norm": solution.kept_norm,
        "rank": None if solution.rank is None else solution.rank.double().mean(),
        "forget_loss": rows.means.get("forget"),
        "retain_loss": rows.means.get("retain"),
    }
    known = {name: value for name, value in wanted.items() if value is not None}
    losses = torch.cat(list(rows.losses.values()))
    parts = [*known.values(), losses, cosines, gram, solution.weights]
    flat = torch.cat([part.to(gram.device).double().flatten() for part in parts]).cpu()
    *means, losses, cosines, gram, weights = (
        found.view(part.shape)
        for found, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    )
    numbers: dict[str, Any] = {k: v.item() for k, v in zip(known, means, strict=True)}
    info = StepInfo(
        losses=losses,
        cosines=cosines,
        gramian=gram,
        frozen=solution.frozen,
        seconds=0.0,
        **numbers,
    )
    return info, weights.to(solution.weights.dtype)
