"""Eigenvalues and eigenvectors as rows: what they promise of any Gramian, and their gradient."""

import mpmath
import pytest
import torch

import gradsurgery as gs
from gradsurgery.ops import eigen
from tests.inputs import CONFLICTING, exact_gramian, gaussian


def assert_decomposes(gramian, values, vectors):
    """K = Vᵀ diag(λ) V, V Vᵀ = 1, λ ascending, to rounding."""
    m, size = gramian.shape[-1], gramian.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(m, dtype=torch.float64)
    assert ((vectors @ vectors.mT - eye).abs() <= 1e-15 * (8 + m)).all()
    assert ((vectors.mT * values[..., None, :] @ vectors - gramian).abs() <= 1e-14 * size).all()
    assert (values.diff() >= 0).all()


@pytest.mark.parametrize("family", CONFLICTING)
def test_decomposes(family, impl):
    gramian = exact_gramian(CONFLICTING[family]())
    assert_decomposes(gramian, *eigen(gramian))


@pytest.mark.parametrize("m,n", [(1, 3), (2, 1), (33, 20), (130, 300), (256, 64)])
def test_many_rows(m, n, impl):
    rows = gaussian(m, n)
    values, vectors = eigen(rows @ rows.mT)
    assert_decomposes(rows @ rows.mT, values, vectors)
    assert (values[: max(m - n, 0)].abs() <= 1e-14 * values[-1]).all()


def test_small_values_of_graded_rows_are_relatively_precise(monkeypatch):
    monkeypatch.setenv("GRADSURGERY_BACKEND", "native")
    gramian = exact_gramian(CONFLICTING["graded"]())  # norms from 1e-12 to 1e12
    values, vectors = eigen(gramian)
    with mpmath.workdps(80):
        exact, _ = mpmath.eigsy(mpmath.matrix(gramian.tolist()))
    assert values.tolist() == pytest.approx(sorted(map(float, exact)), rel=1e-14)
    assert ((vectors @ vectors.mT - torch.eye(6)).abs() <= 1e-14).all()
    # in a batch with others it is the same
    batch, _ = eigen(torch.stack([torch.eye(6).double(), gramian]))
    assert torch.equal(batch[1], values)


def test_hand_worked(impl):
    values, vectors = eigen(torch.tensor([[2.0, 1], [1, 2]]))
    assert values.tolist() == pytest.approx([1, 3])
    # v_k in row k, of either sign
    products = [v[:, None] * v for v in vectors]
    assert products[0].flatten().tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert products[1].flatten().tolist() == pytest.approx([0.5] * 4)
    values, vectors = eigen(torch.diag(torch.tensor([3.0, 0, 1])))
    assert values.tolist() == [0, 1, 3]
    assert vectors.abs().tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_total_scale_scales_the_values(scale, impl):
    gramian = exact_gramian(gaussian(6, 97))
    values, _ = eigen(gramian)
    scaled, vectors = eigen(gramian * scale)
    torch.testing.assert_close(scaled / scale, values, rtol=1e-13, atol=0)
    assert_decomposes(gramian * scale, scaled, vectors)


def test_is_batched(impl):
    gramians = torch.stack([exact_gramian(gaussian(5, 9)) for _ in range(6)])
    values, vectors = eigen(gramians.view(2, 3, 5, 5).float())
    assert (values.shape, vectors.shape) == ((2, 3, 5), (2, 3, 5, 5))
    assert values.dtype == vectors.dtype == torch.float64
    assert vectors.is_contiguous()
    for k, gramian in enumerate(gramians.float()):
        alone = eigen(gramian)
        assert torch.equal(values.view(6, 5)[k], alone[0])
        assert torch.equal(vectors.view(6, 5, 5)[k], alone[1])


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 3, 3)])
def test_empty_shapes(shape, impl):
    values, vectors = eigen(torch.zeros(shape))
    assert (values.shape, vectors.shape) == (shape[:-1], shape)


def test_reads_strided_gramians_and_leaves_them(impl):
    gramian = exact_gramian(gaussian(5, 31))
    spaced, before = torch.stack([gramian, gramian], -1)[..., 0], gramian.clone()
    assert all(map(torch.equal, eigen(spaced), eigen(gramian)))
    assert torch.equal(spaced, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_named(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        eigen(gramian)


@pytest.mark.parametrize(
    "gramian,message",
    [
        (torch.ones(2, 3), r"gramian must be \[..., m, m\], got \[2, 3\]"),
        ([[1.0]], "gramian must be a Tensor, got list"),
        (torch.eye(1).int(), "gramian must be floating point, got torch.int32"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(gramian, message):
    with pytest.raises(gs.InputError, match=message):
        eigen(gramian)


def inverse_root(rows):
    values, vectors = eigen(rows @ rows.mT)
    return (vectors.mT * values[..., None, :].rsqrt()) @ vectors


def largest_two(rows):
    """Of vectors what does not depend on signs, and not the values."""
    vectors = eigen(rows @ rows.mT)[1][..., -2:, :]
    return vectors[..., :, None] * vectors[..., None, :]


@pytest.mark.parametrize(
    "function", [lambda rows: eigen(rows @ rows.mT)[0], inverse_root, largest_two]
)
def test_gradient(function, impl):
    rows = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (rows,))
    assert torch.autograd.gradgradcheck(function, (rows[0, :3].detach().requires_grad_(),))


def test_gradient_of_equal_values_is_finite(impl):
    # a function of K that depends on no basis: of (K + 1)^-1/2 at K = 1, -2^-5/2 dK
    gramian = torch.eye(3, dtype=torch.float64, requires_grad=True)
    values, vectors = eigen(gramian)
    ((vectors.mT * (values + 1).rsqrt()) @ vectors).trace().backward()
    torch.testing.assert_close(gramian.grad, -(2**-2.5) * torch.eye(3).double())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(needs_grad, impl):
    gramian = exact_gramian(gaussian(4, 9)).requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gradsurgery.eigen, (gramian,))


def test_compiles_into_one_graph(impl):
    gramian = exact_gramian(gaussian(4, 9))
    compiled = torch.compile(eigen, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(gramian), eigen(gramian)))
