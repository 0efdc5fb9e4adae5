"""K w = w^-power: solved to rounding at any scale, zero where no such w exists."""

import math

import pytest
import torch
from scipy.optimize import nnls

import gradsurgery as gs
from gradsurgery.ops import bargaining_weights
from tests.inputs import CONFLICTING, exact_gramian, gaussian, half_space, signed

POWERS = [0.5, 1.0, 2.0, 4.0]


def nearest_combination(rows):
    """The distance from 0 of the nearest convex combination of unit rows; zero rows left out."""
    unit = rows[rows.any(1)]
    unit = unit / unit.norm(dim=1, keepdim=True)
    w, _ = nnls(
        torch.cat([unit, torch.ones(len(unit), 1)], 1).mT.numpy(), [0.0] * rows.shape[1] + [1]
    )
    w = torch.from_numpy(w)
    return ((w @ unit).norm() / w.sum()).item() if len(unit) else 1.0


def miss(gramian, w, power):
    """By how much K w · w^power is not 1, relative to the terms of K w; zero rows have w = 0."""
    counts = gramian.diagonal() > 0
    if not (w[counts] > 0).all() or w[~counts].any():
        return math.inf
    right = w[counts] ** -power
    size = (gramian.abs() @ w)[counts] + right
    return (((gramian @ w)[counts] - right).abs() / size).max().item()


def each_family(power):
    """Rows and their weights by family, those of as many rows in one batch."""
    found = {family: [make()] for family, make in CONFLICTING.items() if family != "all zero"}
    for m in (6, 12):
        batch = [pair for pair in found.values() if len(pair[0]) == m]
        weights = bargaining_weights(torch.stack([exact_gramian(rows) for (rows,) in batch]), power)
        for pair, w in zip(batch, weights, strict=True):
            pair.append(w)
    return found


@pytest.mark.parametrize("power", POWERS)
def test_solves_or_is_zero_where_a_positive_combination_vanishes(power, impl):
    wrong = {}
    for family, (rows, w) in each_family(power).items():
        distance = nearest_combination(rows)
        assert distance < 1e-12 or distance > 1e-8  # else this says nothing
        missed = w.abs().max().item() if distance < 1e-12 else miss(exact_gramian(rows), w, power)
        if missed > 1e-13:
            wrong[family] = missed
    assert not wrong


@pytest.mark.parametrize("power", POWERS)
def test_implementations_agree(power, monkeypatch):
    found = []
    for impl in ("torch", "native"):
        torch.manual_seed(0)
        monkeypatch.setenv("GRADSURGERY_BACKEND", impl)
        found.append(each_family(power))
    differing = {}
    for family, (rows, w) in found[0].items():
        # rounding of K, magnified by what is left of rows that nearly cancel
        tolerance = 1e-13 + 1e-15 / max(nearest_combination(rows), 1e-8) ** 2
        if not torch.allclose(found[1][family][1], w, rtol=tolerance, atol=0):
            differing[family] = found[1][family][1], w
    assert not differing


@pytest.mark.parametrize("power", POWERS)
def test_orthogonal_rows(power, impl):
    # |g_i|² w_i = w_i^-power
    w = bargaining_weights(torch.diag(torch.tensor([4.0, 0.25, 0])), power)
    assert w.tolist() == pytest.approx([4 ** (-1 / (1 + power)), 4 ** (1 / (1 + power)), 0])


def test_hand_worked(impl):
    # rows of norm 1 and cosine φ: (1 + φ) w² = 1
    gramian = torch.tensor([[1, -0.75], [-0.75, 1]])
    assert bargaining_weights(gramian).tolist() == pytest.approx([2, 2])
    assert bargaining_weights(gramian, 2).tolist() == pytest.approx([4 ** (1 / 3)] * 2)
    # w is that of Nash-MTL: gains <g_i, d> of d = Jᵀ w are 1 / w_i
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]]).double()
    w = bargaining_weights(rows @ rows.mT)
    assert (rows @ (w @ rows) * w).tolist() == pytest.approx([1, 1], rel=1e-13)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(
    "rows", [[[1, 0], [-2, 0]], [[0, 0], [0, 1], [1, 0], [0, -1]], [[1, 0], [-1, 2], [-1, -2]]]
)
def test_opposed_rows_have_no_bargain(rows, power, impl):
    rows = torch.tensor(rows).double()
    assert not bargaining_weights(rows @ rows.mT, power).any()


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
def test_rows_that_are_nearly_opposed_have(angle, impl):
    # two rows of cosine φ: w² = 1 / (1 + φ)
    gain = 2 * math.sin(angle / 2) ** 2
    gramian = torch.tensor([[1, gain - 1], [gain - 1, 1]], dtype=torch.float64)
    exact = (1 + gramian[0, 1].item()) ** -0.5
    # K w cancels: of its terms, rounding is 1e-16
    assert bargaining_weights(gramian).tolist() == pytest.approx([exact] * 2, rel=4e-16 / gain)


def test_the_others_solve_without_zero_rows(impl):
    rows = CONFLICTING["zero rows"]()
    zero = ~rows.any(1)
    gramian = exact_gramian(rows)
    w = bargaining_weights(gramian, 2)
    assert (w[zero] == 0).all()
    alone = bargaining_weights(gramian[~zero][:, ~zero], 2)
    torch.testing.assert_close(w[~zero], alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("power", [0.5, 1, 2])
@pytest.mark.parametrize("m,n", [(1, 3), (33, 12), (130, 200), (256, 64)])
def test_many_rows(m, n, power, impl):
    rows = half_space(m, n)
    gramian = rows @ rows.mT
    assert miss(gramian, bargaining_weights(gramian, power), power) <= 1e-12


@pytest.mark.parametrize("power", POWERS)
def test_total_scale_scales_the_weights(power, impl):
    gramian = exact_gramian(CONFLICTING["12 in a half space of 5 columns"]())
    w = bargaining_weights(gramian, power)
    for scale in (1e-12, 1e12):
        scaled = bargaining_weights(gramian * scale**2, power)
        torch.testing.assert_close(scaled * scale ** (2 / (1 + power)), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("decades", [3, 6, 12])
def test_norms_that_differ(decades, power, impl):
    rows = gaussian(6, 7) * torch.logspace(0, decades, 6, dtype=torch.float64)[:, None]
    assert nearest_combination(rows) > 1e-2
    gramian = exact_gramian(rows)
    assert miss(gramian, bargaining_weights(gramian, power), power) <= 1e-12


def test_scales_of_rows_do_not_matter_for_power_1(impl):
    gramian = exact_gramian(signed(gaussian(6, 97)))
    w, scale = bargaining_weights(gramian), 2.0 ** torch.randint(-40, 41, (6,)).double()
    scaled = bargaining_weights(gramian * scale * scale[:, None])
    torch.testing.assert_close(scaled * scale, w, rtol=1e-13, atol=0)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("family", ["gaussian", "condition 1e2", "alike", "zero rows"])
def test_a_float32_gramian_is_solved_too(family, power, impl):
    gramian = exact_gramian(CONFLICTING[family]())
    w = bargaining_weights(gramian.float(), power)
    assert w.dtype == torch.float64
    assert miss(gramian.float().double(), w, power) <= 1e-13


def test_is_batched(impl):
    families = ["gaussian", "alike", "zero rows", "graded", "opposed", "all zero"]
    gramians = torch.stack([exact_gramian(CONFLICTING[family]()) for family in families])
    w = bargaining_weights(gramians.view(2, 3, 6, 6))
    assert w.shape == (2, 3, 6)
    for k, gramian in enumerate(gramians):
        torch.testing.assert_close(w.view(6, 6)[k], bargaining_weights(gramian), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 3, 3)])
def test_empty_shapes(shape, impl):
    assert bargaining_weights(torch.zeros(shape)).shape == shape[:-1]


def test_reads_strided_gramians_and_leaves_them(impl):
    gramian = exact_gramian(gaussian(5, 31))
    spaced, before = torch.stack([gramian, gramian], -1)[..., 0], gramian.clone()
    assert torch.equal(bargaining_weights(spaced), bargaining_weights(gramian))
    assert torch.equal(spaced, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_never_taken_for_zero_rows(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        bargaining_weights(gramian)


@pytest.mark.parametrize(
    "gramian,power,message",
    [
        (torch.ones(2, 3), 1, r"gramian must be \[..., m, m\], got \[2, 3\]"),
        ([[1.0]], 1, "gramian must be a Tensor, got list"),
        (torch.eye(1).int(), 1, "gramian must be floating point, got torch.int32"),
        (torch.eye(1), 0, "power must be above 0, got 0"),
        (torch.eye(1), -1.0, "power must be above 0, got -1.0"),
        (torch.eye(1), float("nan"), "power must be above 0, got nan"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(gramian, power, message):
    with pytest.raises(gs.InputError, match=message):
        bargaining_weights(gramian, power)


@pytest.mark.parametrize("power", [1, 2])
def test_gradient(power, impl):
    rows = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def check(r):
        return bargaining_weights(r @ r.mT, power)

    assert torch.autograd.gradcheck(check, (rows,), fast_mode=True)
    assert torch.autograd.gradgradcheck(check, (rows,), fast_mode=True)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_gradient_leaves_zero_rows_and_no_bargain_out(shift, impl):
    gramian = torch.tensor([[4.0, 0, 0], [0, 0, 0], [0, 0, 1]]).double()
    gramian[0, 2] = gramian[2, 0] = -2 * shift  # opposed
    gramian.requires_grad_()
    bargaining_weights(gramian).sum().backward()
    # w = |g|^-1 = K^-1/2 of an orthogonal row
    expected = [-1 / 16, 0, -0.5] if shift == 0 else [0, 0, 0]
    assert gramian.grad.diagonal().tolist() == pytest.approx(expected)
    assert gramian.grad.isfinite().all()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(needs_grad, impl):
    gramian = exact_gramian(gaussian(4, 9)).requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gradsurgery.bargaining_weights, (gramian, 2.0, 1e-7))


def test_compiles_into_one_graph(impl):
    gramian = exact_gramian(gaussian(4, 9))
    compiled = torch.compile(bargaining_weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gramian, 2.0), bargaining_weights(gramian, 2.0))
