"""Orthonormal rows against Householder QR, large and in small batches."""

import pytest
import torch

import gradsurgery as gs

SHAPES = [(32, 1_000_000), (4, 1_000_000), (64, 4, 4096), (64, 16, 4096)]
TARGETS = {(32, 1_000_000): {"torch.linalg.qr": 8}}  # times faster, at least


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def bench_orthonormalize(compare, shape):
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
        target=TARGETS.get(shape),
        rounds=9,
    )
