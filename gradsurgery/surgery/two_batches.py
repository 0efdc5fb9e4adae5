"""Rules whose weights move from step to step along the products of two independent batches."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.ops._inputs import check, to_device
from gradsurgery.surgery.rule import Index, Weighting, chosen


@dataclass(frozen=True, kw_only=True)
class TwoBatches(Weighting):
    """A rule for the m tasks of a batch, and the same ones of a `second` batch drawn apart.

    Weights w of the tasks, on the simplex, are kept from call to call and moved by the
    cross-Gramian K = J_a J_bᵀ, in which the noise that the two batches do not share has mean zero:
    a block of the one Gramian of all rows. The update is wᵀ (J_a + J_b) / 2. Weights begin alike,
    and anew where the number of tasks changes.

        surgeon.step(batch=first, second=other, loss=loss)  # loss: [B, tasks]

    Without second rows K is the Gramian of the rows there are: right for gradients of all data, and
    biased by the noise of a batch.
    """

    roles: ClassVar[tuple[str, ...]] = ("second",)
    remembers: ClassVar[tuple[str, ...]] = ("weights",)

    def _weights(self, gram: Tensor, rtol: float, second: Index = ()) -> Tensor:
        rows = gram.shape[-1]
        b = chosen(second, rows, "second")
        a = [i for i in range(rows) if i not in set(b)] if b else list(range(rows))
        check(
            not b or len(a) == len(b),
            f"second selects {len(b)} of {rows} rows; there must be one for each of the others",
        )
        m = len(a)
        pick = torch.zeros(2, rows, m, dtype=gram.dtype, device="cpu")
        pick[0, a, range(m)] = pick[1, b or a, range(m)] = 1
        pick = to_device(pick, gram.device)
        known = self._state.get("weights")
        if known is None or known.shape != (*gram.shape[:-2], m):
            known = gram.new_full((*gram.shape[:-2], m), 1 / max(m, 1))
        moved, weights = self._moved(pick[0].mT @ gram @ pick[1], known.to(gram))
        self._state["weights"] = moved.detach()
        return weights @ pick.mean(0).mT

    def _of_columns(self) -> str:
        return super()._of_columns() and "weights"

    def _moved(self, cross: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """From K [..., m, m] and w [..., m]: what is kept as w, and the weights of the update."""
        raise NotImplementedError


def on_simplex(point: Tensor) -> Tensor:
    """The nearest to a point [..., m] of those with entries of 0 or more, of sum 1."""
    m = point.shape[-1]
    if m == 0:
        return point
    # of a far point only differences count, and its sum would drown them
    point = point - point.amax(-1, keepdim=True)
    falling = point.sort(-1, descending=True).values
    counts = torch.arange(1, m + 1, dtype=point.dtype, device=point.device)
    shifts = (1 - falling.cumsum(-1)) / counts
    last = (falling + shifts > 0).sum(-1, keepdim=True) - 1  # of the entries that stay above 0
    return (point + shifts.gather(-1, last)).clamp_min(0)
