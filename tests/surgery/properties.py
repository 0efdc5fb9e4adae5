"""The rules with options to test them with, and what they claim of the update."""

import torch

from gradsurgery import RULES
from gradsurgery.surgery import Weighting

# options without which a rule cannot be made or called
OPTIONS = {
    "constant": lambda m: {"values": [1.0 + i for i in range(m)]},
    "gdrgma": lambda m: {"mix": 0.3},
    "krum": lambda m: {"n_byzantine": int(m > 3)},
}
FEWEST = {"krum": 3}  # rows that a rule needs, where one is not enough


def make(name, m=2, **options):
    return RULES[name](**{**OPTIONS.get(name, lambda _: {})(m), **options})


def weighted(name):
    return issubclass(RULES[name], Weighting)


def least_cosine(rows, update):
    """The least cosine of the update with a row that is not zero; 0 for a zero update."""
    norms, length = rows.norm(dim=1), update.norm()
    if length == 0 or not bool((norms > 0).any()):
        return 0.0
    return float(((rows @ update)[norms > 0] / norms[norms > 0] / length).min())


def relative(a, b):
    """|a - b| / |b|, or |a| where b is zero."""
    scale = b.norm()
    return float((a - b).norm() / (scale if scale > 0 else 1))


def update_of(rule, rows, **roles):
    """In float64, from the exact Gramian's weights."""
    return rule.weights(rows @ rows.mT, **roles) @ rows


def permuted(m):
    return torch.randperm(m)
