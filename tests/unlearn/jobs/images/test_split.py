"""What each task of the images job forgets, keeps and holds out."""

import numpy as np
import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images.job import ImagesJob
from tests.unlearn.jobs.images.made import arrays, saved, tiny

TASKS = ("random", "class", "mislabeled", "confusion", "memorized", "ids")


@pytest.fixture
def data(tmp_path):
    return saved(tmp_path)


@pytest.fixture
def named(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("# these three\n7\n\n11\n3\n")
    return path


def made(data, task, named, seed=0, **changes):
    ids = {"ids": str(named)} if task == "ids" else {}
    return ImagesJob().split(tiny(data, task, **ids, **changes), seed)


def pictures(samples):
    """Samples as hashable rows; the made-up images have no duplicates."""
    return [tuple(row) for row in samples["image"].flatten(1).tolist()]


@pytest.mark.parametrize("task", TASKS)
def test_sets_are_disjoint_and_complete(data, named, task):
    split = made(data, task, named)
    sets = [split.forget, split.retain, split.validation, split.test]
    # a tenth of 96, a fifth of 120; named samples are no part of what they are shares of
    held_out = [9, 23] if task == "ids" else [10, 24]
    assert [len(part["label"]) for part in sets[2:]] == held_out
    rows = [row for part in sets for row in pictures(part)]
    assert len(rows) == len(set(rows)) == 120
    assert len(split.ids) == len(split.forget["label"])
    images = torch.as_tensor(arrays()[0])[torch.tensor(split.ids)] / 255
    torch.testing.assert_close(split.forget["image"][:, 0], images)


@pytest.mark.parametrize("task", TASKS)
def test_the_test_set_is_the_same_for_every_seed_and_validation_is_not(data, named, task):
    first, second = (made(data, task, named, seed) for seed in (0, 1))
    assert torch.equal(first.test["image"], second.test["image"])
    assert not torch.equal(first.validation["image"], second.validation["image"])
    again = made(data, task, named)
    assert again.ids == first.ids and torch.equal(again.forget["label"], first.forget["label"])


def test_held_out_sets_have_every_class_in_proportion(data, named):
    split = made(data, "random", named)
    assert torch.bincount(split.test["label"]).tolist() == [8, 8, 8]
    assert sorted(torch.bincount(split.validation["label"]).tolist()) == [3, 3, 4]


@pytest.mark.parametrize(("percent", "count"), [(None, 9), (50, 43), (1.2, 1)])
def test_random_takes_the_share_asked_for(data, named, percent, count):
    split = made(data, "random", named, percent=percent)
    assert len(split.ids) == count  # of 86
    assert not split.mislabeled and split.about == {"class": None}


def test_mislabeled_samples_have_wrong_labels_and_keep_the_true_ones(data, named):
    split = made(data, "mislabeled", named, percent=50)
    labels = torch.as_tensor(arrays()[1])[torch.tensor(split.ids)]
    assert split.mislabeled and torch.equal(split.true_labels, labels)
    assert bool((split.forget["label"] != labels).all())
    assert set(split.forget["label"].tolist()) == {0, 1, 2}


def test_confused_samples_have_the_other_class(data, named):
    split = made(data, "confusion", named, confused=["0", "2"])
    assert split.about == {"class": "0 and 2"}
    labels = torch.as_tensor(arrays()[1])[torch.tensor(split.ids)]
    assert len(labels) == round(0.5 * (86 - int((split.retain["label"] == 1).sum())))
    assert split.mislabeled and set(labels.tolist()) == {0, 2}
    assert torch.equal(split.forget["label"], 2 - labels)
    by_seed = [made(data, "confusion", named, seed).about["class"] for seed in (0, 1, 2)]
    assert by_seed == ["0 and 1", "1 and 2", "2 and 0"]


def test_a_class_is_named_or_the_seeds(data, named):
    split = made(data, "class", named, forget_class="1")
    assert bool((split.forget["label"] == 1).all()) and bool((split.retain["label"] != 1).all())
    assert split.about == {"class": "1"}
    kept, forgotten = split.held_out("test")
    assert forgotten is not None
    assert bool((kept["label"] != 1).all()) and bool((forgotten["label"] == 1).all())
    assert made(data, "class", named, seed=5).forget_class == 2


def test_named_samples_are_forgotten_whatever_the_seed(data, named):
    for seed in range(5):
        assert sorted(made(data, "ids", named, seed).ids) == [3, 7, 11]


def test_parts_of_the_data_set_are_kept(tmp_path):
    images, labels = arrays(150)
    path = tmp_path / "parts.npz"
    named = {"train": slice(0, 90), "test": slice(90, 150)}
    np.savez(
        path,
        **{f"{name}_images": images[part] for name, part in named.items()},
        **{f"{name}_labels": labels[part] for name, part in named.items()},
    )
    split = ImagesJob().split(tiny(path), 0)
    torch.testing.assert_close(split.test["image"][:, 0], torch.as_tensor(images[90:]) / 255)
    assert len(split.validation["label"]) == 9
    assert max(split.ids) < 90
    (tmp_path / "ids.txt").write_text("95\n")
    with pytest.raises(InputError, match="--ids: 95 is a test sample, which no model is trained"):
        ImagesJob().split(tiny(path, "ids", ids=str(tmp_path / "ids.txt")), 0)


@pytest.mark.parametrize("own_test", [False, True])
def test_some_samples_to_train_with_are_the_same_for_every_seed(tmp_path, own_test):
    images, labels = arrays(180)
    named = {"train": slice(0, 120), "test": slice(120, 180)}
    parts = {f"{name}_images": images[part] for name, part in named.items()}
    parts |= {f"{name}_labels": labels[part] for name, part in named.items()}
    path = tmp_path / "data.npz"
    np.savez(path, **(parts if own_test else {"images": images, "labels": labels}))
    used = set()
    for seed in range(3):
        split = ImagesJob().split(tiny(path, train_samples=60), seed)
        sides = [split.forget, split.retain, split.validation]
        assert [len(side["label"]) for side in sides] == [5, 49, 6]
        assert len(split.test["label"]) == (60 if own_test else 36)
        counts = sum(torch.bincount(side["label"], minlength=3) for side in sides)
        assert counts.tolist() == [20, 20, 20]
        used.add(frozenset(row for side in sides for row in pictures(side)))
        assert not used_in(split.test, used)
    assert len(used) == 1


def used_in(samples, used):
    return any(row in rows for rows in used for row in pictures(samples))


def test_named_samples_are_among_those_to_train_with(data, named):
    split = made(data, "ids", named, train_samples=30)
    assert sorted(split.ids) == [3, 7, 11]
    assert len(split.retain["label"]) + len(split.validation["label"]) == 27


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("class", {"forget_class": "cat"}, "--forget-class: there is no class cat, only 0, 1, 2"),
        ("confusion", {"confused": ["0", "9"]}, "--confused: there is no class 9, only 0, 1, 2"),
        (
            "random",
            {"train_samples": 97},
            r"--train-samples must be of the 96 there are, got 97",
        ),
        (
            "ids",
            {"train_samples": 3},
            r"--train-samples must be of the 94 there are beside 3 of --ids, got 3",
        ),
        ("random", {"percent": 0.1}, "--task random would forget none of 86 samples"),
        ("random", {"percent": 99.9}, "--task random would forget all of 86 samples"),
    ],
)
def test_what_these_data_do_not_have_is_named(data, named, task, changes, message):
    with pytest.raises(InputError, match=message):
        made(data, task, named, **changes)


def test_too_few_samples_to_hold_some_out_are_named(tmp_path):
    images, labels = arrays(7)
    np.savez(tmp_path / "few.npz", images=images, labels=labels)
    with pytest.raises(InputError, match="4 samples of 3 classes are too few to draw a validation"):
        ImagesJob().split(tiny(tmp_path / "few.npz"), 0)
