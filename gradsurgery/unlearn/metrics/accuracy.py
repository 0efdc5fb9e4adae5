"""Accuracies, losses, and the unlearning impact score made of accuracies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Batch, PerSampleLoss
from gradsurgery.unlearn.training.modes import evaluating


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
