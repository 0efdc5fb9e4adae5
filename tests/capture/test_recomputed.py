"""Saved tensors that are made anew when they are read."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import gradsurgery as gs
from tests.capture.oracle import BATCH, agrees, batch, energy, mlp

X = batch()
SELECTED = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
)


class Block(nn.Module):
    """Counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(5, 7), nn.Linear(7, 5), 0

    def forward(self, x):
        self.calls += 1
        return x + self.last(self.first(x).tanh())


class Blocks(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.options = nn.ModuleList(Block() for _ in range(3)).double(), options

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        return x


def rows_of(model, x):
    losses = energy(model(x))
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("x", [X, batch(BATCH, 3, 5)], ids=["tokens 1", "tokens 3"])
def test_selective_checkpoints(x):
    """They let one pass recompute, and one is enough."""
    model = Blocks(context_fn=SELECTED)
    rows = rows_of(Blocks(), x)
    with gs.tape(model) as tape:
        losses = energy(model(x))
    jacobian = tape.jacobian(losses)
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.T)
    weights = torch.randn(len(rows), dtype=torch.float64)
    update = torch.cat([u.flatten() for u in jacobian.combine(weights)])
    torch.testing.assert_close(update, weights @ rows)


def test_selective_checkpoints_are_refused_by_name_for_weighted_losses():
    model = Blocks(context_fn=SELECTED)
    with gs.tape(model) as tape:
        losses = energy(model(X))
    jacobian = tape.jacobian(losses, combine="backward")
    with pytest.raises(gs.InputError, match="selective activation checkpoints"):
        jacobian.combine(torch.ones(BATCH))


def test_a_surgeon_steps_with_selective_checkpoints():
    models = [Blocks(), Blocks(context_fn=SELECTED)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())
        loss = lambda model, x: energy(model(x))  # noqa: E731
        surgeon.step(forget=X[:3], retain=X[3:], loss=loss)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_recompute_once():
    model = Blocks()
    with gs.tape(model) as tape:
        losses = energy(model(X))
    jacobian = tape.jacobian(losses)
    jacobian.gramian()
    jacobian.combine(torch.ones(BATCH))
    assert [block.calls for block in model.blocks] == [2, 2, 2]


def test_a_kept_graph_can_be_passed_again():
    model = Blocks()
    with gs.tape(model) as tape:
        losses = energy(model(X))
    one = tape.jacobian(losses, retain_graph=True).gramian()
    two = tape.jacobian(losses, retain_graph=True).gramian()
    losses.sum().backward()
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("hook", [lambda grad: 2 * grad, lambda grad: grad.clamp(-0.1, 0.1)])
def test_checkpoints_and_hooks(hook):
    model = Blocks()

    def forward():
        out = model(X)
        out.register_hook(hook)
        return energy(out)

    agrees(model, forward)


def test_checkpoints_and_losses_in_several_passes():
    model = Blocks()
    agrees(model, lambda: model(X).square())


def test_tensors_kept_elsewhere():
    model = mlp()
    with save_on_cpu():
        agrees(model, lambda: energy(model(X)))


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_tensors_that_are_unpacked_once(combine):
    model, kept = mlp(), {}

    def pack(tensor):
        kept[len(kept)] = tensor
        return len(kept) - 1

    with gs.tape(model) as tape, saved_tensors_hooks(pack, kept.pop):
        losses = energy(model(X))
    with pytest.raises(gs.InputError, match=r"saved by .*AddmmBackward0.* unpacked twice"):
        tape.jacobian(losses, combine=combine)
