"""update = wᵀ J against plain torch."""

import pytest
import torch

import gradsurgery as gs


@pytest.mark.parametrize("m,n", [(16, 1_000_000), (16, 10_000_000), (64, 1_000_000)])
def bench_combine(compare, m, n):
    rows, weights = torch.randn(m, n), torch.randn(m)
    exact = weights.double() @ rows.double()
    error = ((gs.combine(rows, weights) - exact).norm() / exact.norm()).item()
    del exact
    compare(
        lambda: gs.combine(rows, weights),
        {"one read": rows.sum, "w @ J": lambda: weights @ rows},
        nbytes=rows.nbytes + 4 * n,
        error=error,
        result_bytes=4 * n,
    )
