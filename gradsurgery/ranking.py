"""How far two sets of scores lie apart, by their order alone."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.extras import package


def checked_scores(values: Tensor, name: str) -> Tensor:
    """`values` [N] in float64 on the CPU; infinities have an order and may stay, NaN may not."""
    if values.dim() != 1:
        raise InputError(f"{name} must be [N], got {list(values.shape)}")
    found = values.detach().cpu().double()
    bad = found.isnan().nonzero()
    if len(bad):
        raise InputError(f"{name} must not be NaN, got NaN at sample {int(bad[0])}")
    return found


def ranked(member_scores: Tensor, nonmember_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of either side's scores among all distinct ones, [n_members] and [n_nonmembers].

    Order and ties are those of the scores, infinities among them, which libraries do not take.
    """
    sides = [
        checked_scores(member_scores, "member_scores"),
        checked_scores(nonmember_scores, "nonmember_scores"),
    ]
    for side, name in zip(sides, ("member_scores", "nonmember_scores"), strict=True):
        if len(side) == 0:
            raise InputError(f"{name}: no samples: an attack needs some of either kind")
    _, ranks = torch.cat(sides).unique(return_inverse=True)
    return ranks[: len(sides[0])], ranks[len(sides[0]) :]


def auc(member_scores: Tensor, nonmember_scores: Tensor) -> float:
    """Area under the ROC curve, in [0, 1]: the chance that a member scores above a nonmember.

    Ties count half. This is the Mann-Whitney statistic over n_members n_nonmembers, counted in
    halves and so without rounding. 0.5 is guessing; below 0.5 members look less like members than
    samples never seen, which gives them away as well.

    Args:
        member_scores: [n_members].
        nonmember_scores: [n_nonmembers].
    """
    mannwhitneyu = package("scipy.stats", "jobs", "auc").mannwhitneyu

    members, others = ranked(member_scores, nonmember_scores)
    # the method is that of the p-value, which is not used: an exact one takes long
    wins = mannwhitneyu(members.numpy(), others.numpy(), method="asymptotic").statistic
    return float(wins) / (len(members) * len(others))
