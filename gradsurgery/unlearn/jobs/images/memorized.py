"""Which samples a network can only know by heart: those that networks without them get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradsurgery.unlearn.jobs.classifiers import outputs
from gradsurgery.unlearn.methods.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.objectives.base import Batch, take
from gradsurgery.unlearn.objectives.classification import Classification, label_losses, labels

FOLDS = 5
ORDER = 20_260  # by which samples are dealt out to folds, whatever the seed of a run


def unseen_losses(
    samples: Batch, make: Callable[[int], nn.Module], config: RetrainConfig
) -> Tensor:
    """The cross-entropy of each sample under a network that never saw it, [N] float64.

    Five networks are trained, each without a fifth of every class, as the original is.

    Args:
        samples: to train with, N of them; those of a class that has fewer than five count as the
            others do.
        make: the k-th network.

    What a model that knows a sample gains by having seen it is its memorization (Feldman 2020,
    arXiv:1906.05271); an original is right of nearly all that it saw, so what is left is how wrong
    one is that did not.
    """
    fold = _folds(labels(samples).cpu())
    found = torch.zeros(len(fold), dtype=torch.float64)
    for k in range(FOLDS):
        unseen = fold == k
        if not bool(unseen.any()):
            continue
        model, (rest, part) = make(k), (take(samples, ~unseen), take(samples, unseen))
        Retrain(model, Classification(), retain=rest, forget=None, config=config, seed=k).run()
        found[unseen] = label_losses(outputs(model, part), labels(part).cpu()).double()
    return found


def _folds(known: Tensor) -> Tensor:
    """In which fold each sample is, [N]: of every class as many in each, but for one."""
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(ORDER))
    by_class = order[known[order].argsort(stable=True)]
    folds = torch.empty_like(known)
    folds[by_class] = torch.arange(len(known)) % FOLDS
    return folds
