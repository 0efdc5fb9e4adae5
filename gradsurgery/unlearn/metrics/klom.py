"""KLoM: how far margins of unlearned models lie from those of retrained ones, sample by sample.

KL(unlearned || retrained) = sum_b p_b log(p_b / q_b) over bins b of a sample's margin. A margin is
`logit_confidence`: the logit of the right class less the log-sum-exp of all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.ulira import MANY, moments

# those of the authors' public code
BINS = 20
LARGEST_MARGIN = 100.0  # a margin is clipped to plus or minus this, and infinite ones with it
LEAST_SHARE = 1e-5  # of Retrains in a bin where unlearned models are, which bounds KLoM


def klom(unlearned: Tensor, retrained: Tensor, bins: int = BINS) -> Tensor:
    """KLoM of each sample, [N], nats, float64, from 0 to log(1 + 1 / 1e-5), about 11.5.

    A sample's margins on both sides, clipped to 100, are counted in bins of one width between the
    smallest and the largest of them; margins that are all equal share one. Retrains are taken to
    have at least 1e-5 of their share in a bin where unlearned models are.

    It needs many models: of few, two histograms of the very same distribution hardly meet, and
    KLoM is near its largest by chance. The paper has 100 a side. `normal_klom` does with few.

    Args:
        unlearned: margins of S >= 1 models unlearned from originals of several seeds, [S, N],
            logits.
        retrained: of T >= 1 models trained without the forget set on the same split, [T, N].
        bins: how many, at least 1.

    Attribute-to-Delete: Machine Unlearning via Datamodel Matching, Georgiev et al.
    (arXiv:2410.23232), appendix E.1. Direction, bins, clipping and least share are those of the
    authors' public code, which leaves the very largest margin out of its last bin; here it is in.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    unlearned = _clipped(unlearned, "unlearned", 1)
    retrained = _clipped(retrained, "retrained", 1, unlearned.shape[1])
    both = torch.cat([unlearned, retrained])
    low, high = both.amin(dim=0), both.amax(dim=0)
    width = (high - low) / bins
    width = torch.where(width > 0, width, 1.0)

    def shares(margins: Tensor) -> Tensor:
        bin_of = ((margins - low) / width).long().clamp(max=bins - 1)
        counts = torch.zeros(bins, margins.shape[1], dtype=torch.float64)
        counts.scatter_add_(0, bin_of, torch.ones_like(margins))
        return counts / len(margins)

    p, q = shares(unlearned), shares(retrained)
    q = torch.where(p > 0, q.clamp(min=LEAST_SHARE), q)
    q = q / q.sum(dim=0)
    each = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return each.sum(dim=0).clamp(min=0)  # equal shares could round to below 0


def normal_klom(unlearned: Tensor, retrained: Tensor, pooled: bool | None = None) -> Tensor:
    """KL of the normal distributions fitted to both sides' margins, [N], nats, at least 0.

    (log(s_r^2 / s_u^2) + (s_u^2 + (mu_u - mu_r)^2) / s_r^2 - 1) / 2

    What KLoM is after where there are too few models for histograms. Chance alone is about
    (1/S + 1/T) / 2: the means of so many models of one distribution lie that far apart.

    Args:
        unlearned: margins of S >= 2 unlearned models, [S, N], clipped to 100 as in `klom`.
        retrained: of T >= 2 retrained ones, [T, N].
        pooled: one variance on either side for all samples; None: with fewer than 64 models on
            either side.

    The normal fits are inferred; means, pooled variances and their floor are those of
    `ulira.log_ratio`.
    """
    unlearned = _clipped(unlearned, "unlearned", 2)
    retrained = _clipped(retrained, "retrained", 2, unlearned.shape[1])
    if pooled is None:
        pooled = min(len(unlearned), len(retrained)) < MANY
    (mean_u, variance_u), (mean_r, variance_r) = (
        moments(margins, pooled) for margins in (unlearned, retrained)
    )
    apart = (variance_u + (mean_u - mean_r).square()) / variance_r
    return ((variance_r / variance_u).log() + apart - 1).clamp(min=0) / 2


def kloms(unlearned: Tensor, retrained: Tensor) -> dict[str, float]:
    """What KLoM is like over samples, nats, by the name it has in a job's results.

    klom, klom_p95: mean and 95th percentile of `klom`, with at least 64 models on either side.
    klom_normal, klom_normal_p95: of `normal_klom`.

    Args:
        unlearned: [S, N], as in `normal_klom`.
        retrained: [T, N].
    """
    found = {"klom_normal": normal_klom(unlearned, retrained)}
    if min(len(unlearned), len(retrained)) >= MANY:
        found["klom"] = klom(unlearned, retrained)
    return {
        name: value.item()
        for key, each in found.items()
        for name, value in ((key, each.mean()), (f"{key}_p95", each.quantile(0.95)))
    }


def _clipped(margins: Tensor, name: str, least: int, n: int | None = None) -> Tensor:
    """`margins` [at least `least` models, N or n] in float64 on the CPU, none beyond 100."""
    fits = margins.dim() == 2 and len(margins) >= least and margins.shape[1] > 0
    if not fits or (n is not None and margins.shape[1] != n):
        wanted = f"[{least} or more models, {n or 'N'}]"
        raise InputError(f"{name} must be {wanted}, got {list(margins.shape)}")
    found = margins.detach().cpu().double()
    bad = found.isnan().nonzero()
    if len(bad):
        model, sample = bad[0].tolist()
        raise InputError(f"{name} must not be NaN, got NaN of model {model}, sample {sample}")
    return found.clamp(-LARGEST_MARGIN, LARGEST_MARGIN)
