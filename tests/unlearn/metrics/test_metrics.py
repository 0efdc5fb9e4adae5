"""Metrics against cases worked out by hand."""

import math

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.accuracy import accuracy, uis
from gradsurgery.unlearn.metrics.attacks import mia
from gradsurgery.unlearn.metrics.statistics import gap, paired, spread


class Fixed(torch.nn.Module):
    """Gives its input back as logits."""

    def forward(self, images):
        return images


def test_accuracy_is_the_share_of_right_answers():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 2.0], [0.0, 5.0]])
    data = {"image": logits, "label": torch.tensor([0, 1, 1, 0])}
    assert accuracy(Fixed(), data) == 0.5
    assert accuracy(Fixed(), data, torch.tensor([0, 1, 0, 0])) == 0.75


def test_accuracy_of_nothing_is_not_a_number():
    data = {"image": torch.zeros(0, 2), "label": torch.zeros(0, dtype=torch.int64)}
    assert math.isnan(accuracy(Fixed(), data))


@pytest.mark.parametrize(
    "kind,original,test,unlearned,expected",
    [
        ("random", 0.8, 0.8, 0.8, 0.0),  # unlearned samples look unseen, nothing lost
        ("random", 0.8, 0.6, 1.0, 0.25),  # (0.2 / 0.8 + 0.2 / 0.8) / 2
        ("random", 0.8, 0.8, 0.4, 0.25),  # forgetting below test accuracy counts too
        ("class", 0.8, 0.8, 0.0, 0.0),
        ("class", 0.8, 0.6, 0.4, 0.375),  # (0.25 + 0.5) / 2
        ("class", 0.5, 1.0, 0.0, 0.5),
    ],
)
def test_uis_by_hand(kind, original, test, unlearned, expected):
    assert uis(original, test, unlearned, kind=kind) == pytest.approx(expected, abs=1e-15)


def test_uis_names_what_it_cannot_use():
    with pytest.raises(InputError, match="original_test must be positive, got 0"):
        uis(0, 0.5, 0.5, kind="class")
    with pytest.raises(InputError, match="kind must be random or class, got digit"):
        uis(1.0, 0.5, 0.5, kind="digit")


@pytest.mark.parametrize("sign", [1, -1])
def test_mia_tells_separable_losses_apart(sign):
    """Whichever side has the larger losses: an attacker learns the sign."""
    low, high = torch.rand(60), torch.rand(300) + 3
    sides = (low, high) if sign > 0 else (high, low)
    assert mia(*sides) == 1.0


def test_mia_guesses_between_equal_distributions():
    found = [mia(torch.rand(200), torch.rand(500), seed) for seed in range(8)]
    # one attack was seen to vary by 0.028, so the mean of eight by 0.01
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.04)


def test_mia_guesses_between_constants():
    assert mia(torch.full((50,), 2.3), torch.full((50,), 2.3)) == 0.5


def test_mia_survives_one_enormous_loss():
    forget = torch.cat([torch.rand(60) + 3, torch.tensor([1e30])])
    assert mia(forget, torch.rand(61)) > 0.98


def test_mia_needs_a_sample_a_fold():
    with pytest.raises(InputError, match="at least 5 samples a side, got 4"):
        mia(torch.rand(4), torch.rand(100))


def test_gap_is_the_distance_on_shared_metrics():
    found = gap({"a": 0.5, "b": 1.0, "own": 7.0}, {"a": 0.75, "b": 0.875, "other": 1.0})
    assert found == {"a": 0.25, "b": 0.125, "mean": 0.1875}


def test_gap_needs_a_shared_metric():
    with pytest.raises(InputError, match="share no metric"):
        gap({"a": 1.0}, {"b": 1.0})


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0, "values": [1.0, 2.0, 3.0]}
    assert spread([0.5])["std"] is None


def test_paired_by_hand():
    """Differences 1 and 3: mean 2, standard error 1, and t of one degree of freedom, a Cauchy
    quantile: tan(0.475 pi) = 12.706. Two degrees: 0.95 sqrt(2 / (4 * 0.975 * 0.025)) = 4.303."""
    found = paired([2.0, 7.0], [1.0, 4.0])
    assert (found["mean"], found["stderr"]) == (2.0, 1.0)
    reach = math.tan(0.475 * math.pi)
    assert found["interval"] == pytest.approx([2 - reach, 2 + reach], rel=1e-9)
    found = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    reach = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3)
    assert found["stderr"] == pytest.approx(1 / math.sqrt(3))
    assert found["interval"] == pytest.approx([2 - reach, 2 + reach], rel=1e-9)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
def test_paired_is_exact_at_any_scale(scale):
    plain = paired([1.0, 2.0, 4.0], [0.0] * 3)
    found = paired([scale, 2 * scale, 4 * scale], [0.0] * 3)
    for name in ("mean", "stderr"):
        assert found[name] == pytest.approx(scale * plain[name], rel=1e-14, abs=0)
    ends = [scale * end for end in plain["interval"] or ()]
    assert found["interval"] == pytest.approx(ends, rel=1e-14, abs=0)


def test_paired_of_one_pair_has_no_error():
    assert paired([2.0], [0.5]) == {"mean": 1.5, "stderr": None, "interval": None}


def test_paired_of_equal_differences():
    assert paired([0.3] * 3, [0.2] * 3) == {
        "mean": 0.3 - 0.2,
        "stderr": 0,
        "interval": [0.3 - 0.2] * 2,
    }
    # equal but for rounding, 1e-17, without a warning
    found = paired([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    assert found["stderr"] == pytest.approx(0, abs=1e-16)
    assert found["interval"] == pytest.approx([0.1, 0.1], abs=1e-15)


def test_paired_interval_holds_the_truth_as_often_as_it_says():
    hits, rounds = 0, 2000
    draws = 0.3 + torch.randn(rounds, 4, dtype=torch.float64)
    for differences in draws.tolist():
        low, high = paired(differences, [0.0] * 4)["interval"]
        hits += low <= 0.3 <= high
    # a standard error of 0.005; normal quantiles in place of t's would give 0.855
    assert hits / rounds == pytest.approx(0.95, abs=0.02)


def test_paired_names_what_it_cannot_use():
    with pytest.raises(InputError, match="equally many, at least 1, got 2 and 1"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="at least 1, got 0 and 0"):
        paired([], [])
    with pytest.raises(InputError, match=r"must be finite, got 2\.0 and nan at 1"):
        paired([1.0, 2.0], [1.0, math.nan])
