"""Rules for two directions, one that forgets and one that retains, on a 2 x 2 Gramian."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsurgery.ops._inputs import to_device
from gradsurgery.surgery.rule import Index, Weighting, mean_of, one_of, split


@dataclass(frozen=True, kw_only=True)
class ForgetRetain(Weighting):
    """A rule for f and r: the mean of the forget rows and that of all others.

    `forget` names the forget rows: by default row 0. The update is one to be descended, as by any
    optimizer.

    Args:
        objective: what the forget rows are gradients of: "raise", an ordinary loss, which
            forgetting raises, so that f is its negative; "lower", a loss made to forget, such as
            that of wrong labels or NPO, so that f is its gradient.
    """

    roles: ClassVar[tuple[str, ...]] = ("forget",)
    merges: ClassVar[tuple[str, ...]] = ("retain",)

    objective: Literal["raise", "lower"] = "raise"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("objective", self.objective, ("raise", "lower"))

    def _weights(self, gram: Tensor, rtol: float, forget: Index = 0, **given: Any) -> Tensor:
        pair = to_device(self._directions(gram.shape[-1], forget), gram.device)
        return self._mix(pair @ gram @ pair.mT, rtol, **given) @ pair

    def _directions(self, m: int, forget: Index) -> Tensor:
        return directions(m, forget, self.objective)

    def _mix(self, *args: Any, **given: Any) -> Tensor:
        """(gram, rtol, **given): weights [..., 2] of f and r from their Gramian."""
        raise NotImplementedError


def directions(m: int, forget: Index, objective: str) -> Tensor:
    """[2, m] on the CPU: f and r as sums of rows."""
    rows, rest = split(m, forget, "forget", "retain")
    sign = -1 if objective == "raise" else 1
    return torch.stack([sign * mean_of(rows, m), mean_of(rest, m)])


def off(gram: Tensor, row: int, other: int) -> Tensor:
    """Weights [..., 2] of a row without its part against the other, if it opposes that."""
    square = gram[..., other, other]
    nonzero = square > 0
    share = torch.where(nonzero, gram[..., 0, 1].clamp_max(0) / torch.where(nonzero, square, 1), 0)
    parts = [-share, -share]
    parts[row] = torch.ones_like(share)
    return torch.stack(parts, -1)


def inverse_norms(gram: Tensor) -> Tensor:
    """[..., m], 0 for a zero row."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    nonzero = square > 0
    return torch.where(nonzero, torch.where(nonzero, square, 1).rsqrt(), 0)
