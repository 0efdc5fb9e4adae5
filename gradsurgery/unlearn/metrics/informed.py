"""The informed attack: it knows what Retrain says of every sample, and so how hard each of them is.

An attack on a model alone takes a hard sample that was learned for an easy one that was not.
"""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.extras import package
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
    forget: tuple[Tensor, Tensor, Tensor],
    unseen: tuple[Tensor, Tensor, Tensor],
    seed: int = 0,
) -> dict[str, float]:
    """How often forget samples are told from unseen ones by what a model says of them that Retrain
    does not.

    It is given every sample's `features` less those that Retrain has of it, which hold how hard the
    sample is to a model that never saw it. A logistic regression on the three says whether the
    sample was forgotten or never seen; the rest is as in `attacks.mia`. To a Retrain of another
    seed both are unseen, so where they are of one kind it gets 0.5. Wrong labels or a class of its
    own are of another kind, and then that Retrain's number is the one to compare with.

    To ask which of two models an output is of would not do: two Retrains differ as wholes, one
    being more sure than the other on every sample, and are told apart as well as the original is.

    Args:
        forget: the model's logits [N, C], Retrain's on the same samples, and the labels [N] they
            were trained with, N at least 5.
        unseen: the same of samples that neither was trained on, [M, C] and [M], M at least 5.
        seed: of the subsample and of the folds.

    Returns:
        informed: accuracy, in [0, 1]. informed_auc: area under the ROC curve, in [0, 1]. Both are
        means over 5 stratified folds, each judged by a regression that was fitted on the others.

    That two models' outputs on one sample tell more than those of one is from When Machine
    Unlearning Jeopardizes Privacy, Chen et al. (arXiv:2005.02205), whose other model is the
    original. Retrain in its place, unseen samples beside it and the features are inferred.
    """
    package("sklearn", "jobs", "an attack by a fitted model")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    apart = [_apart(*side, name) for side, name in ((forget, "forget"), (unseen, "unseen"))]
    n = min(map(len, apart))
    if n < ATTACK_SPLITS:
        raise InputError(f"an attack needs at least {ATTACK_SPLITS} samples a side, got {n}")
    generator = torch.Generator().manual_seed(seed)
    drawn = [side[torch.randperm(len(side), generator=generator)[:n]] for side in apart]
    rows = torch.cat(drawn).numpy()
    forgotten = torch.tensor([1, 0]).repeat_interleave(n).numpy()
    folds = StratifiedKFold(ATTACK_SPLITS, shuffle=True, random_state=seed)
    rights, areas = [], []
    for fit, judge in folds.split(rows, forgotten):
        attack = make_pipeline(StandardScaler(), LogisticRegression())
        attack.fit(rows[fit], forgotten[fit])
        truth = torch.from_numpy(forgotten[judge]).bool()
        scores = torch.from_numpy(attack.decision_function(rows[judge]))
        rights.append(((scores > 0) == truth).double().mean().item())
        areas.append(auc(scores[truth], scores[~truth]))
    return {"informed": mean(rights), "informed_auc": mean(areas)}


def _apart(logits: Tensor, retrained: Tensor, labels: Tensor, name: str) -> Tensor:
    """Features of a model's outputs less those of Retrain's, [N, 3]."""
    sides = checked_logits(logits, name), checked_logits(retrained, f"{name}: Retrain's logits")
    if sides[0].shape != sides[1].shape:
        shapes = f"{list(sides[0].shape)} and {list(sides[1].shape)}"
        raise InputError(f"{name}: the model's and Retrain's logits must be alike, got {shapes}")
    mine, theirs = (features(side, labels) for side in sides)
    return mine - theirs
