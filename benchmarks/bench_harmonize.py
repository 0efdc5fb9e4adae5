"""Two conflicting gradients against the same in plain torch."""

import pytest
import torch

import gradsurgery as gs


def in_torch(forget, retain):
    product = forget @ retain
    return forget - product.clamp(max=0) / (retain @ retain) * retain, retain


@pytest.mark.parametrize("n", [1_000_000, 10_000_000])
def bench_harmonize(compare, n):
    retain = torch.randn(n)
    forget = torch.randn(n) - 0.1 * retain
    exact = in_torch(forget.double(), retain.double())[0]
    error = ((gs.harmonize(forget, retain)[0] - exact).norm() / exact.norm()).item()
    del exact
    compare(
        lambda: gs.harmonize(forget, retain),
        {"plain torch": lambda: in_torch(forget, retain)},
        nbytes=4 * n * 5,
        error=error,
        result_bytes=4 * n,
    )
