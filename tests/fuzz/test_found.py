"""What the attacks found, each as small as it shrank to."""

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.fuzz.functions import Linear
from tests.fuzz.steps import of_samples


@pytest.mark.parametrize("combine", ["stored", "backward"])
def test_one_row_behind_a_hook_that_is_not_linear(combine):
    """A row times 7 is not what a backward pass of 7 times its loss gives: right, or refused."""
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()

    def loss():
        y = torch.tanh(model(x))
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return y.square().sum()

    row = torch.autograd.grad(loss(), list(model.parameters()))
    with gs.tape(model) as tape:
        losses = loss()
    try:
        update = tape.jacobian(losses, combine=combine).combine(torch.tensor([7.0]))
    except gs.InputError as error:
        assert combine == "backward" and "not linear" in str(error)
        return
    for found, expected in zip(update, row, strict=True):
        torch.testing.assert_close(found, 7 * expected)


@pytest.mark.filterwarnings("ignore:.*there is no formula for LinearBackward")
@pytest.mark.parametrize("groups", [None, torch.zeros(5, dtype=torch.int64)], ids=["rows", "one"])
def test_a_function_whose_backward_reads_names_that_are_no_globals(groups):
    model, x = nn.Linear(4, 4, bias=False).double(), torch.randn(5, 3, 4).double()
    with gs.tape(model) as tape:
        losses = Linear.apply(x, model.weight).square().sum((1, 2))
    jacobian = tape.jacobian(losses, groups)
    rows = torch.stack([2 * (s @ model.weight.mT).mT @ s for s in x]).detach().flatten(1)
    rows = rows if groups is None else rows.sum(0, keepdim=True)
    torch.testing.assert_close(jacobian.gramian(), rows @ rows.mT)


def test_what_left_the_optimizer_keeps_its_grad():
    model = nn.Linear(5, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, optimizer, gs.UPGrad())
    optimizer.param_groups[0]["params"].pop()  # the bias
    before = model.bias.detach().clone()
    surgeon.step(batch=(torch.randn(3, 5).double(), torch.randn(3, 4).double()), loss=of_samples)
    assert model.bias.grad is None and torch.equal(model.bias, before)


@pytest.mark.parametrize("whole", ["first", "second"])
def test_two_parameters_used_row_by_row_of_which_one_is_used_whole_too(whole):
    first, second = (nn.Parameter(torch.randn(5, 4).double()) for _ in range(2))
    model, x = nn.ParameterList([first, second]), torch.randn(5, 4).double()
    both = first if whole == "first" else second
    with gs.tape(model) as tape:
        losses = (first * second * x).sum(1) + both.sum() * x[:, 0]
    grads = [torch.autograd.grad(v, list(model), retain_graph=True) for v in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in pair]) for pair in grads])
    torch.testing.assert_close(tape.jacobian(losses).gramian(), rows @ rows.mT)
