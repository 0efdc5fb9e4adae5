"""A state is loaded whole or not at all, and what does not fit is named."""

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsurgery.errors import InputError
from gradsurgery.unlearn import METHODS, Finetune, FinetuneConfig, Retrain
from gradsurgery.unlearn.objectives.classification import cross_entropy

ALL = {**METHODS, "retrain": Retrain}
CLASSES = 3


def samples(n):
    return torch.randn(n, 6), torch.arange(n) % CLASSES


def net(hidden=8):
    return nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)
    )


def made(name, model=None, **options):
    kind = ALL[name]
    given = {
        k: options.pop(k) for k in ("optimizer", "schedule", "loss") if callable(options.get(k))
    }
    few = {"ltu": {"model_steps": 5}, "ssd": {"alpha": 0.1}}.get(name, {})
    sizes = {f"{k}_batch": 4 for k in ("forget", "retain") if hasattr(kind.Config, f"{k}_batch")}
    config = kind.Config(**{"steps": 6, "lr": 0.01, **few, **sizes, **options})
    forget = None if name == "retrain" else samples(12)
    data = {"forget": forget, "retain": samples(24), "config": config}
    loss = given.pop("loss", cross_entropy)
    return kind(model or net(), loss, **data, validation=samples(10), **given)


def stepped(trainer, count=2):
    for _, _ in zip(range(count), trainer.fit(), strict=False):
        pass
    return trainer


def everything(trainer):
    """All that a load changes, with what is drawn from."""
    order = {kind: dict(vars(each)) for kind, each in trainer.batches.items()}
    return {**trainer.state_dict(), "order": order}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def refused(trainer, state, message):
    """The load is an InputError that matches, and the trainer is what it was."""
    before, rng = everything(trainer), torch.get_rng_state()
    groups = list(trainer.optimizer.param_groups)
    with pytest.raises(InputError, match=message) as caught:
        trainer.load_state_dict(state)
    assert "tensor(" not in str(caught.value) and len(str(caught.value)) < 500
    after = everything(trainer)
    for name in before:
        assert same(after[name], before[name]), name
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(a is b for a, b in zip(trainer.optimizer.param_groups, groups, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_another_method_is_refused(name):
    trainer = stepped(made(name), 1)
    for other in ALL:
        if other != name:
            state = stepped(made(other)).state_dict()
            kinds = ALL[other].__name__, ALL[name].__name__
            if other == "random_label" and name == "salun":  # a base, which has no masks
                refused(trainer, state, "^state: its optimizer is Adam, this trainer's is SGD$")
                continue
            refused(
                trainer, state, f"^state: its method is {kinds[0]}, this trainer's is {kinds[1]}"
            )


@pytest.mark.parametrize("name", ALL)
def test_so_is_one_from_before_states_had_names(name):
    """Where the two differ in anything that is kept; else they cannot be told apart."""
    trainer = stepped(made(name), 1)
    for other in ALL:
        state = stepped(made(other)).state_dict()
        del state["names"]
        kinds = ALL[name], ALL[other]
        alike = kinds[0].draws == kinds[1].draws and kinds[0].keeps == kinds[1].keeps
        adam = [kind.Config().optimizer == "sgd" for kind in kinds]
        if not (alike and adam[0] == adam[1]) and "ssd" not in (name, other):
            refused(trainer, state, "^state: ")


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_its_own_is_loaded_whole(name):
    model = net()
    twin = copy.deepcopy(model)
    trainer = stepped(made(name, model))
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    again = made(name, twin)
    again.load_state_dict(torch.load(file, weights_only=True))
    left, wanted = again.state_dict(), trainer.state_dict()
    assert left.keys() == wanted.keys() and all(same(left[key], wanted[key]) for key in wanted)


def test_a_subclass_takes_the_state_of_its_base_and_not_the_other_way_round():
    class Own(Finetune):
        pass

    def make(kind):
        return kind(
            net(), cross_entropy, forget=None, retain=samples(24), config=FinetuneConfig(steps=4)
        )

    base, own = stepped(make(Finetune)), stepped(make(Own))
    refused(base, own.state_dict(), "its method is Own, this trainer's is Finetune")
    own.load_state_dict(base.state_dict())


def changed(state, path, value):
    """A copy of a state with one thing changed, or without it."""
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


GONE = object()
BAD = torch.zeros(3, dtype=torch.uint8)
DAMAGE = [
    *[((name,), GONE, f"it has no {name}") for name in ("model", "optimizer", "extra", "cuda_rng")],
    (("model",), {}, "model has no 0.weight"),
    (("model",), None, "model must be a mapping, got NoneType"),
    (("model", "0.weight"), GONE, "model has no 0.weight"),
    (("model", "more"), torch.zeros(1), "model has more, which this trainer's has not"),
    (("model", "0.weight"), 3, "model.0.weight must be a tensor, got int"),
    (("model", "3.bias"), torch.zeros(4), r"model.3.bias is float32 \[4\], .* is float32 \[3\]"),
    (("model", "3.bias"), torch.zeros(3).double(), r"model.3.bias is float64 \[3\], .* float32"),
    (("optimizer",), 3, "optimizer must be a mapping, got int"),
    (("optimizer", "state"), GONE, "optimizer has no state"),
    (("optimizer", "param_groups"), [], "optimizer has 0 groups of parameters, this .* has 1"),
    (("optimizer", "param_groups", 0, "params"), [0, 1], r"\[0\] has 2 parameters, this .* has 6"),
    (("optimizer", "param_groups", 0, "betas"), GONE, r"optimizer.param_groups\[0\] has no betas"),
    (("optimizer", "state", 0), None, "optimizer.state of 0.weight must be a mapping"),
    (("optimizer", "state", 9), {}, "an entry of parameter 9, which no group has"),
    (("optimizer", "state", 4, "exp_avg"), GONE, "optimizer.state of 3.weight has no exp_avg"),
    (
        ("optimizer", "state", 0, "exp_avg"),
        torch.zeros(2, 2),
        r"optimizer.state of 0.weight: exp_avg is \[2, 2\], and the parameter is \[8, 6\]",
    ),
    (("schedule",), {"last_epoch": 1}, "it has a schedule, and this trainer has none"),
    (("batches",), {}, "batches are of no set, and this trainer draws from forget, retain"),
    (("batches", "retain", "drawn"), -1, "batches.retain.drawn must be a whole number, at least 0"),
    (("batches", "retain"), [], "batches.retain must be a mapping"),
    (("samples", "forget"), GONE, "samples has no forget"),
    (("samples", "forget"), "many", "samples.forget must be a whole number"),
    (("rng",), BAD, "rng is no state of a generator"),
    (("rng",), None, "rng is no state of a generator"),
    (("generator",), BAD, "generator is no state of a generator"),
    (("cuda_rng",), BAD, "cuda_rng is of a model on a GPU, and this one is on cpu"),
    (("step",), 7, "step is 7, and this trainer takes 6"),
    (("step",), True, "step must be a whole number"),
    (("step",), 10**30, "step is 10+.*, and this trainer takes 6"),
    (("seconds",), float("nan"), "seconds must be a number"),
    (("stopped",), None, "stopped must be a bool"),
    (("extra",), None, "extra must be a mapping"),
    (("names", "method"), "x" * 10_000, "its method is xxx"),
    (("names",), 3, "names must be a mapping"),
]


@pytest.mark.parametrize("path,value,message", DAMAGE)
def test_damage_is_named_and_changes_nothing(path, value, message):
    trainer = stepped(made("graddiff"))
    state = changed(stepped(made("graddiff")).state_dict(), path, value)
    refused(trainer, state, f"^state: .*{message}")


@pytest.mark.parametrize("state", [None, 3, [], "state"])
def test_what_is_no_state_is_named(state):
    refused(made("finetune"), state, "^state: it must be a mapping")


@pytest.mark.parametrize(
    "name,path,value,message",
    [
        ("salun", ("masks",), GONE, "extra has no masks, which SalUn keeps"),
        ("salun", ("masks",), [], "extra.masks has 0 entries, this trainer's has 6"),
        ("salun", ("masks", 1), torch.ones(2).bool(), r"extra.masks\[1\] is bool \[2\]"),
        ("salun", ("masks",), None, "extra.masks must be a list"),
        ("scrub", ("teacher",), None, "extra.teacher must be a mapping"),
        ("scrub", ("teacher", "0.bias"), GONE, "extra.teacher has no 0.bias"),
        ("bad_teacher", ("competent", "0.bias"), torch.ones(1), "extra.competent.0.bias is"),
        ("ltu", ("auditors", "inner"), GONE, "extra.auditors has no inner"),
        ("ltu", ("auditors",), None, "extra.auditors must be a mapping, got NoneType"),
        ("gru", ("average",), 3, "extra: state of average must be a Tensor"),
        ("gru", ("average",), torch.zeros(5), r"extra.average is \[5\], of parameters with"),
        ("gru", ("mean",), torch.zeros(5), r"extra: GRU remembers .*, got \['mean'\]"),
    ],
)
def test_what_a_method_keeps_is_checked_too(name, path, value, message):
    trainer = stepped(made(name))
    state = changed(stepped(made(name)).state_dict(), ("extra", *path), value)
    refused(trainer, state, f"^state: {message}")


def test_membership_models_need_a_trainer_that_has_some():
    state = stepped(made("ltu")).state_dict()
    trainer = made("ltu", feedback="random_label")
    refused(trainer, state, "of it and this trainer only one has membership models")


def test_another_model_is_named():
    state = stepped(made("finetune")).state_dict()
    refused(made("finetune", net(9)), state, r"^state: model.0.weight is float32 \[8, 6\], .*\[9")


def test_other_groups_of_parameters_are_named():
    def two(parameters):
        return torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)

    state = stepped(made("finetune")).state_dict()
    trainer = made("finetune", optimizer=two)
    refused(trainer, state, "optimizer has 1 groups of parameters, this trainer's has 2")


@pytest.mark.parametrize("other", ["sgd", "adamw"])
def test_another_optimizer_is_named(other):
    state = stepped(made("finetune", optimizer=other)).state_dict()
    refused(made("finetune"), state, "its optimizer is (SGD|AdamW), this trainer's is Adam$")


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_schedule_is_of_the_same_kind():
    scheduled = stepped(made("finetune", schedule=halving))
    plain = stepped(made("finetune"))
    refused(plain, scheduled.state_dict(), "its schedule is StepLR, this trainer's is None")
    refused(scheduled, plain.state_dict(), "its schedule is None, this trainer's is StepLR")
    state = changed(scheduled.state_dict(), ("schedule", "last_epoch"), GONE)
    refused(scheduled, state, "schedule has no last_epoch")


def loading(**options):
    generator = torch.Generator().manual_seed(3)
    retain = DataLoader(TensorDataset(*samples(24)), 4, shuffle=True, generator=generator)
    config = FinetuneConfig(steps=9, lr=0.01)
    return Finetune(net(), cross_entropy, forget=None, retain=retain, config=config, **options)


@pytest.mark.parametrize(
    "path,value,message",
    [
        (("batches", "retain", "position"), 10**9, "batches.retain.position is 10+, of 3 drawn"),
        (("batches", "retain", "start"), [], "batches.retain.start must be two states, got 0"),
        (("batches", "retain", "start"), [BAD, None], "batches.retain.start is no state of a gen"),
        (("batches", "retain"), {"drawn": 3}, "batches.retain has no position"),
        (("loaders",), {}, "loaders has no retain"),
        (("loaders", "retain"), BAD, "loaders.retain is no state of a generator"),
    ],
)
def test_places_in_loaders_are_checked(path, value, message):
    state = stepped(loading(), 3).state_dict()
    refused(stepped(loading(), 2), changed(state, path, value), f"^state: {message}")


def test_a_refused_state_leaves_a_run_that_ends_at_the_same_bits():
    """Though a loader was in the middle of an epoch."""
    ends = []
    for tried in (False, True):
        torch.manual_seed(4)
        trainer = stepped(loading(), 2)
        if tried:
            refused(trainer, stepped(made("neggrad")).state_dict(), "^state: ")
            state = changed(trainer.state_dict(), ("model", "0.bias"), torch.zeros(1))
            refused(trainer, state, "^state: model.0.bias")
        trainer.run()
        ends.append(next(trainer.model.parameters()).detach())
    assert torch.equal(*ends)


class Stubborn(nn.Linear):
    """Code of a user's that raises in the middle of a load."""

    loads = False

    def _load_from_state_dict(self, *args, **options):
        super()._load_from_state_dict(*args, **options)
        if not self.loads:
            raise RuntimeError("I keep what I have")


def test_code_of_others_that_raises_is_undone():
    model = net()
    model[3] = Stubborn(8, CLASSES)
    trainer = stepped(made("gru", model, schedule=halving))
    other = stepped(made("gru", copy.deepcopy(model), schedule=halving), 4)
    refused(trainer, other.state_dict(), "^state: model: I keep what I have")
    assert trainer.schedule.last_epoch == 2
    model[3].loads = True
    trainer.load_state_dict(other.state_dict())
    assert trainer.schedule.last_epoch == trainer.step == 4


def test_a_dataset_that_raises_is_undone_and_tells_itself():
    class Torn(TensorDataset):
        torn = False

        def __getitem__(self, at):
            if self.torn:
                raise OSError("disk")
            return super().__getitem__(at)

    data = Torn(*samples(24))
    config = FinetuneConfig(steps=9)
    trainer = Finetune(net(), cross_entropy, forget=None, retain=DataLoader(data, 4), config=config)
    state = stepped(trainer, 2).state_dict()
    stepped(trainer, 2)
    before = everything(trainer)
    data.torn = True
    with pytest.raises(OSError, match="disk"):
        trainer.load_state_dict(state)
    after = everything(trainer)
    assert all(same(after[key], before[key]) for key in before)


def test_a_trainer_that_diverged_goes_back_to_a_state():
    """Its weights are not finite: they are what a state is for."""
    trainer = stepped(made("finetune"))
    state = trainer.state_dict()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    trainer.load_state_dict(state)
    assert same(dict(trainer.model.state_dict()), dict(state["model"]))


def test_messages_are_one_line():
    with pytest.raises(InputError) as caught:
        made("finetune").load_state_dict({"names": {"method": "a\nb"}})
    assert not re.search(r"\n", str(caught.value))


def test_an_own_loss_does_not_matter():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    made("finetune").load_state_dict(stepped(made("finetune", loss=loss)).state_dict())
