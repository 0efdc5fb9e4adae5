"""KLoM by hand, and on distributions whose divergence is known."""

import math
from itertools import pairwise

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.klom import BINS, LEAST_SHARE, klom, kloms, normal_klom
from gradsurgery.unlearn.metrics.ulira import logit_confidence


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def columns(*samples):
    """Margins [S, N] of N samples, each given as the margins of its S models."""
    return tensor(samples).T


def normal(mean, deviation, n=20001):
    """Quantiles of a normal distribution: n models without chance."""
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return mean + deviation * math.sqrt(2) * torch.erfinv(2 * at - 1)


def cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_a_margin_is_the_logit_of_the_right_class_less_the_others():
    logits = tensor([[2.0, 1.0, 0.5]])
    expected = 2 - math.log(math.exp(1) + math.exp(0.5))
    assert logit_confidence(logits, torch.tensor([0])).item() == pytest.approx(expected)


def test_two_bins_by_hand():
    """From 0 to 4 in two bins: 1/2, 1/2 against 1/4, 3/4; then 3/4, 1/4 against the same."""
    unlearned = columns([0, 1, 3, 4], [0, 1, 1.9, 4])
    retrained = columns([0, 4, 4, 4], [0, 2, 4, 4])  # 2 is in the upper bin
    expected = [
        0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        0.75 * math.log(3) + 0.25 * math.log(1 / 3),
    ]
    torch.testing.assert_close(klom(unlearned, retrained, bins=2), tensor(expected))


def test_the_direction_is_from_unlearned_models_to_retrained_ones():
    """Where Retrains are and unlearned models are not costs little, the other way round much."""
    narrow, wide = columns([0, 0]), columns([0, 4])
    assert klom(narrow, wide, bins=2).item() == pytest.approx(math.log(2))
    other = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / LEAST_SHARE) + math.log1p(LEAST_SHARE)
    assert klom(wide, narrow, bins=2).item() == pytest.approx(other)


def test_margins_that_never_meet_have_the_largest_value():
    found = klom(columns([0, 0.1, 0.2]), columns([8, 8, 9]))
    assert found.item() == pytest.approx(math.log1p(1 / LEAST_SHARE))


def test_equal_margins_have_none():
    margins = torch.randn(50, 7, dtype=torch.float64)
    order = torch.randperm(50)
    assert torch.equal(klom(margins, margins[order]), torch.zeros(7, dtype=torch.float64))
    assert torch.equal(normal_klom(margins, margins), torch.zeros(7, dtype=torch.float64))


def test_ties_share_a_bin_and_margins_that_are_all_one_have_none():
    assert klom(columns([3, 3]), columns([3, 3, 3])).item() == 0
    # 3 of 4 against 1 of 2 in the first bin, whatever their number
    found = klom(columns([1, 1, 1, 2]), columns([1, 2]))
    assert found.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_the_largest_margin_is_in_the_last_bin():
    """Were it in none, the two sides would agree."""
    assert klom(columns([0, 4, 4]), columns([0, 0, 4]), bins=4).item() > 0


def test_infinite_margins_are_those_of_the_limit():
    inf = math.inf
    infinite = columns([inf, 1, -inf]), columns([1, inf, 2])
    clipped = columns([100, 1, -100]), columns([1, 100, 2])
    assert torch.equal(klom(*infinite), klom(*clipped))
    assert torch.equal(normal_klom(*infinite), normal_klom(*clipped))
    assert klom(columns([inf, inf]), columns([1e9, inf])).item() == 0


def test_histograms_of_two_gaussians():
    """Bins of known probabilities; the divergence is 1 / 2, of which binning loses some."""
    unlearned, retrained = normal(1, 1), normal(0, 1)
    found = klom(unlearned[:, None], retrained[:, None]).item()
    low, high = retrained.min().item(), unlearned.max().item()
    edges = [low + (high - low) * k / BINS for k in range(BINS + 1)]
    edges[0], edges[-1] = -math.inf, math.inf
    p = [cdf(b - 1) - cdf(a - 1) for a, b in pairwise(edges)]
    q = [cdf(b) - cdf(a) for a, b in pairwise(edges)]
    q = [max(b, LEAST_SHARE) for b in q]
    exact = sum(a * math.log(a / b * sum(q)) for a, b in zip(p, q, strict=True))
    assert found == pytest.approx(exact, abs=2e-3)
    assert 0.45 < found < 0.5


def test_normal_fits_by_hand():
    """Means 2 and 0, variances 2 and 8: (log 4 + (2 + 4) / 8 - 1) / 2."""
    found = normal_klom(columns([1, 3]), columns([-2, 2]))
    assert found.item() == pytest.approx((math.log(4) + 0.75 - 1) / 2)
    whole = normal_klom(normal(1, 1)[:, None], normal(0, 1)[:, None])
    assert whole.item() == pytest.approx(0.5, abs=1e-3)


def test_few_models_share_a_variance():
    """2 and 8 become 5, 8 and 2 too: only the means differ, by 2 and 0."""
    unlearned, retrained = columns([1, 3], [-2, 2]), columns([-2, 2], [-1, 1])
    torch.testing.assert_close(normal_klom(unlearned, retrained), tensor([4 / 5 / 2, 0]))
    apart = normal_klom(unlearned, retrained, pooled=False)
    expected = [(math.log(4) - 0.25) / 2, (math.log(1 / 4) + 4 - 1) / 2]
    torch.testing.assert_close(apart, tensor(expected))


def test_chance_is_what_the_numbers_of_models_make():
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(s, 4000, generator=generator, dtype=torch.float64) for s in (5, 10))
    assert normal_klom(*sides).mean().item() == pytest.approx((1 / 5 + 1 / 10) / 2, rel=0.05)


def test_what_a_job_tells():
    """Values 0 to 20 of 21 samples: mean 10, 95th percentile 19."""
    unlearned = torch.tensor([-1.0, 1.0]).double()[:, None] + (
        2 * torch.arange(21, dtype=torch.float64).sqrt()
    )
    retrained = tensor([-1.0, 1.0])[:, None].expand(2, 21)
    found = kloms(unlearned, retrained)
    assert found == pytest.approx({"klom_normal": 10.0, "klom_normal_p95": 19.0})
    many = kloms(unlearned.repeat(32, 1), retrained.repeat(32, 1))
    assert list(many) == ["klom_normal", "klom_normal_p95", "klom", "klom_p95"]


@pytest.mark.parametrize(
    "unlearned,retrained,message",
    [
        (
            torch.zeros(3),
            torch.zeros(3, 2),
            r"unlearned must be \[1 or more models, N\], got \[3\]",
        ),
        (torch.zeros(3, 2), torch.zeros(3, 4), r"retrained must be \[1 or more models, 2\], got"),
        (torch.zeros(0, 2), torch.zeros(3, 2), r"unlearned must be \[1 or more models, N\]"),
        (torch.zeros(2, 2), torch.full((1, 2), math.nan), "retrained must not be NaN, got NaN of"),
    ],
)
def test_margins_that_are_none_are_named(unlearned, retrained, message):
    with pytest.raises(InputError, match=message):
        klom(unlearned, retrained)


def test_fits_need_two_models_and_histograms_a_bin():
    with pytest.raises(InputError, match=r"unlearned must be \[2 or more models, N\]"):
        normal_klom(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match="bins must be at least 1, got 0"):
        klom(torch.zeros(1, 2), torch.zeros(3, 2), bins=0)
