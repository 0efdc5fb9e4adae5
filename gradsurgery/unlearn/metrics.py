"""What is measured: accuracies, UIS, membership inference, and the gap of each to Retrain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.data import Batch
from gradsurgery.unlearn.trainer import PerSampleLoss

# a loss is clipped here before an attack sees it: one sample forgotten to an enormous loss would
# otherwise set the scale of the logistic regression for all the others
LARGEST_LOSS = 50.0  # nats
ATTACK_SPLITS = 5


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch, labels: Tensor | None = None) -> float:
    """Share of `data` whose largest logit is at `labels` ([N], default: the data's own), in [0, 1].

    NaN for an empty set: no sample, no accuracy.
    """
    return share_right(model(data["image"]), data["label"] if labels is None else labels)


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [N, C] that are largest at `labels` [N]; NaN for none."""
    if len(labels) == 0:
        return math.nan
    return (logits.argmax(dim=1) == labels).double().mean().item()


@torch.no_grad()
def losses(model: nn.Module, loss: PerSampleLoss, data: Batch) -> Tensor:
    """Per-sample losses, [N]."""
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


def mia(forget_losses: Tensor, unseen_losses: Tensor, seed: int = 0) -> float:
    """Accuracy of a loss-based membership attack on forget samples against unseen ones.

    A logistic regression on the per-sample loss, mean accuracy over 5 stratified folds, each
    predicted by the regression fitted on the others. The larger set is subsampled to the size of
    the smaller, so 0.5 means the attack cannot tell them apart. Compare with Retrain, not with
    0.5: wrong labels and an unseen class have losses that stand out in a model that never saw
    them.

    Args:
        forget_losses: [n_forget].
        unseen_losses: [n_unseen], samples no model was trained on.
        seed: of the subsample and of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(len(forget_losses), len(unseen_losses))
    if n < ATTACK_SPLITS:
        raise InputError(f"an attack needs at least {ATTACK_SPLITS} samples a side, got {n}")
    generator = torch.Generator().manual_seed(seed)
    sides = [
        side[torch.randperm(len(side), generator=generator)[:n]].clamp(max=LARGEST_LOSS)
        for side in (forget_losses, unseen_losses)
    ]
    features = torch.cat(sides).double().reshape(-1, 1).numpy()
    member = torch.tensor([1, 0]).repeat_interleave(n).numpy()
    folds = StratifiedKFold(ATTACK_SPLITS, shuffle=True, random_state=seed)
    attack = make_pipeline(StandardScaler(), LogisticRegression())
    return float(cross_val_score(attack, features, member, cv=folds).mean())


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
