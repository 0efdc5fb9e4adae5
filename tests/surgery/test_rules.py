"""Every rule: golden values, what it claims, any scale, batches, state."""

import copy

import mpmath
import pytest
import torch

import gradsurgery as gs
from gradsurgery import RULES
from gradsurgery.surgery import Elementwise, Weighting
from tests.inputs import CONFLICTS, gaussian, signed, vanishing
from tests.surgery.properties import (
    FEWEST,
    OPTIONS,
    least_cosine,
    make,
    relative,
    update_of,
    weighted,
)

WEIGHTED = [name for name in RULES if weighted(name)]
CLAIMS = {
    claim: [name for name in WEIGHTED if claim in RULES[name].properties]
    for claim in ("equivariant", "non-conflicting", "linear", "invariant", "stationary")
}
J = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
# options that are in units of squared gradient norms, or of one over these
UNITS = {"modo": lambda scale: {"gamma": 0.1 / scale**2, "rho": 0.1 * scale**2}}


# golden values


@pytest.mark.parametrize(
    "name,options,expected",
    [
        ("pcgrad", {}, (0.5848, 3.8012, 3.8012)),
        ("gradvac", {}, (0.5848, 3.8012, 3.8012)),  # its targets begin at 0
        ("gradops", {}, (0.5848, 3.8012, 3.8012)),  # the span of the others is one row
        ("mgda", {}, (0, 1, 1)),
        ("imtlg", {}, (0.0767, 1, 1)),
        ("alignedmtl", {}, (0.2133, 0.9673, 0.9673)),
        ("cagrad", {"c": 0.5}, (0.1835, 1.2041, 1.2041)),
        # to second figures the public values, which come of K + 1e-4 in place of K
        ("upgrad", {}, (0.29240, 1.90058, 1.90058)),
        ("dualproj", {}, (0.55556, 1.11111, 1.11111)),
        ("mean", {}, (1, 1, 1)),
        ("sum", {}, (2, 2, 2)),
        ("constant", {}, (8, 3, 3)),
        # g_0 off g_1: (-4, 1, 1) + 22/38 (6, 1, 1)
        ("gem", {}, (-0.52632, 1.57895, 1.57895)),
        # unit rows a, b with <a, b> = -22 / sqrt(684): a + (0.02 + 22 / sqrt(684)) b, as long as a
        ("pcd", {}, (-0.82003, 2.94343, 2.94343)),
        ("agem", {}, (-0.52632, 1.57895, 1.57895)),
    ],
)
def test_golden_values(name, options, expected, impl):
    update = make(name, **options)(J)
    torch.testing.assert_close(
        update, torch.tensor(expected, dtype=torch.float64), atol=5.1e-5, rtol=0
    )


F, R = torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, -2.0]).double()


@pytest.mark.parametrize(
    "name,options,expected",
    [
        # f = (3, 4), r = (0, -2), both lowered: <f, r> = -8, |f| = 5, |r| = 2
        ("ngdiff", {}, (0.6, -0.2)),
        ("orthograd", {"alpha": 0.25}, (2.25, -0.5)),  # (0, -2) / 4 + 3 (3, 0) / 4
        ("munba", {}, (0.6 / 0.2**0.5, -0.2 / 0.2**0.5)),
        ("gru", {}, (3, 0)),  # f + 2 r
        ("blur", {"gamma": 0.5}, (2.46, 1.28)),  # r + (0.5 + 8/25) f
        ("ltuharmonize", {"mode": "forget"}, (3, -2)),  # (3, 0) + r
        ("ltuharmonize", {"mode": "retain"}, (3.96, 3.28)),  # f + r + 8/25 f
        ("ltuharmonize", {"mode": "both"}, (3.96, -0.72)),
        ("gdrgma", {"mix": 0.25}, (0.25 * 3 + 0.75 * 0.96, -0.75 * 0.72)),
        ("sago", {"gamma": 2.0, "alpha": 3.0}, (6, -6)),  # r is 0: gamma f; signs differ: alpha r
        ("salun", {"share": 0.5}, (0, 2)),
    ],
)
def test_pairs_worked_by_hand(name, options, expected, impl):
    expected = torch.tensor(expected, dtype=torch.float64)
    lowered = make(name, objective="lower", **options)(torch.stack([F, R]))
    torch.testing.assert_close(lowered, expected, atol=1e-12, rtol=0)
    # the gradient of a loss that is to be raised is -f
    raised = make(name, objective="raise", **options)(torch.stack([-F, R]))
    torch.testing.assert_close(raised, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [n for n in RULES if "forget" in RULES[n].roles])
def test_forgetting_raises_an_ordinary_forget_loss(name, impl):
    # no conflict: the forget gradient is orthogonal to the retain gradients
    rows = torch.eye(3, 5).double()
    rule = make(name)
    update = rule(rows, forget=0)
    assert update @ rows[0] < 0
    assert (rows[1:] @ update >= 0).all()


@pytest.mark.parametrize("name", [n for n in RULES if "forget" in RULES[n].roles])
def test_forget_rows_may_be_any(name, impl):
    rows, rule = gaussian(5, 9), make(name)
    expected = rule(torch.stack([rows[[1, 3]].mean(0), *rows[[0, 2, 4]]]), forget=0)
    mask = torch.tensor([False, True, False, True, False])
    for forget in ([1, 3], mask, (3, -4), slice(1, None, 2)):
        torch.testing.assert_close(rule(rows, forget=forget), expected)


# definitions, by other means


@pytest.mark.parametrize("family", CONFLICTS)
def test_two_rows_have_closed_forms(family, impl):
    rows = CONFLICTS[family](2, 9)
    pcgrad, upgrad = (make(name)(rows) for name in ("pcgrad", "upgrad"))
    assert (pcgrad - 2 * upgrad).norm() <= 1e-7 * rows.norm(dim=1).min()
    a, b = rows
    # min-norm point of a segment
    t = ((b @ (b - a)) / ((b - a) @ (b - a))).clamp(0, 1)
    assert (make("mgda")(rows) - t * a - (1 - t) * b).norm() <= 1e-7 * min(a.norm(), b.norm())
    f = gs.MUNBa(objective="lower")(rows)
    if family not in ("duplicate", "zero rows", "opposed", "vanishing"):
        assert relative(f, make("nashmtl")(rows)) <= 1e-9


@pytest.mark.parametrize("m,n", [(3, 8), (7, 4), (20, 50)])
def test_mgda_is_the_least_norm(m, n, impl):
    rows = signed(gaussian(m, n)) + 0.3
    weights = gs.MGDA().weights(rows @ rows.mT)
    update = weights @ rows
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    # optimal: no row is less along the update than the update itself
    assert ((rows @ update) - update @ update >= -1e-12).all()


@pytest.mark.parametrize("m,n", [(3, 8), (6, 6)])
def test_upgrad_projects_each_row(m, n, impl):
    rows = signed(gaussian(m, n))
    update = make("upgrad")(rows)
    parts = []
    for g in rows:  # Dykstra's alternating projections
        x, corrections = g.clone(), torch.zeros(m, n).double()
        for _ in range(4000):
            for j in range(m):
                y = x + corrections[j]
                x = y - min(float(y @ rows[j]), 0) / float(rows[j] @ rows[j]) * rows[j]
                corrections[j] = y - x
        parts.append(x)
    assert relative(update, torch.stack(parts).mean(0)) <= 1e-6


def test_upgrad_prefers(impl):
    rows = signed(gaussian(3, 9))
    parts = [gs.UPGrad(preference=p)(rows) for p in torch.eye(3).tolist()]
    torch.testing.assert_close(
        gs.UPGrad(preference=[0.5, 2.0, 0.0])(rows), 0.5 * parts[0] + 2 * parts[1]
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_fairgrad_shares_the_gain(alpha, impl):
    rows = signed(gaussian(4, 9))
    gram = rows @ rows.mT
    weights = gs.FairGrad(alpha=alpha).weights(gram)
    assert (weights > 0).all()
    torch.testing.assert_close((gram @ weights) ** -alpha, weights)


@pytest.mark.parametrize("name", ["nashmtl", "fairgrad"])
def test_coarse_gramians_are_not_taken_for_opposed_rows(name, impl):
    gram = (torch.eye(16) + 0.02 * torch.rand(16, 16)).mT.triu()
    gram = gram + gram.triu(1).mT
    coarse, fine = (make(name).weights(g) for g in (gram.half(), gram.half().double()))
    torch.testing.assert_close(coarse, fine)
    assert (fine > 0).all()


def test_nashmtl_shortens(impl):
    rows = signed(gaussian(4, 9))
    assert gs.NashMTL()(rows).norm() == pytest.approx(2)  # sqrt(m)
    assert gs.NashMTL(max_norm=0.5)(rows).norm() == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["imtlg", "config"])
def test_of_opposed_rows_nothing_is_left(name, impl):
    for scale in torch.rand(50).tolist():
        g = gaussian(2, 7)
        for rows in (torch.cat([g[:1], -scale * g[:1]]), torch.cat([g, -g])):
            if name == "imtlg" and len(rows) == 2:  # pinv(K) sqrt(diag K) = (1, -scale) / ..
                expected = (1 + scale**2) / (1 - scale) * g[0]
                torch.testing.assert_close(make(name)(rows), expected, rtol=1e-6, atol=0)
            else:
                assert make(name)(rows).norm() <= 1e-7 * rows.norm()


@pytest.mark.parametrize("spread", [0, 3, 6])
def test_imtlg_is_its_formula_on_dependent_rows(spread, impl):
    """Against K = A R Rᵀ Aᵀ in 120 digits, with A and R of full rank r."""
    if impl == "torch" and spread:
        pytest.skip("torch's eigh resolves eigenvalues to rounding of the largest only")
    for trial in range(4):
        mixed = torch.cat([torch.eye(3), torch.randint(-3, 4, (2, 3)).float()]).double()
        if trial % 2:
            mixed[3] = 2 * mixed[0]
        mixed *= 10.0 ** torch.randint(-spread, spread + 1, (5, 1)).double()
        basis = torch.randint(-9, 10, (3, 8)).double()
        with mpmath.workdps(120):
            a, r = (mpmath.matrix(part.tolist()) for part in (mixed, basis))
            half = a * mpmath.cholesky(r * r.T)  # pinv(H Hᵀ) = H (Hᵀ H)⁻² Hᵀ
            norms = mpmath.matrix([mpmath.norm((a * r)[i, :]) for i in range(5)])
            solved = mpmath.lu_solve(half.T * half, half.T * norms)
            v = half * mpmath.lu_solve(half.T * half, solved)
            expected = torch.tensor([float(x / sum(v)) for x in v], dtype=torch.float64)
        rows = mixed @ basis
        weights = gs.IMTLG().weights(rows @ rows.mT)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-9 * expected.norm())
        assert relative(weights @ rows, expected @ rows) <= 1e-7


@pytest.mark.parametrize("ratio", [1e6, 1e9, 1e12])
def test_alignedmtl_tells_a_small_row_from_a_dependent_one(ratio, impl):
    if impl == "torch":
        pytest.skip("torch's eigh resolves eigenvalues to rounding of the largest only")
    q = torch.linalg.qr(gaussian(6, 3)).Q.mT
    rows = torch.stack([ratio * q[0], ratio * q[1], ratio * (0.6 * q[0] + 0.8 * q[1]), q[2]])
    update = gs.AlignedMTL(preference=[0, 0, 0, 1.0])(rows)
    torch.testing.assert_close(update, q[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["conflicting", "graded", "tiny", "huge"])
def test_config_has_equal_cosines(family, impl):
    rows = CONFLICTS[family](4, 9)
    update = gs.ConFIG()(rows)
    cosines = rows @ update / rows.norm(dim=1) / update.norm()
    torch.testing.assert_close(cosines, cosines[:1].expand(4), rtol=1e-6, atol=1e-12)
    assert cosines[0] > 0
    assert update.norm() == pytest.approx(float((rows.norm(dim=1) * cosines).sum()), rel=1e-6)


@pytest.mark.parametrize("family", ["conflicting", "condition 1e4", "graded", "tiny", "huge"])
def test_alignedmtl_makes_one_singular_value(family, impl):
    if impl == "torch" and family == "graded":
        pytest.skip("torch's eigh resolves eigenvalues to rounding of the largest only")
    rows = CONFLICTS[family](4, 9)
    parts = torch.stack([gs.AlignedMTL(preference=p)(rows) for p in torch.eye(4).tolist()])
    # the aligned rows are orthogonal, of the length of the least singular value
    lengths = parts.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(4), rtol=1e-6, atol=0)
    cosines = parts @ parts.mT / lengths[0] ** 2
    assert (cosines - torch.eye(4)).abs().max() <= 1e-6


def test_gem_is_the_nearest_that_opposes_none(impl):
    rows = signed(gaussian(6, 9))
    update = gs.GEM()(rows)
    assert least_cosine(rows[1:], update) >= -1e-12
    # what is added is a positive sum of the rows that bind
    weights = gs.GEM().weights(rows @ rows.mT)
    assert weights[0] == 1
    assert (weights[1:] >= 0).all()
    assert (weights[1:] * (rows[1:] @ update)).abs().max() <= 1e-12
    assert (gs.GEM(margin=0.5).weights(rows @ rows.mT)[1:] >= 0.5).all()


def test_agem_opposes_no_mean(impl):
    rows = gaussian(3, 9)
    rows[0] -= 3 * rows[1:].mean(0)
    update = gs.AGEM()(rows)
    assert abs(update @ rows[1:].mean(0)) <= 1e-12
    torch.testing.assert_close(gs.AGEM()(rows * torch.tensor([[-1], [1], [1]])), -rows[0])


def test_memory_rows_are_not_opposed_and_ask_for_nothing(impl):
    rows = signed(gaussian(6, 20))
    for rule in (gs.UPGrad(), gs.DualProj()):
        update = rule(rows, memory=[4, 5])
        assert least_cosine(rows, update) >= -1e-12
        far = torch.cat([rows[:4], torch.linalg.qr(rows.mT).Q.mT[:0], torch.zeros(2, 20)]).double()
        torch.testing.assert_close(rule(far, memory=[4, 5]), rule(rows[:4]))
    update = gs.OrthoGrad(alpha=0.0)(rows, forget=0, memory=[4, 5])
    assert (rows[1:] @ update).abs().max() <= 1e-12
    with_memory = gs.OrthoGrad(alpha=1.0)(rows, forget=0, memory=[4, 5])
    torch.testing.assert_close(with_memory, rows[1:4].mean(0))


# properties


@pytest.mark.parametrize("family", CONFLICTS)
@pytest.mark.parametrize("name", CLAIMS["non-conflicting"])
def test_opposes_no_row(name, family, impl):
    for m, n in ((2, 9), (5, 40), (7, 4)):
        rows = CONFLICTS[family](m, n)
        update = update_of(make(name, m), rows)
        assert update.isfinite().all()
        # what is left of rows that nearly cancel is rounding's
        rounding = update.norm() <= 1e-12 * rows.norm()
        assert rounding or least_cosine(rows, update) >= -1e-9, (m, n)


@pytest.mark.parametrize("ratio", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-9, 1.0])
def test_upgrad_keeps_small_rows(ratio, scale, impl):
    for _ in range(20):
        rows = scale * signed(gaussian(2, 6)) * torch.tensor([[1], [ratio]])
        assert least_cosine(rows, make("upgrad")(rows)) >= -1e-9


@pytest.mark.parametrize("family", CONFLICTS)
@pytest.mark.parametrize("name", CLAIMS["equivariant"])
def test_the_order_of_rows_does_not_matter(name, family, impl):
    rows = CONFLICTS[family](5, 40)
    order = torch.randperm(5)
    expected = update_of(make(name, 5), rows)
    tolerance = 1e-6 * (expected.norm() + 1e-9 * rows.norm())
    assert (update_of(make(name, 5), rows[order]) - expected).norm() <= tolerance


@pytest.mark.parametrize("name", CLAIMS["linear"])
def test_is_linear_in_the_scale_of_each_row(name, impl):
    rows, (a, b) = signed(gaussian(4, 9)), 10 ** torch.randn(2, 4, 1).double()
    one, two, both = (update_of(make(name, 4), c * rows) for c in (a, b, a + b))
    torch.testing.assert_close(one + two, both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CLAIMS["invariant"])
def test_the_scale_of_each_row_does_not_matter(name, impl):
    rows, c = signed(gaussian(4, 9)), 10 ** (3 * torch.randn(4, 1).double())
    # the mean of several retain rows is not: one row each
    rows, c = (rows[:2], c[:2]) if "forget" in RULES[name].roles else (rows, c)
    torch.testing.assert_close(
        update_of(make(name, 4), c * rows), update_of(make(name, 4), rows), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("m,n", [(2, 9), (3, 9), (6, 20)])
@pytest.mark.parametrize("name", CLAIMS["stationary"])
def test_stands_still_at_pareto_points(name, m, n, impl):
    for scale in (1e-9, 1.0, 1e9):
        rows = scale * vanishing(m, n)
        assert update_of(make(name, m), rows).norm() <= 1e-7 * rows.norm()


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaled_rows_give_scaled_or_equal_updates(name, scale, impl):
    rows = signed(gaussian(4, 9))
    own = UNITS.get(name, lambda _: {})
    expected, update = (update_of(make(name, 4, **own(s)), s * rows) for s in (1.0, scale))
    power = {"nashmtl": 0, "munba": 0, "ngdiff": 0, "fairgrad": -1 / 3}.get(name, 1)
    assert relative(update / scale**power, expected) <= 1e-9


@pytest.mark.parametrize("family", CONFLICTS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_gives_finite_weights(name, family, impl):
    for m, n in ((max(2, FEWEST.get(name, 2)), 9), (6, 4)):
        rows = CONFLICTS[family](m, n)
        assert make(name, m).weights(rows @ rows.mT).isfinite().all()


@pytest.mark.parametrize("name", WEIGHTED)
def test_one_row(name, impl):
    row, rule = torch.tensor([[3.0, 4.0]]).double(), make(name, 1)
    if "forget" in rule.roles or name in ("gem", "agem"):
        with pytest.raises(gs.InputError, match=r"selects . of 1 rows"):
            rule(row)
        return
    if name in FEWEST:
        with pytest.raises(gs.InputError, match=rf"needs {FEWEST[name]} rows or more .* got 1"):
            rule(row)
        return
    length = {"nashmtl": 1.0, "fairgrad": 5 ** (-1 / 3), "cagrad": 7.5}.get(name, 5.0)
    torch.testing.assert_close(rule(row), row[0] / 5 * length)


# shapes, batches, granularity


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_a_batch_are_those_of_each(name, impl):
    rows = torch.stack([signed(gaussian(4, 9)) for _ in range(6)]).view(2, 3, 4, 9)
    gram = rows @ rows.mT
    weights = make(name, 4).weights(gram)
    assert weights.shape == (2, 3, 4)
    assert weights.dtype == torch.float64
    if RULES[name].remembers:
        return  # draws differ
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(weights[i, j], make(name, 4).weights(gram[i, j]))
    assert make(name, 4).weights(gram[:0]).shape == (0, 3, 4)


@pytest.mark.parametrize("name", RULES)
def test_blocks_are_as_one_matrix(name, impl):
    blocks = [torch.randn(4, 3, 5).double(), torch.randn(4, 7).double()]
    update = make(name, 4)(blocks)
    assert [u.shape for u in update] == [(3, 5), (7,)]
    if RULES[name].remembers and not weighted(name):
        return  # draws go tensor by tensor
    whole = make(name, 4)(torch.cat([b.flatten(1) for b in blocks], 1))
    torch.testing.assert_close(torch.cat([u.flatten() for u in update]), whole)


@pytest.mark.parametrize("name", WEIGHTED)
def test_granularity_weighs_groups_apart(name, impl):
    blocks = {"a.w": gaussian(4, 6).view(4, 2, 3), "a.b": gaussian(4, 9), "b.w": gaussian(4, 8)}
    jacobian = gs.DenseJacobian(blocks)
    if RULES[name].remembers:  # the draws of a batch are not those of single calls
        assert len(make(name, 4, granularity="tensor")(jacobian)) == 3
        return
    for granularity, groups in (("tensor", [[0], [1], [2]]), ("module", [[0, 1], [2]])):
        update = make(name, 4, granularity=granularity)(jacobian)
        for group in groups:
            part = [list(blocks.values())[k] for k in group]
            for k, expected in zip(group, make(name, 4)(part), strict=True):
                torch.testing.assert_close(update[k], expected, rtol=1e-9, atol=1e-12)


def test_a_row_that_a_tensor_does_not_know_has_no_say_there(impl):
    blocks = [gaussian(3, 6), gaussian(3, 4)]
    blocks[1][:2] = 0
    parts = gs.MGDA(granularity="tensor")(blocks)
    torch.testing.assert_close(parts[1], blocks[1][2])
    assert not gs.MGDA()([blocks[1]])[0].any()


def test_a_metric_weighs_the_inner_products(impl):
    blocks = [gaussian(4, 6), gaussian(4, 9)]
    metric = [torch.rand(6).double() + 0.1, torch.rand(9).double() + 0.1]
    scaled = [b * w.sqrt() for b, w in zip(blocks, metric, strict=True)]
    for rule in (gs.UPGrad(), gs.MGDA(), gs.CAGrad()):
        weights = rule.solve(gs.DenseJacobian(blocks), metric=metric).weights
        torch.testing.assert_close(weights, rule.solve(gs.DenseJacobian(scaled)).weights)


@pytest.mark.parametrize(
    "name", ["upgrad", "dualproj", "mgda", "nashmtl", "fairgrad", "config", "gradops"]
)
def test_gradients(name, impl):
    rows = signed(gaussian(4, 9))
    rule = make(name)
    assert torch.autograd.gradcheck(
        lambda r: rule.weights(r @ r.mT) @ r, rows.requires_grad_(), atol=1e-5
    )


@pytest.mark.parametrize("gram", [torch.eye(3), torch.diag(torch.tensor([1.0, 4, 4]))])
@pytest.mark.parametrize("name", ["imtlg", "config", "alignedmtl"])
def test_gradients_where_eigenvalues_are_equal(name, gram, impl):
    gram, rule = gram.double(), make(name)
    direction = torch.randn(3, 3).double()
    direction = direction + direction.mT
    if name == "alignedmtl":
        direction[0] = direction[:, 0] = 0  # the least eigenvalue stays the only one of its value
        if gram[1, 1] == 1:
            return
    variable = gram.clone().requires_grad_()
    probe = torch.tensor([1.0, 10, 100], dtype=torch.float64)
    (rule.weights(variable) @ probe).backward()
    step = 1e-5
    ends = [rule.weights(gram + s * step * direction) @ probe for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((variable.grad * direction).sum()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["imtlg", "config", "nashmtl", "alignedmtl"])
def test_gradients_of_nothing_are_zero(name, impl):
    gram = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    options = {"max_norm": 1.0} if name == "nashmtl" else {}
    make(name, **options).weights(gram).sum().backward()
    assert not gram.grad.any()


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "cagrad", "conicgrad"])
def test_no_gradient_rather_than_a_wrong_one(name, impl):
    rows = signed(gaussian(4, 9)).requires_grad_()
    with pytest.raises(gs.InputError, match="has no derivative here"):
        make(name).weights(rows @ rows.mT).sum().backward()


@pytest.mark.parametrize("name", WEIGHTED)
def test_rounded_gramians(name, impl):
    """A Gramian in float32 does as well as that allows, and never makes noise of it."""
    rows = signed(gaussian(6, 40))
    rows[5] = 2 * rows[4]
    gram = (rows @ rows.mT).float()
    update, expected = (make(name, 6).weights(g) @ rows for g in (gram, rows @ rows.mT))
    assert relative(update, expected) <= 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", WEIGHTED)
def test_waits_for_no_gpu(name):
    gram = torch.randn(8, 6, 20, device="cuda").double()
    gram, rule = gram @ gram.mT, make(name, 6)
    expected = make(name, 6).weights(gram.cpu())
    rule.weights(gram)  # what is made once
    rule.load_state_dict({})
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = rule.weights(gram)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(weights.cpu(), expected)


# state


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].remembers])
def test_goes_on_where_it_was(name, impl):
    options = {"momentum": 0.5} if name == "gru" else {}
    rows = [signed(gaussian(4, 9)) for _ in range(4)]
    rule = make(name, 4, **options)
    for r in rows[:2]:
        rule(r)
    resumed, copied = make(name, 4, **options), copy.deepcopy(rule)
    resumed.load_state_dict(rule.state_dict())
    for r in rows[2:]:
        expected = rule(r)
        assert torch.equal(resumed(r), expected)
        assert torch.equal(copied(r), expected)
    resumed.load_state_dict({})
    assert torch.equal(resumed(rows[0]), make(name, 4, **options)(rows[0]))


@pytest.mark.parametrize("name", ["pcgrad", "random", "graddrop"])
def test_seeds_decide(name, impl):
    rows = signed(gaussian(6, 9))
    torch.manual_seed(1)
    first = make(name, seed=3)(rows)
    torch.manual_seed(2)
    assert torch.equal(make(name, seed=3)(rows), first)
    assert any(not torch.equal(make(name, seed=s)(rows), first) for s in range(4, 9))
    assert torch.initial_seed() == 2


def test_gradvac_moves_its_targets(impl):
    rows = torch.tensor([[1.0, 0.2], [1.0, -0.2]]).double()
    rule = gs.GradVac(beta=0.25)
    rule(rows)
    cosine = float(rows[0] @ rows[1] / rows[0].norm() / rows[1].norm())
    assert rule.state_dict()["targets"][0, 0, 1] == pytest.approx(0.25 * cosine)
    # then rows are turned towards each other though they do not conflict
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    changed = rule(apart)
    t = 0.25 * cosine
    share = t / (1 - t**2) ** 0.5
    torch.testing.assert_close(changed, torch.full((2,), 1 + share).double())
    # another number of rows begins anew
    rows = signed(gaussian(3, 5))
    assert torch.equal(rule(rows).isfinite(), torch.ones(5, dtype=torch.bool))
    assert rule.state_dict()["targets"].shape == (1, 3, 3)


def test_gru_averages_retain_gradients(impl):
    a, b = gaussian(3, 5), gaussian(3, 5)
    rule = gs.GRU(momentum=0.9, objective="lower")
    rule(a)
    average = 0.9 * a[1:].mean(0) + 0.1 * b[1:].mean(0)
    expected = b[0] - min(float(b[0] @ average), 0) / float(average @ average) * average
    torch.testing.assert_close(rule(b), expected)


def test_gdrgma_turns_to_retaining_as_the_retain_loss_grows(impl):
    rule = gs.GDRGMA(objective="lower", gamma=100.0, eps=0.02)
    rows = torch.eye(2).double()
    torch.testing.assert_close(rule(rows, retain_loss=0.02), torch.tensor([0.5, 0.5]).double())
    low, high = rule(rows, retain_loss=0.0), rule(rows, retain_loss=torch.tensor(0.1))
    assert low[0] == pytest.approx(1 / (1 + 2.718281828**-2))
    assert high[0] == pytest.approx(1 / (1 + 2.718281828**8), rel=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_no_rows_at_all(name):
    if (RULES[name].roles and "memory" not in RULES[name].roles) or name in ("gem", "agem"):
        return
    if name == "orthograd" or name in FEWEST:
        return
    assert make(name, 0)(torch.zeros(0, 5)).tolist() == [0] * 5


@pytest.mark.parametrize("name", WEIGHTED)
def test_rules_with_weights_are_their_own_weightings(name):
    rule = make(name)
    assert rule.weighting is rule


def test_gru_with_momentum_is_no_function_of_a_gramian():
    rule = gs.GRU(momentum=0.5)
    assert rule.weighting is None
    with pytest.raises(gs.InputError, match="no function of one Gramian: call it on rows"):
        rule.weights(torch.eye(2))
    with pytest.raises(gs.InputError, match="no function of one Gramian: call it on rows"):
        rule.solve(gs.DenseJacobian(torch.eye(2)))


class Largest(Elementwise):
    """A rule as a user writes one, with no row told apart."""

    def _edit(self, blocks):
        return [rows.amax(0) for rows in blocks]


class Longest(Weighting):
    def _weights(self, gram, rtol, not_this=()):
        square = gram.diagonal(dim1=-2, dim2=-1).clone()
        square[..., list(not_this)] = -1
        return torch.nn.functional.one_hot(square.argmax(-1), gram.shape[-1]).double()

    roles = ("not_this",)


def test_rules_of_ones_own():
    rows = torch.tensor([[1.0, 5.0], [3.0, 2.0], [4.0, 0.0]])
    assert Largest()(rows).tolist() == [4, 5]
    assert Longest()(rows).tolist() == [1, 5]
    assert Longest()(rows, not_this=[0]).tolist() == [4, 0]
    with pytest.raises(gs.InputError, match="Longest has no that rows"):
        Longest()(rows, that=[0])
    optimizer = torch.optim.SGD((model := torch.nn.Linear(2, 1, bias=False)).parameters(), lr=1.0)
    for rule, moved in ((Largest(), [4, 5]), (Longest(), [1, 5])):
        before = model.weight.detach().clone()
        gs.Surgeon(model, optimizer, rule).step(batch=rows, loss=lambda m, x: m(x)[:, 0])
        torch.testing.assert_close(before - model.weight, torch.tensor([moved]).float())


def test_rows_and_gramians_are_untouched(impl):
    rows = signed(gaussian(4, 9))
    before = rows.clone()
    for name in RULES:
        make(name, 4)(rows)
    assert torch.equal(rows, before)


def test_the_registry_knows_every_rule():
    assert set(OPTIONS) <= set(RULES)
    for name, rule in RULES.items():
        assert getattr(gs, rule.__name__) is rule
        assert name == rule.__name__.lower()
        assert rule.formula
        assert rule.__doc__


@pytest.mark.parametrize("rule", [gs.AlignedMTL, gs.ConFIG, gs.IMTLG])
@pytest.mark.parametrize("twice", [False, True])
def test_rows_of_zeros_change_nothing_but_the_mean(rule, twice):
    # their own eigenvalue is zero but for rounding, as is that of a row that is there twice
    torch.manual_seed(0)
    for zero in range(5):
        rows = torch.randn(5, 30, dtype=torch.float64)
        if twice:
            rows[(zero + 1) % 5] = rows[(zero + 2) % 5]
        rows[zero] = 0
        gram = rows @ rows.mT
        update = rule().weights(gram) @ rows
        order = torch.randperm(5)
        again = rule().weights(gram[order][:, order]) @ rows[order]
        torch.testing.assert_close(again, update, rtol=1e-9, atol=1e-12)
        assert update.norm() > 1e-3
