"""What project_out refuses, and how it fits torch: errors, gradients, registration, compile."""

import math

import pytest
import torch

import gradsurgery as gs
from tests.inputs import blocks_of


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_what_is_not_finite(value, impl, dtype):
    rows, grad = torch.randn(3, 401).to(dtype), torch.randn(401).to(dtype)
    bad_rows, bad_grad = rows.clone(), grad.clone()
    bad_rows[1, 400] = bad_grad[7] = value
    with pytest.raises(gs.NonFiniteError, match="rows: row 1 is not finite: 1 of 401 values"):
        gs.project_out(grad, bad_rows)
    with pytest.raises(gs.NonFiniteError, match=r"grad.* is not finite.* 1 of 401 values"):
        gs.project_out(bad_grad, rows)


def test_says_when_the_result_overflows(impl):
    # g⊥ may have larger values than g: here 72,426 > 65,504
    a = math.pi / 8
    grad = torch.tensor([6e4, 6e4], dtype=torch.float16)
    row = torch.tensor([[-math.sin(a), math.cos(a)]], dtype=torch.float16)
    with pytest.raises(gs.NonFiniteError, match=r"overflows torch.float16"):
        gs.project_out(grad, row)


@pytest.mark.parametrize(
    "grad,rows,message",
    [
        (torch.ones(3), torch.ones(3), r"rows must be \[m, n\], got \[3\]"),
        (torch.ones(4), torch.ones(2, 3), r"grad\[0\] must be \[3\] to match rows, got \[4\]"),
        (torch.ones(3).double(), torch.ones(2, 3), "grad is torch.float64, rows is torch.float32"),
        (torch.ones(3).int(), torch.ones(2, 3), r"grad\[0\] must be float16.*got torch.int32"),
        (torch.ones(3, device="meta"), torch.ones(2, 3), "grad is on meta, rows is on cpu"),
        ([torch.ones(3)] * 2, torch.ones(2, 3), "grad has 2 tensors, rows has 1"),
        ([], torch.ones(2, 3), "grad is an empty sequence"),
        (
            [torch.ones(3), None],
            [torch.ones(2, 3)] * 2,
            r"grad\[1\] must be a Tensor, got NoneType",
        ),
        (None, torch.ones(2, 3), "grad must be a Tensor or a sequence of Tensors, got NoneType"),
        (torch.ones(3).to_sparse(), torch.ones(2, 3), r"grad\[0\] must be a dense tensor"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(grad, rows, message, impl):
    with pytest.raises(gs.InputError, match=message):
        gs.project_out(grad, rows)


@pytest.mark.parametrize("rtol", [-1e-3, 1.0, float("nan")])
def test_rejects_a_senseless_rtol(rtol):
    with pytest.raises(gs.InputError, match=r"rtol must be in \[0, 1\), got"):
        gs.project_out(torch.ones(3), torch.ones(2, 3), rtol=rtol)


def test_rejects_a_negative_refine():
    with pytest.raises(gs.InputError, match="refine must be 0 or more, got -1"):
        gs.project_out(torch.ones(3), torch.ones(2, 3), refine=-1)


def test_gradient(impl):
    rows = [block.requires_grad_() for block in blocks_of([(3, 4), (3,), (3, 2, 2)])]
    grad = [torch.randn(block.shape[1:], dtype=torch.float64, requires_grad=True) for block in rows]
    check = lambda *t: tuple(gs.project_out(t[:3], t[3:]))  # noqa: E731
    assert torch.autograd.gradcheck(check, (*grad, *rows))
    assert torch.autograd.gradgradcheck(check, (*grad, *rows))


def test_information_carries_no_gradient(impl):
    rows = torch.randn(2, 5, requires_grad=True)
    perp, info = gs.project_out(torch.randn(5), rows, return_info=True)
    assert perp.requires_grad
    assert not any(figure.requires_grad for figure in info)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(needs_grad, impl, dtype):
    if needs_grad and dtype != torch.float64:
        pytest.skip("gradients are compared in float64")
    rows = [b.requires_grad_(needs_grad) for b in blocks_of([(2, 5), (2,), (2, 2, 3)], dtype)]
    grad = [torch.randn(b.shape[1:]).to(dtype).requires_grad_(needs_grad) for b in rows]
    torch.library.opcheck(torch.ops.gradsurgery.project_out, (grad, rows, 1e-7, 1))


def test_compiles_into_one_graph(impl):
    rows, grad = torch.randn(3, 41), torch.randn(41)
    compiled = torch.compile(
        lambda g, r: 2 * gs.project_out(g, r), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(grad, rows), 2 * gs.project_out(grad, rows))
