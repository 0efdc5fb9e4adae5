"""Classification as a task: what a loss function stands for, to the same bits."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.unlearn import Classification, cross_entropy
from tests.unlearn.objectives.tasks import ALL, run, same, values


class Noisy(nn.Sequential):
    """A classifier that draws from torch's generator in evaluation mode too."""

    def __init__(self, classes=3):
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh()
        super().__init__(*layers, nn.Linear(8, classes))

    def forward(self, input):
        return super().forward(input) + 1e-3 * torch.rand(())


def pictures(classes=3):
    def samples(n):
        return torch.randn(n, 6), torch.arange(n) % classes

    names = {"retain_loader": 24, "forget_loader": 12, "val_loader": 10}
    return {name: samples(n) for name, n in names.items()}


def smooth(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.3)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    "function,objective",
    [
        (cross_entropy, Classification()),
        (cross_entropy, Classification(n_classes=3)),
        (smooth, Classification(smooth)),
    ],
    ids=["default", "counted", "own"],
)
def test_a_loss_function_is_classification_with_it(method, function, objective):
    net, sets, ends = Noisy(), pictures(), []
    for loss in (function, objective):
        twin = copy.deepcopy(net)
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(twin, sets, loss, method)
        told = [str(each.message).startswith("loss: ") for each in caught]
        assert told == [True] * (function is smooth and method in ("scrub", "bad_teacher"))
        ends.append([*values(twin), torch.get_rng_state()])
    assert same(*ends)


@pytest.mark.parametrize("method", ["random_label", "salun", "ltu"])
def test_one_task_serves_models_of_other_classes(method):
    task = Classification()
    for classes in (5, 2):  # labels drawn among five would be none of two
        options = {"feedback": "random_label"} if method == "ltu" else {}
        run(Noisy(classes), pictures(classes), task, method, **options)
    assert task.n_classes is None


def test_wrong_labels_need_the_number_of_classes():
    batch, generator = (torch.randn(6, 6), torch.arange(6) % 3), torch.Generator()
    task = Classification()
    with pytest.raises(InputError, match="n_classes must be given, or a model's outputs"):
        task.relabel(batch, generator)
    task.outputs(Noisy(), batch)
    assert (task.relabel(batch, generator)[1] != batch[1]).all()
    assert Classification(n_classes=3).relabel(batch, generator)[1].max() < 3


def test_a_batch_of_another_make_serves_where_the_task_says_how():
    class Tagged(Classification):
        def losses(self, model, batch):
            return super().losses(model, self.pair(batch))

        def outputs(self, model, batch):
            return super().outputs(model, self.pair(batch))

        def classes(self, batch):
            return batch["y"]

        @staticmethod
        def pair(batch):
            return batch["x"], batch["y"]

    sets = {k: {"x": x, "y": y} for k, (x, y) in pictures().items()}
    for method in ("finetune", "scrub", "orthograd"):
        run(Noisy(), sets, Tagged(), method)
    sets["val_loader"]["y"] = sets["val_loader"]["y"] + 1
    with pytest.raises(InputError, match=r"^validation: labels must be in \[0, 3\)"):
        run(Noisy(), sets, Tagged(), "finetune")
