"""Projection on the cone of rows: optimal at any scale and rank, batched, differentiable."""

import pytest
import torch
from scipy.optimize import nnls

import gradsurgery as gs
from gradsurgery.ops import cone_weights
from gradsurgery.ops.cone import dual_projection_weights
from gradsurgery.ops.weighting import default_rtol
from tests.inputs import CONFLICTING, exact_gramian, gaussian, half_space

NEAR = ("near duplicate 1e-06", "near duplicate 1e-07")  # dependent, or nearly


def problem(family, p=4):
    """Rows, p vectors, K, and the products of the vectors."""
    rows = CONFLICTING[family]()
    vectors = gaussian(p, rows.shape[1])
    return rows, vectors, exact_gramian(rows), vectors @ rows.mT


def missed(gramian, products, x):
    """How far x is from optimal, [p]: unit rows, the largest product 1; apart from the kernel's."""
    norms = gramian.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    size = (products * scale).amax(-1, keepdim=True).clamp_min(1e-300)
    gradient = (products * scale - (x @ gramian) * scale) / size
    return torch.where(x > 0, gradient.abs(), gradient.clamp_min(0)).amax(-1)


def nearest(rows, vector):
    """The point of the cone by Lawson and Hanson on the rows, not on their Gramian."""
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, 0)
    return torch.from_numpy(nnls(unit.mT.numpy(), vector.numpy())[0]) @ unit


@pytest.mark.parametrize("family", CONFLICTING)
def test_meets_the_conditions_of_a_minimum(family, impl):
    _, _, gramian, products = problem(family)
    for b in (products, -gramian):  # of vectors, and of every row's negative
        x, residual = cone_weights(gramian, b)
        norms = gramian.diagonal().sqrt()
        sizes = (b / norms.clamp_min(1e-300)).amax(-1).clamp_min(1e-300)
        # coefficients of unit rows: large where rows nearly cancel
        tolerance = 4e-14 * (1 + (x * norms).sum(-1) / sizes)
        if family in NEAR:  # rows nearer than rtol are left out
            tolerance = tolerance + default_rtol(6)
        assert (x >= 0).all()
        assert (missed(gramian, b, x) <= tolerance).all()
        assert (residual <= tolerance).all()
        assert (x[:, gramian.diagonal() == 0] == 0).all()


@pytest.mark.parametrize("family", CONFLICTING)
def test_weighted_rows_are_the_nearest_of_the_cone(family, impl):
    rows, vectors, gramian, products = problem(family)
    x, _ = cone_weights(gramian, products)
    for weights, vector in zip(x, vectors, strict=True):
        error = (weights @ rows - nearest(rows, vector)).norm() / vector.norm()
        assert error <= (1e-6 if "near" in family else 1e-11)


@pytest.mark.parametrize("family", CONFLICTING)
def test_implementations_agree(family, monkeypatch):
    rows, vectors, gramian, products = problem(family)
    found = []
    for impl in ("torch", "native"):
        monkeypatch.setenv("GRADSURGERY_BACKEND", impl)
        found.append(cone_weights(gramian, products)[0] @ rows)
    # of rows that tie either may be taken: the projections are the same
    error = (found[0] - found[1]).norm(dim=1) / vectors.norm(dim=1)
    assert (error <= (1e-7 if "near" in family else 1e-12)).all()


def test_hand_worked(impl):
    rows = torch.tensor([[1.0, 0], [0, 2]]).double()
    vectors = torch.tensor([[3.0, 4], [-1, 4], [3, -1], [-1, -1], [0, 0]]).double()
    x, residual = cone_weights(rows @ rows.mT, vectors @ rows.mT)
    assert x.tolist() == [[3, 2], [0, 2], [3, 0], [0, 0], [0, 0]]
    assert residual.tolist() == [0] * 5


def test_rows_that_a_dependent_one_replaces(impl):
    # the nearest d with d_1 >= 1, d_2 >= 0.5, -0.6 d_1 + 0.8 d_2 >= -0.15 is (1, 0.5625)
    rows = torch.tensor([[1, 0], [0, 1], [-0.6, 0.8]]).double()
    x, residual = cone_weights(rows @ rows.mT, torch.tensor([[1, 0.5, -0.15]]).double())
    assert x[0].tolist() == pytest.approx([1.421875, 0, 0.703125])
    assert residual.item() <= 1e-15


@pytest.mark.parametrize("family", CONFLICTING)
def test_products_of_no_vector_have_a_minimum_too(family, impl):
    # that of min |d|² / 2 with J d >= b, which some d meets
    _, _, gramian, products = problem(family, 20)
    norms = gramian.diagonal().sqrt()
    products -= 0.1 * torch.rand_like(products) * norms
    x, residual = cone_weights(gramian, products)
    sizes = (products / norms.clamp_min(1e-300)).amax(-1).clamp_min(1e-300)
    tolerance = 4e-14 * (1 + (x * norms).sum(-1) / sizes)
    tolerance = tolerance + (default_rtol(6) if family in NEAR else 0)
    assert (missed(gramian, products, x) <= tolerance).all()
    assert (residual <= tolerance).all()


def test_sum_of_rows_without_conflict(impl):
    # UPGrad's: each row plus the nearest of the cone to its negative; PCGrad's too for two rows
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    gramian = rows @ rows.mT
    x, _ = cone_weights(gramian, -gramian)
    assert x.tolist() == [pytest.approx([0, 22 / 38]), pytest.approx([22 / 18, 0])]
    assert ((torch.eye(2) + x).sum(0) @ rows).tolist() == pytest.approx(
        [-4 + 6 * 22 / 38 + 6 - 4 * 22 / 18, *[2 + 22 / 38 + 22 / 18] * 2]
    )


def test_shortest_convex_combination(impl):
    # MGDA's: x of K + s 1 1ᵀ and s 1 is a multiple of it
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    gramian = rows @ rows.mT
    x, _ = cone_weights(gramian + 18, torch.full((1, 2), 18.0))
    assert (x / x.sum()).tolist() == [pytest.approx([0.6, 0.4])]


@pytest.mark.parametrize("rows_of", [gaussian, half_space])
@pytest.mark.parametrize("m,n", [(1, 5), (2, 5), (33, 20), (64, 200), (256, 64), (256, 512)])
def test_many_rows(m, n, rows_of, impl):
    rows = rows_of(m, n)
    gramian, products = rows @ rows.mT, gaussian(2, n) @ rows.mT
    for b in (products, -gramian[:2]):
        x, residual = cone_weights(gramian, b)
        assert (x >= 0).all()
        assert (missed(gramian, b, x) <= 1e-12).all()
        assert (residual <= 1e-12).all()


def test_zero_rows_and_copies(impl):
    rows = torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 0], [0, 3]]).double()
    x, residual = cone_weights(rows @ rows.mT, (rows @ torch.tensor([5.0, 6]).double())[None])
    assert x[0, [0, 3]].tolist() == [0, 0]
    assert (x[0, 1] == 0) != (x[0, 2] == 0)
    assert (x[0] @ rows).tolist() == pytest.approx([5, 6])
    assert residual.item() <= 1e-15


def test_rtol_is_a_relative_distance(impl):
    distance = 1e-3
    rows = torch.tensor([[1e5, 0], [1e-5, 1e-5 * distance]]).double()
    products = (rows @ torch.tensor([1.0, distance / 2]).double())[None]
    for rtol, expected in ((0.9 * distance, 2), (1.1 * distance, 1)):
        x, residual = cone_weights(rows @ rows.mT, products, rtol=rtol)
        assert (x > 0).sum() == expected
        assert (residual.item() <= 1e-15) == (expected == 2)


def test_a_residual_shows_that_no_minimum_exists(impl):
    opposed = torch.tensor([[1.0, -1], [-1, 1]])
    assert cone_weights(opposed, torch.tensor([[1.0, 1], [1, -1]]))[1].tolist() == [2, 0]


@pytest.mark.parametrize("spread", [0, 20, 40])  # norms 1 to 1e12, 1e-12 to 1e12
@pytest.mark.parametrize(
    "family", ["gaussian", "opposed", "12 of 5 columns", "12 opposed of 5 columns"]
)
def test_scales_change_nothing_but_scale(family, spread, impl):
    _, _, gramian, products = problem(family)
    m = len(gramian)
    scale = 2.0 ** torch.randint(-spread, spread + 1, (m,)).double()
    x, residual = cone_weights(gramian, products)
    for total in (2.0**-40, 1, 2.0**40):
        s = scale * total
        scaled, same = cone_weights(gramian * s * s[:, None], products * s * 8)
        assert torch.equal(scaled * s / 8, x)
        assert torch.equal(same, residual)


@pytest.mark.parametrize("family", [f for f in CONFLICTING if f != "graded"])
def test_a_float32_gramian_gives_what_float32_resolves(family, impl):
    rows, vectors, gramian, products = problem(family)
    x, _ = cone_weights(gramian.float(), products)
    assert (x >= 0).all()
    exact, _ = cone_weights(gramian, products)
    error = ((x - exact) @ rows).norm(dim=1) / vectors.norm(dim=1)
    assert (error <= default_rtol(len(rows), torch.float32)).all()


def test_is_batched(impl):
    families = ["gaussian", "duplicate", "zero rows", "graded", "parallel", "opposed"]
    _, _, gramians, products = (torch.stack(t) for t in zip(*map(problem, families), strict=True))
    x, residual = cone_weights(gramians.view(2, 3, 6, 6), products.view(2, 3, 4, 6))
    assert (x.shape, residual.shape) == ((2, 3, 4, 6), (2, 3, 4))
    for k in range(6):
        alone = cone_weights(gramians[k], products[k])
        assert torch.equal(x.view(6, 4, 6)[k], alone[0])
        assert torch.equal(residual.view(6, 4)[k], alone[1])
        assert torch.equal(cone_weights(gramians[k], products[k, 1:2])[0], alone[0][1:2])


@pytest.mark.parametrize("batch,p,m", [((), 2, 0), ((), 0, 3), ((4,), 0, 0), ((0,), 2, 3)])
def test_empty_shapes(batch, p, m, impl):
    x, residual = cone_weights(torch.zeros(*batch, m, m), torch.zeros(*batch, p, m))
    assert x.shape == (*batch, p, m)
    assert torch.equal(residual, torch.zeros(*batch, p, dtype=torch.float64))


def test_reads_strided_tensors_and_leaves_them(impl):
    rows = gaussian(5, 31)
    gramian, products = rows @ rows.mT, gaussian(5, 3).mT
    spaced = torch.stack([gramian, gramian], -1)[..., 0]
    before = gramian.clone(), products.clone()
    x = cone_weights(spaced, products)[0]
    assert torch.equal(x, cone_weights(gramian, products.contiguous())[0])
    assert torch.equal(spaced, before[0])
    assert torch.equal(products, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_never_taken_for_zero_rows(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        cone_weights(gramian, torch.ones(1, 3))


@pytest.mark.parametrize(
    "gramian,products,message",
    [
        (torch.ones(2, 3), torch.ones(1, 2), r"gramian must be \[..., m, m\], got \[2, 3\]"),
        (torch.eye(3), torch.ones(3), r"products must be \['p', 3\] to match gramian, got \[3\]"),
        (torch.eye(3), torch.ones(3, 2), r"products must be \['p', 3\] .* got \[3, 2\]"),
        (torch.ones(4, 1, 1), torch.ones(3, 1, 1), r"products must be \[4, 'p', 1\] .* got"),
        ([[1.0]], torch.ones(1, 1), "gramian must be a Tensor, got list"),
        (torch.eye(1), [[1.0]], "products must be a Tensor, got list"),
        (torch.eye(1).int(), torch.ones(1, 1), "gramian must be floating point, got torch.int32"),
        (torch.eye(1), torch.ones(1, 1, device="meta"), "products is on meta, gramian is on cpu"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(gramian, products, message):
    with pytest.raises(gs.InputError, match=message):
        cone_weights(gramian, products)


@pytest.mark.parametrize("rtol", [-1e-9, 1.0, float("nan")])
def test_rejects_an_rtol_out_of_range(rtol):
    with pytest.raises(gs.InputError, match=rf"rtol must be in \[0, 1\), got {rtol}"):
        cone_weights(torch.eye(1), torch.ones(1, 1), rtol=rtol)


def test_gradient(impl):
    rows = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    products = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def check(r, b):
        return cone_weights(r @ r.mT, b)[0]

    used = check(rows, products) > 0
    assert used.any()
    assert not used.all()
    assert torch.autograd.gradcheck(check, (rows, products))
    small = [t[0, :2, :4].detach().requires_grad_() for t in (rows, products)]
    small[1] = small[1][:, :2].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(check, small)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(needs_grad, impl):
    _, _, gramian, products = problem("gaussian")
    args = gramian.requires_grad_(needs_grad), products, 1e-7, 1e-14
    torch.library.opcheck(torch.ops.gradsurgery.cone_weights, args)


def test_compiles_into_one_graph(impl):
    _, _, gramian, products = problem("gaussian")
    compiled = torch.compile(cone_weights, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(gramian, products), cone_weights(gramian, products), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [(), (3,), (2, 0)])
@pytest.mark.parametrize("m", [0, 1, 2, 7, 33])
@pytest.mark.parametrize("given", [False, True])
def test_a_sum_projected_on_the_dual_cone(given, m, batch):
    """One call, or by `cone_weights` where someone has to see the steps: the same weights."""
    rows = torch.randn(*batch, m, 5, dtype=torch.float64)
    gram = (rows @ rows.mT).mT
    wanted = torch.rand(m, dtype=torch.float64) if given else None
    weights = dual_projection_weights(gram, wanted, 1e-7, 1e-14)
    seen = dual_projection_weights(gram.clone().requires_grad_(), wanted, 1e-7, 1e-14)
    assert seen.requires_grad
    assert weights.shape == (*batch, m)
    torch.testing.assert_close(weights, seen.detach(), rtol=1e-9, atol=1e-11)


def test_a_sum_projected_on_the_dual_cone_by_hand():
    # rows (1, 0) and (-2, 2): their sum (-1, 2) opposes the first; without that, it is (0, 2)
    rows = torch.tensor([[1.0, 0], [-2, 2]], dtype=torch.float64)
    weights = dual_projection_weights(rows @ rows.mT, torch.ones(2).double(), 1e-7, 1e-14)
    torch.testing.assert_close(weights @ rows, torch.tensor([0.0, 2]).double())
    # the mean (-0.5, 1), likewise
    weights = dual_projection_weights(rows @ rows.mT, None, 1e-7, 1e-14)
    torch.testing.assert_close(weights @ rows, torch.tensor([0.0, 1]).double())
