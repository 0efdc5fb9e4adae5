"""Linear probes of features that are known, and of networks without any."""

import pytest
import torch
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.networks import SmallCNN, SmallViT, resnet18
from gradsurgery.unlearn.metrics.probe import features, last_linear, linear_probe


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def batch(n=3, size=8):
    return {"image": torch.rand(n, 1, size, size), "label": torch.zeros(n, dtype=torch.long)}


class Convolved(nn.Module):
    """A linear layer inside, and logits of a convolution."""

    def __init__(self, classes=3):
        super().__init__()
        self.inside = nn.Linear(8, 8)
        self.head = nn.Conv2d(1, classes, 8)

    def forward(self, images):
        return self.head(self.inside(images))[:, :, 0, 0]


class ByTokens(nn.Module):
    """Logits are the mean of those of every row of pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(images[:, 0]).mean(dim=1)


class Backwards(nn.Module):
    """The layer that was made first is called last."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(5, 3), nn.Linear(64, 5)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())


@pytest.mark.parametrize(
    "model,name,width",
    [
        (SmallCNN(1, (8, 8), 3), "head.3", 256),
        (resnet18(1, (8, 8), 3), "fc", 512),
        (SmallViT(1, (8, 8), 3), "head", 128),
        (Backwards(), "head", 5),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "1", 64),
    ],
    ids=["cnn", "resnet18", "vit", "backwards", "linear"],
)
def test_features_are_what_the_last_linear_layer_is_given(model, name, width):
    samples = batch()
    assert last_linear(model, samples) == name
    found = features(model, samples)
    assert found.shape == (3, width) and found.dtype == torch.float64
    with torch.no_grad():
        logits = model.eval()(samples["image"])
        again = model.get_submodule(name)(found.float())
    torch.testing.assert_close(again, logits)


def test_parts_and_modes_do_not_matter_and_nothing_is_left_behind():
    samples = batch(7)
    samples["image"] = samples["image"].double()  # float32 products differ with the batch's size
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Dropout(0.5), nn.Linear(9, 3))
    model = model.double().train()
    whole = features(model, samples)
    torch.testing.assert_close(features(model, samples, at_once=2), whole)
    torch.testing.assert_close(whole, model[1](samples["image"].flatten(1)))
    assert model.training and model[2].training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(features(model, samples, layer="1"), samples["image"].flatten(1))


def test_models_without_such_a_layer_are_refused_by_name():
    for model in (Convolved(), ByTokens(), nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())):
        assert last_linear(model, batch()) is None
        with pytest.raises(InputError, match=f"^model: {type(model).__name__} makes its logits by"):
            features(model, batch())


@pytest.mark.parametrize(
    "model,layer,message",
    [
        (Backwards(), "tail", "layer: Backwards has no module named tail"),
        (ByTokens(), "head", r"head of ByTokens must be given features .* got \[3, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "0", r"0 of Sequential .* \[3, 1, 8, 8\]"),
    ],
)
def test_layers_that_are_none_are_named(model, layer, message):
    with pytest.raises(InputError, match=message):
        features(model, batch(), layer=layer)


def test_a_layer_that_is_never_called_is_named():
    model = Backwards()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"spare of Backwards must be given .* got none"):
        features(model, batch(), layer="spare")


def test_classes_on_a_line_by_hand():
    """0 to the left, 1 to the right, 2 above: sides of lines halfway between."""
    known = tensor([[-2, 0], [-3, 0], [2, 0], [3, 0], [0, 5], [0, 6]])
    says = linear_probe(known, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert says(known).tolist() == [0, 0, 1, 1, 2, 2]
    assert says(tensor([[-1, 0], [1, 0], [0, 9], [-9, 1]])).tolist() == [0, 1, 2, 0]


def test_a_class_of_few_samples_counts_like_one_of_many():
    """Two samples at 1 among a hundred from -1 to 0.9: weighed alike, 0.8 is theirs."""
    known = torch.cat([torch.linspace(-1, 0.9, 100), torch.tensor([1.0, 1.0])])[:, None]
    labels = torch.tensor([0] * 100 + [1] * 2)
    assert linear_probe(known, labels)(tensor([[0.8], [-0.5]])).tolist() == [1, 0]


def test_scale_does_not_matter():
    known, labels = torch.randn(60, 4, dtype=torch.float64), torch.arange(60) % 3
    known[:, 0] += labels
    scale, asked = tensor([1, 1e4, 1e-4, 1]), torch.randn(50, 4, dtype=torch.float64)
    one, other = linear_probe(known, labels), linear_probe(known * scale, labels)
    assert torch.equal(one(asked), other(asked * scale))


def test_a_head_that_forgot_is_seen_through():
    """The logits of one class are gone, and the features say it as before."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    samples = {"image": torch.eye(3, 4).repeat(10, 1), "label": torch.arange(3).repeat(10)}
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3, 4))
        model[1].bias.copy_(tensor([0, 0, -100]))
    assert not bool((model(samples["image"]).argmax(1) == 2).any())
    found = features(model, samples)
    assert torch.equal(linear_probe(found, samples["label"])(found), samples["label"])


@pytest.mark.parametrize(
    "known,labels,message",
    [
        (torch.zeros(4), torch.zeros(4).long(), r"known must be features \[N, D\], N > 0, got"),
        (torch.zeros(4, 2), torch.zeros(4).long(), r"two classes at least, got \[0\]"),
        (torch.zeros(4, 2), torch.zeros(3).long(), r"labels must be integers \[4\]"),
        (torch.tensor([[0.0], [torch.inf]]), torch.arange(2), "known must be finite, .* row 1"),
    ],
)
def test_features_that_are_none_are_named(known, labels, message):
    with pytest.raises(InputError, match=message):
        linear_probe(known, labels)


def test_features_of_another_width_are_named():
    says = linear_probe(torch.eye(2), torch.arange(2))
    with pytest.raises(InputError, match=r"asked must be \[M, 2\] like known, got \[1, 3\]"):
        says(torch.zeros(1, 3))
