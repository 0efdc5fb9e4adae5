"""G = J Jᵀ against one read of the rows and plain torch."""

import pytest
import torch

import gradsurgery as gs


@pytest.mark.parametrize(
    "m,n", [(2, 10_000_000), (16, 1_000_000), (16, 10_000_000), (64, 1_000_000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_gramian(compare, m, n, dtype):
    rows = torch.randn(m, n).to(dtype)
    exact = sum(chunk.double() @ chunk.double().mT for chunk in rows.split(1 << 20, dim=1))
    error = ((gs.gramian(rows) - exact).norm() / exact.norm()).item()
    compare(
        lambda: gs.gramian(rows),
        {"one read": rows.sum, "J @ J.T": lambda: rows @ rows.mT},
        nbytes=rows.nbytes,
        error=error,
        result_bytes=8 * m * m,
    )
