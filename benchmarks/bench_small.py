"""Calls on a few small rows, where there is next to nothing to compute: what a call itself costs.

Against plain torch, and the operator called by torch's dispatcher, its arguments unchecked.
"""

import pytest
import torch

import gradsurgery as gs
from gradsurgery.bench.cases import by_gramian

ROUNDS = 300  # of some microseconds each


def dispatched(name, *args):
    operator = getattr(torch.ops.gradsurgery, name)
    return lambda: operator(*args)


def by_solve(gram, alpha=0.5):
    """OrthoGrad's weights where the rows are independent."""
    c = (1 - alpha) * torch.linalg.solve(gram[1:, 1:], gram[1:, 0])
    return torch.cat([c.new_full((1,), alpha - 1), c + alpha / len(c)])


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("m,n", [(4, 64), (8, 1000)])
def bench_small_gramian(compare, m, n):
    rows = torch.randn(m, n)
    compare(
        lambda: gs.gramian(rows),
        {
            "torch's dispatcher": dispatched("gramian", [rows], False, False),
            "J @ J.T": lambda: rows.double() @ rows.double().mT,
        },
        nbytes=rows.nbytes,
        error=relative(gs.gramian(rows), rows.double() @ rows.double().mT),
        target={"J @ J.T": 1 / 2.5},
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("m,n", [(4, 64), (8, 1000)])
def bench_small_combine(compare, m, n):
    rows, weights = torch.randn(m, n), torch.rand(m).double()
    compare(
        lambda: gs.combine(rows, weights),
        {
            "torch's dispatcher": dispatched("combine", [rows], weights),
            "w @ J": lambda: weights @ rows.double(),
        },
        nbytes=rows.nbytes + 4 * n,
        error=relative(gs.combine(rows, weights), weights @ rows.double()),
        target={"w @ J": 1 / 3},
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("m,n", [(4, 64), (8, 1000)])
def bench_small_project_out(compare, m, n):
    rows, grad = torch.randn(m, n), torch.randn(n)
    compare(
        lambda: gs.project_out(grad, rows),
        {
            "torch's dispatcher": dispatched("project_out", [grad], [rows], 1e-7, 1),
            "plain torch Gramian": lambda: by_gramian(grad, rows),
        },
        nbytes=2 * (rows.nbytes + 4 * n) + 4 * n,
        error=relative(gs.project_out(grad, rows), by_gramian(grad.double(), rows.double())),
        target={"plain torch Gramian": 1 / 1.5},
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("m", [4, 32])
def bench_small_orthograd(compare, m):
    rows = torch.randn(m, 8 * m, dtype=torch.float64)
    gram, rule = rows @ rows.mT, gs.OrthoGrad()
    compare(
        lambda: rule.weights(gram),
        {"plain torch": lambda: by_solve(gram)},
        nbytes=gram.nbytes,
        error=relative(rule.weights(gram), by_solve(gram)),
        target={"plain torch": 1 / 2.5},
        rounds=ROUNDS,
    )
