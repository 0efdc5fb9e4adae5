"""Truth ratio, options, forget quality, utility: by hand, in logarithms, and what is refused."""

import math
from fractions import Fraction

import pytest
import torch

import gradsurgery as gs
from gradsurgery.language import metrics


def near(values):
    return pytest.approx(values, rel=1e-12, abs=1e-300)


def test_options_by_hand():
    # probabilities 0.5 against 0.25 and 0.25; 0.2 against 0.6 alone
    right = {1: -math.log(0.5), 2: -math.log(0.2)}
    wrong = {1: [-math.log(0.25), -math.log(0.25)], 2: [-math.log(0.6)]}
    assert metrics.probability_among(right, wrong) == near({1: 0.5, 2: 0.25})


def test_truth_ratio_by_hand():
    # the right answer has 0.5. Wrong ones of 0.2 and 0.05 have the geometric mean 0.1: r = 1/5, the
    # truth is likelier. Of 0.9 alone: r = 1.8, and 1/r = 5/9
    right = {1: -math.log(0.5), 2: -math.log(0.5)}
    wrong = {1: [-math.log(0.2), -math.log(0.05)], 2: [-math.log(0.9)]}
    ratios = metrics.truth_ratios(right, wrong)
    assert ratios == near({1: math.log(0.2), 2: math.log(1.8)})
    assert metrics.closeness(ratios) == near({1: 0.2, 2: 5 / 9})
    assert metrics.truthfulness(ratios) == near({1: 0.8, 2: 0})


def test_probabilities_that_no_float_holds():
    # L of 2000 and 2001: exp(-L) is 0, and 1e-10 in a denominator would decide
    right, wrong = {0: 2000.0, 1: 2001.0, 2: 0.0}, {0: [2001.0], 1: [2000.0, 2000.0], 2: [5000.0]}
    among = metrics.probability_among(right, wrong)
    assert among == near({0: 1 / (1 + math.exp(-1)), 1: 1 / (1 + 2 * math.e), 2: 1})
    ratios = metrics.truth_ratios(right, wrong)
    assert ratios == {0: -1, 1: 1, 2: -5000}
    assert metrics.closeness(ratios) == near({0: math.exp(-1), 1: math.exp(-1), 2: 0})
    assert metrics.truthfulness(ratios) == near({0: 1 - math.exp(-1), 1: 0, 2: 1})
    # a ratio of nearly 1 keeps its digits
    assert metrics.truthfulness({0: -1e-14}) == near({0: 1e-14})


def test_forget_quality_by_hand():
    # all of one side below all of the other: D = 1, of 4 and 4 samples in 2 of 8 choose 4 = 70 ways
    low, high = {k: float(k) for k in range(4)}, {k: float(k) for k in range(10, 14)}
    assert metrics.forget_quality(low, high) == pytest.approx(2 / 70, rel=1e-9)
    assert metrics.forget_quality(low, dict(low)) == 1
    # ids do not pair the samples, and r, 1/r, log r are as far apart
    assert metrics.forget_quality(high, low) == metrics.forget_quality(low, high)
    inverse = [{k: math.exp(-v) for k, v in side.items()} for side in (low, high)]
    assert metrics.forget_quality(*inverse) == pytest.approx(2 / 70, rel=1e-9)


def orders_closer_than(gap, n, m):
    """In how many orders of n and m samples the distributions are everywhere closer than a gap."""
    ways = {0: 1}  # by how many of the n came
    for came in range(1, n + m + 1):
        ways = {
            i: ways.get(i, 0) + ways.get(i - 1, 0)
            for i in range(max(0, came - m), min(n, came) + 1)
            if abs(Fraction(i, n) - Fraction(came - i, m)) < gap
        }
    return ways.get(n, 0)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 27), (1, 9)])
def test_forget_quality_counts_orders(n, m):
    one, other = torch.randn(n).tolist(), (1.5 * torch.randn(m) + 0.3).tolist()
    gap = max(
        abs(Fraction(sum(a <= x for a in one), n) - Fraction(sum(b <= x for b in other), m))
        for x in one + other
    )
    expected = 1 - Fraction(orders_closer_than(gap, n, m), math.comb(n + m, n))
    found = metrics.forget_quality(dict(enumerate(one)), dict(enumerate(other)))
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_utility_by_hand():
    # 3 / (1/1 + 1/0.5 + 1/0.25)
    assert metrics.model_utility({"a": 1.0, "b": 0.5, "c": 0.25}) == near(3 / 7)
    assert metrics.model_utility({"a": 1.0, "b": 0.0}) == 0
    for bad in (math.nan, -0.1, math.inf):
        with pytest.raises(gs.InputError, match="retain/truth_ratio must be 0 or more"):
            metrics.model_utility({"retain/truth_ratio": bad})
    with pytest.raises(gs.InputError, match="needs metrics, got none"):
        metrics.model_utility({})


@pytest.mark.parametrize("metric", [metrics.truth_ratios, metrics.probability_among])
def test_answers_that_are_missing_are_named(metric):
    for right, wrong, message in (
        ({}, {}, "right: no sample"),
        ({4: 1.0}, {}, "wrong has no answer of sample id 4"),
        ({4: 1.0}, {4: []}, "wrong has no answer of sample id 4"),
        ({4: 1.0}, {4: [1.0], 5: [1.0]}, "right has no answer of sample id 5"),
        ({4: 1.0}, {4: [math.nan]}, "losses of sample id 4 must be finite"),
        ({4: math.inf}, {4: [1.0]}, "losses of sample id 4 must be finite"),
    ):
        with pytest.raises(gs.InputError, match=message):
            metric(right, wrong)


def test_quality_of_no_sample_or_nan_is_refused():
    with pytest.raises(gs.InputError, match="ratios: no sample"):
        metrics.forget_quality({}, {1: 0.0})
    with pytest.raises(gs.InputError, match="retrained of sample id 1 is NaN"):
        metrics.forget_quality({1: 0.0}, {1: math.nan})
