"""CAGrad's direction: in the ball, and best for the worst row, which duality proves."""

import pytest
import torch
from scipy.optimize import minimize

import gradsurgery as gs
from gradsurgery.ops import cone_weights, conflict_averse_weights
from gradsurgery.ops.weighting import default_rtol
from tests.inputs import CONFLICTING, exact_gramian, gaussian, half_space

STATIONARY = ["opposed", "12 of 5 columns", "12 opposed of 5 columns"]
RADII = [0.3, 0.9, 1.5]  # a positive combination that vanishes is out of reach below 1, or within


def shortest(gramian):
    """A convex combination of the rows that are not zero, the shortest up to rounding."""
    counts = (gramian.diagonal() > 0).double()
    size = gramian.diagonal()[counts > 0].amin()
    x, _ = cone_weights(gramian + size * counts * counts[:, None], size * counts[None])
    return x[0] / x.sum()


def least(rows, d):
    """min <g_i, d> over the rows that are not zero."""
    return (rows[rows.any(1)] @ d).min()


def bound(rows, weights, c):
    """Of any convex combination g of rows, <g, g₀> + c |g₀| |g|: no d in the ball beats it."""
    mean, g = rows.mean(0), weights @ rows
    return g @ mean + c * mean.norm() * g.norm()


def assert_best(rows, weights, c, tolerance):
    """In the ball, and as good as a bound: then no other d is better by more than tolerance."""
    mean, d = rows.mean(0), weights @ rows
    assert (d - mean).norm() <= c * mean.norm() * (1 + tolerance)
    assert (weights >= 1 / len(rows)).all()  # exactly: x >= 0
    scale = mean.norm() * rows.norm(dim=1).max()
    x = weights - 1 / len(rows)
    candidates = [shortest(rows @ rows.mT)] + [x / x.sum()] * bool(x.any())
    gap = min(bound(rows, weights, c) for weights in candidates) - least(rows, d)
    assert gap.abs() <= tolerance * scale


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("family", [f for f in CONFLICTING if f not in ("all zero", "graded")])
def test_no_direction_of_the_ball_serves_the_worst_row_better(family, c, impl):
    rows = CONFLICTING[family]()
    weights = conflict_averse_weights(exact_gramian(rows), c)
    assert_best(rows, weights, c, 1e-7 if "near" in family else 1e-9)


@pytest.mark.parametrize("c", [0.5, 1, 2])
@pytest.mark.parametrize(
    "rows",
    [[[-2, 1], [-2, 2], [-1, -3]], [[1, 0], [2, 2], [2, 0], [-1, -3]], [[1, 0], [2, 1], [3, 0]]],
)
def test_more_rows_than_columns(rows, c, impl):
    rows = torch.tensor(rows).double()
    assert_best(rows, conflict_averse_weights(rows @ rows.mT, c), c, 1e-10)


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("m", [2, 3, 5])
def test_matches_a_general_solver(m, c, impl):
    rows = gaussian(m, 7)
    mean = rows.mean(0)
    d = conflict_averse_weights(rows @ rows.mT, c) @ rows
    # on the simplex, the least of CAGrad's dual
    found = minimize(
        lambda w: bound(rows, torch.from_numpy(w), c).item(),
        torch.full((m,), 1 / m).numpy(),
        bounds=[(0, 1)] * m,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15},
    )
    g = torch.from_numpy(found.x) @ rows
    best = mean + c * mean.norm() / g.norm() * g
    assert (d - best).norm() <= 1e-5 * mean.norm()
    assert least(rows, d) >= found.fun - 1e-9


@pytest.mark.parametrize("family", CONFLICTING)
def test_implementations_agree(family, monkeypatch):
    rows = CONFLICTING[family]()
    gramian, found = exact_gramian(rows), []
    for impl in ("torch", "native"):
        monkeypatch.setenv("GRADSURGERY_BACKEND", impl)
        found.append(conflict_averse_weights(gramian, 0.5) @ rows)
    error = (found[0] - found[1]).norm()
    assert error <= (1e-5 if "near" in family else 1e-10) * rows.mean(0).norm()


def test_hand_worked(impl):
    # of two rows as long as each other both products grow alike: d = (1 + c) g₀
    weights = conflict_averse_weights(torch.eye(2), 0.5)
    assert weights.tolist() == pytest.approx([0.75, 0.75])
    # as CAGrad's example in torchjd
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    d = conflict_averse_weights(rows @ rows.mT, 0.5) @ rows
    assert d.tolist() == pytest.approx([0.1835, 1.2041, 1.2041], abs=5e-5)


@pytest.mark.parametrize("c,expected", [(0, -0.5), (0.5, -0.25), (1, 0), (2, 0)])
def test_opposed_rows(c, expected, impl):
    # g and -2 g, their mean -g / 2: nothing is better than d = 0, in reach from c = 1
    rows = torch.tensor([[1.0], [-2.0]]).double()
    d = conflict_averse_weights(rows @ rows.mT, c) @ rows
    assert d.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family", STATIONARY)
def test_stationary_rows_get_the_nearest_direction_without_conflict(family, impl):
    rows = CONFLICTING[family]()
    gramian = exact_gramian(rows)
    assert (shortest(gramian) @ rows).norm() <= 1e-7  # a positive combination vanishes
    weights = conflict_averse_weights(gramian, 1.5)
    nearest, _ = cone_weights(gramian, -gramian.mean(0)[None])
    d = rows.mean(0) + nearest[0] @ rows
    assert (weights @ rows - d).norm() <= 1e-8 * rows.mean(0).norm()
    assert least(rows, weights @ rows) >= -1e-8 * rows.norm(dim=1).max()


@pytest.mark.parametrize("family", CONFLICTING)
def test_without_a_radius_the_mean(family, impl):
    rows = CONFLICTING[family]()
    weights = conflict_averse_weights(exact_gramian(rows), 0)
    assert torch.equal(weights, torch.full_like(weights, 1 / len(rows)))


@pytest.mark.parametrize("rows", [[[0.0, 0]], [[0.0, 0], [0, 0]], [[1.0, 2], [-1, -2]]])
def test_a_mean_of_zero_stays(rows, impl):
    rows = torch.tensor(rows)
    weights = conflict_averse_weights(rows @ rows.mT, 0.5)
    assert torch.equal(weights, torch.full_like(weights, 1 / len(rows)))


def test_one_row_is_lengthened(impl):
    assert conflict_averse_weights(torch.tensor([[9.0]]), 0.5).item() == pytest.approx(1.5)


def test_zero_rows_count_in_the_mean_alone(impl):
    rows = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 1]]).double()
    weights = conflict_averse_weights(rows @ rows.mT, 0.5)
    assert weights.tolist() == pytest.approx([0.25, 0.375, 0.25, 0.375])


@pytest.mark.parametrize("m,n", [(33, 12), (100, 300), (256, 64)])
def test_many_rows(m, n, impl):
    if impl == "torch" and m > 33:
        pytest.skip("minutes: a bisection of one row at a time")
    rows = half_space(m, n)
    assert_best(rows, conflict_averse_weights(rows @ rows.mT, 0.7), 0.7, 1e-10)


@pytest.mark.parametrize("family", ["gaussian", "12 in a half space of 5 columns", "opposed"])
def test_total_scale_changes_nothing(family, impl):
    gramian = exact_gramian(CONFLICTING[family]())
    weights = conflict_averse_weights(gramian, 0.7)
    for scale in (1e-12, 1e12):
        scaled = conflict_averse_weights(gramian * scale**2, 0.7)
        torch.testing.assert_close(scaled, weights, rtol=1e-10, atol=0)


@pytest.mark.parametrize("decades", [3, 6, 9, 12])
def test_norms_that_differ(decades, impl):
    rows = gaussian(6, 97) * torch.logspace(0, decades, 6, dtype=torch.float64)[:, None]
    assert_best(rows, conflict_averse_weights(exact_gramian(rows), 0.7), 0.7, 1e-10)


@pytest.mark.parametrize("family", ["gaussian", "alike", "duplicate", "zero rows", "opposed"])
def test_a_float32_gramian_gives_what_float32_resolves(family, impl):
    rows = CONFLICTING[family]()
    gramian = exact_gramian(rows)
    weights = conflict_averse_weights(gramian.float(), 0.7)
    assert_best(rows, weights, 0.7, default_rtol(len(rows), torch.float32))


def test_is_batched(impl):
    families = ["gaussian", "duplicate", "zero rows", "alike", "parallel", "opposed"]
    gramians = torch.stack([exact_gramian(CONFLICTING[family]()) for family in families])
    weights = conflict_averse_weights(gramians.view(2, 3, 6, 6), 0.5)
    assert weights.shape == (2, 3, 6)
    for k, gramian in enumerate(gramians):
        assert torch.equal(weights.view(6, 6)[k], conflict_averse_weights(gramian, 0.5))


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 3, 3)])
def test_empty_shapes(shape, impl):
    assert conflict_averse_weights(torch.zeros(shape), 0.5).shape == shape[:-1]


def test_reads_strided_gramians_and_leaves_them(impl):
    gramian = exact_gramian(gaussian(5, 31))
    spaced, before = torch.stack([gramian, gramian], -1)[..., 0], gramian.clone()
    assert torch.equal(conflict_averse_weights(spaced, 0.5), conflict_averse_weights(gramian, 0.5))
    assert torch.equal(spaced, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_never_taken_for_zero_rows(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        conflict_averse_weights(gramian, 0.5)


@pytest.mark.parametrize(
    "gramian,c,message",
    [
        (torch.ones(2, 3), 0.5, r"gramian must be \[..., m, m\], got \[2, 3\]"),
        ([[1.0]], 0.5, "gramian must be a Tensor, got list"),
        (torch.eye(1).int(), 0.5, "gramian must be floating point, got torch.int32"),
        (torch.eye(1), -0.5, "c must be 0 or more, got -0.5"),
        (torch.eye(1), float("nan"), "c must be 0 or more, got nan"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(gramian, c, message):
    with pytest.raises(gs.InputError, match=message):
        conflict_averse_weights(gramian, c)


def test_has_no_gradient_and_says_so(impl):
    weights = conflict_averse_weights(exact_gramian(gaussian(3, 9)).requires_grad_(), 0.5)
    with pytest.raises(gs.InputError, match="conflict_averse_weights has no derivative here"):
        weights.sum().backward()


def test_registration(impl):
    gramian = exact_gramian(CONFLICTING["gaussian"]())
    op = torch.ops.gradsurgery.conflict_averse_weights
    torch.library.opcheck(op, (gramian, 0.5, 1e-7, 1e-14))


def test_compiles_into_one_graph(impl):
    gramian = exact_gramian(CONFLICTING["gaussian"]())
    compiled = torch.compile(conflict_averse_weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gramian, 0.5), conflict_averse_weights(gramian, 0.5))
