"""Elementwise rules on rows of any shape: scalar parameters, and parameters without values."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs

RULES = [
    gs.GradDrop(),
    gs.GradDrop(leak=0.3),
    gs.SignAgreement(threshold=0.5),
    gs.TrimmedMean(),
    gs.SAGO(gamma=0.7),
    gs.SalUn(share=0.6),
    gs.SalUn(share=0.6, granularity="tensor"),
]
rules = pytest.mark.parametrize("rule", RULES, ids=repr)
M = 5


@rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_scalars_is_one_of_a_column(rule, dtype):
    columns = [torch.randn(M, 3, 2), torch.randn(M, 1), torch.zeros(M, 0), torch.randn(M, 1)]
    columns = [block.to(dtype) for block in columns]
    blocks = [columns[0], columns[1][:, 0], columns[2], columns[3][:, 0]]
    expected, update = copy.deepcopy(rule)(columns), copy.deepcopy(rule)(blocks)
    assert [u.shape for u in update] == [block.shape[1:] for block in blocks]
    for a, b in zip(update, expected, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
        assert a.dtype == dtype


@rules
def test_a_block_of_scalars_alone(rule):
    block = torch.randn(M, dtype=torch.float64)
    (update,) = copy.deepcopy(rule)([block])
    (expected,) = copy.deepcopy(rule)([block[:, None]])
    assert update.shape == ()
    assert torch.equal(update, expected[0])


@rules
def test_what_is_not_finite_in_a_block_of_scalars_is_named(rule):
    blocks = [torch.randn(M, 3), torch.randn(M)]
    blocks[1][2] = torch.inf
    with pytest.raises(gs.NonFiniteError, match="row 2 is not finite in 1"):
        rule(blocks)


@rules
def test_no_rows_give_zeros(rule):
    update = rule([torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 0)])
    assert [u.tolist() for u in update] == [[0, 0, 0], 0, []]


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.scale = nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64))

    def forward(self, x):
        return (self.linear(x) * self.scale.exp()).square().sum(1)


@rules
@pytest.mark.parametrize("rows", ["captured", "stored"])
def test_a_step_with_a_scalar_parameter_is_that_with_one_of_a_value(rule, rows):
    start, x = Scaled(), torch.randn(M, 4, dtype=torch.float64)
    stepped = []
    for shape in ((), (1,)):
        model = Scaled(*shape)
        model.linear.load_state_dict(start.linear.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = {"forget": x, "retain": 1 - x} if "forget" in rule.roles else {"batch": x}
        surgeon = gs.Surgeon(model, optimizer, copy.deepcopy(rule), rows=rows)
        surgeon.step(**batches, loss=lambda m, x: m(x))
        stepped.append([p.detach().flatten() for p in model.parameters()])
    for a, b in zip(*stepped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert stepped[0][0] != 0.5, "the scalar moved"
