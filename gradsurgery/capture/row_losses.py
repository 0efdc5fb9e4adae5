"""The losses of the rows, and whether they are finite: a GPU is asked with what comes later."""

from functools import cached_property

import torch
from torch import Tensor

from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.errors import NonFiniteError
from gradsurgery.ops._inputs import to_device


class SummedLosses:
    """Losses of all samples, summed in float64 over the rows they belong to.

    Attributes:
        values: [m], in the dtype of the losses; float64 where their sums leave its range.
        settled: whether they are known to be finite.
    """

    def __init__(self, losses: Tensor, rows: RowNumbers, m: int) -> None:
        flat, into = losses.detach().flatten(), rows.tensor
        if rows.some_none:
            flat, into = flat[into >= 0], into[into >= 0]
        self._wide = flat.new_zeros(m, dtype=torch.float64)
        self._wide.index_add_(0, to_device(into, flat.device), flat.double())
        self.values = self._wide.to(flat.dtype)
        self.settled = m == 0 or flat.is_meta

    @cached_property
    def finite(self) -> Tensor:
        """Whether all are, [] on their device."""
        return self.values.isfinite().all()

    def settle(self) -> None:
        """Raise `NonFiniteError` naming a row whose loss is not finite. Waits for a GPU."""
        if self.settled:
            return
        if not bool(self.finite):
            self.values = self._wide  # the sum of finite losses may leave their dtype's range
            bad = (~self._wide.isfinite()).nonzero().flatten().tolist()
            if bad:
                value = float(self._wide[bad[0]])
                raise NonFiniteError(f"losses: row {bad[0]} is not finite: {value}")
        self.settled = True
