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


def attacked(unlearned, retrained, **more):
    labels = torch.zeros(len(unlearned), dtype=torch.long)
    return informed_attack(of_margins(unlearned), of_margins(retrained), labels, **more)


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


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_always_on_one_side_is_always_told(sign):
    """Forgotten too well or not at all, however different the samples are from each other."""
    retrained = torch.linspace(-5, 5, 20, dtype=torch.float64)
    found = attacked(retrained + sign * 0.5, retrained)
    assert found == {"informed": 1.0, "informed_auc": 1.0}


def test_equal_outputs_cannot_be_told():
    margins = torch.randn(20, dtype=torch.float64)
    assert attacked(margins, margins) == {"informed": 0.5, "informed_auc": 0.5}


def test_two_models_of_one_kind_cannot_be_told():
    """No sample is on a side of its own: of 2000 the share is 0.5 with a deviation of 0.011."""
    generator = torch.Generator().manual_seed(0)
    hard = 3 * torch.randn(2000, generator=generator, dtype=torch.float64)
    one, other = (
        hard + torch.randn(2000, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    found = attacked(one, other)
    assert found["informed"] == pytest.approx(0.5, abs=0.04)
    assert found["informed_auc"] == pytest.approx(0.5, abs=0.04)


def test_four_of_five_on_one_side_are_told():
    """Margins of 1 and 0, in one of five samples of 0 and 1: each fold goes by what most have.

    Scores are then c of a share a and -c of the others, in the other order the reverse: a score of
    the first kind wins with a^2 and ties with 2 a (1 - a), which makes a.
    """
    up = tensor([1, 1, 1, 1, 0] * 40)
    expected = pytest.approx({"informed": 0.8, "informed_auc": 0.8})
    assert attacked(up, 1 - up) == expected


def test_an_entropy_that_is_always_lower_tells_where_losses_go_both_ways():
    """Margins of 1 and -1 against 0: as much up as down, and never as undecided."""
    step = tensor([1, -1] * 50)
    assert attacked(step, torch.zeros(100, dtype=torch.float64))["informed"] == 1.0


def test_it_sees_what_an_attack_on_losses_alone_does_not():
    """Every margin larger by a little, in a set where they differ by much."""
    retrained = torch.linspace(0, 5, 50, dtype=torch.float64)
    unlearned = retrained + 0.3
    losses = [torch.nn.functional.softplus(-side) for side in (unlearned, retrained)]
    assert mia(*losses) < 0.6
    assert attacked(unlearned, retrained)["informed"] == 1.0


def test_a_seed_is_of_the_folds_alone():
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(2)]
    assert attacked(*sides) == attacked(*sides)
    assert attacked(*sides) != attacked(*sides, seed=1)
    before = torch.get_rng_state()
    attacked(*sides)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "unlearned,retrained,labels,message",
    [
        ((4, 3), (4, 3), 4, "an attack needs at least 5 samples, got 4"),
        ((6, 3), (6, 4), 6, r"must share \[N, C\], got \[6, 3\] and \[6, 4\]"),
        ((6, 3), (7, 3), 6, r"must share \[N, C\], got \[6, 3\] and \[7, 3\]"),
        ((6, 3), (6, 3), 5, "labels"),
        ((6,), (6, 3), 6, r"unlearned_logits must be \[N, C\]"),
    ],
)
def test_outputs_that_do_not_fit_are_named(unlearned, retrained, labels, message):
    with pytest.raises(InputError, match=message):
        informed_attack(
            torch.zeros(unlearned), torch.zeros(retrained), torch.zeros(labels, dtype=torch.long)
        )
