"""`unlearning(net, retain_loader=..., forget_loader=...)`, with every method."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, Finetune, FinetuneConfig, unlearning
from gradsurgery.unlearn.objectives.classification import cross_entropy

CLASSES = 4


@pytest.fixture
def vision():
    """A small network with batch norm, as vision scripts have, and loaders of one data set."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, CLASSES),
    )
    data = TensorDataset(torch.randn(60, 1, 6, 6), torch.arange(60) % CLASSES)

    def loader(indices, size):
        return DataLoader(Subset(data, indices), batch_size=size, shuffle=True)

    return net, loader(range(12, 44), 8), loader(range(12), 6), loader(range(44, 60), 16)


def named(retain, forget, validation):
    return {"retain_loader": retain, "forget_loader": forget, "val_loader": validation}


@pytest.mark.parametrize("method", [*METHODS, "retrain"])
def test_every_method_takes_loaders_and_gives_the_net_back(method, vision):
    net, *loaders = vision
    net.eval()
    start = copy.deepcopy(net.state_dict())
    # by default SSD dampens what is ten times as important to the few as to all: here nothing
    options = {"alpha": 1.0} if method == "ssd" else {"epochs": 1, "lr": 1e-2}
    assert unlearning(net, **named(*loaders), method=method, **options) is net
    assert not net.training
    end = net.state_dict()
    assert any(not torch.equal(start[key], end[key]) for key in start)
    assert all(value.isfinite().all() for value in end.values())
    assert not any(p.grad is not None and p.grad.isnan().any() for p in net.parameters())


def test_epochs_are_passes_over_the_retain_loader(vision):
    net, retain, forget, _ = vision
    seen = []

    def loss(model, batch):
        seen.append(len(batch[1]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    unlearning(
        net, retain_loader=retain, forget_loader=forget, method="finetune", loss=loss, epochs=2
    )
    assert seen == [8] * 8


def test_samples_in_memory_serve_too(vision):
    net, *_ = vision
    images, labels = torch.randn(20, 1, 6, 6), torch.arange(20) % CLASSES
    unlearning(
        net,
        retain_loader=(images[4:], labels[4:]),
        forget_loader=(images[:4], labels[:4]),
        method="neggrad",
        steps=2,
    )


def test_loaders_that_share_samples_are_refused(vision):
    net, retain, _, validation = vision
    data = retain.dataset.dataset
    forget = DataLoader(Subset(data, range(10, 15)), batch_size=5)
    with pytest.raises(InputError, match="overlap: 3 samples are in both"):
        unlearning(net, retain_loader=retain, forget_loader=forget, val_loader=validation)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "magic"}, "method must be one of orthograd, .*, retrain, got 'magic'"),
        ({"method": "neggrad", "alpha": 1}, "neggrad has no option alpha; there are steps, lr"),
        ({"epochs": 1, "steps": 2}, "give epochs or steps, not both"),
        ({"lr": -1.0}, "OrthoGradTrainer.lr must be positive and finite, got -1.0"),
    ],
)
def test_nonsense_is_named(options, message, vision):
    net, *loaders = vision
    with pytest.raises(InputError, match=message):
        unlearning(net, **named(*loaders), **options)


def test_labels_out_of_range_are_named(vision):
    net, retain, *_ = vision
    wrong = (torch.randn(3, 1, 6, 6), torch.tensor([0, 1, CLASSES]))
    with pytest.raises(InputError, match=r"labels must be in \[0, 4\), .* got 0 to 4"):
        unlearning(net, retain_loader=retain, forget_loader=wrong, method="neggrad", steps=1)


def test_a_reduced_loss_is_named(vision):
    net, *loaders = vision

    def reduced(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(InputError, match=r"one value per sample.*use reduction='none'"):
        unlearning(net, **named(*loaders), method="graddiff", loss=reduced)


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("finetune", {"optimizer": "SGD"}, "optimizer must be one of sgd, adam, adamw, got 'SGD'"),
        ("finetune", {"precision": "bf16"}, "precision must be one of float32, bfloat16"),
        ("ltu", {"order": "2nd"}, "order must be one of first, second, got '2nd'"),
        ("finetune", {"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ("finetune", {"epochs": -1}, "epochs must be at least 0, got -1"),
    ],
)
def test_a_choice_that_there_is_not_is_named(method, options, message, vision):
    net, *loaders = vision
    with pytest.raises(InputError, match=message):
        unlearning(net, **named(*loaders), method=method, **options)


def test_a_trainer_of_ones_own_checks_its_choices_too(vision):
    net, retain, *_ = vision
    config = FinetuneConfig(schedule="cos")
    with pytest.raises(InputError, match=r"^Finetune.schedule must be one of constant, cosine"):
        Finetune(net, cross_entropy, forget=None, retain=retain, config=config)
    with pytest.raises(InputError, match=r"^Finetune.lr must be a number, got '1e-3'"):
        Finetune(net, cross_entropy, forget=None, retain=retain, config=FinetuneConfig(lr="1e-3"))


def test_what_a_loss_or_a_set_is_not_is_named(vision):
    net, retain, forget, _ = vision
    with pytest.raises(InputError, match=r"loss must be a function .* got CrossEntropyLoss"):
        unlearning(
            net,
            retain_loader=retain,
            forget_loader=forget,
            method="graddiff",
            loss=nn.CrossEntropyLoss(),
        )
    with pytest.raises(InputError, match=r"batch holds no tensor.* a Dataset goes into a DataL"):
        unlearning(
            net, retain_loader=retain.dataset, forget_loader=forget, method="graddiff", steps=1
        )


def test_a_batch_sampler_and_int32_labels_serve(vision):
    net, retain, forget, validation = vision
    sampler = BatchSampler(SequentialSampler(retain.dataset), batch_size=8, drop_last=False)
    loader = DataLoader(retain.dataset, batch_sampler=sampler)
    images, labels = next(iter(forget))
    few = (images, labels.int())
    unlearning(
        net,
        retain_loader=loader,
        forget_loader=few,
        val_loader=validation,
        method="ltu",
        steps=1,
        feedback="random_label",
    )


def test_callbacks_and_duplicates_through_the_function(vision):
    net, retain, *_ = vision
    data, told = retain.dataset.dataset, []
    forget = DataLoader(Subset(data, range(10, 15)), batch_size=5)
    unlearning(
        net,
        retain_loader=retain,
        forget_loader=forget,
        method="graddiff",
        steps=2,
        overlap="allow",
        callbacks=[lambda trainer, record: told.append(record["step"])],
    )
    assert told == [1, 2]
