"""U-LiRA: an attack of its own on every sample, from models that did and did not have to forget it.

log N(phi; mu_u, s_u^2) - log N(phi; mu_r, s_r^2), phi = log(p_y / (1 - p_y)): above 0, forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import at_labels, auc, checked_labels, log_probabilities

# below this many shadow models a side one variance serves all samples: a variance of so few values
# is mostly noise. The bound is that of Carlini et al. (arXiv:2112.03570)
MANY = 64
# shadow models may agree to the last bit, and a density needs a width: (0.001 logits)^2
LEAST_VARIANCE = 1e-6


def logit_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """phi = log(p_y / (1 - p_y)), [N], float64, logits; exact where p_y rounds to 0 or 1 as well.

    Unlike p_y and the loss, phi is close to Gaussian over models trained alike.

    Args:
        logits: [N, C].
        labels: y, [N].
    """
    log_p, log_rest = log_probabilities(logits)
    return at_labels(log_p - log_rest, checked_labels(labels, log_p))


def log_ratio(
    unlearned: Tensor, retrained: Tensor, observed: Tensor, pooled: bool | None = None
) -> Tensor:
    """Log likelihood ratio of each observed phi, [M, N], nats: above 0 it looks forgotten, not
    unseen.

    Every sample has a Gaussian of its own on either side, with the mean of that side's shadow
    models. The variance, of S - 1 degrees of freedom and at least 1e-6, is the sample's own or the
    mean over all samples, one for each side.

    Args:
        unlearned: phi of S >= 2 shadow models that had sample n in their forget set and were
            unlearned, [S, N].
        retrained: phi of T >= 2 shadow models that never saw sample n, [T, N].
        observed: phi of M models under attack, [M, N].
        pooled: one variance for all samples; None: with fewer than 64 shadow models on either side.

    Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy, Hayes et
    al. (arXiv:2403.01218), whose Gaussians are per sample. Pooling for few models is from LiRA,
    Carlini et al. (arXiv:2112.03570); LiRA's public code pools the deviation of all values, here
    what the means of the samples differ by stays out of it. The floor is inferred.
    """
    unlearned = _checked(unlearned, "unlearned")
    retrained = _checked(retrained, "retrained", unlearned.shape[1])
    observed = _checked(observed, "observed", unlearned.shape[1], 1)
    if pooled is None:
        pooled = min(len(unlearned), len(retrained)) < MANY

    def log_density(shadows: Tensor) -> Tensor:
        mean, variance = moments(shadows, pooled)
        return -((observed - mean).square() / variance + variance.log()) / 2

    return log_density(unlearned) - log_density(retrained)


def moments(phi: Tensor, pooled: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance over models [S, N] of each sample, [N] each; the variance is at least 1e-6,
    and its mean over all samples where `pooled`."""
    mean, variance = phi.mean(dim=0), phi.var(dim=0)
    variance = variance.mean().expand_as(mean) if pooled else variance
    return mean, variance.clamp(min=LEAST_VARIANCE)


def u_lira(
    unlearned: Tensor,
    retrained: Tensor,
    observed: Tensor,
    forgotten: Tensor,
    pooled: bool | None = None,
) -> dict[str, float]:
    """How often the ratio is right about which observed models had to forget which samples.

    Args:
        unlearned: [S, N], as in `log_ratio`.
        retrained: [T, N].
        observed: [M, N], phi of models that are not among the shadow models.
        forgotten: [M, N], bool: whether model m had sample n in its forget set and was unlearned,
            or never saw it. Both must occur. One unlearned and one retrained model with all
            samples are two rows, all true and all false.
        pooled: as in `log_ratio`.

    Returns:
        ulira: balanced accuracy of calling forgotten what is above 0, in [0, 1]. ulira_auc: area
        under the ROC curve of the ratios of all models and samples, in [0, 1]. 0.5 is guessing,
        and what retraining itself would get.
    """
    ratios = log_ratio(unlearned, retrained, observed, pooled)
    if forgotten.dtype != torch.bool or forgotten.shape != ratios.shape:
        got = f"{forgotten.dtype} {list(forgotten.shape)}"
        raise InputError(f"forgotten must be bool {list(ratios.shape)} like observed, got {got}")
    forgotten = forgotten.cpu()
    members, others = ratios[forgotten], ratios[~forgotten]
    if not len(members) or not len(others):
        missing = "forgotten" if not len(members) else "never seen"
        raise InputError(f"forgotten: no sample is {missing}: an attack needs some of either kind")
    found, spared = (members > 0).double().mean(), (others <= 0).double().mean()
    return {"ulira": ((found + spared) / 2).item(), "ulira_auc": auc(members, others)}


def _checked(phi: Tensor, name: str, n: int | None = None, least: int = 2) -> Tensor:
    """`phi` [at least `least` models, N or n] in float64 on the CPU."""
    fits = phi.dim() == 2 and len(phi) >= least and phi.shape[1] > 0
    if not fits or (n is not None and phi.shape[1] != n):
        wanted = f"[{least} or more models, {n or 'N'}]"
        raise InputError(f"{name} must be {wanted}, got {list(phi.shape)}")
    found = phi.detach().cpu().double()
    bad = (~found.isfinite()).nonzero()
    if len(bad):
        model, sample = bad[0].tolist()
        value = found[model, sample]
        raise InputError(f"{name} must be finite, got {value} of model {model}, sample {sample}")
    return found
