"""The splits: sizes, disjointness, and what each task forgets."""

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.classifiers import share
from gradsurgery.unlearn.jobs.digits import data as digits
from gradsurgery.unlearn.objectives.classification import cross_entropy


def ids(data):
    """Images as hashable rows: the data set has no duplicates among them."""
    return {tuple(row) for row in data["image"].flatten(1).tolist()}


@pytest.mark.parametrize("task,forgotten", [("mislabeled", 100), ("random", 126), ("class", None)])
def test_sets_are_disjoint_and_complete(task, forgotten):
    data = digits.load(task, seed=3)
    sets = [data.forget, data.retain, data.validation, data.test]
    assert [len(part["label"]) for part in sets[2:]] == [180, 360]
    assert len(data.train["label"]) == 1257
    if forgotten is not None:
        assert len(data.forget["label"]) == forgotten
    assert sum(len(ids(part)) for part in sets) == len(set.union(*map(ids, sets))) == 1797
    assert data.train["image"].min() >= 0 and data.train["image"].max() == 1


def test_every_wrong_label_is_wrong():
    data = digits.load("mislabeled", seed=0)
    assert (data.forget["label"] != data.true_labels).all()
    assert data.forget["label"].min() >= 0 and data.forget["label"].max() <= 9


def test_class_takes_all_of_one_digit_and_the_seed_names_it():
    data = digits.load("class", seed=13)
    assert data.forget_class == 3
    assert (data.forget["label"] == 3).all() and (data.retain["label"] != 3).all()
    kept, forgotten = data.held_out("test")
    assert forgotten is not None
    assert (kept["label"] != 3).all() and (forgotten["label"] == 3).all()
    assert len(kept["label"]) + len(forgotten["label"]) == 360
    assert digits.load("class", seed=13, forget_class=8).forget_class == 8


def test_test_set_is_the_same_for_every_seed():
    first, second = digits.load("random", seed=0), digits.load("mislabeled", seed=105)
    assert torch.equal(first.test["image"], second.test["image"])
    assert not torch.equal(first.validation["image"], second.validation["image"])


def test_same_seed_same_split():
    first, second = digits.load("mislabeled", seed=4), digits.load("mislabeled", seed=4)
    assert torch.equal(first.forget["label"], second.forget["label"])
    assert first.ids == second.ids


@pytest.mark.parametrize("percent,forgotten", [(1, 13), (5, 63), (10, 126), (99.9, 1256)])
def test_random_takes_the_share_asked_for(percent, forgotten):
    data = digits.load("random", seed=0, random_percent=percent)
    assert len(data.forget["label"]) == forgotten
    assert len(data.retain["label"]) == digits.TRAIN_SIZE - forgotten


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_a_share_has_every_class_in_proportion(fraction):
    retain = digits.load("class", seed=0).retain
    some = share(retain, fraction, seed=1)
    for label in range(1, 10):
        n, kept = ((part["label"] == label).sum().item() for part in (retain, some))
        assert kept == round(fraction * n)
    assert not (some["label"] == 0).any()


def test_a_share_is_drawn_by_the_seed_from_the_larger_ones():
    retain = digits.load("random", seed=0).retain
    whole = share(retain, 1.0, seed=1)
    assert torch.equal(whole["image"], retain["image"])
    few, more, other = (ids(share(retain, f, s)) for f, s in ((0.1, 1), (0.3, 1), (0.1, 2)))
    assert few < more < ids(retain)
    assert few != other


def test_no_class_loses_its_last_sample():
    data = {"image": torch.arange(30.0), "label": torch.tensor([0] * 28 + [1, 2])}
    assert sorted(share(data, 0.01, seed=0)["label"].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("speaker", 0), "--task must be one of mislabeled, class, random, got speaker"),
        (("class", 0, 12), "--forget-class must be a digit from 0 to 9, got 12"),
        (("random", 0, 3), "--forget-class applies to --task class only, got --task random"),
        (("random", 0, None, 0), r"--random-percent must be in \(0, 100\), got 0"),
        (("random", 0, None, 100), r"--random-percent must be in \(0, 100\), got 100"),
        (("random", 0, None, 0.01), r"--random-percent must leave at least one .* to forget"),
        (("random", 0, None, 99.99), r"--random-percent must leave .* one to retain, got 99.99"),
    ],
)
def test_nonsense_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        digits.load(*arguments)


def test_a_loss_depends_on_its_own_sample_alone():
    torch.manual_seed(0)
    model, data = digits.DigitsCNN(), digits.load("random", seed=0).validation
    together = cross_entropy(model, data)
    alone = cross_entropy(model, {key: value[:1] for key, value in data.items()})
    torch.testing.assert_close(together[:1], alone)
    assert sum(p.numel() for p in model.parameters()) == 124_426
