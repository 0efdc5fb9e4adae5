"""Coefficients of a projection from a Gramian: any scale, any rank, batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import projection_weights
from gradsurgery.ops.weighting import default_rtol
from tests.inputs import FAMILIES, exact_gramian

CLEAR = [f for f in FAMILIES if f not in ("near duplicate 1e-07", "near duplicate 1e-06")]


def problem(family, m=6, n=97):
    rows, vector = FAMILIES[family](m, n), torch.randn(n, dtype=torch.float64)
    return rows, vector, exact_gramian(rows), rows @ vector


def projection(rows, vector):
    """By SVD of the normalized rows."""
    norms = rows.norm(dim=1, keepdim=True)
    _, values, right = torch.linalg.svd(
        torch.where(norms > 0, rows / norms, 0), full_matrices=False
    )
    basis = right[values > 3e-7]
    return (vector @ basis.mT) @ basis, len(basis)


@pytest.mark.parametrize("family", CLEAR)
def test_weighted_rows_are_the_projection(family, impl):
    rows, vector, gramian, products = problem(family)
    c, rank, margin = projection_weights(gramian, products)
    expected, expected_rank = projection(rows, vector)
    assert rank.item() == expected_rank
    # rounding of the Gramian, magnified by the distances in it
    assert (c @ rows - expected).norm() <= 1e-13 / max(margin.item(), 1e-12) * vector.norm()
    assert 0 <= margin <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_agree(family, monkeypatch):
    _, _, gramian, products = problem(family)
    found = {}
    for impl in ("torch", "native"):
        monkeypatch.setenv("GRADSURGERY_BACKEND", impl)
        found[impl] = projection_weights(gramian, products)
    (c, rank, margin), (other_c, other_rank, other_margin) = found["torch"], found["native"]
    assert rank == other_rank
    assert margin.item() == pytest.approx(other_margin.item(), rel=1e-4, abs=1e-14)
    # of two rows that tie either may be taken: the projections are the same
    difference = c - other_c
    scale = c @ gramian @ c
    assert difference @ gramian @ difference <= (1e-13 / max(margin.item(), 1e-12)) ** 2 * scale


def test_hand_worked(impl):
    # the third row is the sum of the others: farthest first takes it, then the first
    gramian = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 2]])
    c, rank, _ = projection_weights(gramian, torch.tensor([2.0, 3, 5]))
    assert rank.item() == 2
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)
    assert (c @ rows).tolist() == pytest.approx([2, 3])


def test_dependent_and_zero_rows_get_exactly_zero(impl):
    rows = torch.tensor([[0.0, 0, 0], [1, 2, 2], [2, 4, 4], [0, 0, 0], [0, 0, 3]]).double()
    vector = torch.tensor([1.0, 1, 1]).double()
    c, rank, margin = projection_weights(rows @ rows.mT, rows @ vector)
    assert rank.item() == 2
    assert c[[0, 3]].tolist() == [0, 0]
    assert (c[1] == 0) != (c[2] == 0)
    assert margin.item() == pytest.approx(0, abs=1e-15)


def test_margin_is_the_squared_distance_of_the_row_taken_last(impl):
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1e-2], [0, 0, 0]]).double()
    _, rank, margin = projection_weights(rows @ rows.mT, torch.zeros(4))
    assert rank.item() == 3
    assert margin.item() == pytest.approx(1e-4, rel=1e-3)  # a zero row does not count
    _, rank, margin = projection_weights(torch.eye(3), torch.zeros(3))
    assert (rank.item(), margin.item()) == (3, 1)


def test_rtol_is_a_relative_distance(impl):
    distance = 1e-3
    rows = torch.tensor([[1e5, 0], [1e-5, 1e-5 * distance]]).double()
    for rtol, expected in ((0.9 * distance, 2), (1.1 * distance, 1)):
        _, rank, _ = projection_weights(rows @ rows.mT, torch.zeros(2), rtol=rtol)
        assert rank.item() == expected


@pytest.mark.parametrize("m", [1, 2, 3, 17, 130])
def test_solves_well_conditioned_systems(m, impl):
    rows = torch.randn(m, 3 * m, dtype=torch.float64)
    gramian, products = rows @ rows.mT, torch.randn(m, dtype=torch.float64)
    c, rank, _ = projection_weights(gramian, products)
    assert rank.item() == m
    assert (gramian @ c - products).norm() <= 1e-12 * products.norm()


def test_is_batched(impl):
    gramians, products = [], []
    for family in ("gaussian", "duplicate", "zero rows", "graded", "parallel", "all zero"):
        _, _, gramian, product = problem(family)
        gramians.append(gramian)
        products.append(product)
    batch = torch.stack(gramians).view(2, 3, 6, 6), torch.stack(products).view(2, 3, 6)
    c, rank, margin = projection_weights(*batch)
    assert (c.shape, rank.shape, margin.shape) == ((2, 3, 6), (2, 3), (2, 3))
    for k, (gramian, product) in enumerate(zip(gramians, products, strict=True)):
        alone = projection_weights(gramian, product)
        torch.testing.assert_close(c.view(6, 6)[k], alone[0], rtol=1e-9, atol=0)
        assert rank.view(6)[k] == alone[1]
        assert margin.view(6)[k].item() == pytest.approx(alone[2].item(), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 3, 3), (1, 1)])
def test_empty_shapes(shape, impl):
    c, rank, margin = projection_weights(torch.zeros(shape), torch.zeros(shape[:-1]))
    assert c.shape == shape[:-1]
    assert not c.any()
    assert not rank.any()
    assert torch.equal(margin, torch.ones(shape[:-2], dtype=torch.float64))


def test_reads_strided_gramians(impl):
    rows = torch.randn(2, 5, 31, dtype=torch.float64)
    gramian, products = rows @ rows.mT, torch.randn(5, 2, dtype=torch.float64).mT
    spaced = torch.stack([gramian, gramian], -1)[..., 0]
    expected = projection_weights(gramian, products.contiguous())[0]
    assert torch.equal(projection_weights(spaced, products)[0], expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 9), spread=st.integers(0, 60), seed=st.integers(0, 99))
def test_scale_of_rows_does_not_matter(m, spread, seed):
    torch.manual_seed(seed)
    rows = torch.randn(m, 2 * m, dtype=torch.float64)
    gramian, products = rows @ rows.mT, torch.randn(m, dtype=torch.float64)
    scale = 2.0 ** torch.randint(-spread, spread + 1, (m,)).double()
    c, rank, margin = projection_weights(gramian, products)
    scaled = projection_weights(gramian * scale * scale[:, None], products * scale)
    torch.testing.assert_close(scaled[0] * scale, c, rtol=1e-9, atol=1e-12)
    assert scaled[1] == rank
    assert scaled[2].item() == pytest.approx(margin.item(), rel=1e-9)


def test_smallest_resolved_distance():
    assert default_rtol(1) == pytest.approx(4.2e-8, rel=0.01)
    assert default_rtol(0) == default_rtol(1)
    assert default_rtol(100) == pytest.approx(10 * default_rtol(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_never_taken_for_zero_rows(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        projection_weights(gramian, torch.ones(3))


def test_inputs_are_untouched(impl):
    _, _, gramian, products = problem("duplicate")
    before = gramian.clone(), products.clone()
    projection_weights(gramian, products)
    assert torch.equal(gramian, before[0])
    assert torch.equal(products, before[1])


@pytest.mark.parametrize(
    "gramian,products,message",
    [
        (torch.ones(2, 3), torch.ones(2), r"gramian must be \[..., m, m\], got \[2, 3\]"),
        (torch.ones(3), torch.ones(3), r"gramian must be \[..., m, m\], got \[3\]"),
        (torch.eye(3), torch.ones(2), r"products must be \[3\] to match gramian, got \[2\]"),
        (torch.tensor(1.0), torch.tensor(1.0), r"gramian must be \[..., m, m\], got \[\]"),
        ([[1.0]], torch.ones(1), "gramian must be a Tensor, got list"),
        (torch.eye(1), [1.0], "products must be a Tensor, got list"),
        (torch.eye(1).int(), torch.ones(1), "gramian must be floating point, got torch.int32"),
        (torch.eye(1), torch.ones(1, device="meta"), "products is on meta, gramian is on cpu"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(gramian, products, message):
    with pytest.raises(gs.InputError, match=message):
        projection_weights(gramian, products)


def test_gradient(impl):
    rows = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    products = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    check = lambda r, k: projection_weights(r @ r.mT, k)[0]  # noqa: E731
    assert torch.autograd.gradcheck(check, (rows, products))
    small = [t[0, :2].detach().requires_grad_() for t in (rows, products)]
    assert torch.autograd.gradgradcheck(check, small)


def test_gradient_leaves_dependent_rows_out(impl):
    gramian = torch.diag(torch.tensor([2.0, 0, 4])).double().requires_grad_()
    products = torch.tensor([1.0, 0, 1]).double().requires_grad_()
    c = projection_weights(gramian, products)[0]
    c.sum().backward()
    assert products.grad.tolist() == pytest.approx([0.5, 0, 0.25])
    assert gramian.grad.diagonal().tolist() == pytest.approx([-0.25, 0, -0.0625])


@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(needs_grad, impl):
    rows = torch.randn(2, 4, 9, dtype=torch.float64)
    args = (rows @ rows.mT).requires_grad_(needs_grad), torch.randn(2, 4).double(), 1e-7
    torch.library.opcheck(torch.ops.gradsurgery.projection_weights, args)


def test_compiles_into_one_graph(impl):
    _, _, gramian, products = problem("gaussian")
    compiled = torch.compile(projection_weights, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(gramian, products), projection_weights(gramian, products), strict=True
    ):
        assert torch.equal(a, b)
