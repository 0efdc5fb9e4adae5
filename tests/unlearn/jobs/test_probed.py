"""What a probe of features knows and is asked in a job with a classifier."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradsurgery.unlearn.jobs.classifiers import KNOWN, divide, probed

CLASSES = 3


def samples(labels):
    """Images of one pixel a class, the label's lit, with a little noise."""
    labels = torch.tensor(labels)
    lit = torch.nn.functional.one_hot(labels, CLASSES).float()
    noise = 0.1 * torch.rand(lit.shape, generator=torch.Generator().manual_seed(0))
    return {"image": (lit + noise)[:, None, None], "label": labels}


@pytest.fixture
def split():
    """Class 2 is forgotten; 24 samples are trained on, 9 are for validation, 9 for the test."""
    of = samples([0, 1, 2] * 14)
    train = torch.arange(24)
    held_out = {"validation": torch.arange(24, 33), "test": torch.arange(33, 42)}
    return divide(of, train, held_out, of["label"][train] == 2, forget_class=2)


def forgetful():
    """Its logits never say class 2, and its features are the pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(CLASSES))
        model[1].bias.copy_(torch.tensor([0.0, 0.0, -100.0]))
    return model


def test_a_class_that_only_the_logits_forgot_is_found(split):
    assert probed(forgetful(), split) == {"probe_forget": 1.0, "probe_forgotten": 1.0}


def test_a_class_that_the_features_forgot_is_not(split):
    """Without its pixel it is neither of the others, and the noise says nothing sure."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.tensor([0.0, 0.0, 1.0])))
        model[1].bias.zero_()
    assert probed(model, split)["probe_forget"] == 1.0
    model[1].weight.data.copy_(torch.zeros(CLASSES, CLASSES))
    assert probed(model, split)["probe_forget"] < 1.0


def test_wrong_labels_are_asked_as_they_were_learned(split):
    of, train = samples([0, 1, 2] * 14), torch.arange(24)
    held_out = {"validation": torch.arange(24, 33), "test": torch.arange(33, 42)}
    forgotten = torch.arange(24) < 6
    wrong = divide(of, train, held_out, forgotten, torch.tensor([1, 2, 0, 0, 1, 2]))
    # the last three have their own labels, the first three others; there is no forgotten class
    assert probed(forgetful(), wrong) == {"probe_forget": 0.5}


def test_a_held_out_set_without_the_class_is_not_asked(split):
    here = split.test["label"] != 2
    without = replace(split, test={key: value[here] for key, value in split.test.items()})
    assert probed(forgetful(), without) == {"probe_forget": 1.0}


def test_a_model_without_such_a_layer_has_no_numbers(split):
    assert probed(nn.Sequential(nn.Conv2d(1, 3, (1, 3)), nn.Flatten()), split) == {}


def test_only_some_of_a_large_retain_set_is_looked_at(split):
    seen = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, images):
            seen.append(len(images))
            return self.head(images.flatten(1))

    many = {key: value.repeat_interleave(200, 0) for key, value in split.retain.items()}
    assert len(many["label"]) > KNOWN
    probed(Counting(), replace(split, retain=many))
    assert seen[0] == 1 and sum(seen[1:]) <= KNOWN + 3 + len(split.ids) + 3
