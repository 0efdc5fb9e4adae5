"""Backward passes that change what they kept: as from one ordinary backward pass, or refused."""

import dataclasses
from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from tests.capture.oracle import BATCH, batch, energy, labels, mlp

X = batch()


def rows_of(model, forward):
    """[m, n], each loss from a graph of its own: what a backward pass changed does not matter."""
    count = len(forward())
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(forward()[i], model.parameters())])
            for i in range(count)
        ]
    )


def exact(model, forward, *, combine="stored", warns=False):
    rows = rows_of(model, forward)
    with gs.tape(model) as tape:
        losses = forward()
    if warns:
        with pytest.warns(UserWarning, match="no formula for"):
            jacobian = tape.jacobian(losses, combine=combine)
    else:
        jacobian = tape.jacobian(losses, combine=combine)
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT)
    weights = torch.randn(len(rows), dtype=torch.float64)
    for _ in range(2):
        update = torch.cat([u.flatten() for u in jacobian.combine(weights)])
        torch.testing.assert_close(update, weights @ rows)
    return losses, rows


class CrossEntropy(torch.autograd.Function):
    """Of one sample: the gradient is made forwards and scaled in place backwards."""

    @staticmethod
    def forward(ctx, logits, label):
        p = logits.softmax(-1)
        loss = -p[label].log()
        p[label] -= 1
        ctx.grad = p
        return loss

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.grad.mul_(g), None


class FusedLinear(torch.autograd.Function):
    """The same, of a head's inputs and weight, both gradients made forwards."""

    @staticmethod
    def forward(ctx, x, weight, label):
        p = (weight @ x).softmax(-1)
        loss = -p[label].log()
        p[label] -= 1
        ctx.save_for_backward(weight.T @ p, p[:, None] * x)
        return loss

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return x.mul_(g), weight.mul_(g), None


class Scaled(torch.autograd.Function):
    """Of a batch [B, n]: what it kept is doubled by each call."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.full_like(x, 3.0))
        return 3 * x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = ctx.saved_tensors
        out = g * factor
        factor.mul_(2)
        return out


TALLY, LATEST, RECENT, SIZES = [], 0.0, deque(maxlen=3), np.zeros(2)


class Statistics:
    n = 0


def note(g):
    """As a helper does that a backward calls."""
    RECENT.append(float(g.abs().max()))
    SIZES[0] += 1
    Statistics.n += 1


class Counting(torch.autograd.Function):
    """Counts calls wherever a Function can: in itself, its class, a module, and around it."""

    calls = 0

    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.module, ctx.calls = module, 0
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        global LATEST
        LATEST = float(g.abs().max())
        TALLY.append(LATEST)
        note(g)
        Counting.calls += 1
        ctx.calls += 1
        ctx.module.amax.copy_(torch.maximum(ctx.module.amax, g.abs().max()))
        ctx.module.history.append(float(g.abs().max()))
        ctx.module.count += 1
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x, None


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.count, self.history = nn.Parameter(batch(4, 7, seed=3)), 0, []
        self.register_buffer("amax", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return Counting.apply(x, self.weight, self)

    def state(self):
        own = self.count, list(self.history), float(self.amax)
        around = list(TALLY), LATEST, list(RECENT), SIZES.tolist(), Statistics.n
        return Counting.calls, *own, *around


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_a_gradient_scaled_in_place(combine):
    model, y = nn.Linear(5, 4).double(), labels()
    exact(
        model,
        lambda: torch.stack([CrossEntropy.apply(a, b) for a, b in zip(model(X), y, strict=True)]),
        combine=combine,
    )


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_gradients_of_a_head_scaled_in_place(combine):
    model, y = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 4, bias=False)]).double(), labels()
    exact(
        model,
        lambda: torch.stack(
            [
                FusedLinear.apply(a, model[1].weight, b)
                for a, b in zip(model[0](X).tanh(), y, strict=True)
            ]
        ),
        combine=combine,
    )


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_one_row_of_gradients_scaled_in_place(combine):
    model, y = nn.Linear(5, 4).double(), labels()

    def forward():
        each = [CrossEntropy.apply(a, b) for a, b in zip(model(X), y, strict=True)]
        return torch.stack(each).sum()[None]

    exact(model, forward, combine=combine)


class Squared(torch.autograd.Function):
    """x x, whose backward scales what it kept in place and gives it away."""

    @staticmethod
    def forward(ctx, x):
        ctx.grad = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.grad.mul_(g)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(7, 3)
        self.double()


def of_a_weight(model):
    return energy(F.linear(model.a(X).tanh(), Squared.apply(model.b.weight), model.b.bias))


def of_two_tasks(model):
    h = Squared.apply(model.a(X))
    return torch.stack([energy(model.b(h)).mean(), energy(model.c(h)).mean()])


def of_several_passes(model):
    h = Squared.apply(model.a(X))
    return torch.stack([energy(model.b(h)), energy(model.c(h))], 1)


def of_losses(model):
    return Squared.apply(energy(model.b(model.a(X).tanh())))


@pytest.mark.parametrize("forward", [of_a_weight, of_two_tasks, of_several_passes, of_losses])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "a parameter hook"])
def test_it_is_put_back_for_every_pass(forward, hooked):
    model = Heads()
    if forward in (of_a_weight, of_losses):
        model.c.requires_grad_(False)
    used = [p for p in model.parameters() if p.requires_grad]
    if hooked:
        model.a.weight.register_hook(lambda grad: 2 * grad)
    losses = forward(model)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(forward(model).flatten()[i], used)])
            for i in range(losses.numel())
        ]
    )
    with gs.tape(model) as tape:
        losses = forward(model)
    with pytest.warns(UserWarning) if hooked else nullcontext():
        jacobian = tape.jacobian(losses)
    weights = torch.randn(len(rows), dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT)
        update = torch.cat([u.flatten() for u in jacobian.combine(weights)])
        torch.testing.assert_close(update, weights @ rows)
        torch.testing.assert_close(jacobian.materialize(), rows)


def test_torch_linear_cross_entropy_in_chunks():
    """It refuses a second call of its backward."""
    model, y = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 8, bias=False)]).double(), labels(8, 12)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    x, y = batch(3, 4, 5), y.view(3, 4)
    exact(
        model,
        lambda: torch.stack(
            [
                F.linear_cross_entropy(h, model[1].weight, t, options=chunks)
                for h, t in zip(model[0](x).tanh(), y, strict=True)
            ]
        ),
    )


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_saved_tensors_written_to(combine):
    model = mlp()
    forward = lambda: energy(model[2](Scaled.apply(model[0](X)).tanh()))  # noqa: E731
    exact(model, forward, combine=combine)


def test_saved_tensors_that_hooks_pack_and_leave_in_place():
    """They are written to all the same."""
    model, y = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 4, bias=False)]).double(), labels()
    model[0].weight.register_hook(lambda grad: 2 * grad)

    def forward():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            pairs = zip(model[0](X).tanh(), y, strict=True)
            return torch.stack([FusedLinear.apply(h, model[1].weight, t) for h, t in pairs])

    with pytest.warns(UserWarning, match="it has a hook"):
        exact(model, forward)


def test_refusing_leaves_everything_as_it_was():
    model = mlp()

    def forward():
        return energy(model[2](Scaled.apply(model[0](X)).tanh()))

    with gs.tape(model) as tape:
        losses = forward()
    with pytest.raises(gs.InputError, match="computes across samples"):
        tape.jacobian(losses.softmax(0))
    want = torch.autograd.grad(forward().sum(), model[0].weight)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), model[0].weight), want)


@pytest.mark.parametrize("where", ["rows of it", "below it"])
def test_it_is_called_as_often_as_by_a_backward_pass(where):
    def run(step):
        Counting.calls = 0
        TALLY.clear()
        RECENT.clear()
        SIZES[:], Statistics.n = 0, 0
        torch.manual_seed(0)
        body, counter = nn.Linear(5, 7).double(), Counter()
        model = nn.ModuleList([body, counter])
        counter.weight.requires_grad_(where == "rows of it")
        step(model, lambda: energy(counter(body(X).tanh())))
        return counter.state()

    def plain(model, forward):
        forward().sum().backward()

    def captured(model, forward):
        with gs.tape(model) as tape:
            losses = forward()
        tape.jacobian(losses).gramian()

    with pytest.warns(UserWarning) if where == "rows of it" else nullcontext():
        found = run(captured)
    assert found == run(plain)


def test_rows_of_a_stateful_operation_without_a_formula():
    body, counter = nn.Linear(5, 7).double(), Counter()
    model = nn.ModuleList([body, counter])
    exact(model, lambda: energy(counter(body(X).tanh())), warns=True)


class Restless(torch.autograd.Function):
    """What it keeps is out of anybody's sight."""

    @staticmethod
    def forward(ctx, x, memory):
        ctx.memory = memory
        return x * 1

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.memory(), None


def test_refused_by_name_where_it_cannot_be_put_back():
    numbers = iter(range(1, 1000))
    model = mlp()
    with gs.tape(model) as tape:
        losses = energy(model[2](Restless.apply(model[0](X).tanh(), numbers.__next__)))
    with pytest.raises(gs.InputError, match=r"RestlessBackward: .*another answer"):
        tape.jacobian(losses)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * (1 + torch.rand_like(g))


@pytest.mark.parametrize("hook", [False, True])
def test_random_numbers_are_drawn_as_by_one_backward_pass(hook):
    """What it draws while it is asked, it draws again; also where a hook lives elsewhere."""
    model, elsewhere = mlp(), mlp()[0](X)
    if hook:
        elsewhere.register_hook(lambda grad: grad)

    def forward():
        return energy(model[2](Noisy.apply(model[0](X).tanh())))

    torch.manual_seed(3)
    forward().sum().backward()
    want, drawn = [p.grad.clone() for p in model.parameters()], torch.rand(())
    torch.manual_seed(3)
    with gs.tape(model) as tape:
        losses = forward()
    update = tape.jacobian(losses).combine(torch.ones(BATCH))
    torch.testing.assert_close(update, want)
    assert torch.rand(()) == drawn


class Picked(torch.autograd.Function):
    """One loss of a whole batch's outputs."""

    @staticmethod
    def forward(ctx, x, i):
        ctx.save_for_backward(x)
        ctx.i = i
        return x[i].square().sum()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        out = torch.zeros_like(x)
        out[ctx.i] = 2 * x[ctx.i] * g
        return out, None


def test_a_scalar_of_a_whole_batch_is_asked_which_sample_it_used():
    model = mlp()
    exact(model, lambda: torch.stack([Picked.apply(model(X), i) for i in range(BATCH)]))


class Clipped(torch.autograd.Function):
    """By the norm of all, where that is above a threshold."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * (1000 / g.norm()).clamp(max=1)


def test_a_threshold_far_above_is_seen():
    """Rows are got one by one: together they would be mixed."""
    model = mlp()

    def forward():
        return 1e4 * energy(model[2](Clipped.apply(model[0](X).tanh())))

    exact(model, forward, warns=True)


class Dirty(torch.autograd.Function):
    """Writes into a view, so that autograd's node is not its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.grad = 2 * x.detach().clone()
        x.mul_(x.detach().clone())
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.grad.mul_(g)


def test_what_is_hidden_in_a_view_is_refused():
    model = mlp()
    with gs.tape(model) as tape:
        h = model[0](X) * 1.0
        Dirty.apply(h[:, :3])
        losses = energy(model[2](h))
    with pytest.raises(gs.InputError, match=r"CopySlices: .*another answer"):
        tape.jacobian(losses)


WORKSPACE = torch.zeros(BATCH, 7, dtype=torch.float64)


class Reusing(torch.autograd.Function):
    """Its gradients are all in the same memory."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.mul(g, 3, out=WORKSPACE)


def test_memory_that_is_used_again():
    model = mlp(middle=[nn.Linear(7, 7), nn.Linear(7, 7)])

    def forward():
        h = model[0](X)
        for k in (1, 2):
            h = model[k](Reusing.apply(h).tanh())
        return energy(model[4](Reusing.apply(h).tanh()))

    exact(model, forward)


class Large(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0**14

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * 2.0**14


def test_large_factors_in_float16():
    """What an operation is asked with does not overflow."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).half()
    with gs.tape(model) as tape:
        losses = Large.apply(model(X.half()) * 2.0**-20).float().square().sum(1)
    assert tape.jacobian(losses).gramian().diagonal().gt(0).all()


class Unit(torch.autograd.Function):
    """Not linear, but each sample's gradient is by its own norm."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g / (g.norm(dim=1, keepdim=True) + 1e-12)


def test_gradients_by_the_norm_of_each_sample():
    model = mlp()

    def forward():
        return energy(model[2](Unit.apply(model[0](X).tanh())))

    exact(model, forward)
    with gs.tape(model) as tape:
        losses = forward()
    with pytest.raises(gs.InputError, match=r"UnitBackward is not linear .* combine='stored'"):
        tape.jacobian(losses, combine="backward")


def test_check_says_the_same():
    model = mlp()

    def loss(model, x):
        return energy(model[2](Scaled.apply(model[0](x)).tanh()))

    checked = gs.check(model, X, loss=loss)
    assert checked.exact, checked


class Tally:
    __slots__ = ("__factor", "calls", "latest")  # the first is mangled, the last is not set

    def __init__(self):
        self.__factor, self.calls = 3.0, 0

    def take(self, g):
        out = g * self.__factor
        self.__factor *= 2
        self.calls += 1
        self.latest = float(g.abs().max())
        return out


class Longer(Tally):
    """Slots of its own beside those it inherits, and tensors and lists in them."""

    __slots__ = ("history", "scale")

    def __init__(self):
        super().__init__()
        self.history, self.scale = [], torch.ones((), dtype=torch.float64)

    def take(self, g):
        out = super().take(g) * self.scale
        self.scale.mul_(2)
        self.history.append(len(self.history))
        return out * (1 + len(self.history))


class Named(Tally):
    """Attributes beside slots."""

    def __init__(self):
        super().__init__()
        self.more = 1.0

    def take(self, g):
        self.more += 1
        return super().take(g) * self.more


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    factor: float = 3.0
    calls: int = 0

    def take(self, g):
        out = g * self.factor
        object.__setattr__(self, "factor", 2 * self.factor)
        object.__setattr__(self, "calls", self.calls + 1)
        return out


class Log(list):
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 3.0

    def take(self, g):
        self.factor *= 2
        return g * self.factor


class Plain:
    """No slots, to see that these are as attributes are."""

    def __init__(self):
        self.factor = 3.0

    def take(self, g):
        out = g * self.factor
        self.factor *= 2
        return out


class Taking(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state):
        ctx.state = state
        return x.clone()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.state.take(g), None


@pytest.mark.parametrize("combine", ["stored", "backward"])
@pytest.mark.parametrize("kind", [Tally, Longer, Named, Frozen, Log, Plain])
def test_slots_are_put_back(kind, combine):
    """Where nodes are called several times: one for each task, and a graph for all."""
    model = Heads()
    model.c.requires_grad_(False)

    def forward():
        h = model.a(X).tanh()
        weight = Taking.apply(model.b.weight, kind())
        return energy(F.linear(Taking.apply(h, kind()), weight, model.b.bias))

    exact_of(model, forward, combine)


def exact_of(model, forward, combine):
    """As `exact`, of what requires gradients."""
    used = [p for p in model.parameters() if p.requires_grad]
    count = len(forward())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(forward()[i], used)])
            for i in range(count)
        ]
    )
    with gs.tape(model) as tape:
        losses = forward()
    jacobian = tape.jacobian(losses, combine=combine)
    weights = torch.randn(count, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT)
        update = torch.cat([u.flatten() for u in jacobian.combine(weights)])
        torch.testing.assert_close(update, weights @ rows)


def test_memory_of_a_weights_function_is_put_back_for_weighted_losses():
    model = Heads()
    model.c.requires_grad_(False)
    exact_of(model, lambda: of_a_weight(model), combine="backward")


@pytest.mark.parametrize("kind", [Tally, Longer, Named, Frozen, Plain])
def test_slots_are_as_after_one_backward_pass(kind):
    def content(state):
        names = ("calls", "_Tally__factor", "latest", "history", "scale", "more", "factor")
        return [getattr(state, name, None) for name in names]

    found = []
    for captured in (True, False):
        model, state = mlp(), kind()
        with gs.tape(model) as tape:
            losses = energy(model[2](Taking.apply(model[0](X), state).tanh()))
        if captured:
            tape.jacobian(losses).gramian()
        else:
            losses.sum().backward()
        found.append(content(state)[:2])
    assert found[0] == found[1] != content(kind())[:2] or kind is Plain
