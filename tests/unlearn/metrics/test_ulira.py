"""U-LiRA on Gaussians whose answer is known."""

import math

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import auc
from gradsurgery.unlearn.metrics.ulira import log_ratio, logit_confidence, u_lira


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def normal_cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_logit_confidence_by_hand():
    p = tensor([[0.7, 0.2, 0.1]]).expand(3, 3)
    expected = tensor([math.log(0.7 / 0.3), math.log(0.2 / 0.8), math.log(0.1 / 0.9)])
    torch.testing.assert_close(logit_confidence(p.log(), torch.arange(3)), expected)


def test_logit_confidence_of_saturated_outputs():
    logits, labels = torch.tensor([[500.0, 0, 0], [500.0, 0, 0]]), torch.tensor([0, 1])
    found = logit_confidence(logits, labels)
    torch.testing.assert_close(found, tensor([500 - math.log(2), -500]))


def test_ratio_by_hand():
    """Sample 0: means 2 and 0, variances 2: x - 1. Sample 1: mean 1, variance 2 against 0, 32."""
    unlearned, retrained = tensor([[1, 0], [3, 2]]), tensor([[-1, -4], [1, 4]])
    found = log_ratio(unlearned, retrained, tensor([[3, 1], [1, 5]]), pooled=False)
    expected = [[2, 1 / 64 + 2 * math.log(2)], [0, -16 / 4 + 25 / 64 + 2 * math.log(2)]]
    torch.testing.assert_close(found, tensor(expected))


def test_few_shadow_models_share_a_variance():
    """Variances 2 and 2 on the unlearned side; 2 and 32 on the other become 17 for both samples."""
    unlearned, retrained = tensor([[1, 0], [3, 2]]), tensor([[-1, -4], [1, 4]])
    found = log_ratio(unlearned, retrained, tensor([[3, 1]]))
    shared = math.log(17 / 2) / 2
    expected = [[-1 / 4 + 9 / 34 + shared, 0 + 1 / 34 + shared]]
    torch.testing.assert_close(found, tensor(expected))
    assert torch.equal(found, log_ratio(unlearned, retrained, tensor([[3, 1]]), pooled=True))


def test_many_shadow_models_have_a_variance_a_sample():
    sides = torch.randn(64, 5) * torch.arange(1, 6), torch.randn(64, 5)
    observed = torch.randn(2, 5)
    assert torch.equal(log_ratio(*sides, observed), log_ratio(*sides, observed, pooled=False))


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_gets_what_the_best_attack_on_gaussians_gets(shift):
    """phi ~ N(c_n + shift, 1) against N(c_n, 1): accuracy Phi(shift / 2), AUC Phi(shift / sqrt 2).
    The samples' own means c_n lie so far apart that one threshold for all would see nothing."""
    n, models = 2000, 200
    own = 50 * torch.randn(n)
    unlearned, retrained = own + shift + torch.randn(models, n), own + torch.randn(models, n)
    forgotten = torch.rand(4, n) < 0.3
    observed = own + shift * forgotten + torch.randn(4, n)
    found = u_lira(unlearned, retrained, observed, forgotten)
    # 8000 decisions: a standard error of about 0.006
    assert found["ulira"] == pytest.approx(normal_cdf(shift / 2), abs=0.025)
    assert found["ulira_auc"] == pytest.approx(normal_cdf(shift / math.sqrt(2)), abs=0.025)
    assert auc(observed[forgotten], observed[~forgotten]) == pytest.approx(0.5, abs=0.03)


def test_two_shadow_models_are_enough_where_the_difference_is_large():
    own = 50 * torch.randn(500)
    unlearned, retrained = own + 5 + torch.randn(2, 500), own + torch.randn(2, 500)
    forgotten = torch.tensor([[True], [False]]).expand(2, 500)
    observed = torch.stack([own + 5, own]) + torch.randn(2, 500)
    found = u_lira(unlearned, retrained, observed, forgotten)
    # the mean of two adds half a variance on either side: about Phi(2.5 / 1.2)
    assert found["ulira"] > 0.96


def test_shadow_models_that_agree_are_a_guess():
    same = torch.ones(3, 4)
    forgotten = torch.tensor([[True, True, False, False]])
    found = u_lira(same, same, torch.randn(1, 4), forgotten)
    assert found == {"ulira": 0.5, "ulira_auc": 0.5}


def test_shadow_models_without_spread_still_tell_sides_apart():
    forgotten = torch.tensor([[True, False]])
    found = u_lira(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[0.9, 0.1]]), forgotten)
    assert found == {"ulira": 1.0, "ulira_auc": 1.0}


def test_unusable_input_is_named():
    good, both = torch.randn(2, 3), torch.tensor([[True, False, True]])
    bad = good.clone()
    bad[1, 2] = math.nan
    one = torch.randn(1, 3)
    cases = [
        ((bad, good, one, both), "unlearned must be finite, got nan of model 1, sample 2"),
        ((good, bad, one, both), "retrained must be finite"),
        ((good, good, one * math.inf, both), "observed must be finite"),
        ((one, good, one, both), r"unlearned must be \[2 or more models, N\], got \[1, 3\]"),
        ((good, torch.randn(2, 4), one, both), r"retrained must be \[2 .*, 3\], got \[2, 4\]"),
        (
            (good, good, one[0], both),
            r"observed must be \[1 or more models, 3\], got \[3\]",
        ),
        ((torch.randn(2, 0),) * 3 + (both,), r"unlearned must be .* got \[2, 0\]"),
        ((good, good, one, both.long()), r"forgotten must be bool \[1, 3\].*int64"),
        ((good, good, one, both[0]), r"forgotten must be bool \[1, 3\].*got torch.bool \[3\]"),
        ((good, good, one, both & False), "no sample is forgotten"),
        ((good, good, one, both | True), "no sample is never seen"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            u_lira(*arguments)
