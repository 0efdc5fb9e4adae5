"""PCD: the first row's descent, of which every other row is guaranteed a share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops import cone_weights
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import Weighting, chosen


@dataclass(frozen=True, kw_only=True)
class PCD(Weighting):
    """The primary row, changed no more than it takes to give each other row its share.

    The d nearest to g_p with ⟨g_j, d⟩ ≥ tau |g_j|² for all j ≠ p, then made as long as g_p was.
    Rows are first divided by the root of the mean square of their norms over the calls so far, of
    weights beta^k: the share, a part tau of what a step along g_j alone gains, is then the same for
    rows of any scale. Where no d serves all, as where rows cancel, the update is g_p; where g_p or
    d is zero, it is zero. A row opposite to g_p is served, too: the update is then -g_p.

        gs.TwoDirections(rule=gs.PCD(primary=1))  # retains first, and forgets tau at least

    Args:
        tau: the share guaranteed, in [0, 1].
        beta: of the mean, in [0, 1), kept from call to call, and begun anew where the number of
            rows changes.
        primary: which row comes first.

    The paper's constant added to the mean square, 1e-8, is left out: no scale is too small.

    Not All Objectives Are Born Equal: Priority-Constrained Descent, Varam and AlHajri 2026
    (arXiv:2606.29521).
    """

    formula: ClassVar[str] = "argmin |d - g_p|, ⟨g_j, d⟩ >= tau |g_j|², as long as g_p"
    paper: ClassVar[str] = "Varam and AlHajri 2026 (arXiv:2606.29521)"
    remembers: ClassVar[tuple[str, ...]] = ("squares",)

    tau: float = 0.02
    beta: float = 0.999
    primary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.tau <= 1, f"tau must be in [0, 1], got {self.tau}")
        check(0 <= self.beta < 1, f"beta must be in [0, 1), got {self.beta}")

    def _weights(self, gram: Tensor, rtol: float) -> Tensor:
        m = gram.shape[-1]
        if m == 0:
            return gram.new_zeros(gram.shape[:-1])
        (p,) = chosen(self.primary, m, "primary")
        scale = self._scales(gram)
        unit = gram * scale[..., :, None] * scale[..., None, :]
        first = torch.arange(m, device=gram.device) == p
        # of the others alone: to the cone the first is a row of zeros
        others = torch.where(first | first[:, None], 0, unit)
        squares = unit.diagonal(dim1=-2, dim2=-1)
        products = torch.where(first, 0, self.tau * squares - unit[..., p, :])
        x, missed = cone_weights(others, products.unsqueeze(-2), rtol=rtol, noise=rtol**2)
        # rows that cancel miss, for unit rows, tau times the shortest at least
        norms = squares.clamp_min(0).sqrt()
        there = (norms > 0) & ~first
        most = torch.where(there, products / torch.where(there, norms, 1), 0).amax(-1, keepdim=True)
        least = self.tau * torch.where(there, norms, torch.inf).amin(-1, keepdim=True)
        served = (self.tau == 0) | (missed * most <= (least / 2).clamp_min(rtol**2 * most))
        weights = torch.where(served, x.squeeze(-2), 0) + first
        square = (weights * (unit @ weights.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
        size = (weights * norms).sum(-1, keepdim=True)
        left = square > (rtol * size) ** 2  # above rounding
        length = gram[..., p, p, None] / torch.where(left, square, 1)
        return weights * scale * torch.where(left, length, 0).clamp_min(0).sqrt()

    def _scales(self, gram: Tensor) -> Tensor:
        """1 / sqrt of the mean squares so far, [..., m]; 0 of rows that were always zero."""
        squares = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        seen = torch.cat([squares, torch.ones_like(squares[..., :1])], -1)  # last, weights' sum
        before = self._state.get("squares")
        if before is None or before.shape != seen.shape:
            before = torch.zeros_like(seen)
        seen = self.beta * before.to(seen) + seen
        self._state["squares"] = seen.detach()
        mean = seen[..., :-1] / seen[..., -1:]
        known = mean > 0
        return torch.where(known, torch.where(known, mean, 1).rsqrt(), 0)
