"""Hooks between the losses and the parameters: exact where they work sample by sample."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradsurgery as gs
from gradsurgery.capture.partial_rows import PartialRows
from tests.capture.oracle import BATCH, agrees, batch, energy, mlp

X = batch()


def doubled(grad):
    return 2 * grad


def clipped(grad):
    return grad.clamp(-0.1, 0.1)


def per_sample(grad):
    return grad / (grad.flatten(1).norm(dim=1).view(-1, *[1] * (grad.dim() - 1)) + 1e-12)


def in_place(grad):
    grad.mul_(3)


def by_std(grad):
    return grad / grad.std()


def by_norm_in_place(grad):
    grad.div_(grad.norm())


def by_norm_past_autograd(grad):
    grad.data.div_(grad.norm())


def clipped_by_norm(grad):
    return grad * min(1.0, 0.1 / float(grad.norm()))


def centered(grad):
    return grad - grad.mean(0)


def noisy(grad):
    return grad + torch.randn_like(grad)


def shuffled(grad):
    return grad.roll(1, 0)


OWN = [doubled, clipped, per_sample, in_place]
MIXING = [
    by_std,
    by_norm_in_place,
    by_norm_past_autograd,
    clipped_by_norm,
    centered,
    noisy,
    shuffled,
]


class Hooked(nn.Module):
    """Three layers, a residual connection, and a hook on the tensor of one name."""

    def __init__(self, where, hook):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.where, self.hook = where, hook
        self.double()

    def at(self, name, x):
        if name == self.where:
            x.register_hook(self.hook)
        return x

    def forward(self, x):
        h = self.at("first", self.first(x))
        h = self.at("residual", h + self.at("middle", self.middle(self.at("tanh", h.tanh()))))
        return self.at("last", self.last(h))


WHERE = ["first", "tanh", "middle", "residual", "last", "losses"]


def losses_of(model, x):
    losses = energy(model(x))
    return model.at("losses", losses)


@pytest.mark.parametrize("hook", OWN)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(BATCH, 5), (BATCH, 3, 5)], ids=["tokens 1", "tokens 3"])
def test_exact_where_samples_are_apart(hook, where, shape):
    if where == "losses" and hook is per_sample:
        hook = doubled
    model, x = Hooked(where, hook), batch(*shape)
    agrees(model, lambda: losses_of(model, x))


@pytest.mark.parametrize("hook", MIXING)
@pytest.mark.parametrize("where", WHERE)
def test_mixing_is_refused_by_name(hook, where):
    model = Hooked(where, hook)
    with gs.tape(model) as tape:
        losses = losses_of(model, X)
    with pytest.raises(gs.InputError, match=r"a hook on the output of \w+, \[.*\] comp"):
        tape.jacobian(losses)
    if hook is noisy:  # no two passes agree
        return
    warns = ["a hook on the output of", "a backward pass each"]
    agrees(model, lambda: losses_of(model, X), coupled="exact", warns=warns)


MODULES = {
    "full": lambda module, hook: module.register_full_backward_hook(
        lambda module, inputs, outputs: tuple(None if g is None else hook(g) for g in inputs)
    ),
    "full pre": lambda module, hook: module.register_full_backward_pre_hook(
        lambda module, outputs: tuple(hook(g) for g in outputs)
    ),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("hook", [doubled, clipped, per_sample])
def test_module_hooks(kind, place, hook):
    model = mlp()
    MODULES[kind](model[place], hook)
    agrees(model, lambda: energy(model(X)))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("hook", [by_std, clipped_by_norm, centered])
def test_mixing_module_hooks(kind, hook):
    model = mlp()
    MODULES[kind](model[1], hook)
    with gs.tape(model) as tape:
        losses = energy(model(X))
    with pytest.raises(gs.InputError, match=r"the backward hook of 1 \(Tanh\) computes across"):
        tape.jacobian(losses)
    info = gs.check(model, X, loss=lambda model, x: energy(model(x)))
    assert info.refused is not None
    assert "the backward hook of 1 (Tanh)" in info.refused
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), gs.Mean())
    with pytest.raises(gs.InputError, match="the backward hook of 1"):
        surgeon.step(batch=X, loss=lambda model, x: energy(model(x)))


def test_a_hook_of_a_node():
    """One that changes what a layer's parameters get is refused; elsewhere it is like any hook."""
    model = mlp()

    def forward(place, hook):
        out = model[0](X)
        if place == "layer":
            out.grad_fn.register_hook(hook)
        out = out.tanh()
        if place == "tanh":
            out.grad_fn.register_hook(hook)
        return energy(model[2](out))

    agrees(model, lambda: forward("tanh", lambda inputs, outputs: (2 * inputs[0],)))
    with gs.tape(model) as tape:
        losses = forward("layer", lambda inputs, outputs: None)
    with pytest.raises(gs.InputError, match=r"AddmmBackward0 has a hook of its own"):
        tape.jacobian(losses)
    with gs.tape(model) as tape:
        losses = forward("tanh", lambda inputs, outputs: (inputs[0] / inputs[0].norm(),))
    with pytest.raises(gs.InputError, match="a hook on TanhBackward0 computes across samples"):
        tape.jacobian(losses)


def test_observers_change_nothing():
    """They see the gradients of an ordinary backward pass, among others that ask."""
    model, seen = mlp(), []

    def forward():
        hidden = model[1](model[0](X))
        hidden.register_hook(lambda grad: seen.append(grad.clone()))
        hidden.retain_grad()
        return energy(model[2](hidden)), hidden

    with gs.tape(model) as tape:
        losses, hidden = forward()
    tape.jacobian(losses).gramian()
    again, hidden = forward()
    (want,) = torch.autograd.grad(again.sum(), hidden)
    torch.testing.assert_close(seen[0], want)
    agrees(model, lambda: forward()[0])


def test_a_hook_that_works_under_a_condition():
    """The pass of all rows does not meet it, those of some do."""
    model = Hooked("tanh", lambda grad: grad if grad.norm() > 1.4 else 5 * grad)
    with gs.tape(model) as tape:
        losses = losses_of(model, X)
    with pytest.raises(gs.InputError, match="a hook on the output of TanhBackward0"):
        tape.jacobian(losses)


def test_rows_of_which_one_depends_on_others():
    """The first row's number has no bit: it is asked without the others all the same."""
    model, groups = mlp(), torch.tensor([0, 0, 0, 1, 2, 3])

    def hook(grad):
        grad = grad.clone()
        kept, moved = grad[3:].norm(), grad[:3].norm()
        grad[:3] *= min(1.0, 0.5 * float(kept / moved)) if moved > 0 else 1.0
        return grad

    with gs.tape(model) as tape:
        hidden = model[0](X)
        hidden.register_hook(hook)
        losses = energy(model[2](hidden.tanh()))
    with pytest.raises(gs.InputError, match="a hook on the output of AddmmBackward0"):
        tape.jacobian(losses, groups)


def test_a_hook_made_after_the_tape():
    model = mlp()
    with gs.tape(model) as tape:
        hidden = model[0](X)
        losses = energy(model[2](hidden.tanh()))
    hidden.register_hook(doubled)
    rows = [torch.autograd.grad(loss, model[0].bias, retain_graph=True)[0] for loss in losses]
    gram = tape.jacobian(losses).gramian(per="tensor")[1]
    torch.testing.assert_close(gram, torch.stack(rows) @ torch.stack(rows).T)


def test_a_hook_made_before_the_tape():
    model = mlp()
    hidden = model[0](X)
    hidden.register_hook(doubled)
    with gs.tape(model) as tape:
        losses = energy(model[2](hidden.tanh()))
    rows = [torch.autograd.grad(loss, model[0].bias, retain_graph=True)[0] for loss in losses]
    gram = tape.jacobian(losses).gramian(per="tensor")[1]
    torch.testing.assert_close(gram, torch.stack(rows) @ torch.stack(rows).T)


def test_a_parameter_hook_sees_tensors(alone):
    """One of each row, which it may keep."""
    model, norms = mlp(), []
    model[0].weight.register_hook(lambda grad: norms.append(float(grad.norm())))
    with gs.tape(model) as tape:
        losses = energy(model(X))
    with pytest.warns(UserWarning, match="it has a hook"):
        gram = tape.jacobian(losses).gramian(per="tensor")[0]
    seen = torch.tensor(norms[:BATCH], dtype=torch.float64)
    torch.testing.assert_close(seen.square(), gram.diagonal())


def test_a_hook_that_remembers_is_refused():
    model, seen = mlp(), []

    def warm_up(grad):
        seen.append(None)
        return grad * min(1.0, len(seen) / 10)

    model[0].weight.register_hook(warm_up)
    with gs.tape(model) as tape:
        losses = energy(model(X))
    why = r"a hook of 0\.weight: its backward gives another answer"
    with pytest.raises(gs.InputError, match=why):
        tape.jacobian(losses)


@pytest.mark.parametrize("combine", ["stored", "backward"])
@pytest.mark.parametrize("where", ["nowhere", "tensor", "weight"])
def test_sparse_gradients(where, combine):
    model = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Linear(5, 3)).double()
    ids = torch.tensor([[0, 3], [3, 6], [1, 1]])
    if where == "weight":
        model[0].weight.register_hook(lambda grad: 2 * grad)

    def forward():
        hidden = model[0](ids).mean(1)
        if where == "tensor":
            hidden.register_hook(doubled)
        return energy(model[1](hidden))

    with gs.tape(model) as tape:
        losses = forward()
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in losses]
    rows = torch.stack([torch.cat([g.to_dense().flatten() for g in row]) for row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jacobian = tape.jacobian(losses, combine=combine)
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.T)
    jacobian.backward(torch.ones(3).double())
    update = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()])
    torch.testing.assert_close(update, rows.sum(0))


# not linear


@pytest.mark.parametrize("hook", [clipped, per_sample])
def test_weighted_losses_need_what_is_linear(hook):
    model = Hooked("tanh", hook)
    with gs.tape(model) as tape:
        losses = losses_of(model, X)
    with pytest.raises(gs.InputError, match=r"TanhBackward0, \[6, 5\] is not linear .*'stored'"):
        tape.jacobian(losses, combine="backward")
    agrees_backward(Hooked("tanh", doubled))


def agrees_backward(model):
    with gs.tape(model) as tape:
        losses = losses_of(model, X)
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in losses]
    jacobian = tape.jacobian(losses, combine="backward")
    weights = torch.randn(len(losses), dtype=torch.float64)
    for found, row in zip(jacobian.combine(weights), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(found, torch.tensordot(weights, torch.stack(row), 1))


def clip_of_weight(grad):
    return grad.clamp(-0.3, 0.3)


def unit_weight(grad):
    return grad / grad.norm()


class Computed(nn.Module):
    """A weight with a hook on what is computed from it."""

    def __init__(self, way, hook):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.way, self.hook = nn.Linear(5, 4).double(), way, hook

    def forward(self, x):
        weight, bias = self.linear.weight, self.linear.bias
        seen = {
            "product": lambda: weight * 1.5,
            "transpose": lambda: weight.t(),
            "view": lambda: weight.view(-1),
            "rows": lambda: weight[:2],
            "two uses": lambda: weight * 1.5,
        }[self.way]()
        seen.register_hook(self.hook)
        if self.way == "transpose":
            return x @ seen + bias
        if self.way == "view":
            return x @ seen.view(4, 5).t() + bias
        if self.way == "rows":
            return x @ seen.t() + bias[:2]
        if self.way == "two uses":
            return nn.functional.linear(x.tanh(), seen.exp(), bias) + x @ seen.t()
        return nn.functional.linear(x, seen, bias)


WAYS = ["product", "transpose", "view", "rows", "two uses"]


@pytest.mark.parametrize("hook", [doubled, clip_of_weight, unit_weight])
@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_what_is_computed_from_a_weight(hook, way):
    """Rows and update agree: each row is what its own backward pass gives."""
    model = Computed(way, hook)
    warns = [] if hook is doubled else ["linear.weight.* is not linear in its gradient"]
    agrees(model, lambda: energy(model(X)), warns=warns)


@pytest.mark.parametrize("way", WAYS)
def test_weighted_losses_through_it_are_refused(way):
    model = Computed(way, clip_of_weight)
    with gs.tape(model) as tape:
        losses = energy(model(X))
    with pytest.raises(gs.InputError, match=r"linear.weight.* is not linear .*'stored'"):
        tape.jacobian(losses, combine="backward")


@pytest.mark.parametrize("where", ["tanh", "weight"])
def test_one_row_of_weighted_losses(where):
    """It may be weighted as any other."""
    model = mlp()

    def forward(hook):
        hidden = model[0](X).tanh()
        weight = model[2].weight * 1
        (hidden if where == "tanh" else weight).register_hook(hook)
        return nn.functional.linear(hidden, weight, model[2].bias).square().sum()

    with gs.tape(model) as tape:
        losses = forward(clipped)
    with pytest.raises(gs.InputError, match=r"weight passes through is not linear .*'stored'"):
        tape.jacobian(losses, combine="backward")
    with gs.tape(model) as tape:
        losses = forward(doubled)
    rows = torch.autograd.grad(losses, list(model.parameters()), retain_graph=True)
    jacobian = tape.jacobian(losses, combine="backward")
    for found, row in zip(jacobian.combine(torch.tensor([7.0])), rows, strict=True):
        torch.testing.assert_close(found, 7 * row)


def test_a_clipping_hook_on_a_parameter_and_weighted_losses():
    model = mlp()
    model[0].weight.register_hook(clipped)
    with gs.tape(model) as tape:
        losses = energy(model(X))
    with pytest.raises(gs.InputError, match=r"0.weight passes through is not linear .*'stored'"):
        tape.jacobian(losses, combine="backward")


@pytest.mark.parametrize("way", ["parameter", "computed", "activation"])
@pytest.mark.parametrize("hook", [doubled, clip_of_weight])
def test_rows_summed_over_parts(way, hook):
    """As of the whole batch where hooks are linear, or of samples apart; refused where not."""
    found = []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        model: nn.Module = {
            "parameter": mlp,
            "computed": lambda: Computed("product", hook),
            "activation": lambda: Hooked("tanh", hook),
        }[way]()
        if way == "parameter":
            model.get_parameter("0.weight").register_hook(hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), micro_batch=micro_batch)

        def step(surgeon=surgeon):
            return surgeon.step(forget=X[:3], retain=X[3:], loss=lambda net, x: energy(net(x)))

        if hook is clip_of_weight and micro_batch is not None and way != "activation":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(gs.InputError, match=r"weight.*not linear.*whole"):
                    step()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((step().gramian, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*found)


class Tied(nn.Module):
    """Uses of all kinds: tied, normed, convolved, computed, and expanded over a batch."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.mix = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Conv1d(6, 6, 3)
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.places, self.scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(()))
        self.double()

    def forward(self, x):
        h = self.norm(self.tokens(x) + self.places)
        h.register_hook(doubled)
        h = F.linear(h, self.left @ self.right).tanh()
        h = self.mix(h.transpose(1, 2)).transpose(1, 2) * self.scale
        return F.linear(h, self.tokens.weight).square().sum((1, 2))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sums", [{0}, {2}, {0, 2}, {0, 1, 2, 3}])
def test_rows_that_others_are_added_to_are_the_same_with_those_that_are_whole(sums, hooked):
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 7, (6, 5))
    if hooked:
        model.left.register_hook(doubled)
        model.tokens.weight.register_hook(doubled)
    rows, found = torch.tensor([0, 0, 2, 2, 1, 3]), []
    for each in (set(), sums):
        with gs.tape(model, coupled="exact") as tape:
            tape.partial = PartialRows(each) if each else None
            losses = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jacobian = tape.jacobian(losses, rows)
        found.append((jacobian.gramian(per="tensor"), jacobian.materialize()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("hook", [doubled, clipped])
def test_rows_summed_over_several_passes(hook):
    """Losses [B, T] in a pass for each t: sums where hooks are linear, else refused."""
    model, groups = nn.ModuleList([mlp(), nn.Linear(4, 1).double()]), torch.arange(BATCH)
    with gs.tape(model) as tape:
        hidden = model[0](X)
        hidden.register_hook(hook)
        losses = torch.stack([energy(hidden), energy(model[1](hidden))], 1)
    both = torch.stack([groups, groups], 1)
    rows = [
        torch.autograd.grad(pair.sum(), list(model.parameters()), retain_graph=True)
        for pair in losses
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    try:
        gram = tape.jacobian(losses, both).gramian()
    except gs.InputError as error:
        assert hook is clipped and "not linear" in str(error)
        return
    torch.testing.assert_close(gram, rows @ rows.T)


def test_hooks_where_gradients_accumulate_are_refused():
    model = mlp()
    node = torch.autograd.graph.get_gradient_edge(model[0].weight).node
    handle = node.register_prehook(lambda grads: (2 * grads[0],))
    why = r"parameter 0.weight has a hook on the node that accumulates"
    with pytest.raises(gs.InputError, match=why), gs.tape(model):
        pass
    handle.remove()
    agrees(model, lambda: energy(model(X)))
    model[0].weight.main_grad = torch.zeros(7, 5)
    with pytest.raises(gs.InputError, match=r"parameter 0.weight .* main_grad"), gs.tape(model):
        pass


def test_a_backward_pass_inside_of_a_backward_is_refused():
    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, module, x):
            ctx.module = module
            ctx.save_for_backward(x)
            with torch.no_grad():
                return module(x)

        @staticmethod
        def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.module(x), g)
            return None, x.grad

    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)).double()
    model[1].bias.grad = torch.ones(5).double()
    with gs.tape(model) as tape:
        losses = energy(model[2](Inside.apply(model[1], model[0](X)).tanh()))
    with pytest.raises(gs.InputError, match=r"adds to \.grad of 1.weight"):
        tape.jacobian(losses)
    assert model[1].weight.grad is None
    assert torch.equal(model[1].bias.grad, torch.ones(5).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hook", [lambda *_: None, lambda m, i, o: (i[0].clamp(-0.01, 0.01),)])
def test_hooks_in_16_bits(dtype, hook):
    """Rounding is not taken for what is not linear, and the other way round."""
    model = mlp(middle=[nn.Linear(7, 7)], dtype=dtype)
    model[1].register_full_backward_hook(hook)
    with gs.tape(model) as tape:
        losses = energy(model(X.to(dtype))).float()
    if hook(None, [torch.ones(1)], None) is not None:
        with pytest.raises(gs.InputError, match="not linear"):
            tape.jacobian(losses, combine="backward")
        return
    tape.jacobian(losses, combine="backward").combine(torch.ones(BATCH))


class Clamping(torch.autograd.Function):
    """A parametrization whose backward clamps."""

    @staticmethod
    def forward(ctx, weight):
        return weight.round(decimals=1)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.clamp(-0.3, 0.3)


class Straight(Clamping):
    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("function", [Clamping, Straight])
def test_functions_of_a_weight(function):
    model = nn.Linear(5, 4).double()

    def forward():
        return energy(nn.functional.linear(X, function.apply(model.weight), model.bias))

    warns = ["weight: .* is not linear"] if function is Clamping else []
    agrees(model, forward, warns=warns)
