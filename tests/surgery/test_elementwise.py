"""Elementwise rules: what they make of signs, and rows of any shape, scalar and without values."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.inputs import gaussian, signed
from tests.surgery.properties import make, weighted

NAMES = [name for name in gs.RULES if not weighted(name)]
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


def test_graddrop_keeps_one_sign(impl):
    rows = signed(gaussian(5, 2000))
    update = gs.GradDrop()(rows)
    positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
    up = torch.isclose(update, positive)
    assert (up | torch.isclose(update, negative)).all()
    purity = positive / (positive - negative)
    assert float(up.double().mean()) == pytest.approx(float(purity.mean()), abs=0.03)
    torch.testing.assert_close(gs.GradDrop(leak=1.0)(rows), rows.sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_elementwise_rules_in_sixteen_bits(dtype, impl):
    ones = torch.ones(2, 100_000, dtype=dtype)
    assert torch.equal(gs.GradDrop()(ones), ones.sum(0))  # no draw is rounded up to 1
    small = torch.tensor([[-1e-4, 1e-4], [-1e-4, -1e-4]], dtype=dtype)  # products underflow
    update = gs.SAGO(gamma=2.0, alpha=3.0)(small)
    assert update.tolist() == (torch.tensor([3.0, 2.0], dtype=dtype) * small[1]).tolist()
    many = torch.ones(1024, 1, dtype=dtype)
    many[0] = -1
    assert not gs.SignAgreement()(many).any()
    assert all(make(name)(torch.randn(4, 6).to(dtype)).dtype == dtype for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_elementwise_rules_name_a_row_that_is_not_finite(name):
    rows = torch.randn(4, 3)
    rows[1, 2] = float("nan")
    with pytest.raises(gs.NonFiniteError, match="row 1 is not finite in 0"):
        make(name)(rows)


def test_salun_keeps_its_share_where_gradients_tie():
    f = torch.tensor([1.0] + [0] * 9)
    update = gs.SalUn(objective="lower")(torch.stack([f, torch.ones(10)]))
    assert (update != 0).sum() == 5


def test_signs_agree_or_nothing_moves(impl):
    rows = torch.tensor([[1.0, -1, 2, 0], [3, -2, -2, 1], [2, -3, 2, 1]])
    assert gs.SignAgreement()(rows).tolist() == [2, -2, 0, 0]
    loose = gs.SignAgreement(threshold=1 / 3)(rows)
    assert loose.tolist() == pytest.approx([2, -2, 2 / 3, 2 / 3])


def test_trimmed_mean(impl):
    rows = torch.tensor([[1.0, 9], [2, -9], [3, 4], [100, 5]])
    assert gs.TrimmedMean(trim=1)(rows).tolist() == [2.5, 4.5]


def test_salun_masks_by_the_forget_gradient(impl):
    blocks = [torch.tensor([[5.0, 1.0], [1, 1]]), torch.tensor([[4.0, 3.0], [1, 1]])]
    whole = gs.SalUn(objective="lower")(blocks)
    assert [u.tolist() for u in whole] == [[6, 0], [5, 0]]
    each = gs.SalUn(objective="lower", share=0.5, granularity="tensor")(blocks)
    assert [u.tolist() for u in each] == [[6, 0], [5, 0]]
    most = gs.SalUn(objective="lower", share=0.75)(blocks)
    assert [u.tolist() for u in most] == [[6, 0], [5, 4]]


@pytest.mark.parametrize("name", NAMES)
def test_elementwise_rules_have_no_weights_and_no_metric(name):
    rule = make(name)
    assert rule.weighting is None
    assert not any(hasattr(rule, member) for member in ("weights", "solve", "precondition"))
    with pytest.raises(TypeError, match="precondition"):
        make(name, precondition="optimizer")
