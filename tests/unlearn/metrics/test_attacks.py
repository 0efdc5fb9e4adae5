"""Membership attacks against cases worked out by hand and properties of a ROC curve."""

import math

import pytest
import torch
import torch.nn.functional as F

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import (
    attack_all,
    auc,
    best_accuracy,
    confidence_attack,
    correctness_attack,
    entropy_attack,
    log_probabilities,
    mia,
    modified_entropy_attack,
    roc,
    tpr_at_fpr,
)

ATTACKS = [confidence_attack, entropy_attack, modified_entropy_attack, correctness_attack]
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def near(found, expected, rel=1e-12):
    torch.testing.assert_close(found, tensor(*expected), rtol=rel, atol=0)


# -- scores


def test_scores_of_three_classes_by_hand():
    """The same outputs (0.7, 0.2, 0.1) under each label; a constant shift of logits is nothing."""
    logits, labels = (P.log() + 5).expand(3, 3), torch.tensor([0, 1, 2])
    near(confidence_attack(logits, labels), [math.log(p) for p in (0.7, 0.2, 0.1)])
    entropy = sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    near(entropy_attack(logits, labels), [entropy] * 3)
    others = [p * math.log(1 - p) for p in (0.7, 0.2, 0.1)]
    near(
        modified_entropy_attack(logits, labels),
        [
            0.3 * math.log(0.7) + others[1] + others[2],
            0.8 * math.log(0.2) + others[0] + others[2],
            0.9 * math.log(0.1) + others[0] + others[1],
        ],
    )
    # -0.1622, -2.1409, -2.9597: the logarithms taken by hand
    near(modified_entropy_attack(logits, labels), [-0.16216724, -2.14086734, -2.95973626], 1e-7)
    assert correctness_attack(logits, labels).tolist() == [1, 0, 0]


def test_each_sample_is_scored_by_itself():
    """A column taken for the whole batch where (i, y_i) is meant would mix the samples."""
    logits, labels = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 4, (7,))
    for attack in ATTACKS:
        together = attack(logits, labels)
        alone = [attack(logits[i : i + 1], labels[i : i + 1]) for i in range(7)]
        torch.testing.assert_close(together, torch.cat(alone))


def test_saturated_scores_are_exact():
    """p = 1 - 2e, e = exp(-100) each for the others: far below what 1 - p can hold."""
    logits = torch.tensor([[100.0, 0.0, 0.0]])
    e, right, wrong = math.exp(-100), torch.tensor([0]), torch.tensor([1])
    near(confidence_attack(logits, right), [-2 * e])
    near(confidence_attack(logits, wrong), [-100])
    near(entropy_attack(logits, right), [-(2 * e + 2 * e * 100)])
    near(modified_entropy_attack(logits, right), [-(2 * e * 2 * e + 2 * e * e)])
    near(modified_entropy_attack(logits, wrong), [-100 - (100 - math.log(2)) - e * e])
    assert modified_entropy_attack(logits, wrong) < modified_entropy_attack(logits, right) < 0


@pytest.mark.parametrize("scale", [1e4, 3e38, 1e308])
def test_enormous_logits_have_finite_scores(scale):
    logits = torch.tensor([[scale, -scale, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for attack in ATTACKS:
        for label in range(3):
            assert attack(logits, torch.tensor([label, label])).isfinite().all()


def test_log_probabilities_of_a_tie_at_the_top():
    log_p, log_rest = log_probabilities(torch.zeros(1, 2))
    torch.testing.assert_close(log_p, torch.full((1, 2), math.log(0.5), dtype=torch.float64))
    torch.testing.assert_close(log_rest, log_p)


def test_log_probabilities_are_those_of_a_softmax():
    logits = torch.randn(50, 5, dtype=torch.float64)
    p = logits.softmax(dim=1)
    log_p, log_rest = log_probabilities(logits)
    torch.testing.assert_close(log_p, p.log())
    torch.testing.assert_close(log_rest, (1 - p).log())


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_surer_right_answer_looks_more_like_a_member(attack):
    logits = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [60.0, 0.0, 0.0]])
    scores = attack(logits, torch.tensor([0, 0, 0]))
    assert scores.dtype == torch.float64
    assert attack is correctness_attack or scores.tolist() == sorted(set(scores.tolist()))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    "logits,labels,message",
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels must be in \[0, 3\), got 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"labels must be in \[0, 3\), got -1 to 0"),
        (torch.zeros(2, 3), torch.tensor([0]), r"labels must be integers \[2\].*\[1\]"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), r"labels must be integers.*float32"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), r"C at least 2, got \[2, 1\]"),
        (torch.zeros(3), torch.tensor([0]), r"logits must be \[N, C\].*got \[3\]"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 0]), "got nan in row 1"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "got inf in row 0"),
    ],
)
def test_unusable_outputs_are_named(attack, logits, labels, message):
    with pytest.raises(InputError, match=message):
        attack(logits, labels)


# -- two sets of scores


def test_roc_by_hand_with_ties():
    fpr, tpr = roc(tensor(3, 2, 2, 0), tensor(2, 1))
    assert fpr.tolist() == [0, 0, 0.5, 1, 1]
    assert tpr.tolist() == [0, 0.25, 0.75, 0.75, 1]
    # pairs won: 3 over both, each 2 over the 1, each 2 ties a 2: (2 + 2 + 2 / 2) of 8
    assert auc(tensor(3, 2, 2, 0), tensor(2, 1)) == 5 / 8
    assert best_accuracy(tensor(3, 2, 2, 0), tensor(2, 1)) == 5 / 8
    # members lead by 1 - 3/4 at the threshold 1, the others by 1/2 at 3
    turned = tensor(2, 1), tensor(3, 3, 2, 0)
    assert best_accuracy(*turned) == 5 / 8
    assert best_accuracy(*turned, two_sided=True) == 3 / 4


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_roc_and_auc_are_what_counting_gives(levels):
    members, others = (torch.randint(0, levels, (n,)).double() + s for n, s in ((37, 1), (91, 0)))
    thresholds = sorted({*members.tolist(), *others.tolist()}, reverse=True)
    fpr, tpr = roc(members, others)
    for rates, side in ((fpr, others), (tpr, members)):
        near(rates, [0, *((side >= at).double().mean().item() for at in thresholds)], 1e-15)
    won = members[:, None] > others
    tied = members[:, None] == others
    assert auc(members, others) == (2 * int(won.sum()) + int(tied.sum())) / (2 * 37 * 91)


def test_perfect_separation():
    members, others = torch.rand(13) + 2, torch.rand(17)
    assert auc(members, others) == 1
    assert best_accuracy(members, others) == 1
    assert tpr_at_fpr(members, others, 0.0) == 1
    assert auc(others, members) == 0
    assert best_accuracy(others, members) == 0.5  # below the threshold: not members
    assert best_accuracy(others, members, two_sided=True) == 1
    assert tpr_at_fpr(others, members) == 0


@pytest.mark.parametrize("scores", [torch.rand(30), torch.zeros(30)], ids=["identical", "all tied"])
def test_identical_sets_are_a_guess(scores):
    assert auc(scores, scores) == 0.5
    assert best_accuracy(scores, scores) == 0.5
    assert tpr_at_fpr(scores, scores, 0.2) == (0 if len(scores.unique()) == 1 else 0.2)


def test_order_and_scale_of_scores_do_not_matter():
    members, others = torch.randn(20).double(), torch.randn(30).double() - 0.5
    shuffled = members[torch.randperm(20)], others[torch.randperm(30)]
    stretched = (members * 3).exp(), (others * 3).exp()
    for measure in (auc, best_accuracy, lambda a, b: tpr_at_fpr(a, b, 0.1)):
        assert measure(members, others) == measure(*shuffled) == measure(*stretched)
    assert auc(members, others) == pytest.approx(1 - auc(others, members), abs=1e-15)


def test_best_accuracy_gives_both_sets_one_weight():
    members, others = tensor(1, 1, 0), tensor(*[0] * 95, *[1] * 5)
    assert best_accuracy(members, others) == pytest.approx((2 / 3 + 0.95) / 2, abs=1e-15)


def test_tpr_counts_only_thresholds_there_are():
    """100 unseen samples at 0..99: at 1 % the 99 may pass, at 2 % the 98 as well."""
    members, others = tensor(150, 98.5, 96.5, 98), torch.arange(100)
    assert tpr_at_fpr(members, others, 0.0) == 1 / 4
    assert tpr_at_fpr(members, others, 0.00999) == 1 / 4
    assert tpr_at_fpr(members, others, 0.01) == 2 / 4
    assert tpr_at_fpr(members, others, 0.01999) == 2 / 4
    assert tpr_at_fpr(members, others, 0.02) == 3 / 4  # the 98 ties with a nonmember: both pass
    assert tpr_at_fpr(members, others, 1.0) == 1


def test_tpr_with_few_samples_is_the_share_above_all_others():
    assert tpr_at_fpr(tensor(5, 4, 1), tensor(3, 2), 0.01) == 2 / 3
    assert tpr_at_fpr(tensor(3, 1), tensor(3, 2), 0.01) == 0  # a tie with the highest is not above


def test_infinite_scores_have_an_order():
    assert auc(tensor(math.inf, 0), tensor(-math.inf, 0)) == (2 + 1 + 0.5) / 4
    sides = tensor(math.inf, 0, math.inf), tensor(-math.inf, math.inf)
    assert auc(*sides) == (3 + 2 * 0.5) / 6
    fpr, tpr = roc(*sides)
    assert fpr.tolist() == [0, 1 / 2, 1 / 2, 1]
    assert tpr.tolist() == [0, 2 / 3, 1, 1]


@pytest.mark.parametrize("measure", [roc, auc, best_accuracy, tpr_at_fpr])
def test_unusable_scores_are_named(measure):
    some = torch.zeros(3)
    with pytest.raises(InputError, match="member_scores must not be NaN, got NaN at sample 1"):
        measure(tensor(0, math.nan), some)
    with pytest.raises(InputError, match="nonmember_scores must not be NaN, got NaN at sample 0"):
        measure(some, tensor(math.nan))
    with pytest.raises(InputError, match=r"^member_scores: no samples"):
        measure(torch.zeros(0), some)
    with pytest.raises(InputError, match="nonmember_scores: no samples"):
        measure(some, torch.zeros(0))
    with pytest.raises(InputError, match=r"nonmember_scores must be \[N\], got \[3, 1\]"):
        measure(some, some[:, None])


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_a_rate_is_a_share(fpr):
    with pytest.raises(InputError, match=r"fpr must be in \[0, 1\]"):
        tpr_at_fpr(torch.zeros(2), torch.zeros(2), fpr)


# -- all attacks

KEYS = {
    "mia",
    "mia_confidence",
    "mia_entropy",
    "mia_modified_entropy",
    "mia_correctness",
    "mia_auc",
    "mia_tpr",
}


def outputs(n, sure):
    """Logits of n samples with noise, `sure` higher at their labels."""
    labels = torch.randint(0, 4, (n,))
    return torch.randn(n, 4).scatter_add(1, labels[:, None], torch.full((n, 1), sure)), labels


def test_attack_all_tells_memorized_samples_from_unseen_ones():
    found = attack_all(*outputs(60, 30.0), *outputs(150, 0.0))
    assert set(found) == KEYS
    assert all(type(value) is float for value in found.values())
    assert found["mia_confidence"] == found["mia_modified_entropy"] == 1
    assert found["mia_auc"] == found["mia_tpr"] == 1
    assert found["mia"] > 0.95
    assert 0.75 < found["mia_correctness"] < 1  # a quarter of the unseen are right by luck


def test_attack_all_tells_wrongly_labelled_samples_too():
    """A model that never saw wrong labels has high losses on them: any side gives them away."""
    logits, labels = outputs(60, 30.0)
    found = attack_all(logits, (labels + 1) % 4, *outputs(150, 30.0))
    for name in ("mia_confidence", "mia_modified_entropy", "mia_correctness"):
        assert found[name] == 1
    assert found["mia"] > 0.95
    assert found["mia_auc"] == found["mia_tpr"] == 0


def test_attack_all_on_one_set_twice():
    side = outputs(50, 1.0)
    found = attack_all(*side, *side)
    for name in KEYS - {"mia", "mia_tpr"}:
        assert found[name] == 0.5


def test_attack_all_says_what_its_parts_say():
    forget, unseen = outputs(40, 2.0), outputs(80, 0.5)
    found = attack_all(*forget, *unseen, seed=3)
    losses = [F.cross_entropy(*side, reduction="none") for side in (forget, unseen)]
    assert found["mia"] == mia(*losses, seed=3)
    assert found["mia_auc"] == auc(-losses[0], -losses[1])
    assert found["mia_tpr"] == tpr_at_fpr(-losses[0], -losses[1], 0.01)
    right = [(side[0].argmax(1) == side[1]).double().mean().item() for side in (forget, unseen)]
    assert found["mia_correctness"] == pytest.approx((1 + right[0] - right[1]) / 2)


def test_attack_all_names_the_side():
    good, labels = outputs(9, 1.0)
    bad = good.clone()
    bad[4, 1] = math.nan
    with pytest.raises(InputError, match="forget_logits must be finite, got nan in row 4"):
        attack_all(bad, labels, good, labels)
    with pytest.raises(InputError, match="unseen_logits must be finite, got nan in row 4"):
        attack_all(good, labels, bad, labels)
    with pytest.raises(InputError, match="unseen_labels must be integers"):
        attack_all(good, labels, good, labels[:3])
    with pytest.raises(InputError, match="at least 5 samples a side, got 0"):
        attack_all(good[:0], labels[:0], good, labels)


def test_mia_names_a_loss_that_is_not_a_number():
    with pytest.raises(InputError, match="unseen_losses must not be NaN, got NaN at sample 2"):
        mia(torch.rand(9), torch.tensor([0.0, 1.0, math.nan, 0.0, 0.0]))


@pytest.mark.parametrize("low", [-math.inf, -1e308])
def test_mia_takes_the_least_losses_too(low):
    lowest = torch.full((9,), low, dtype=torch.float64)
    assert mia(lowest, torch.rand(9, generator=torch.Generator().manual_seed(0))) == 1.0
