"""g⊥ against QR of the rows, the Gramian in plain torch, and two reads of the rows."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery.bench.cases import by_gramian, by_qr

TARGETS = {  # times faster, at least
    (16, 1_000_000): {"torch.linalg.qr": 25, "plain torch Gramian": 1.8},
    (16, 10_000_000): {"torch.linalg.qr": 25, "plain torch Gramian": 1.8, "two reads": 1 / 1.4},
    (64, 1_000_000): {"plain torch Gramian": 1.5},
}


@pytest.mark.parametrize("m,n", TARGETS)
def bench_project_out(compare, m, n):
    rows, grad = torch.randn(m, n), torch.randn(n)
    exact = by_gramian(grad.double(), rows.double())
    error = ((gs.project_out(grad, rows) - exact).norm() / exact.norm()).item()
    del exact
    compare(
        lambda: gs.project_out(grad, rows),
        {
            "torch.linalg.qr": lambda: by_qr(grad, rows),
            "plain torch Gramian": lambda: by_gramian(grad, rows),
            "two reads": lambda: (rows.sum(), rows.sum()),
        },
        nbytes=2 * (rows.nbytes + 4 * n) + 4 * n,
        error=error,
        result_bytes=4 * n,
        target=TARGETS[m, n],
        rounds=9,
    )
