"""What is measured: accuracies, UIS, membership inference, and the gap of each to Retrain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import mia as mia
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.training.data import Batch
from gradsurgery.unlearn.training.modes import evaluating
from gradsurgery.unlearn.training.trainer import PerSampleLoss


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch, labels: Tensor | None = None) -> float:
    """Share of `data` whose largest logit is at `labels` ([N], default: the data's own), in [0, 1].

    `data` is a classifier's batch, as `classification` says. NaN for an empty set: no sample, no
    accuracy.
    """
    with evaluating(model):
        known = classification.labels(data) if labels is None else labels
        return share_right(classification.logits(model, data), known)


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, C] that are largest at `labels` [N]; NaN for none."""
    known = classification.integers(labels, len(logits), of="row of logits").to(logits.device)
    if len(known) == 0:
        return math.nan
    return (logits.argmax(dim=1) == known).double().mean().item()


@torch.no_grad()
def losses(model: nn.Module, loss: PerSampleLoss, data: Batch) -> Tensor:
    """Per-sample losses, [N]."""
    with evaluating(model):
        return loss(model, data)


def uis(original_test: float, test: float, unlearned: float, *, kind: str) -> float:
    """Unlearning impact score, at least 0, lower is better.

    With A_o the original test accuracy, A_t the test accuracy after and A_u the accuracy on the
    unlearned set after: kind "random": (|A_o - A_t| / A_o + |A_o - A_u| / A_o) / 2, an unlearned
    sample should look unseen; kind "class":  (|A_o - A_t| / A_o + A_u / A_o) / 2, an unlearned
    class should never be predicted.

    For one class to forget, A_o and A_t are meant over the other classes; for mislabelled samples
    the digits job uses "class" with the wrong labels. The paper defines the two kinds; these two
    readings are inferred.

    Go Beyond Your Means: Unlearning with Per-Sample Gradient Orthogonalization, Shamsian et al.
    (arXiv:2503.02312).
    """
    if original_test <= 0:
        raise InputError(f"original_test must be positive, got {original_test}")
    if kind not in ("random", "class"):
        raise InputError(f"kind must be random or class, got {kind}")
    unwanted = abs(original_test - unlearned) if kind == "random" else unlearned
    return (abs(original_test - test) + unwanted) / (2 * original_test)


def gap(metrics: Mapping[str, float], retrain: Mapping[str, float]) -> dict[str, float]:
    """|metric - Retrain's| for every metric both have, and their mean under "mean"."""
    each = {name: abs(value - retrain[name]) for name, value in metrics.items() if name in retrain}
    if not each:
        raise InputError("gap: the two sides share no metric")
    return {**each, "mean": mean(each.values())}


def spread(values: list[float]) -> dict[str, float | list[float] | None]:
    """Mean, sample standard deviation (None for one value) and the values themselves."""
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Mean difference a - b over pairs, such as two methods on the same seeds, and how sure it is.

    Args:
        a: n values.
        b: n values, b[i] under the conditions of a[i].

    Returns:
        mean: of the differences. stderr: its standard error, their sample standard deviation over
        sqrt(n). interval: [low, high], its 95 % interval of Student's t with n - 1 degrees of
        freedom, right where the differences are about normal. The last two are None for one pair.
    """
    if len(a) != len(b) or len(a) == 0:
        raise InputError(f"a and b must be equally many, at least 1, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    for i, difference in enumerate(differences):
        if not math.isfinite(difference):
            raise InputError(f"a and b must be finite, got {a[i]} and {b[i]} at {i}")
    center, n = mean(differences), len(differences)
    if n == 1:
        return {"mean": center, "stderr": None, "interval": None}
    from scipy.stats import t

    error = stdev(differences) / math.sqrt(n)
    reach = float(t.ppf(0.975, n - 1)) * error
    return {"mean": center, "stderr": error, "interval": [center - reach, center + reach]}
