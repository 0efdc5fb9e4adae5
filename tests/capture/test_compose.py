"""What models and training loops do besides calling layers: exact, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from tests.capture.oracle import (
    BATCH,
    agrees,
    batch,
    check,
    energy,
    entropy,
    flattened,
    labels,
    loop,
    mlp,
    refused,
    trainable,
)

X = batch()
WORDS = batch(4, 3, 5)


def test_dropout():
    """The masks are those of the forward pass."""
    model = mlp(middle=[nn.Dropout(0.5)]).append(nn.AlphaDropout(0.3))
    agrees(model, lambda: entropy(model(X)))


def test_inplace_activations():
    model = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4), nn.Hardswish(inplace=True)
    ).double()
    agrees(model, lambda: energy(model(X)))

    def inplace():
        h = model[0](X)
        h.mul_(2).add_(X[:, :1])
        h[:, 2:4].sigmoid_()
        return energy(model[2](h))

    agrees(model, inplace)


@pytest.mark.parametrize("grad", [True, False])
def test_inputs(grad):
    x = X.clone().requires_grad_(grad)
    model = mlp()
    agrees(model, lambda: entropy(model(x)))
    assert x.grad is None


def test_frozen_parameters():
    model = mlp(middle=[nn.LayerNorm(7)])
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    agrees(model, lambda: entropy(model(X)))
    assert model[0].weight.grad is None


# recomputed


class Checkpointed(nn.Module):
    """Several layers in a segment, and another segment inside; forward passes are counted."""

    def __init__(self, nested, dropout=0.0, reentrant=False):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.norm, self.dropout = nn.LayerNorm(7), nn.Dropout(dropout)
        self.nested, self.reentrant, self.counts = nested, reentrant, [0, 0]

    def inner(self, h):
        self.counts[1] += 1
        return h + self.dropout(F.gelu(self.second(self.norm(h))))

    def outer(self, x):
        self.counts[0] += 1
        h = torch.tanh(self.first(x))
        if self.nested:
            return checkpoint(self.inner, h, use_reentrant=False)
        return self.dropout(self.inner(h))

    def forward(self, x):
        return self.head(checkpoint(self.outer, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoint(nested, dropout):
    model = Checkpointed(nested, dropout).double()
    agrees(model, lambda: entropy(model(X)))


@pytest.mark.parametrize("nested", [True, False])
def test_checkpoint_recomputes_twice(nested):
    """Once for what the forward pass kept, once in the backward pass."""
    model = Checkpointed(nested).double()
    with gs.tape(model) as tape:
        losses = entropy(model(X))
    model.counts = [0, 0]
    tape.jacobian(losses).gramian()
    assert max(model.counts) <= 2


def test_reentrant_checkpoint():
    model = Checkpointed(False, reentrant=True).double()
    x = X.clone().requires_grad_()
    refused(model, lambda: entropy(model(x)), "use_reentrant=True", exact=False)


# other dtypes


class Words(nn.Module):
    """Embedding, attention, norm, convolution, layers; the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.mix = nn.LayerNorm(16), nn.Conv1d(16, 16, 3, padding=1)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens):
        h = self.embedding(tokens)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.narrow(F.gelu(self.wide(h)))
        scores = F.linear(h, self.embedding.weight).transpose(1, 2)
        return F.cross_entropy(scores, tokens.roll(-1, 1), reduction="none").mean(1)


TOKENS = labels(11, 30).view(6, 5)


def no_worse(jacobian, model, rows, exact, roundoff):
    """As near to float64 as backward passes in the same dtype, but for a rounding."""
    m = jacobian.m
    exact, rows = (torch.cat(flattened(r, model, m), 1) for r in (exact, rows))
    largest = (exact @ exact.T).diagonal().max()
    w = torch.randn(m, dtype=next(iter(trainable(model).values())).dtype)
    combined = torch.cat([c.flatten() for c in jacobian.combine(w)]).double()
    w = w.double()
    for mine, theirs, right, scale in (
        (jacobian.materialize().double(), rows, exact, largest.sqrt()),
        (jacobian.gramian(), rows @ rows.T, exact @ exact.T, largest),
        (combined, w @ rows, w @ exact, largest.sqrt() * w.abs().sum()),
    ):
        bound = 1.5 * (theirs - right).abs().max() + roundoff * scale
        assert (mine - right).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    model = Words().to(dtype)
    precise = copy.deepcopy(model).double()
    with gs.tape(model) as tape:
        losses = model(TOKENS)
    rows = loop(losses, model)
    jacobian = tape.jacobian(losses)
    no_worse(jacobian, model, rows, loop(precise(TOKENS), precise), torch.finfo(dtype).eps / 2)
    jacobian.backward(torch.ones(6, dtype=dtype))
    assert all(p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("around", ["forward", "both"])
def test_autocast(around):
    model = Words()
    precise = copy.deepcopy(model).double()
    autocast = torch.autocast("cpu", torch.bfloat16)
    with gs.tape(model) as tape, autocast:
        losses = model(TOKENS)
    rows = loop(losses, model)
    plain = tape.jacobian(losses, retain_graph=True)
    expected = plain.gramian()
    exact = loop(precise(TOKENS), precise)
    no_worse(plain, model, rows, exact, torch.finfo(torch.bfloat16).eps / 2)
    if around == "both":  # what autocast does to the forward pass, it does not do to the rows
        with autocast:
            inside = tape.jacobian(losses)
            torch.testing.assert_close(inside.gramian(), expected, rtol=1e-6, atol=0)
            combined = inside.combine(torch.ones(6))
        assert all(c.dtype == torch.float32 for c in combined)
        for c, p in zip(combined, plain.combine(torch.ones(6)), strict=True):
            torch.testing.assert_close(c, p, rtol=1e-5, atol=1e-6)


# adapters


@pytest.mark.parametrize("dora", [True, False])
def test_adapters(dora):
    peft = pytest.importorskip("peft")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(F.silu(self.up(x))).mean(1)

    config = peft.LoraConfig(r=2, use_dora=dora, target_modules=["up", "down"], lora_dropout=0.1)
    model = peft.get_peft_model(Block(), config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    agrees(model, lambda: entropy(model(WORDS), labels(4, 4)))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# one forward pass, several Jacobians


def test_retained_graph():
    model = mlp()
    with gs.tape(model) as tape:
        losses = entropy(model(X))
    rows = loop(losses, model)
    first = tape.jacobian(losses, retain_graph=True)
    second = tape.jacobian(losses, torch.arange(BATCH) % 2)
    check(first, model, rows)
    check(second, model, [r.view(3, 2, *r.shape[1:]).sum(0) for r in rows])
    with pytest.raises(gs.InputError, match=r"losses was freed.*retain_graph=True"):
        tape.jacobian(losses)
    check(first, model, rows)


def test_graph_freed_by_backward():
    model = mlp()
    with gs.tape(model) as tape:
        losses = entropy(model(X))
    losses.sum().backward()
    with pytest.raises(gs.InputError, match="losses was freed"):
        tape.jacobian(losses)


def test_gramian_twice():
    model = mlp()
    with gs.tape(model) as tape:
        losses = entropy(model(X))
    jacobian = tape.jacobian(losses)
    first = jacobian.gramian().clone()
    jacobian.combine(torch.randn(BATCH, dtype=torch.float64))
    assert torch.equal(jacobian.gramian(), first)


def test_another_forward_pass():
    """One that no loss comes from, and one whose losses are joined to the first's."""
    model = mlp()

    def unused():
        model(X + 1)
        with torch.no_grad():
            model(X)
        return entropy(model(X))

    agrees(model, unused)
    agrees(model, lambda: torch.cat([entropy(model(X)), energy(model(2 * X[:2]))]))


# outputs and losses of any shape


class Heads(nn.Module):
    """Two inputs, a dictionary and a list of outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.top = nn.Linear(5, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        h = self.left(inputs["x"]) * self.right(inputs["z"])
        return {"top": [self.top(h.tanh())], "h": h}


def test_inputs_and_outputs_in_trees():
    model, z = Heads().double(), batch(BATCH, 3)

    def out():
        return model({"x": X, "z": z})

    agrees(model, lambda: energy(out()["top"][0]) + energy(out()["h"]))
    agrees(model, lambda: energy(out()["h"]))  # the top is not reached


def test_losses_of_tasks():
    model = mlp()
    agrees(model, lambda: (lambda o: torch.stack([entropy(o).mean(), energy(o).sum()]))(model(X)))
    norm = mlp(middle=[nn.BatchNorm1d(7, dtype=torch.float64)])
    agrees(norm, lambda: (lambda o: torch.stack([entropy(o).mean(), energy(o).sum()]))(norm(X)))


def test_losses_of_tokens():
    """[B, T] of a model that keeps tokens apart, and of one that does not."""
    model = mlp()
    agrees(model, lambda: model(WORDS).square().sum(2))
    attention = nn.MultiheadAttention(6, 2, batch_first=True).double()
    up = nn.Sequential(nn.Linear(5, 6).double(), attention)
    agrees(up, lambda: (lambda h: attention(h, h, h)[0].square().sum(2))(up[0](WORDS)))


def test_losses_of_heads():
    """[B, K], each head's on its own output."""
    model = mlp()
    agrees(model, lambda: model(X).square())
    agrees(model, lambda: model(X).square(), groups=torch.arange(24).view(6, 4) % 5 - 1)


@pytest.mark.parametrize("reduce", [torch.mean, lambda losses: losses[:1], lambda losses: losses])
def test_one_row(reduce):
    model = mlp()
    agrees(model, lambda: reduce(entropy(model(X[:1]), labels()[:1])))
    agrees(model, lambda: entropy(model(X)).mean())


def test_losses_that_are_a_parameter():
    model = nn.Module()
    model.p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    agrees(model, lambda: model.p)
    agrees(model, lambda: model.p * 1)


@pytest.mark.parametrize("norm", [True, False])
def test_no_sample(norm):
    model = mlp(middle=[nn.LayerNorm(7)] * norm)
    with gs.tape(model) as tape:
        losses = entropy(model(X[:0]), labels()[:0])
    jacobian = tape.jacobian(losses)
    assert jacobian.m == 0
    assert jacobian.gramian().shape == (0, 0)
    assert jacobian.gramian(per="tensor").shape == (len(trainable(model)), 0, 0)
    assert jacobian.materialize().shape[0] == 0
    jacobian.backward(torch.zeros(0, dtype=torch.float64))
    assert all(p.grad is None for p in model.parameters())


def test_no_row_kept():
    model = mlp()
    with gs.tape(model) as tape:
        losses = entropy(model(X))
    assert tape.jacobian(losses, torch.full((BATCH,), -1)).m == 0


@pytest.mark.parametrize("rows", ["captured", "stored"])
def test_a_default_device_that_is_not_the_models(rows):
    # as with torch.set_default_device("cuda"); what is made on the meta device holds no values
    model, groups = mlp(middle=[nn.LayerNorm(7)]), torch.arange(BATCH) // 2
    plain, elsewhere = copy.deepcopy(model), copy.deepcopy(model)
    x, y = X, labels()

    def run(model):
        with gs.tape(model) as tape:
            losses = entropy(model(x), y)
        gram = tape.jacobian(losses, groups).gramian()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad(), rows=rows)
        halves = (x[:2], y[:2]), (x[2:], y[2:])
        surgeon.step(
            forget=halves[0], retain=halves[1], loss=lambda model, b: entropy(model(b[0]), b[1])
        )
        return gram

    expected = run(plain)
    with torch.device("meta"):
        assert torch.equal(run(elsewhere), expected)
    for p, q in zip(plain.parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(p, q)
