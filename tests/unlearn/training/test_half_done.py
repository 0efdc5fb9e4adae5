"""A step that raises leaves nothing half changed, and no method leaves traces in the network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from gradsurgery.capture import hooked
from gradsurgery.errors import InputError
from gradsurgery.unlearn import (
    METHODS,
    Finetune,
    FinetuneConfig,
    LTUConfig,
    LTUTrainer,
    Retrain,
    RetrainConfig,
    SalUn,
    SalUnConfig,
    TrainingError,
    unlearning,
)
from gradsurgery.unlearn.objectives.classification import cross_entropy

ALL = {**METHODS, "retrain": Retrain}
OPTIONS = {"ssd": {"alpha": 1.0}, "scrub": {"msteps": 1}, "ltu": {"model_steps": 5}}
CLASSES = 3


def samples(n):
    return torch.randn(n, 6), torch.arange(n) % CLASSES


def sets():
    return {"forget": samples(12), "retain": samples(24), "validation": samples(10)}


def net(*between):
    """With a buffer that each forward pass in training changes."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), *between, nn.Tanh(), nn.Linear(8, CLASSES)
    )


def of_names(method):
    """The default batch norm of each method, and options with which it moves."""
    return {"steps": 6, "lr": 0.01, **OPTIONS.get(method, {})}


def made(method, model, data, **options):
    kind = ALL[method]
    steps = of_names(method)
    sizes = {f"{k}_batch": 5 for k in ("forget", "retain") if hasattr(kind.Config, f"{k}_batch")}
    config = kind.Config(**{"momentum": 0.9, **steps, **sizes})
    loss = options.pop("loss", cross_entropy)
    forget = None if method == "retrain" else data["forget"]
    return kind(
        model,
        loss,
        forget=forget,
        retain=data["retain"],
        config=config,
        validation=data["validation"],
        **options,
    )


def everything(trainer):
    """All that a later step depends on, but for what torch's own generators have drawn."""
    state = trainer.state_dict()
    del state["rng"], state["seconds"]
    return copy.deepcopy(state)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Broken(Exception):
    pass


class Fuse(nn.Module):
    """Passes its input on, and raises at a forward or a backward pass once it is lit."""

    def __init__(self, backward=False):
        super().__init__()
        self.left, self.backward = None, backward

    def blow(self, *_):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Broken

    def forward(self, x):
        if not self.backward:
            self.blow()
        elif x.requires_grad:
            x = x * 1.0
            x.register_hook(self.blow)
        return x


# how many forward passes a step of the method survives at most
PASSES = (0, 1, 3)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("method", ALL)
def test_an_exception_in_a_step_leaves_all_as_it_was_before_it(method, passes):
    data, fuse = sets(), Fuse()
    trainer = made(method, net(fuse), data)
    model = trainer.model
    steps = trainer.fit()
    if method != "ssd":  # one step is all of it
        next(steps)
        next(steps)
    model[0].eval()
    stale = torch.ones_like(model[0].weight)
    model[0].weight.grad = stale
    before, modes = everything(trainer), [module.training for module in model.modules()]
    fuse.left = passes
    try:
        next(steps)
    except Broken:
        pass
    else:
        return  # no step has so many
    assert same(everything(trainer), before)
    assert model[0].weight.grad is stale and torch.equal(stale, torch.ones_like(stale))
    assert all(p.grad is None for p in model.parameters() if p is not model[0].weight)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    fuse.left = None
    assert next(trainer.fit())["step"] == (1 if method == "ssd" else 3)  # and it goes on


def test_every_method_has_a_step_that_was_broken():
    """Else the test before this one would try nothing."""
    for method in ALL:
        trainer = made(method, net(fuse := Fuse()), sets())
        fuse.left = 0
        with pytest.raises(Broken):
            trainer.run()


@pytest.mark.parametrize("method", [m for m in ALL if m not in ("ssd",)])
def test_a_run_that_was_broken_ends_at_the_same_bits(method):
    """What the step before the exception drew is drawn again."""
    data, fuse = sets(), Fuse()
    start = net(fuse)
    whole = made(method, copy.deepcopy(start), data)
    whole.run()
    model = copy.deepcopy(start)
    trainer = made(method, model, data)
    steps = trainer.fit()
    next(steps)
    next(steps)
    model[2].left = 0
    with pytest.raises(Broken):
        next(steps)
    model[2].left = None
    trainer.run()
    assert same(model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("method", ALL)
def test_an_exception_in_a_backward_pass_too(method):
    trainer = made(method, net(fuse := Fuse(backward=True)), sets())
    before = everything(trainer)
    fuse.left = 0
    with pytest.raises(Exception):  # noqa: B017  # the engine may wrap it
        trainer.run()
    assert same(everything(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("method", ALL)
def test_hooks_of_an_optimizer_that_raise_undo_the_step(method):
    if method == "ssd":
        return  # it takes no step of an optimizer
    trainer = made(method, net(), sets())
    steps = trainer.fit()
    next(steps)
    next(steps)

    def broken(*_):
        raise Broken

    trainer.optimizer.register_step_post_hook(broken)
    before = everything(trainer)
    with pytest.raises(Broken):
        next(steps)
    assert same(everything(trainer), before)


def test_an_update_of_ones_own_that_raises_after_its_step_is_undone():
    class Own(Finetune):
        def update(self):
            record = super().update()
            if self.step == 1:
                raise Broken
            return record

    data, model = sets(), net()
    trainer = Own(
        model, cross_entropy, forget=None, retain=data["retain"], config=FinetuneConfig(lr=0.1)
    )
    steps = trainer.fit()
    next(steps)
    before = everything(trainer)
    with pytest.raises(Broken):
        next(steps)
    assert same(everything(trainer), before)


@pytest.mark.parametrize("given", [False, True], ids=["none", "given"])
@pytest.mark.parametrize("method", ALL)
def test_grad_and_modes_are_afterwards_as_before(method, given):
    data, model = sets(), net(nn.Dropout(0.1))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    grads = [torch.full_like(p, 3.0) if given else None for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    forget = None if method == "retrain" else data["forget"]
    options = of_names(method)
    unlearning(
        model,
        retain_loader=data["retain"],
        forget_loader=forget,
        val_loader=data["validation"],
        method=method,
        **options,
    )
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert grad is None or bool((grad == 3).all())
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [True, False, *[True] * (len(flags) - 2)]
    assert [module.training for module in model] == [True, False, True, True, True]


@pytest.mark.parametrize("method", ALL)
def test_nothing_is_drawn_from_torch_where_no_layer_is_random(method):
    data, model = sets(), nn.Sequential(nn.Linear(6, CLASSES))
    before = torch.get_rng_state()
    forget = None if method == "retrain" else data["forget"]
    options = of_names(method)
    unlearning(
        model,
        retain_loader=data["retain"],
        forget_loader=forget,
        val_loader=data["validation"],
        method=method,
        **options,
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_an_optimizer_that_zeroes_in_place_leaves_grad():
    class Zeroing(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    data, model = sets(), net()
    model[0].weight.grad = grad = torch.ones_like(model[0].weight)
    config = FinetuneConfig(steps=2)
    Finetune(
        model, cross_entropy, forget=None, retain=data["retain"], config=config, optimizer=Zeroing
    ).run()
    assert model[0].weight.grad is grad and bool((grad == 1).all())


def test_membership_models_of_a_step_that_raises_are_those_before_it():
    """They are made anew at the step's beginning, by a forward pass over either set."""
    data, fuse = sets(), Fuse()
    config = LTUConfig(steps=3, refresh=1, model_steps=5)
    trainer = LTUTrainer(
        net(fuse),
        cross_entropy,
        forget=data["forget"],
        retain=data["retain"],
        config=config,
        validation=data["validation"],
    )
    steps = trainer.fit()
    next(steps)
    before, auditors = everything(trainer), trainer.auditors
    fuse.left = 2
    with pytest.raises(Broken):
        next(steps)
    assert trainer.auditors is auditors and same(everything(trainer), before)


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("method", ALL)
def test_the_function_gives_the_network_back_as_it_was_after_an_exception(method, at):
    data, calls = sets(), []

    def told(trainer, record):
        calls.append(record)
        if len(calls) > at or method == "ssd":
            raise KeyboardInterrupt

    model = net().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    forget = None if method == "retrain" else data["forget"]
    with pytest.raises(KeyboardInterrupt):
        unlearning(
            model,
            retain_loader=data["retain"],
            forget_loader=forget,
            val_loader=data["validation"],
            method=method,
            callbacks=[told],
            **of_names(method),
        )
    assert same(model.state_dict(), before)
    assert not any(module.training for module in model.modules())
    assert bool((model[0].weight.grad == 1).all()) and model[0].bias.grad is None


def test_a_run_that_diverges_gives_the_network_back():
    data, model, calls = sets(), net(), []

    def steep(model, batch):
        calls.append(1)
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses / 0 if len(calls) > 3 else losses

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="at step 4"):
        unlearning(
            model,
            retain_loader=data["retain"],
            forget_loader=data["forget"],
            method="neggrad",
            loss=steep,
            steps=9,
        )
    assert same(model.state_dict(), before)


def test_salun_that_cannot_rank_leaves_grad():
    data, model = sets(), net(fuse := Fuse())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    fuse.left = 0
    with pytest.raises(Broken):
        SalUn(
            model, cross_entropy, forget=data["forget"], retain=data["retain"], config=SalUnConfig()
        )
    assert bool((model[0].weight.grad == 1).all())


def test_retrain_draws_nothing_where_its_optimizer_cannot_be_made():
    data, model = sets(), net()
    before = copy.deepcopy(model.state_dict())

    def impossible(parameters):
        return torch.optim.SGD(parameters, lr=-1.0)

    with pytest.raises(ValueError, match="Invalid learning rate"):
        Retrain(
            model,
            cross_entropy,
            forget=None,
            retain=data["retain"],
            config=RetrainConfig(),
            optimizer=impossible,
        )
    assert same(model.state_dict(), before)


def test_a_schedule_that_raises_leaves_a_whole_step():
    class Ends(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch=None):
            if self.last_epoch >= 0 and self._step_count > 1:
                raise Broken
            super().step()

    data = sets()
    trainer = Finetune(
        net(),
        cross_entropy,
        forget=None,
        retain=data["retain"],
        config=FinetuneConfig(lr=0.1),
        schedule=lambda optimizer: Ends(optimizer, lambda _: 1.0),
    )
    steps = trainer.fit()
    next(steps)
    with pytest.raises(Broken):
        next(steps)
    assert trainer.step == 2


# -- batch norm and a batch of one sample


def loader(part, size, **options):
    return DataLoader(TensorDataset(*part), batch_size=size, **options)


TRAINS_STATISTICS = [
    name for name, kind in ALL.items() if kind.draws and kind.Config().batch_norm == "train"
]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("method", TRAINS_STATISTICS)
def test_a_last_batch_of_one_is_named_before_the_first_step(method, where, shuffle):
    if where not in ALL[method].draws:
        return
    data = {"forget": samples(12), "retain": samples(24), "validation": samples(10)}
    data[where] = samples(17)
    loaders = {k: loader(v, 8, shuffle=shuffle) for k, v in data.items()}
    calls = []
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=rf"^{where}: a batch of one sample.*drop_last=.*'eval'"):
        unlearning(
            model,
            retain_loader=loaders["retain"],
            forget_loader=None if method == "retrain" else loaders["forget"],
            method=method,
            callbacks=[lambda *_: calls.append(1)],
            epochs=2,
        )
    assert not calls and same(model.state_dict(), before)


@pytest.mark.parametrize("method", TRAINS_STATISTICS)
def test_so_is_one_in_memory(method):
    data = {"forget": samples(12), "retain": samples(1)}
    with pytest.raises(InputError, match=r"^retain: a batch of one sample"):
        made(method, net(), {**data, "validation": None})


@pytest.mark.parametrize("method", TRAINS_STATISTICS)
def test_one_that_cannot_be_foreseen_is_named_at_its_step(method):
    retain = TensorDataset(*samples(17))

    class Sevens(BatchSampler):
        """A batch sampler of one's own."""

    sampler = Sevens(SequentialSampler(retain), batch_size=8, drop_last=False)
    data = {"forget": samples(12), "retain": DataLoader(retain, batch_sampler=sampler)}
    trainer = made(method, net(), {**data, "validation": None})
    steps, before = trainer.fit(), everything(trainer)
    with pytest.raises(InputError, match=r"^retain: a batch of one sample"):
        for _ in steps:
            before = everything(trainer)
    left = everything(trainer)
    for part in (before, left):  # a batch that a loader has given is gone
        del part["batches"]
    assert same(left, before)


@pytest.mark.parametrize(
    "loaded,options",
    [
        ({"drop_last": True}, {}),
        ({}, {"batch_norm": "eval"}),
    ],
)
def test_the_ways_out_are_ways_out(loaded, options):
    retain, forget = loader(samples(17), 8, **loaded), loader(samples(8), 4)
    unlearning(
        net(), retain_loader=retain, forget_loader=forget, method="finetune", epochs=2, **options
    )


def test_batch_norm_over_places_takes_one_sample():
    """It normalizes over height and width as well."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    images, labels = torch.randn(17, 1, 6, 6), torch.arange(17) % 3
    unlearning(
        model,
        retain_loader=loader((images, labels), 8),
        forget_loader=None,
        method="finetune",
        epochs=1,
    )


def test_a_look_ahead_draws_nothing():
    """Dropout of the trial, and the order of a loader that shuffles, are not of the run."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    retain = loader(samples(17), 8, shuffle=True)
    before = torch.get_rng_state()
    with pytest.raises(InputError, match="batch of one"):
        unlearning(model, retain_loader=retain, forget_loader=None, method="finetune", epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_ltu_passes_over_a_retain_batch_of_one():
    retain = loader(samples(17), 8)
    config = LTUConfig(steps=4, batch_norm="train", split="augmentation", feedback="random_label")
    LTUTrainer(
        net(),
        cross_entropy,
        forget=samples(12),
        retain=retain,
        config=config,
        augment=lambda batch, _: batch,
    ).run()


# -- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["forget", "retain", "validation"])
@pytest.mark.parametrize("method", ALL)
def test_inputs_that_are_not_finite_name_their_set(method, where, value):
    kinds = {*ALL[method].draws, *ALL[method].needs}
    kinds |= {"validation"} if method == "ltu" else set()
    if where not in kinds:
        return  # never looked at
    if where == "validation" and value == float("inf"):
        return  # outputs of it are finite here
    data, model = sets(), net()
    data[where][0][:, 2] = value
    before = copy.deepcopy(model.state_dict())
    forget = None if method == "retrain" else data["forget"]
    with pytest.raises((TrainingError, InputError), match=where) as caught:
        unlearning(
            model,
            retain_loader=data["retain"],
            forget_loader=forget,
            val_loader=data["validation"],
            method=method,
            **of_names(method),
        )
    assert "tensor(" not in str(caught.value)
    assert same(model.state_dict(), before)


def test_an_infinite_loss_of_finite_inputs_names_its_set():
    def steep(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / 0

    data = sets()
    with pytest.raises(
        TrainingError, match=r"^retain: a loss of the batch is not finite at step 1"
    ):
        unlearning(
            net(), retain_loader=data["retain"], forget_loader=None, method="finetune", loss=steep
        )


def test_a_first_measurement_that_is_not_finite_ends_the_run():
    measure = {"probe": lambda model: {"retain_loss": float("nan")}}
    trainer = made("finetune", net(), sets(), **measure)
    with pytest.raises(TrainingError, match=r"retain_loss became nan at step 0 .* before anything"):
        trainer.run()


def test_a_step_makes_no_later_one_look_for_hooks_in_the_whole_process(monkeypatch):
    """That takes longer than a step of a small model."""
    looks, found = [], hooked._found
    monkeypatch.setattr(hooked, "_found", lambda: looks.append(None) or found())
    steps = made("orthograd", net(), sets()).fit()
    next(steps)
    looks.clear()
    for _ in steps:
        pass
    assert not looks
