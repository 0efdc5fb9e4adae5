"""Orthonormal rows against Householder QR, large and in small batches."""

import pytest
import torch

import gradsurgery as gs


@pytest.mark.parametrize(
    "shape,target",
    [
        ((32, 1_000_000), {"torch.linalg.qr": 8}),
        ((4, 1_000_000), {}),
        ((64, 4, 4096), {}),
        ((64, 16, 4096), {}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def bench_orthonormalize(compare, shape, target):
    rows = torch.randn(shape)
    q, _ = gs.orthonormalize(rows)
    eye = torch.eye(shape[-2], dtype=torch.float64)
    error = (q.double() @ q.double().mT - eye).abs().max().item()
    del q
    compare(
        lambda: gs.orthonormalize(rows),
        {"torch.linalg.qr": lambda: torch.linalg.qr(rows.mT)},
        nbytes=3 * rows.nbytes,
        error=error,
        target=target,
        rounds=9,
    )
