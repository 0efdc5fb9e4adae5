"""Which nodes have hooks, whatever thread made them, and nobody else's hooks."""

import contextlib
import gc
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import gradsurgery as gs
from gradsurgery.capture import hooked
from tests.capture.oracle import agrees, batch, check, energy, loop, mlp
from tests.capture.test_hooks import MIXING, OWN, by_std, doubled

X = batch()

# graphs of other threads


def elsewhere(function, before):
    """What a function gives in another thread that made some nodes before; it ends."""

    def run():
        x = torch.ones((), requires_grad=True)
        for _ in range(before):
            x.clone()
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def numbered():
    return torch._C._autograd._get_sequence_nr()


def older_graph(model, hook, where):
    """A part of a graph made in another thread, with numbers that this thread will use."""

    def part():
        hidden = model[0](X)
        if where == "node":
            middle = hidden * 1

            def of_node(grads):
                changed = hook(grads[0])
                return None if changed is None else (changed,)

            middle.grad_fn.register_prehook(of_node)
            return middle * 1
        hidden.register_hook(hook)
        return hidden * 1

    return elsewhere(part, numbered() + 8)


@pytest.mark.parametrize("where", ["tensor", "node"])
@pytest.mark.parametrize("hook", MIXING)
def test_a_mixing_hook_on_an_older_graph_of_another_thread(hook, where):
    model = mlp()
    hidden = older_graph(model, hook, where)
    with gs.tape(model) as tape:
        losses = energy(model[2](hidden.tanh()))
    with pytest.raises(gs.InputError, match=r"a hook on .* computes across samples"):
        tape.jacobian(losses)


@pytest.mark.parametrize("hook", OWN)
def test_a_hook_of_samples_on_an_older_graph_of_another_thread(hook):
    model = mlp()
    hidden = older_graph(model, hook, "tensor")
    with gs.tape(model) as tape:
        losses = energy(model[2](hidden.tanh()))
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(tape.jacobian(losses).gramian(), rows @ rows.mT)


@pytest.mark.parametrize("hook", [None, doubled, by_std])
def test_a_part_made_in_another_thread_under_the_tape(hook):
    """Its nodes are walked like others, and its handles counted."""
    model = mlp()

    def part():
        hidden = model[0](X)
        if hook is not None:
            hidden.register_hook(hook)
        return hidden

    def forward():
        return energy(model[2](elsewhere(part, numbered() + 3).tanh()))

    if hook is not by_std:
        agrees(model, forward)
        return
    with gs.tape(model) as tape:
        losses = forward()
    with pytest.raises(gs.InputError, match=r"a hook on the output of AddmmBackward0"):
        tape.jacobian(losses)


def passes(model, forward):
    """How many backward passes the rows of a model take."""
    counted, grad = [], torch.autograd.grad

    def count(*args, **kwargs):
        counted.append(None)
        return grad(*args, **kwargs)

    with gs.tape(model) as tape:
        losses = forward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", count)
        tape.jacobian(losses)
    return len(counted)


def test_ordinary_models_take_one_pass(alone):
    """Whatever hooks modules and optimizers have, and after tensors with hooks are gone."""
    model, other = mlp(), mlp()

    def forward():
        return energy(model(X))

    assert passes(model, forward) == 1
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    handles = [
        other.register_forward_hook(lambda *_: None),
        other[0].register_full_backward_hook(lambda *_: None),
        other[0].bias.register_post_accumulate_grad_hook(lambda _: None),
        optimizer.register_step_post_hook(lambda *_: None),
        register_optimizer_step_post_hook(lambda *_: None),
        nn.modules.module.register_module_forward_hook(lambda *_: None),
    ]
    hidden = other[0](X)
    hidden.register_hook(doubled)
    del hidden
    gc.collect()
    try:
        assert passes(model, forward) == 1
    finally:
        for handle in handles:
            handle.remove()


def test_looks_through_objects_once_for_new_handles(alone, monkeypatch):
    model, looked = mlp(), []
    found = hooked._found
    monkeypatch.setattr(hooked, "_found", lambda: looked.append(None) or found())
    model.register_forward_hook(lambda *_: None)
    for _ in range(3):
        assert passes(model, lambda: energy(model(X))) == 1
    assert len(looked) == 1
    hidden = mlp()[0](X)
    hidden.register_hook(doubled)
    for _ in range(3):
        assert passes(model, lambda: energy(model(X))) == 2  # one to see that it is elsewhere
    assert len(looked) == 2
    del hidden
    gc.collect()
    assert passes(model, lambda: energy(model(X))) == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        made = self.query(x), self.key(x), self.value(x)
        return nn.functional.scaled_dot_product_attention(*made)


def mean_of_squares(model, x):
    return model(x).square().mean((1, 2))


def hooked_module(model):
    model[1].register_full_backward_hook(lambda *_: None)


def hooked_output(model):
    model[0].register_forward_hook(lambda *args: args[-1].register_hook(lambda g: g * 1) and None)


@pytest.mark.parametrize("add", [hooked_module, hooked_output])
def test_hooks_that_change_nothing(add, alone):
    """Weights keep pairs; a key's bias, whose gradient is all rounding, is no reason to refuse."""
    x, steps = torch.randn(6, 3, 5), []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        model = nn.Sequential(Attention(), Attention())
        add(model)
        with gs.tape(model) as tape:
            losses = mean_of_squares(model, x)
        jacobian = tape.jacobian(losses)
        assert not jacobian._derived
        assert not jacobian.fallbacks
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), micro_batch=micro_batch)
        steps.append(surgeon.step(forget=x[:4], retain=x[4:], loss=mean_of_squares).gramian)
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_clip_of_a_long_sum_is_seen(dtype):
    """Though what its terms are rounded to is much, in few bits."""
    layer = nn.Linear(5, 4).to(dtype)
    x, signs = torch.randn(8, 64, 5).to(dtype), torch.randn(8, 64, 4).to(dtype)
    with gs.tape(layer) as tape:
        bias = layer.bias * 1
        bias.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        loss = ((x @ layer.weight.t() + bias) * signs).sum()
    with pytest.raises(gs.InputError, match=r"what bias passes through is not linear"):
        tape.jacobian(loss, combine="backward")


def test_a_hook_elsewhere_changes_no_path(alone):
    model, elsewhere = mlp(), mlp()[0](X)
    for hook in (False, True):
        if hook:
            elsewhere.register_hook(by_std)
        with gs.tape(model) as tape:
            losses = energy(model(X))
        jacobian = tape.jacobian(losses)
        assert not jacobian._derived
        check(jacobian, model, loop(energy(model(X)), model))


@pytest.mark.parametrize("raises", [False, True])
def test_hooks_are_put_back(raises):
    model = mlp()

    def hook(grad):
        if raises:
            raise KeyError
        return 2 * grad

    with gs.tape(model) as tape:
        hidden = model[0](X)
        hidden.register_hook(hook)
        losses = energy(model[2](hidden.tanh()))
    with pytest.raises(KeyError) if raises else contextlib.nullcontext():
        tape.jacobian(losses)
    assert list(hidden._backward_hooks.values()) == [hook]


@pytest.mark.parametrize("after", ["cut off", "a leaf", "frozen"])
def test_a_hook_stays_on_the_graph(after):
    """On the node that made the tensor, whatever is done afterwards to that or to parameters."""
    model = mlp()
    with gs.tape(model) as tape:
        hidden = model[0](X)
        hidden.register_hook(by_std)
        losses = energy(model[2](hidden.tanh()))
    if after == "frozen":
        model[0].requires_grad_(False)
    else:
        hidden.detach_().requires_grad_(after == "a leaf")
    with pytest.raises(gs.InputError, match=r"a hook on the output of AddmmBackward0"):
        tape.jacobian(losses)


def test_hooks_are_not_called_by_who_asks_where_they_are():
    """One that works once would have worked already."""
    model, called = mlp(), []

    def once(grad):
        called.append(None)
        return 2 * grad if len(called) == 1 else None

    with gs.tape(model) as tape:
        hidden = model[0](X)
        hidden.register_hook(once)
        losses = energy(model[2](hidden.tanh()))
    with pytest.raises(gs.InputError, match=r"a hook on the output of AddmmBackward0"):
        tape.jacobian(losses)


class Named(torch.autograd.Function):
    """Has what nodes that accumulate have."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = 1
        return x * 1

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


@pytest.mark.parametrize("mode", ["all", "any"])
@pytest.mark.parametrize("where", ["on this graph", "elsewhere"])
def test_hooks_on_several_tensors_at_once(mode, where):
    model, seen = mlp(), []
    other = model(X)
    with gs.tape(model) as tape:
        hidden = model[0](X)
        tensors = [hidden, other.sum()] if where == "on this graph" else [other, other.sum()]
        handle = torch.autograd.graph.register_multi_grad_hook(tensors, seen.append, mode=mode)
        losses = energy(model[1:](hidden))
    check(tape.jacobian(losses, retain_graph=True), model, loop(losses, model))
    handle.remove()


def test_a_hook_on_a_function_that_has_a_variable():
    model = mlp()
    with gs.tape(model) as tape:
        hidden = Named.apply(model[0](X))
        hidden.register_hook(by_std)
        losses = energy(model[2](hidden.tanh()))
    with pytest.raises(gs.InputError, match=r"a hook on the output of NamedBackward"):
        tape.jacobian(losses)


def test_a_table_of_modules_is_what_it_is():
    """Numbers and what can be called: so are hooks kept."""
    model, elsewhere = mlp(), mlp()[0](X)
    elsewhere.register_hook(doubled)
    linear = nn.Linear(7, 7).double()
    table = OrderedDict({0: linear})

    class Looked(torch.autograd.Function):
        """Looks a module up, and calls it, in its backward."""

        @staticmethod
        def forward(ctx, x):
            return table[0](x)

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            assert table[0] is linear
            with torch.enable_grad():
                x = torch.zeros_like(grad).requires_grad_()
                return torch.autograd.grad(table[0](x), x, grad * table[0].in_features)[0] / 7

    agrees(model, lambda: energy(model[2](Looked.apply(model[0](X)))))
    assert table[0] is linear


def test_threads_ask_beside_each_other():
    """None takes another's hooks away, or holds what another is making."""
    wrong, stop = [], []

    def unrelated():
        while not stop:
            hidden = mlp()[0](X)
            hidden.register_hook(doubled)
            hidden.sum().backward()

    def work():
        model = mlp()

        def forward():
            hidden = model[0](X)
            hidden.register_hook(doubled)
            return energy(model[2](hidden.tanh())), hidden

        rows = torch.cat([g.flatten(1) for g in loop(forward()[0], model)], 1)
        for _ in range(20):
            with gs.tape(model) as tape:
                losses, hidden = forward()
            found = tape.jacobian(losses).materialize()
            wrong.extend([] if torch.allclose(found, rows) else ["rows"])
            kept.append(hidden)

    kept = []
    threads = [threading.Thread(target=target) for target in (unrelated, work, work, work)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.append(None)
    threads[0].join()
    assert len(kept) == 60
    assert not wrong
    assert all(list(hidden._backward_hooks.values()) == [doubled] for hidden in kept)


def test_what_the_collector_does_not_list_may_have_hooks():
    model = mlp()
    hidden = older_graph(model, by_std, "tensor")
    gc.collect()
    gc.freeze()
    try:
        with gs.tape(model) as tape:
            losses = energy(model[2](hidden.tanh()))
        with pytest.raises(gs.InputError, match=r"a hook on .* computes across samples"):
            tape.jacobian(losses)
    finally:
        gc.unfreeze()
