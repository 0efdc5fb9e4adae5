"""What users have in hand: it works where it can mean one thing, else one error names it."""

import collections
import copy
import dataclasses
import inspect
import re

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from gradsurgery.errors import InputError, PositionError
from gradsurgery.unlearn import (
    METHODS,
    Finetune,
    FinetuneConfig,
    LTUConfig,
    LTUTrainer,
    Retrain,
    unlearning,
)
from gradsurgery.unlearn.objectives.base import batch_size, take, to_device
from gradsurgery.unlearn.objectives.classification import cross_entropy, inputs, labels, relabeled
from gradsurgery.unlearn.training.data import LoaderBatches, overlap

ALL = {**METHODS, "retrain": Retrain}
OPTIONS = {"ssd": {"alpha": 1.0}, "scrub": {"msteps": 1}, "ltu": {"model_steps": 5}}


def samples(n):
    return torch.randn(n, 6), torch.arange(n) % 3


def sets():
    return {"forget": samples(12), "retain": samples(24), "validation": samples(10)}


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def run(model, data, method="finetune", **options):
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


def plain(message):
    return "tensor(" not in message and "\n" not in message and "0x" not in message


# -- batches of other types


class Mapped(collections.UserDict):
    """As `transformers.BatchEncoding` is."""


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor | None = None


Named = collections.namedtuple("Named", "image label")
TYPES = {
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"image": x, "label": y},
    "mapping": lambda x, y: Mapped(image=x, label=y),
    "dataclass": Sample,
    "frozen dataclass": Frozen,
    "named tuple": Named,
}


@pytest.mark.parametrize("kind", ["mapping", "dataclass", "named tuple"])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("loaders", [False, True], ids=["memory", "loader"])
def test_every_type_of_batch_ends_at_the_same_bits(method, kind, loaders):
    data, start = sets(), net()

    def given(make):
        if not loaders:
            return {k: make(*part) for k, part in data.items()}

        def collate(part):
            return lambda at: make(part[0][at], part[1][at])

        return {
            k: DataLoader(range(len(part[1])), batch_size=5, collate_fn=collate(part))
            for k, part in data.items()
        }

    ends = [
        run(copy.deepcopy(start), given(make), method).state_dict()
        for make in (lambda x, y: (x, y), TYPES[kind])
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_done_with_a_batch_keeps_its_type(kind):
    images, known = samples(6)
    batch = TYPES[kind](images, known)
    assert batch_size(batch) == 6
    for changed in (take(batch, slice(1, 3)), to_device(batch, torch.device("cpu"))):
        assert type(changed) is type(batch)
    part = take(batch, torch.tensor([4, 2]))
    assert torch.equal(inputs(part), images[[4, 2]]) and torch.equal(labels(part), known[[4, 2]])
    other = relabeled(batch, known + 1)
    assert type(other) is type(batch) and inputs(other) is images
    assert torch.equal(labels(other), known + 1) and torch.equal(labels(batch), known)
    assert overlap(batch, TYPES["dict"](images, known)) == 6


@pytest.mark.parametrize("kind", ["mapping", "dataclass"])
def test_parts_of_a_batch_keep_their_type(kind):
    make, seen = TYPES[kind], []

    def loss(model, batch):
        seen.append(type(batch))
        return cross_entropy(model, batch)

    data = {k: make(*part) for k, part in sets().items()}
    run(net(), data, loss=loss, micro_batch=5, steps=1)
    assert len(seen) == 5 and set(seen) == {type(data["retain"])}


def test_a_loader_may_say_more_of_its_samples_than_tensors():
    part = samples(8)
    paths = [f"{k}.png" for k in range(8)]
    seen = []

    def loss(model, batch):
        seen.append(batch["path"])
        return cross_entropy(model, batch)

    def collate(at):
        return {"image": part[0][at], "label": part[1][at], "path": [paths[k] for k in at]}

    loader = DataLoader(range(8), batch_size=4, collate_fn=collate)
    unlearning(
        net(), retain_loader=loader, forget_loader=None, method="finetune", epochs=1, loss=loss
    )
    assert seen == [paths[:4], paths[4:]]
    with pytest.raises(
        InputError, match=r"must hold tensors to be taken apart.* str at \['path'\]"
    ):
        unlearning(
            net(),
            retain_loader=loader,
            forget_loader=None,
            method="finetune",
            epochs=1,
            loss=loss,
            micro_batch=2,
        )


WRONG_DATA = {
    "numpy": (lambda x, y: (x.numpy(), y.numpy()), "numpy"),
    "numpy labels": (lambda x, y: (x, y.numpy()), "numpy"),
    "numpy inputs": (lambda x, y: (x.numpy(), y), "numpy"),
    "strings": (lambda x, y: (["a"] * len(y), y), "got str at"),
    "paths": (lambda x, y: {"image": x, "label": y, "path": ["a"] * len(y)}, "got str at"),
    "objects": (lambda x, y: ([object()] * len(y), y), "got object at"),
    "lengths": (lambda x, y: (x[:5], y), r"share one leading dimension, got \[5, "),
    "scalar": (lambda x, y: {"image": x, "label": y, "t": torch.tensor(1.0)}, "leading dimension"),
    "three": (lambda x, y: (x, y, y), "got 3 items; a collate_fn"),
    "inputs alone": (lambda x, y: x, "got Tensor; a collate_fn"),
    "empty": (lambda x, y: (x[:0], y[:0]), "no samples to draw batches from"),
    "generator": (lambda x, y: (part for part in zip(x, y, strict=True)), "got generator"),
    "batches": (lambda x, y: [(x[:4], y[:4]), (x[4:8], y[4:8])], "labels must be .* got tuple"),
    "pairs": (lambda x, y: list(zip(x, y, strict=True)), "leading dimension"),
    "string": (lambda x, y: "data", "got str: a Dataset goes into a DataLoader"),
    "number": (lambda x, y: 3, "got int"),
    "dataset": (TensorDataset, "got TensorDataset: a Dataset goes into a DataLoader"),
    "meta": (lambda x, y: (x.to("meta"), y), "got a meta one"),
    "sparse": (lambda x, y: (x.to_sparse(), y), "got a sparse one"),
    "nothing": (lambda x, y: {}, "holds no tensor, got dict"),
}


@pytest.mark.parametrize("where", ["forget", "retain", "validation"])
@pytest.mark.parametrize("kind", WRONG_DATA)
def test_what_is_no_data_is_refused_by_set(kind, where):
    make, message = WRONG_DATA[kind]
    for method in ALL:
        if method == "retrain" and where == "forget":
            continue
        data, model = sets(), net()
        before = copy.deepcopy(model.state_dict())
        data[where] = make(*data[where])
        with pytest.raises(InputError, match=rf"^{where}.*{message}") as caught:
            run(model, data, method)
        assert plain(str(caught.value))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Stream(IterableDataset):
    def __init__(self, parts, length=None):
        self.parts, self.length = parts, length

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


class Empty(Sampler):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter([])

    def __len__(self):
        return self.length


class Unmeasured(Sampler):
    def __iter__(self):
        return iter([[0, 1]])


def collated(make):
    return DataLoader(range(8), batch_size=4, collate_fn=lambda at: make(*samples(len(at))))


EIGHT = TensorDataset(*samples(8))
WRONG_LOADERS = {
    "stream": (lambda: DataLoader(Stream([])), "dataset must have a length"),
    "empty stream": (lambda: DataLoader(Stream([], 8)), "the loader made no batch"),
    "empty sampler": (lambda: DataLoader(EIGHT, sampler=Empty(3)), "the loader made no batch"),
    "no indices": (lambda: DataLoader(EIGHT, sampler=Empty(0)), "sampler is empty"),
    "no dataset": (lambda: DataLoader([]), "no samples to draw"),
    "dropped": (lambda: DataLoader(EIGHT, batch_size=9, drop_last=True), "use drop_last=False"),
    "no length": (lambda: DataLoader(EIGHT, batch_sampler=Unmeasured()), "must have a length"),
    "strings": (lambda: DataLoader(["a", "b"]), "holds no tensor, got list"),
    "None": (lambda: collated(lambda x, y: None), "made no batch"),
    "lengths": (lambda: collated(lambda x, y: (x[:3], y)), "one leading dimension"),
    "empty batch": (lambda: collated(lambda x, y: (x[:0], y[:0])), "batch without samples"),
    "numpy": (lambda: collated(lambda x, y: (x.numpy(), y)), "holds a numpy array"),
    "meta": (lambda: collated(lambda x, y: (x.to("meta"), y)), "got a meta one"),
    "three": (lambda: collated(lambda x, y: (x, y, y)), "got 3 items"),
}


@pytest.mark.parametrize("method", ["finetune", "graddiff", "orthograd", "scrub", "ltu"])
@pytest.mark.parametrize("kind", WRONG_LOADERS)
def test_what_is_no_loader_is_refused_by_set(kind, method):
    make, message = WRONG_LOADERS[kind]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=rf"^retain.*{message}") as caught:
        run(model, {**sets(), "retain": make()}, method, steps=5)
    assert plain(str(caught.value))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["ssd", "salun", "ltu"])
def test_a_loader_without_batches_is_named_by_a_pass_over_it_too(method):
    loader = DataLoader(Stream([], 8))
    with pytest.raises(InputError, match="forget: the loader made no batch"):
        run(net(), {**sets(), "forget": loader}, method)


def test_a_stream_that_has_a_length_serves():
    loader = DataLoader(Stream(list(zip(*samples(8), strict=True)), 8), batch_size=4)
    run(net(), {**sets(), "retain": loader}, steps=5)


def test_samplers_of_given_indices_inside_a_batch_sampler_do_not_overlap():
    """Such a loader's `sampler` is one over all of the dataset, and is not asked."""
    data = TensorDataset(*samples(30))
    loaders = [
        DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(part), 5, False))
        for part in (range(10), range(10, 30), range(5, 15))
    ]
    assert overlap(*loaders[:2]) == 0 and overlap(*loaders[1:]) == 5
    assert overlap(loaders[0], DataLoader(Subset(data, range(3)))) == 3


def test_complex_samples_overlap_where_both_parts_are_equal():
    data = torch.tensor([1 + 1j, 1 + 2j])
    assert overlap(data, data) == 2 and overlap(data, data.conj()) == 0


def test_a_loader_says_its_set_when_it_runs_dry():
    part = Stream(list(zip(*samples(8), strict=True)), 8)
    batches = LoaderBatches(DataLoader(part, batch_size=4), "forget")
    next(batches)
    part.parts = []
    next(batches)
    with pytest.raises(InputError, match="forget: the loader made no batch"):
        next(batches)


# -- networks


class Wrapped(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = net(), change

    def forward(self, x):
        return self.change(self.inner(x))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    loss: None = None


@pytest.mark.parametrize("method", ALL)
def test_logits_under_their_name_serve(method):
    torch.manual_seed(1)
    ends = []
    for change in (lambda y: y, lambda y: {"logits": y, "hidden": 0}, Output):
        torch.manual_seed(1)
        model = Wrapped(change)
        run(model, sets(), method)
        ends.append(model.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(ends[0][key], end[key]) for key in end)


WRONG_OUTPUTS = {
    "tuple": lambda y: (y, y),
    "dict": lambda y: {"out": y},
    "none": lambda y: None,
    "vector": lambda y: y[:, 0],
    "places": lambda y: y[:, :, None],
    "twice": lambda y: torch.cat([y, y]),
    "integers": lambda y: y.long(),
}


@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
@pytest.mark.parametrize("method", ["finetune", "orthograd", "bad_teacher", "scrub", "ltu", "ssd"])
def test_outputs_that_are_no_logits_are_named(method, kind):
    with pytest.raises(InputError, match="model must return logits, real numbers") as caught:
        run(Wrapped(WRONG_OUTPUTS[kind]), sets(), method)
    assert plain(str(caught.value))


def half_meta():
    model = net()
    model[0].to("meta")
    return model


WRONG_MODELS = {
    "none": (lambda: None, "must be a Module, got NoneType"),
    "class": (lambda: nn.Linear, "got the class Linear"),
    "function": (lambda: F.relu, "got function"),
    "list": (lambda: [net()], "got list"),
    "no parameters": (nn.Tanh, "no parameter requires a gradient"),
    "frozen": (lambda: net().requires_grad_(False), "no parameter requires a gradient"),
    "meta": (lambda: net().to("meta"), "0.weight is on the meta device"),
    "half meta": (half_meta, "0.weight is on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape yet"),
    "parallel": (lambda: nn.DataParallel(net()), "DataParallel"),
    "parallel inside": (lambda: nn.Sequential(nn.DataParallel(net())), "DataParallel"),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
@pytest.mark.parametrize("method", ALL)
def test_what_is_no_network_is_named(method, kind):
    make, message = WRONG_MODELS[kind]
    with pytest.raises(InputError, match=rf"^model.*{message}"):
        run(make(), sets(), method)


# -- the other arguments


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("method", None, "must be one of .* got NoneType"),
        ("method", ["ltu"], "must be one of .* got list"),
        ("method", Finetune, "must be one of .* got the class Finetune"),
        ("method", "SCRUB", "must be one of .* got 'SCRUB'"),
        ("epochs", "x", "must be an integer, got str"),
        ("epochs", 1.5, "must be an integer, got float"),
        ("epochs", True, "must be an integer, got bool"),
        ("epochs", torch.ones(2), "must be an integer, got Tensor"),
        ("epochs", -1, "must be at least 0, got -1"),
        ("seed", None, "must be an integer, got NoneType"),
        ("seed", 1.5, "must be an integer, got float"),
        ("seed", 2**70, r"must be less than 2\*\*63"),
        ("loss", None, "must be a function .* got NoneType"),
        ("loss", "cross_entropy", "must be a function .* got str"),
        ("loss", F.cross_entropy, "must be a function .* got cross_entropy"),
        ("loss", nn.CrossEntropyLoss, "must be a function .* got the class CrossEntropyLoss"),
        ("loss", nn.CrossEntropyLoss(), "must be a function .* got CrossEntropyLoss"),
        ("loss", lambda model, batch: None, "must return a Tensor, got NoneType"),
        ("loss", lambda model, batch: 1.0, "must return a Tensor, got float"),
        ("loss", lambda model, batch: model(batch[0])[:, :1], "must return one value per sample"),
        ("loss", lambda model, batch: batch[1], "must be floating point, got torch.int64"),
        ("loss", lambda model, batch: batch[0].sum(1), "does not depend on the model's param"),
        ("probe", 3, "must be a function or None, got int"),
        ("probe", lambda model: None, "must return a dict of numbers, got NoneType"),
        ("probe", lambda model: torch.ones(2), "must return a dict of numbers, got Tensor"),
        ("callbacks", print, "must be a sequence of functions"),
        ("callbacks", None, "must be a sequence of functions, got NoneType"),
        ("callbacks", [1], "must be a sequence of functions"),
        ("overlap", "alow", "must be one of error, allow, got 'alow'"),
        ("overlap", True, "must be one of error, allow, got bool"),
        ("steps", 1.5, "must be of type int, got 1.5"),
        ("steps", torch.ones(3), "must be a plain value, got Tensor"),
        ("lr", torch.ones(2), "must be a plain value, got Tensor"),
        ("lr", None, "must be of type float, got None"),
        ("optimizer", torch.optim.SGD, "must be a plain value, got the class SGD"),
        ("micro_batch", "x", "must be of type int, got 'x'"),
    ],
)
@pytest.mark.parametrize("method", ["graddiff", "ltu", "ssd"])
def test_an_argument_that_makes_no_sense_is_named(method, name, value, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    options = {"method": method, "steps": 2, name: value}
    if name == "epochs":
        del options["steps"]
    data = sets()
    with pytest.raises(InputError, match=rf"^{name}.*{message}") as caught:
        unlearning(
            model,
            retain_loader=data["retain"],
            forget_loader=data["forget"],
            val_loader=data["validation"],
            **options,
        )
    assert plain(str(caught.value))
    assert all(torch.equal(before[key], end) for key, end in model.state_dict().items())


def test_an_epoch_needs_the_set_it_passes_over():
    with pytest.raises(InputError, match="retain: graddiff needs this data, got None"):
        unlearning(net(), retain_loader=None, forget_loader=samples(4), method="graddiff", epochs=1)


def test_integers_of_numpy_are_integers():
    end = []
    for number in (int, numpy.int64):
        torch.manual_seed(0)
        end.append(run(net(), sets(), seed=number(3)).state_dict())
        data = sets()
        unlearning(
            net(),
            retain_loader=data["retain"],
            forget_loader=None,
            method="finetune",
            epochs=number(1),
        )
    assert all(torch.equal(end[0][key], end[1][key]) for key in end[0])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"config": None}, "config must be a FinetuneConfig, got NoneType"),
        ({"config": {}}, "config must be a FinetuneConfig, got dict"),
        ({"config": LTUConfig()}, "config must be a FinetuneConfig, got LTUConfig"),
        ({"config": FinetuneConfig}, "config must be a FinetuneConfig, got the class Finetune"),
        ({"config": FinetuneConfig(steps=None)}, "Finetune.steps must be of type int, got None"),
        ({"config": FinetuneConfig(lr=torch.ones(2))}, "Finetune.lr must be a plain value, got T"),
        ({"probe_every": "x"}, "probe_every must be an integer, got str"),
        ({"probe_every": 0}, "probe_every must be at least 1, got 0"),
        ({"optimizer": "sgd"}, "optimizer must be a function or None, got str"),
        (
            {"optimizer": lambda p: torch.optim.SGD},
            "must make a torch optimizer, got the class SGD",
        ),
        ({"optimizer": lambda p: None}, "optimizer must make a torch optimizer, got NoneType"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: LBFGS.step needs closure"),
        ({"optimizer": torch.optim.SparseAdam}, "optimizer: SparseAdam steps on sparse gradients"),
        ({"schedule": 3}, "schedule must be a function or None, got int"),
        ({"schedule": lambda o: None}, "schedule must make a torch scheduler, got NoneType"),
    ],
)
def test_so_is_one_of_a_trainer(options, message):
    given = {"config": FinetuneConfig(steps=2), **options}
    with pytest.raises(InputError, match=message):
        Finetune(net(), cross_entropy, forget=None, retain=samples(8), **given)


def test_an_optimizer_that_is_made_already_is_no_function():
    model = net()
    made = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="optimizer must be a function or None, got SGD"):
        Finetune(
            model,
            cross_entropy,
            forget=None,
            retain=samples(8),
            config=FinetuneConfig(),
            optimizer=made,
        )


def test_an_augmentation_must_be_a_function():
    with pytest.raises(InputError, match="augment must be a function or None, got int"):
        LTUTrainer(
            net(),
            cross_entropy,
            forget=samples(4),
            retain=samples(8),
            config=LTUConfig(),
            augment=3,
        )


def test_a_probe_must_give_what_stopping_looks_at():
    for stop, missing in (("target", "forget_accuracy"), ("validation", "validation_accuracy")):
        found = {} if stop == "target" else {"forget_accuracy": 1.0}
        with pytest.raises(InputError, match=f"stop = {stop} needs a probe that gives {missing}"):
            run(net(), sets(), stop=stop, probe=lambda model, found=found: found)


# -- networks that do more than their part


class Centered(nn.Module):
    """Normalizes its inputs, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = net(), in_place

    def forward(self, x):
        return self.inner(x.sub_(1.0) if self.in_place else x - 1.0)


@pytest.mark.parametrize("method", ALL)
def test_a_network_that_changes_its_inputs_changes_no_sample(method):
    """Nor what the next model to look at them sees."""
    data = sets()
    before, ends = copy.deepcopy(data), []
    for in_place in (False, True):
        torch.manual_seed(1)
        model = Centered(in_place)
        run(model, data, method)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    for kind, (x, y) in data.items():
        assert torch.equal(x, before[kind][0]) and torch.equal(y, before[kind][1])


@pytest.mark.parametrize("method", ALL)
def test_samples_that_require_gradients_get_none(method):
    data = sets()
    for x, _ in data.values():
        x.requires_grad_()
    run(net(), data, method, **({} if method == "ssd" else {"micro_batch": 3}))
    assert all(x.grad is None for x, _ in data.values())


@pytest.mark.parametrize("method", ["scrub", "bad_teacher", "boundary_shrink"])
def test_a_network_that_cannot_be_copied_is_named(method):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            self.kept = self.inner(x)
            return self.kept

    model, data = Keeps(), sets()
    model(data["retain"][0])
    with pytest.raises(InputError, match=r"^model cannot be copied, which \w+ needs: Only Tensors"):
        run(model, data, method)
    model.kept = None
    run(model, data, method)


@pytest.mark.parametrize("method", ["finetune", "orthograd", "ssd"])
def test_an_optimizer_of_another_model_is_refused(method):
    data, model, other = sets(), net(), net()
    kind, before = METHODS[method], copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="optimizer holds none of the model's parameters"):
        kind(
            model,
            cross_entropy,
            forget=data["forget"],
            retain=data["retain"],
            config=kind.Config(),
            validation=data["validation"],
            optimizer=lambda _: torch.optim.SGD(other.parameters(), lr=0.1),
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- by name


def test_sets_by_position_are_refused_with_their_names():
    """The two calls once had opposite orders, and a swap unlearns what should stay."""
    model, data = net(), sets()
    before = copy.deepcopy(model.state_dict())
    message = (
        "unlearning takes net by position and all else by name, retain_loader=, forget_loader=, "
        "val_loader=: a set to forget in the place of one to retain would unlearn what should stay"
    )
    for given in ((data["retain"],), (data["retain"], data["forget"], data["validation"])):
        with pytest.raises(PositionError, match=f"^{re.escape(message)}$"):
            unlearning(model, *given, method="graddiff", steps=1)
    config = FinetuneConfig(steps=1)
    for kind in (Finetune, LTUTrainer):
        with pytest.raises(
            PositionError, match=f"^{kind.__name__} takes model and loss by .*config"
        ):
            kind(model, cross_entropy, None, data["retain"], config)
    with pytest.raises(TypeError, match="forget"):  # both at once
        Finetune(model, cross_entropy, None, forget=None, retain=data["retain"], config=config)
    with pytest.raises(TypeError, match=r"missing .* 'retain'"):
        Finetune(model, cross_entropy, forget=None, config=config)
    assert issubclass(PositionError, InputError) and issubclass(PositionError, TypeError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_signatures_say_what_goes_by_name():
    for function, first in ((unlearning, ["net"]), (Finetune.__init__, ["self", "model", "loss"])):
        kinds = inspect.signature(function).parameters.values()
        assert [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD] == first
