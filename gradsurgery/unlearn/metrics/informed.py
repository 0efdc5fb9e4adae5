"""The informed attack: shown one sample's outputs of two models, which of them is Retrain?

It knows what no attack on the unlearned model alone can know, and so finds what these miss: a
sample that looks unseen, but not as this very sample would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.ranking import auc
from gradsurgery.unlearn.metrics.attacks import (
    ATTACK_SPLITS,
    LARGEST_LOSS,
    at_labels,
    checked_labels,
    checked_logits,
    log_probabilities,
)


def features(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, margin and entropy of each sample's outputs, [N, 3], float64, nats.

    Loss -log p_y and margin log(p_y / (1 - p_y)) are clipped to 50, so that one sample cannot set
    the scale of a regression for all the others.

    Args:
        logits: [N, C].
        labels: y, [N].
    """
    log_p, log_rest = log_probabilities(logits)
    y = checked_labels(labels, log_p)
    loss = -at_labels(log_p, y)
    margin = at_labels(log_p - log_rest, y)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    clipped = (each.clamp(-LARGEST_LOSS, LARGEST_LOSS) for each in (loss, margin))
    return torch.stack([*clipped, entropy], dim=1)


def informed_attack(
    unlearned_logits: Tensor, retrained_logits: Tensor, labels: Tensor, seed: int = 0
) -> dict[str, float]:
    """How often an attack tells an unlearned model's outputs on a forget sample from Retrain's.

    Of every sample it sees both models' `features` in unknown order. A logistic regression without
    intercept on their differences says which is the unlearned one's; it is fitted on four fifths
    of the samples and judged on the others, five times over.

    Two Retrains differ as wholes too, one being more sure than the other on all samples: compare
    with the number of a Retrain of another seed, which chance leaves above 0.5.

    Args:
        unlearned_logits: on the forget set, [N, C], N at least 5.
        retrained_logits: of a model that never saw the forget set, on the same samples, [N, C].
        labels: [N], as the forget set was trained with them.
        seed: of the folds.

    Returns:
        informed: share of samples told rightly, in [0, 1], an undecided one counting half.
        informed_auc: area under the ROC curve of the scores of either order, in [0, 1]. Both are
        means over the folds; 0.5 is guessing and so perfect unlearning, 1 tells every sample.

    That two models' outputs on one sample tell more than those of one is from When Machine
    Unlearning Jeopardizes Privacy, Chen et al. (arXiv:2005.02205), whose other model is the
    original. Retrain in its place, the features and the regression are inferred.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    unlearned = checked_logits(unlearned_logits, "unlearned_logits")
    retrained = checked_logits(retrained_logits, "retrained_logits")
    if unlearned.shape != retrained.shape:
        shapes = f"{list(unlearned.shape)} and {list(retrained.shape)}"
        raise InputError(f"unlearned_logits and retrained_logits must share [N, C], got {shapes}")
    n = len(unlearned)
    if n < ATTACK_SPLITS:
        raise InputError(f"an attack needs at least {ATTACK_SPLITS} samples, got {n}")
    apart = features(unlearned, labels) - features(retrained, labels)
    rights, areas = [], []
    for fit, judge in KFold(ATTACK_SPLITS, shuffle=True, random_state=seed).split(apart):
        # either order of the two models, and so no intercept and no mean to take away
        orders = torch.cat([apart[fit], -apart[fit]]).numpy()
        first = torch.tensor([1, 0]).repeat_interleave(len(fit)).numpy()
        attack = make_pipeline(
            StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False)
        ).fit(orders, first)
        scores = torch.from_numpy(attack.decision_function(apart[judge].numpy()))
        rights.append(((1 + scores.sign()) / 2).mean())
        areas.append(auc(scores, -scores))
    return {
        "informed": torch.stack(rights).mean().item(),
        "informed_auc": sum(areas) / len(areas),
    }
