"""The informed attack on outputs whose answer is known."""

import math

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics.attacks import mia
from gradsurgery.unlearn.metrics.informed import features, informed_attack


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def of_margins(margins):
    """Logits of two classes, whose margins are those of class 0, and its labels."""
    margins = tensor(margins) if isinstance(margins, list) else margins
    return torch.stack([margins, torch.zeros_like(margins)], dim=1)


def attacked(forget, unseen, **more):
    """Of margins of a model and of Retrain, on forget and on unseen samples."""

    def side(model, retrain):
        labels = torch.zeros(len(model), dtype=torch.long)
        return of_margins(model), of_margins(retrain), labels

    return informed_attack(side(*forget), side(*unseen), **more)


def drawn(n, seed, deviation=1.0):
    generator = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(n, generator=generator, dtype=torch.float64)


def test_features_by_hand():
    p = tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    entropies = [-sum(x * math.log(x) for x in row) for row in p.tolist()]
    expected = [
        [-math.log(0.2), math.log(0.2 / 0.8), entropies[0]],
        [-math.log(0.5), 0.0, entropies[1]],
    ]
    torch.testing.assert_close(features(p.log(), torch.tensor([1, 2])), tensor(expected))


def test_features_are_clipped():
    found = features(tensor([[1e3, 0.0], [0.0, 1e3]]), torch.tensor([0, 0]))
    torch.testing.assert_close(found, tensor([[0, 50, 0], [50, -50, 0]]))


HARD = torch.linspace(-5, 5, 40, dtype=torch.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_known_better_or_worse_than_retrain_would_is_told(sign):
    """Remembered or forgotten too well, however different the samples are from each other."""
    found = attacked((HARD + sign * 0.5, HARD), (HARD, HARD))
    assert found == {"informed": 1.0, "informed_auc": 1.0}


def test_retrain_itself_is_not():
    found = attacked((HARD, HARD), (HARD.flip(0) / 2, HARD.flip(0) / 2))
    assert found == {"informed": 0.5, "informed_auc": 0.5}


def test_a_model_that_differs_as_a_whole_is_not():
    """More sure than Retrain of every sample, forgotten or not, with noise of a seed's own.

    One answer has a standard deviation of 0.014, and so a mean of six one of 0.006.
    """
    answers = []
    for k in range(6):
        hard = drawn(4000, 10 * k, 3.0)
        retrain, model = hard + drawn(4000, 10 * k + 1), hard + 1 + drawn(4000, 10 * k + 2)
        found = attacked((model[:2000], retrain[:2000]), (model[2000:], retrain[2000:]))
        answers.append(list(found.values()))
    torch.testing.assert_close(tensor(answers).mean(0), tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_four_of_five_are_told_by_hand():
    """Margins of 1 where Retrain's are 0, in one of five like the unseen ones: 0.8 of the forget
    samples and all others are told, and the fifth ties with all unseen ones."""
    none = torch.zeros(200, dtype=torch.float64)
    found = attacked((tensor([1, 1, 1, 1, 0] * 40), none), (none, none))
    assert found == pytest.approx({"informed": 0.9, "informed_auc": 0.9})


def test_it_sees_what_an_attack_on_losses_alone_does_not():
    """Every margin larger by a little, in a set where they differ by much."""
    found = [torch.nn.functional.softplus(-side) for side in (HARD + 0.3, HARD)]
    assert mia(*found) < 0.6
    assert attacked((HARD + 0.3, HARD), (HARD, HARD))["informed"] == 1.0


def test_the_larger_side_is_cut_to_the_smaller():
    """All that are said to be unseen would be right on four of five, were they all there."""
    found = attacked((HARD[:10], HARD[:10]), (HARD, HARD))
    assert found == {"informed": 0.5, "informed_auc": 0.5}


def test_a_seed_is_of_the_folds_alone():
    sides = [(drawn(30, k), drawn(30, k + 10)) for k in range(2)]
    assert attacked(*sides) == attacked(*sides)
    assert attacked(*sides) != attacked(*sides, seed=1)
    before = torch.get_rng_state()
    attacked(*sides)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "model,retrain,labels,message",
    [
        ((4, 3), (4, 3), 4, "an attack needs at least 5 samples a side, got 4"),
        ((6, 3), (6, 4), 6, r"unseen: .* must be alike, got \[6, 3\] and \[6, 4\]"),
        ((6, 3), (7, 3), 6, r"unseen: .* must be alike, got \[6, 3\] and \[7, 3\]"),
        ((6, 3), (6, 3), 5, "labels"),
        ((6,), (6, 3), 6, r"unseen must be \[N, C\]"),
        ((6, 3), (6,), 6, r"unseen: Retrain's logits must be \[N, C\]"),
    ],
)
def test_outputs_that_do_not_fit_are_named(model, retrain, labels, message):
    fine = torch.zeros(8, 3), torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)
    given = torch.zeros(model), torch.zeros(retrain), torch.zeros(labels, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        informed_attack(fine, given)
