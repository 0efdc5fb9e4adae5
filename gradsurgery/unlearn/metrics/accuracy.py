"""Accuracies, losses, and the unlearning impact score made of accuracies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.objectives.base import (
    Batch,
    Objective,
    Outputs,
    PerSampleLoss,
    batch_size,
    check_has,
)
from gradsurgery.unlearn.objectives.classification import Classification, as_objective, integers
from gradsurgery.unlearn.training.given import checked_outputs
from gradsurgery.unlearn.training.modes import evaluating


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: Batch,
    labels: Tensor | None = None,
    *,
    objective: Objective | None = None,
) -> float:
    """Share of the predictions for `data` whose largest logit is at the label, in [0, 1].

    NaN for an empty set: no prediction, no accuracy.

    Args:
        model: in any mode, which stays.
        data: a batch of the objective.
        labels: [N], in the place of the data's own.
        objective: None: classification.
    """
    with evaluating(model):
        found = outputs(model, objective or Classification(), data)
    return share_right(found.logits, found.labels if labels is None else labels)


def outputs(model: nn.Module, objective: Objective, data: Batch) -> Outputs:
    """What a model predicts; `InputError` where the task cannot say it."""
    check_has(objective, ("outputs",), "accuracy")
    return checked_outputs(objective, objective.outputs(model, data), batch_size(data))


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, C] that are largest at `labels` [N]; NaN for none."""
    found = right(logits, labels)
    return found.double().mean().item() if len(found) else math.nan


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of `logits` [N, C] are largest at `labels` [N], a mask [N]."""
    known = integers(labels, len(logits), of="row of logits").to(logits.device)
    return logits.argmax(dim=1) == known


@torch.no_grad()
def losses(model: nn.Module, loss: PerSampleLoss | Objective, data: Batch) -> Tensor:
    """Per-sample losses, [B], of a function (model, batch) -> [B] or an `Objective`."""
    with evaluating(model):
        return as_objective(loss).losses(model, data)


def uis(original_test: float, test: float, unlearned: float, *, kind: str) -> float:
    """Unlearning impact score, at least 0, lower is better.

    With A_o the original test accuracy, A_t the test accuracy after and A_u the accuracy on the
    unlearned set after: kind "random": (|A_o - A_t| / A_o + |A_o - A_u| / A_o) / 2, an unlearned
    sample should look unseen; kind "class":  (|A_o - A_t| / A_o + A_u / A_o) / 2, an unlearned
    class should never be predicted.

    For one class to forget, A_o and A_t are meant over the other classes; for mislabelled samples
    jobs use "class" with the wrong labels. The paper defines the two kinds; these two
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
