"""Means whose losses are taken in several passes, where hooks or Functions change gradients.

A step in parts is that of the whole batch, or is refused.
"""

import pickle

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.capture import collector

torch.manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64)


def doubled(grad):
    return 2 * grad


def largest(grad):
    """Of the whole batch, the three largest."""
    least = grad.abs().flatten().topk(3).values[-1]
    return grad * (grad.abs() >= least)


def unit(grad):
    return grad / (grad.norm(dim=-1, keepdim=True) + 1e-30)


def clipped(grad):
    return grad.clamp(-0.01, 0.01)


def softened(grad):
    return grad / (grad.abs() + 1e-3)


def centered(grad):
    return grad - grad.mean(0)


def limited(grad):
    """What no part of the batch reaches, but the whole does."""
    return grad * min(1.0, 0.5 / float(grad.norm() + 1e-30))


def resized(grad):
    return grad * len(grad)


OWN = {each.__name__: each for each in (doubled, unit, clipped, softened)}  # of each sample
MIXING = {each.__name__: each for each in (largest, centered, limited, resized)}
HOOKS = OWN | MIXING
LINEAR = {"activation": {"doubled"}, "parameter": {"doubled", "centered", "resized"}}
LINEAR["Function"] = LINEAR["activation"]


class Changed(torch.autograd.Function):
    """Passes its input on; what comes back goes through a function."""

    @staticmethod
    def forward(ctx, x, change, option=0):
        ctx.change, ctx.option = change, option
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return clipped(grad) if ctx.option else ctx.change(grad), None, None


class Net(nn.Module):
    def __init__(self, where, change):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.c = nn.Linear(3, 2)
        self.double()
        self.where, self.change, self.option = where, change, 0
        if where == "parameter":
            self.a.weight.register_hook(change)

    def forward(self, x):
        hidden = self.a(x)
        if self.where == "activation":
            hidden.register_hook(self.change)
        if self.where == "Function":
            hidden = Changed.apply(hidden, self.change, self.option)
        return self.b(hidden.tanh()) + self.c(x)


class Heads(Net):
    """Each task has parameters of its own."""

    def forward(self, x):
        return torch.stack([super().forward(x).sum(1), self.c(x).square().sum(1)], 1)


def samples(net, x):
    return net(x).square().sum(1)


def weighted(net, x):
    return gs.WeightedLosses(samples(net, x), 1 + x[:, 0].abs())


def tasks(net, x):
    return net(x).square()


KINDS = {  # the rule, the loss, the model, and the surgeon's options
    "one mean": (gs.OrthoGrad, samples, Net, {}),
    "two means": (gs.GRU, samples, Net, {"together": False}),
    "weighted means": (gs.GRU, weighted, Net, {"together": False}),
    "tasks": (gs.UPGrad, tasks, Net, {}),
    "tasks apart": (gs.UPGrad, tasks, Heads, {}),
}
WAYS = ("micro-batches of 2", "micro-batches of 1", "added", "a list")


def stepped(kind, where, change, way=None):
    rule, loss, network, options = KINDS[kind]
    model = network(where, change)
    most = {"micro-batches of 2": 2, "micro-batches of 1": 1}.get(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, rule(), micro_batch=most, **options)
    if rule is gs.UPGrad:
        whole, parts = {"batch": X}, [{"batch": X[:4]}, {"batch": X[4:]}]
    else:
        whole = {"forget": X[:4], "retain": X[4:]}
        parts = [{"forget": X[:3]}, {"forget": X[3:4]}, {"retain": X[4:]}]
    if way == "added":
        for part in parts:
            surgeon.add(loss=loss, **part)
        surgeon.backward()
        optimizer.step()
    elif way == "a list":
        lists = {name: [(p[name],) for p in parts if name in p] for name in whole}
        surgeon.step(loss=lambda net, batch: loss(net, batch[0]), **lists)
    else:
        surgeon.step(loss=loss, **whole)
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*the rows are got")
@pytest.mark.parametrize("where", ["activation", "parameter", "Function"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_step_in_parts_is_that_of_the_whole_or_refused(hook, kind, where):
    try:
        whole = stepped(kind, where, HOOKS[hook])
    except gs.CoupledSamplesError:
        assert hook in MIXING
        return
    # what changes each sample's gradient by itself sees it as in the whole batch, if the number of
    # samples says how large it is there
    apart = where != "parameter" and hook in OWN
    for way in WAYS:
        known = way.startswith("micro") and kind != "weighted means"
        if hook in LINEAR[where] or (apart and known):
            torch.testing.assert_close(stepped(kind, where, HOOKS[hook], way), whole)
            continue
        with pytest.raises(gs.InputError, match=r"a\.weight.*not linear.*take whole batches"):
            stepped(kind, where, HOOKS[hook], way)


def test_functions_are_asked_once_whether_gradients_grow_as_losses_do(monkeypatch):
    asked = []
    ask = collector.out_of_proportion
    monkeypatch.setattr(
        collector, "out_of_proportion", lambda *args: asked.append(args) or ask(*args)
    )
    model = Net("Function", doubled)
    surgeon = surgeon_of(model)
    added_step(model, surgeon)
    added_step(model, surgeon)
    assert len(asked) == 1
    pickle.loads(pickle.dumps(surgeon))


def added_step(model, surgeon, cut=3):
    surgeon.add(loss=samples, forget=X[:cut].to(model.a.weight.dtype))
    surgeon.add(loss=samples, forget=X[cut:4].to(model.a.weight.dtype))
    return surgeon.step(loss=samples, retain=X[4:].to(model.a.weight.dtype))


def surgeon_of(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return gs.Surgeon(model, optimizer, gs.GRU(), together=False, **options)


@pytest.mark.parametrize("option", [3, (1, 2), [None, "x"], {"a": 1}, torch.tensor(1.0)], ids=str)
def test_a_function_with_another_option_is_asked_again(option):
    model = Net("Function", doubled)
    surgeon = surgeon_of(model)
    added_step(model, surgeon)
    model.option = option
    with pytest.raises(gs.InputError, match="not linear"):
        added_step(model, surgeon)


def test_a_gradient_of_zero_says_nothing_of_a_function():
    model = Net("Function", clipped)
    nn.init.zeros_(model.b.weight)
    surgeon = surgeon_of(model)
    added_step(model, surgeon)
    with pytest.raises(gs.InputError, match="not linear"):
        added_step(model, surgeon)


def test_one_pass_is_right_whatever_hooks_do():
    """A mean of one batch that is added, and goes into a step with others."""
    steps = []
    for added in (False, True):
        model = Net("activation", unit)
        surgeon = surgeon_of(model)
        if added:
            surgeon.add(loss=samples, forget=X[:4])
            surgeon.step(loss=samples, retain=X[4:])
        else:
            surgeon.step(loss=samples, forget=X[:4], retain=X[4:])
        steps.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*steps)


def test_a_hook_does_not_keep_float16_from_training():
    """Gradients that overflow, or that float16 has no digits for, are no sign of a hook's."""
    for scale in (None, 1.0, 2.0**15, 2.0**24):
        model = Net("activation", doubled).float()
        surgeon = surgeon_of(model)
        if scale is not None:
            surgeon.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def loss(net, x):
            with torch.autocast("cpu", torch.float16):
                return samples(net, x).float() * 1e-4

        surgeon.add(loss=loss, forget=X[:3].float())
        surgeon.add(loss=loss, forget=X[3:4].float())
        surgeon.step(loss=loss, retain=X[4:].float())


@pytest.mark.parametrize("draws", ["in train mode", "always"])
def test_random_numbers_are_no_sign_of_a_hook(draws):
    model = Net("activation", doubled)

    def loss(net, x):
        drawn = nn.functional.dropout(net(x), 0.5, training=draws == "always" or net.training)
        return drawn.square().sum(1)

    surgeon, before = surgeon_of(model), torch.get_rng_state()
    surgeon.add(loss=loss, forget=X[:3])
    surgeon.add(loss=loss, forget=X[3:4])
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    for some in (X[:3], X[3:4]):
        loss(model, some)
    torch.testing.assert_close(torch.rand(3), drawn)  # as much as two ordinary passes draw
    assert model.training
    surgeon.step(loss=loss, retain=X[4:])


def root(grad):
    return grad / (grad.norm() + 1e-12) ** 0.3


@pytest.mark.parametrize("most", [2, 4])
def test_sums_in_sixteen_bits_are_looked_at_closely(most):
    model = Net("activation", root).float()

    def loss(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return samples(net, x).float()

    x = torch.randn(9, 3)
    with pytest.raises(gs.InputError, match="not linear"):
        surgeon_of(model, micro_batch=most).step(loss=loss, forget=x, retain=x[:2])
