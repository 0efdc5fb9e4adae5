"""Distances between outputs against cases worked out by hand."""

import math

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.distance import activation_distance, js, kl, tow

DISTANCES = [kl, js, activation_distance]
MODEL = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64).log() + 3
REFERENCE = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64).log() - 1
LN2 = math.log(2)


def test_kl_by_hand():
    """Row 0: 0.25 log(1/2) + 0.5 log 2 = 0.25 log 2; row 1: 0."""
    assert kl(MODEL, REFERENCE) == pytest.approx(0.125 * LN2, abs=1e-15)


def test_kl_weighs_by_the_reference():
    """The reference is (1/2, 1/2), the model (1/4, 3/4): (log 2 + log(2/3)) / 2, not the other."""
    model, reference = torch.tensor([[1.0, 3.0]]).double().log(), torch.zeros(1, 2)
    assert kl(model, reference) == pytest.approx(math.log(4 / 3) / 2, abs=1e-15)
    other = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
    assert kl(reference, model) == pytest.approx(other, abs=1e-15)


def test_js_by_hand():
    """Row 0: m = (3/8, 3/8, 1/4): each side is (log(4/3)) / 2 + (log(2/3)) / 4."""
    row = math.log(4 / 3) / 2 + math.log(2 / 3) / 4
    assert js(MODEL, REFERENCE) == pytest.approx(row / 2, abs=1e-15)
    assert js(REFERENCE, MODEL) == pytest.approx(row / 2, abs=1e-15)


def test_activation_distance_by_hand():
    """Row 0: sqrt(2) / 4; row 1: 0."""
    assert activation_distance(MODEL, REFERENCE) == pytest.approx(math.sqrt(2) / 8, abs=1e-15)


@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_lies_between_equal_outputs(distance):
    logits = 30 * torch.randn(20, 7)
    assert distance(logits, logits) == pytest.approx(0, abs=1e-15)
    assert 0 <= distance(logits, logits + 4) < 1e-6
    assert distance(logits, torch.randn(20, 7)) > 0.01


@pytest.mark.parametrize("gap", [1e3, 1e30])
def test_saturated_outputs_that_disagree(gap):
    a, b = torch.tensor([[gap, 0.0]]), torch.tensor([[0.0, gap]])
    assert kl(a, b) == gap or kl(a, b) == pytest.approx(gap, rel=1e-6)
    assert js(a, b) == LN2
    assert activation_distance(a, b) == pytest.approx(math.sqrt(2), abs=1e-15)


def test_logits_further_apart_than_the_largest_double():
    a = torch.tensor([[1e308, -1e308]], dtype=torch.float64)
    assert kl(a, a) == js(a, a) == activation_distance(a, a) == 0
    assert js(a, -a) == LN2


def test_bounds():
    for scale in (0.1, 1.0, 10.0, 100.0):
        a, b = scale * torch.randn(2, 50, 4)
        assert kl(a, b) >= 0
        assert 0 <= js(a, b) <= LN2
        assert 0 <= activation_distance(a, b) <= math.sqrt(2)


@pytest.mark.parametrize("distance", [kl, js])
def test_rounding_makes_no_divergence_negative(distance):
    for logits in torch.randn(300, 1, 5, dtype=torch.float64):
        assert distance(logits, logits + 1e-9 * torch.randn(5)) >= 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_unusable_outputs_are_named(distance):
    good = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"^logits must be finite, got nan in row 0"):
        distance(good * math.nan, good)
    with pytest.raises(InputError, match="reference_logits must be finite"):
        distance(good, good * math.nan)
    with pytest.raises(InputError, match=r"share \[N, C\], N > 0, got \[2, 3\] and \[1, 3\]"):
        distance(good, good[:1])
    with pytest.raises(InputError, match="N > 0"):
        distance(good[:0], good[:0])
    with pytest.raises(InputError, match="C at least 2"):
        distance(good[:, :1], good[:, :1])


def test_tow_by_hand():
    retrain = {"forget": 0.5, "retain": 1.0, "test": 0.75}
    assert tow({**retrain, "mia": 0.9}, retrain) == 1
    assert tow({"forget": 0.75, "retain": 0.5, "test": 0.75}, retrain) == 0.75 * 0.5
    assert tow({"forget": 0.25, "retain": 1.0, "test": 0.5}, retrain) == 0.75 * 0.75
    assert tow({"forget": 1.0, "retain": 0.0, "test": 0.75}, retrain) == 0


def test_tow_names_what_it_cannot_use():
    whole = {"forget": 0.5, "retain": 1.0, "test": 0.75}
    with pytest.raises(InputError, match="retrain must have forget, retain, test, got no test"):
        tow(whole, {"forget": 0.5, "retain": 1.0})
    for value in (math.nan, 1.5, -0.1):
        with pytest.raises(InputError, match=r"accuracies: retain must be in \[0, 1\]"):
            tow({**whole, "retain": value}, whole)
