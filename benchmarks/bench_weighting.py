"""Rules on a Gramian, against torchjd's weightings, and a batch of them against a loop.

torchjd's MGDA is approximate by design, and its NashMTL takes the rows: 5e-3 and 2 % off ours here.
"""

import warnings
from functools import partial

import pytest
import torch
from torchjd import aggregation as theirs

import gradsurgery as gs
from gradsurgery.ops import cone_weights
from gradsurgery.ops.deconflict import deconflict_weights, deconflict_weights_reference, shuffled

# m rows: times faster than torchjd's weighting at least
TARGETS = {
    ("UPGrad", 32): 10,
    ("UPGrad", 128): 60,
    ("UPGrad", 256): 60,
    ("DualProj", 32): 10,
    ("DualProj", 128): 60,
    ("DualProj", 256): 60,
    ("PCGrad", 128): 150,
    ("GradVac", 64): 150,
    ("MGDA", 32): 5,
    ("CAGrad", 32): 5,
    ("NashMTL", 32): 5,
    # what a call costs where there is little to solve
    ("UPGrad", 3): None,
    ("PCGrad", 3): None,
    ("MGDA", 3): None,
    ("IMTLG", 8): None,
    ("AlignedMTL", 8): None,
    ("Mean", 8): None,
}
ARGUMENTS = {"CAGrad": {"c": 0.5}}


def gramian_of(m):
    torch.manual_seed(0)
    rows = torch.randn(m, 8 * m, dtype=torch.float64)
    return rows, rows @ rows.mT


def missed(name, gram):
    """How far the weights are from what defines them, relative to the unit rows."""
    rule = getattr(gs, name)()
    weights = rule.weights(gram)
    if name == "UPGrad":
        return cone_weights(gram, -gram)[1].max().item()
    if name == "DualProj":
        mean = torch.full((1, len(gram)), 1 / len(gram), dtype=torch.float64)
        return cone_weights(gram, -(mean @ gram))[1].max().item()
    if name == "NashMTL":
        return ((gram @ weights) * weights - 1).abs().max().item()
    if name == "MGDA":  # no row is less along the update than the update is
        square = weights @ gram @ weights
        return ((square - gram @ weights) / square).clamp_min(0).max().item()
    if name == "CAGrad":  # |d - g₀| = c |g₀|
        mean = torch.full_like(weights, 1 / len(gram))
        apart = weights - mean
        return (((apart @ gram @ apart) / (mean @ gram @ mean)).sqrt() / 0.5 - 1).abs().item()
    if name in ("PCGrad", "GradVac"):  # against the same visits in plain torch
        order = shuffled(torch.rand(gram.shape))
        targets = torch.zeros_like(gram) if name == "GradVac" else None
        expected, _ = deconflict_weights_reference(gram, order, targets, 0.5)
        found, _ = deconflict_weights(gram, order, targets, 0.5)
        return ((found - expected).abs().max() / expected.abs().max()).item()
    return (weights - getattr(theirs, f"{name}Weighting")()(gram)).abs().max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name,m", TARGETS)
def bench_weighting(compare, name, m):
    rows, gram = gramian_of(m)
    ours = getattr(gs, name)()
    if name == "NashMTL":
        other = theirs.NashMTL(n_tasks=m).weighting
        rival = partial(other, rows)
    else:
        other = getattr(theirs, f"{name}Weighting")(**ARGUMENTS.get(name, {}))
        rival = partial(other, gram)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's
        compare(
            lambda: ours.weights(gram),
            {"torchjd": rival},
            nbytes=gram.nbytes,
            error=missed(name, gram),
            target={"torchjd": TARGETS[name, m]} if TARGETS[name, m] else None,
            rounds=5 if m > 200 else 15,
        )


@pytest.mark.parametrize("name", ["UPGrad", "MGDA"])
def bench_layers(compare, name):
    """100 layers of 16 rows in one call."""
    torch.manual_seed(0)
    rows = torch.randn(100, 16, 400, dtype=torch.float64)
    gram = rows @ rows.mT
    ours, other = getattr(gs, name)(), getattr(theirs, f"{name}Weighting")()
    weights = ours.weights(gram)
    alone = torch.stack([ours.weights(g) for g in gram])
    compare(
        lambda: ours.weights(gram),
        {
            "torchjd in a loop": lambda: [other(g) for g in gram],
            "a loop": lambda: [ours.weights(g) for g in gram],
        },
        nbytes=gram.nbytes,
        error=(weights - alone).abs().max().item(),
        target={"torchjd in a loop": 50},
    )
