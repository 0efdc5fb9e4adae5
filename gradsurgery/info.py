"""What a step saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.collect import Collected
from gradsurgery.diagnosis import Diagnosis, diagnose
from gradsurgery.ops._inputs import fetched
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

    A GPU is waited for once, where the solution is on it.
    """
    known = {k: v for k, v in solution._asdict().items() if isinstance(v, Tensor)}
    found = dict(zip(known, fetched(list(known.values())), strict=True))
    gram = found["gramian"]
    norms = gram.diagonal().sqrt()
    scale = norms[:, None] * norms
    cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0).clamp(-1, 1)
    means, losses = rows.means, torch.cat(list(rows.losses.values())).double()
    if "forget" in means:
        cosines = cosines[0, 1:]
        lowered = getattr(rule, "objective", "raise") == "lower"
        rate = (cosines < 0 if lowered else cosines > 0).double().mean()
    else:
        above = cosines.triu(1)
        rate = (above < 0).double().sum() / max(len(gram) * (len(gram) - 1) / 2, 1)
    wanted: dict[str, Tensor | None] = {
        "kept_norm": found.get("kept_norm"),
        "rank": found["rank"].double().mean() if "rank" in found else None,
        "forget_loss": means.get("forget"),
        "retain_loss": means.get("retain"),
    }
    numbers: dict[str, Any] = {k: float(v) for k, v in wanted.items() if v is not None}
    info = StepInfo(
        losses=losses,
        cosines=cosines,
        conflict_rate=float(rate),
        gramian=gram,
        frozen=solution.frozen,
        seconds=0.0,
        **numbers,
    )
    return info, found["weights"].to(solution.weights.dtype)
