"""Samples that are most known by heart: those that networks without them get wrong."""

import numpy as np
import torch
from torch import nn

from gradsurgery.unlearn.jobs.images.job import ImagesJob
from gradsurgery.unlearn.jobs.images.memorized import FOLDS, _folds, unseen_losses
from gradsurgery.unlearn.methods.retrain import RetrainConfig
from tests.unlearn.jobs.images.made import arrays, tiny

WRONG = (5, 17, 40, 66, 91, 110)  # samples that are labeled as the next class


def mislabeled():
    images, labels = arrays()
    labels[list(WRONG)] = (labels[list(WRONG)] + 1) % 3
    return images, labels


def make(k):
    torch.manual_seed(k)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def test_a_wrong_label_is_known_by_heart():
    images, labels = mislabeled()
    samples = {"image": torch.as_tensor(images)[:, None] / 255, "label": torch.as_tensor(labels)}
    config = RetrainConfig(steps=60, lr=0.05, start="given", retain_batch=32)
    found = unseen_losses(samples, make, config)
    assert sorted(found.topk(len(WRONG)).indices.tolist()) == list(WRONG)
    assert torch.equal(found, unseen_losses(samples, make, config))


def test_no_network_has_seen_what_it_judges():
    """One pixel says who a sample is: a network that had seen it would know its label."""
    drawn = torch.Generator().manual_seed(0)
    samples = {
        "image": torch.eye(64)[:60].view(60, 1, 8, 8),
        "label": torch.randint(3, (60,), generator=drawn),
    }
    config = RetrainConfig(steps=300, lr=0.1, start="given", retain_batch=48, weight_decay=0.0)
    assert unseen_losses(samples, make, config).mean() > 1.0  # chance: 1.1


def test_folds_have_of_every_class_as_many_but_for_one():
    known = torch.tensor([0] * 23 + [1] * 4 + [7] * 50)
    folds = _folds(known)
    for label in (0, 1, 7):
        counts = torch.bincount(folds[known == label], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(folds, _folds(known))


def test_every_seed_forgets_those_of_its_training_samples(tmp_path):
    images, labels = mislabeled()
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=labels)
    config = tiny(path, "memorized", percent=5, training={"steps": 80, "lr": 0.01})
    job = ImagesJob()
    for seed in range(3):
        split = job.split(config, seed)
        assert len(split.ids) == 4  # of 86
        assert not split.mislabeled
        held_out = sum(len(part["label"]) for part in (split.validation, split.test))
        assert held_out == 34
        # wrong ones come first, but for those that are held out
        assert len(set(split.ids) & set(WRONG)) >= 3
