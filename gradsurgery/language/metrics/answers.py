"""Metrics of answers beside other answers, as TOFU has them: truth ratio, quality, utility.

They are computed from mean losses L, not from probabilities exp(-L), which are 0 in floating point
for an answer that is unlikely enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import harmonic_mean

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.ops._inputs import check, shown


def probability_among(
    right: Mapping[int, float], wrong: Mapping[int, Sequence[float]]
) -> dict[int, float]:
    """Probability of the right answer among the options, p / (p + sum of the wrong ones').

    With p = exp(-L) of each answer; in [0, 1], by sample id.

    Args:
        right: L of the right answers, nats a token.
        wrong: L of the wrong answers of the same samples, of each sample as many as it has.

    TOFU, Maini et al. 2024 (arXiv:2401.06121).
    """
    found = {}
    for sample, loss, others in _pairs(right, wrong):
        # 1 / (1 + sum exp(L - L_wrong)), of which no term may overflow
        largest = max([loss - other for other in others] + [0.0])
        terms = [math.exp(loss - other - largest) for other in others]
        own = math.exp(-largest)
        found[sample] = own / (own + math.fsum(terms))
    return found


def truth_ratios(
    right: Mapping[int, float], wrong: Mapping[int, Sequence[float]]
) -> dict[int, float]:
    """log r of each sample, r = exp(-mean L of the wrong answers) / exp(-L of the right one).

    Below 0 where the model finds the right answer likelier. The logarithm, for r may be too large
    or too small for a float. The probabilities of the wrong answers are averaged geometrically, as
    TOFU's code does; its paper writes an arithmetic mean.

    Args:
        right: L of the right answers as paraphrased, nats a token.
        wrong: L of the wrong, perturbed answers of the same samples, of each as many as it has.

    TOFU, Maini et al. 2024 (arXiv:2401.06121).
    """
    return {
        sample: loss - math.fsum(others) / len(others)
        for sample, loss, others in _pairs(right, wrong)
    }


def closeness(ratios: Mapping[int, float]) -> dict[int, float]:
    """min(r, 1/r) of each sample of a forget set, in [0, 1]: 1 where it does not tell them apart.

    Args:
        ratios: log r, as `truth_ratios`.
    """
    return {sample: math.exp(-abs(ratio)) for sample, ratio in ratios.items()}


def truthfulness(ratios: Mapping[int, float]) -> dict[int, float]:
    """max(0, 1 - r) of each sample of any other set, in [0, 1]: 1 where only the truth is likely.

    Args:
        ratios: log r, as `truth_ratios`.
    """
    return {sample: -math.expm1(min(ratio, 0.0)) for sample, ratio in ratios.items()}


def forget_quality(ratios: Mapping[int, float], retrained: Mapping[int, float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test of truth ratios, in [0, 1].

    High where a model's truth ratios on the forget set are distributed as those of the model that
    never saw it. The test looks at the order alone, so that log r, r and 1/r have the same.

    Args:
        ratios: log r of the forget set, as `truth_ratios`.
        retrained: the same of the retrained model.

    TOFU, Maini et al. 2024 (arXiv:2401.06121).
    """
    stats = package("scipy.stats", "language", "forget_quality")
    sides = [_known(ratios, "ratios"), _known(retrained, "retrained")]
    return float(stats.ks_2samp(*sides).pvalue)


def model_utility(metrics: Mapping[str, float]) -> float:
    """Harmonic mean of metrics, each in [0, 1]: 0 as soon as one of them is.

    TOFU takes probability, ROUGE-L recall and truth ratio of the retain set, of real authors and of
    world facts, nine in all.

    Raises:
        InputError: no metric, or one that is negative or not finite, by its name.

    TOFU, Maini et al. 2024 (arXiv:2401.06121).
    """
    check(len(metrics) > 0, "model_utility needs metrics, got none")
    for name, value in metrics.items():
        good = math.isfinite(value) and value >= 0
        check(good, f"{name} must be 0 or more and finite, got {shown(value)}")
    return float(harmonic_mean(metrics.values()))


def _pairs(
    right: Mapping[int, float], wrong: Mapping[int, Sequence[float]]
) -> list[tuple[int, float, Sequence[float]]]:
    """Each sample with the losses of its answers."""
    check(len(right) > 0, "right: no sample")
    for one, other, name in ((right, wrong, "wrong"), (wrong, right, "right")):
        missing = [sample for sample in one if sample not in other]
        check(not missing, f"{name} has no answer of sample id {missing[0] if missing else None}")
    for sample, loss in right.items():
        check(len(wrong[sample]) > 0, f"wrong has no answer of sample id {sample}")
        finite = all(map(math.isfinite, (loss, *wrong[sample])))
        check(finite, f"losses of sample id {sample} must be finite")
    return [(sample, loss, wrong[sample]) for sample, loss in right.items()]


def _known(values: Mapping[int, float], name: str) -> list[float]:
    check(len(values) > 0, f"{name}: no sample")
    for sample, value in values.items():
        if math.isnan(value):
            raise InputError(f"{name} of sample id {sample} is NaN")
    return list(values.values())
