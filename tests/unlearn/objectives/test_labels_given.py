"""Labels of any integer dtype do the same in every method; all others are refused, by set."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, FinetuneConfig, Retrain, unlearning
from gradsurgery.unlearn.metrics.accuracy import accuracy, share_right
from gradsurgery.unlearn.metrics.attacks import attack_all
from gradsurgery.unlearn.metrics.relearn import relearn_steps
from gradsurgery.unlearn.objectives.classification import (
    cross_entropy,
    label_losses,
    relabeled,
    wrong_labels,
)

ALL = {**METHODS, "retrain": Retrain}
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
CLASSES = 3
SETS = ("forget", "retain", "validation")
# by default SSD dampens what is ten times as important to the few as to all: here nothing
OPTIONS = {"ssd": {"alpha": 1.0}, "scrub": {"msteps": 1}, "ltu": {"model_steps": 5}}


def samples(n, labels=None):
    return torch.randn(n, 6), torch.arange(n) % CLASSES if labels is None else labels


def sets():
    return {"forget": samples(12), "retain": samples(24), "validation": samples(10)}


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def run(model, data, method, **options):
    options = {"steps": 3, "lr": 0.01, **OPTIONS.get(method, {}), **options}
    forget = None if method == "retrain" else data["forget"]
    return unlearning(
        model,
        retain_loader=data["retain"],
        forget_loader=forget,
        val_loader=data["validation"],
        method=method,
        **options,
    )


def values(model):
    return [value.clone() for value in model.state_dict().values()]


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def loader(part, size=5):
    return DataLoader(TensorDataset(*part), batch_size=size)


@pytest.mark.parametrize("loaders", [False, True], ids=["memory", "loader"])
@pytest.mark.parametrize("method", ALL)
def test_every_integer_dtype_does_the_same(method, loaders):
    data, start = sets(), net()
    ends = []
    for dtype in (torch.int64, *INTEGERS):
        given = {k: (x, y.to(dtype)) for k, (x, y) in data.items()}
        given = {k: loader(part) for k, part in given.items()} if loaders else given
        ends.append(values(run(copy.deepcopy(start), given, method)))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))
    assert not unchanged(start, ends[0])


def last(labels, value):
    return labels.where(torch.arange(len(labels)) < len(labels) - 1, value)


WRONG = {
    "float": lambda labels: labels + 0.9,
    "double": lambda labels: labels.double(),
    "bool": lambda labels: labels > 0,
    "complex": lambda labels: labels.to(torch.complex64),
    "one-hot": lambda labels: F.one_hot(labels, CLASSES).float(),
    "one-hot integers": lambda labels: F.one_hot(labels, CLASSES),
    "column": lambda labels: labels[:, None],
    "negative": lambda labels: labels - 1,
    "ignored": lambda labels: last(labels, -100),
    "too large": lambda labels: last(labels, CLASSES),
    "none": lambda labels: None,
    "list": lambda labels: labels.tolist(),
    "meta": lambda labels: labels.to("meta"),
    "numpy": lambda labels: labels.numpy(),
}


FEW = ("float", "one-hot", "too large", "none")


@pytest.mark.parametrize("where", SETS)
@pytest.mark.parametrize(
    "method,kind", [(m, k) for m in ALL for k in (WRONG if m == "graddiff" else FEW)]
)
def test_all_others_are_refused_by_set_before_anything_changes(method, where, kind):
    if method == "retrain" and where == "forget":
        return  # it is given none
    data, model = sets(), net()
    inputs, labels = data[where]
    data[where] = inputs, WRONG[kind](labels)
    before = values(model)
    with pytest.raises(InputError, match=rf"^{where}") as caught:
        run(model, data, method)
    assert "tensor(" not in str(caught.value) and "\n" not in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["float", "column", "too large"])
@pytest.mark.parametrize("where", SETS)
@pytest.mark.parametrize("method", ALL)
def test_of_a_loader_too(method, where, kind):
    """Known only once it is drawn: at the end of an epoch, the network goes back to its start."""
    kinds = set(ALL[method].draws) | set(ALL[method].needs)
    if method in ("ltu", "salun"):
        kinds |= {"validation"} if method == "ltu" else {"forget"}
    if where not in kinds:
        return  # never drawn from
    data, model = {k: loader(part) for k, part in sets().items()}, net()
    inputs, labels = data[where].dataset.tensors
    data[where] = loader((inputs, WRONG[kind](labels)))
    before = values(model)
    with pytest.raises(InputError, match=rf"^{where}"):
        run(model, data, method, steps=8)
    assert unchanged(model, before)


@pytest.mark.parametrize("method", ["random_label", "salun", "boundary_shrink", "scrub", "ltu"])
def test_a_loss_of_ones_own_does_not_hide_labels_that_a_method_looks_at(method):
    def loss(model, batch):
        return model(batch[0]).square().mean(1)

    where = "retain" if method == "scrub" else "forget"
    data = sets()
    data[where] = data[where][0], data[where][1] + 0.5
    with pytest.raises(InputError, match=f"{where}: labels must be integers"):
        run(net(), data, method, loss=loss)


@pytest.mark.parametrize("method", ["finetune", "graddiff", "orthograd", "ssd", "bad_teacher"])
def test_a_loss_of_ones_own_may_have_other_labels(method):
    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="none").mean(1)

    data = {k: (x, torch.randn(len(x), CLASSES)) for k, (x, _) in sets().items()}
    unused = pytest.warns(UserWarning, match="^loss: BadTeacher never calls it, for it takes div")
    with unused if method == "bad_teacher" else contextlib.nullcontext():
        run(net(), data, method, loss=loss)


@pytest.mark.parametrize("method", ["scrub", "bad_teacher"])
def test_a_loss_that_is_never_called_is_one_warning(method):
    def loss(model, batch):
        raise AssertionError

    with pytest.warns(UserWarning, match=f"^loss: {ALL[method].__name__} never ca") as caught:
        run(net(), sets(), method, loss=loss)
    assert len(caught) == 1
    run(net(), sets(), method)  # any warning is an error


@pytest.mark.parametrize("method", [m for m in ALL if m not in ("scrub", "bad_teacher")])
def test_a_loss_of_ones_own_is_called(method):
    calls = []

    def loss(model, batch):
        calls.append(model)
        return cross_entropy(model, batch)

    run(net(), sets(), method, loss=loss)
    assert calls


def test_a_single_loss_refuses_them_too():
    images, labels = samples(4)
    for kind in ("float", "bool", "one-hot", "column", "none"):
        with pytest.raises(InputError, match="labels must be integers"):
            cross_entropy(net(), (images, WRONG[kind](labels)))
    with pytest.raises(InputError, match=r"integers \[4\], one for each row of logits, got int64 "):
        label_losses(torch.randn(4, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="labels must be integers"):
        wrong_labels(labels.float(), 3, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.int64, *INTEGERS])
def test_accuracy_and_attacks_take_every_integer_dtype(dtype):
    images, labels = samples(12)
    model = net()
    logits = model(images).detach()
    known = labels.to(dtype)
    assert accuracy(model, (images, known)) == share_right(logits, labels)
    assert accuracy(model, {"image": images, "label": labels}, known) <= 1
    pytest.importorskip("sklearn")
    assert attack_all(logits, known, -logits, known) == attack_all(logits, labels, -logits, labels)


@pytest.mark.parametrize("kind", ["float", "bool", "one-hot", "column", "none", "list", "numpy"])
def test_accuracy_and_attacks_refuse_all_others(kind):
    images, labels = samples(12)
    model, given = net(), WRONG[kind](labels)
    logits = model(images).detach()
    with pytest.raises(InputError):
        accuracy(model, {"image": images, "label": given})
    with pytest.raises(InputError, match="labels must be integers"):
        share_right(logits, given)  # a column would compare every row with every label
    with pytest.raises(InputError, match="forget_labels must be integers"):
        attack_all(logits, given, logits, labels)


def test_other_labels_keep_the_batch_as_it_is():
    images, labels = samples(4)
    batch = {"image": images, "label": labels, "weight": torch.ones(4)}
    changed = relabeled(batch, labels + 1)
    assert set(changed) == set(batch) and torch.equal(batch["label"], labels)


def test_relearning_names_the_set_it_was_given():
    images, labels = samples(12)
    for wrong in (labels + 0.5, labels[:, None]):
        with pytest.raises(InputError, match=r"^forget: labels must be integers"):
            relearn_steps(net(), cross_entropy, (images, wrong), 1.0, FinetuneConfig(steps=1))
