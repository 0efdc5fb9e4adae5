"""How far a model's outputs and accuracies are from a reference's, usually Retrain's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import checked_logits

TUGGED = ("forget", "retain", "test")


def tow(accuracies: Mapping[str, float], retrain: Mapping[str, float]) -> float:
    """Tug of war, in [0, 1], higher is better: prod over the sets of 1 - |acc - acc_retrain|.

    1 only where a model is as accurate as Retrain on the forget set, the retain set and the test
    set alike; failing on one of them cannot be made up for on another.

    Args:
        accuracies: of the model, in [0, 1], under forget, retain and test; other keys are left out.
        retrain: the same of Retrain.

    What makes unlearning hard and what to do about it, Zhao et al. (arXiv:2406.01257).
    """
    for side, name in ((accuracies, "accuracies"), (retrain, "retrain")):
        for key in TUGGED:
            if key not in side:
                raise InputError(f"{name} must have {', '.join(TUGGED)}, got no {key}")
            if not 0 <= side[key] <= 1:
                raise InputError(f"{name}: {key} must be in [0, 1], got {side[key]}")
    return math.prod(1 - abs(accuracies[key] - retrain[key]) for key in TUGGED)


def _log_probabilities(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p of either side, [N, C], float64."""
    sides = checked_logits(logits), checked_logits(reference_logits, "reference_logits")
    if sides[0].shape != sides[1].shape or len(sides[0]) == 0:
        shapes = f"{list(sides[0].shape)} and {list(sides[1].shape)}"
        raise InputError(f"logits and reference_logits must share [N, C], N > 0, got {shapes}")
    # the clamp keeps 0 log 0 at 0 where two logits lie further apart than the largest double
    least = torch.finfo(torch.float64).min
    a, b = (side.log_softmax(dim=1).clamp(min=least) for side in sides)
    return a, b


def kl(logits: Tensor, reference_logits: Tensor) -> float:
    """Mean over samples of KL(reference || model) = sum_i r_i log(r_i / p_i), nats, at least 0.

    Large where the model rules out what the reference holds likely. It has no upper bound: one
    sample can make up all of the mean.

    Args:
        logits: of the model, [N, C].
        reference_logits: of the reference on the same samples, [N, C].
    """
    log_p, log_r = _log_probabilities(logits, reference_logits)
    each = (log_r.exp() * (log_r - log_p)).sum(dim=1)
    return each.clamp(min=0).mean().item()  # equal outputs could round to below 0


def js(logits: Tensor, reference_logits: Tensor) -> float:
    """Mean over samples of the Jensen-Shannon divergence, nats, in [0, log 2], symmetric.

    (KL(p || m) + KL(r || m)) / 2, m = (p + r) / 2. Code in wide use for unlearning computes
    KL(m || p) and KL(m || r) in its place, which is another quantity and has no bound.

    Args:
        logits: of the model, [N, C].
        reference_logits: of the reference on the same samples, [N, C].
    """
    log_p, log_r = _log_probabilities(logits, reference_logits)
    log_m = torch.logaddexp(log_p, log_r) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_r.exp() * (log_r - log_m)
    return (terms.sum(dim=1) / 2).clamp(0, math.log(2)).mean().item()


def activation_distance(logits: Tensor, reference_logits: Tensor) -> float:
    """Mean over samples of the L2 distance of the softmax outputs, in [0, sqrt 2].

    Args:
        logits: of the model, [N, C].
        reference_logits: of the reference on the same samples, [N, C].

    Mixed-Privacy Forgetting in Deep Networks, Golatkar et al. 2021 (arXiv:2012.13431) compares
    final activations with those of a retrained model; taking L2 of probabilities is inferred from
    later use, and papers differ in it.
    """
    log_p, log_r = _log_probabilities(logits, reference_logits)
    return (log_p.exp() - log_r.exp()).norm(dim=1).mean().item()
