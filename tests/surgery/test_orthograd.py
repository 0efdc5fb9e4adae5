"""OrthoGrad: its formula, for every granularity, metric and degenerate batch."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery import DenseJacobian, OrthoGrad
from tests.surgery.reference import orthograd

SHAPES = [(4, 3), (4,), (2, 4), (2,), (30,)]  # of parameters; "a.w", "a.b", "b.w", "b.b", "c"
NAMES = ["a.w", "a.b", "b.w", "b.b", "c"]


def blocks(m, shapes=SHAPES, names=NAMES):
    return {
        name: torch.randn(m, *shape, dtype=torch.float64)
        for name, shape in zip(names, shapes, strict=True)
    }


def projected(grad, rows):
    """grad less its part in the span of rows, by QR; float64."""
    q = torch.linalg.qr(rows.mT).Q
    return grad - q @ (q.mT @ grad)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_is_the_formula(alpha, k, impl):
    rows = torch.randn(k + 1, 61, dtype=torch.float64)
    expected = orthograd(rows[:1], rows[1:], alpha)
    assert (OrthoGrad(alpha=alpha)(rows) - expected).norm() <= 1e-13 * rows.norm()
    weights = OrthoGrad(alpha=alpha).weights(rows @ rows.mT)
    assert (weights @ rows - expected).norm() <= 1e-13 * rows.norm()


def test_weights_are_those_of_the_gram_form(impl):
    # w_i = α/k + (1 - α) c_i, w_u = -(1 - α), with c = K_rr⁻¹ k_ru
    rows = torch.randn(5, 31, dtype=torch.float64)
    gramian = rows @ rows.mT
    c = torch.linalg.solve(gramian[1:, 1:], gramian[1:, 0])
    expected = torch.cat([torch.tensor([-0.7]).double(), 0.3 / 4 + 0.7 * c])
    torch.testing.assert_close(OrthoGrad(alpha=0.3).weights(gramian), expected)


def test_hand_worked(impl):
    # g_u = (1, 1), one retain gradient (2, 0): g⊥ = (0, 1)
    rows = torch.tensor([[1.0, 1], [2, 0]], dtype=torch.float64)
    assert OrthoGrad(alpha=0)(rows).tolist() == pytest.approx([0, -1])
    assert OrthoGrad(alpha=1)(rows).tolist() == pytest.approx([2, 0])
    assert OrthoGrad(alpha=0.5)(rows).tolist() == pytest.approx([1, -0.5])


def test_alpha_zero_climbs_and_is_orthogonal_to_every_retain_row(impl):
    rows = torch.randn(8, 50, dtype=torch.float64)
    update = OrthoGrad(alpha=0)(rows)
    assert (rows[1:] @ update).abs().max() <= 1e-13 * rows.norm() ** 2
    # descended, it raises the forget loss: <g_u, -update> > 0
    assert rows[0] @ -update > 0
    assert rows[0] @ -update == pytest.approx((update @ update).item())


def test_alpha_one_is_the_retain_mean(impl):
    rows = torch.randn(8, 50, dtype=torch.float64)
    torch.testing.assert_close(OrthoGrad(alpha=1)(rows), rows[1:].mean(0))


@pytest.mark.parametrize(
    "forget,indices",
    [
        (2, [2]),
        (-1, [6]),
        (slice(0, 3), [0, 1, 2]),
        (slice(5, None), [5, 6]),
        (torch.tensor([1, 4]), [1, 4]),
        (torch.tensor([False, True, False, True, False, False, True]), [1, 3, 6]),
        ([0, 5], [0, 5]),
    ],
    ids=str,
)
def test_forget_rows_may_be_any(forget, indices, impl):
    rows = torch.randn(7, 40, dtype=torch.float64)
    rest = [i for i in range(7) if i not in indices]
    expected = orthograd(rows[indices], rows[rest], 0.4)
    rule = OrthoGrad(alpha=0.4)
    assert (rule(rows, forget) - expected).norm() <= 1e-12 * rows.norm()
    weights = rule.weights(rows @ rows.mT, forget)
    assert (weights @ rows - expected).norm() <= 1e-12 * rows.norm()
    # several forget rows share one weight: g_u is their mean
    assert weights[indices].tolist() == pytest.approx([-0.6 / len(indices)] * len(indices))


@pytest.mark.parametrize("batch", [(3,), (2, 4), (0,)])
def test_is_batched_over_leading_dimensions(batch, impl):
    rows = torch.randn(*batch, 5, 20, dtype=torch.float64)
    gramian = rows @ rows.mT
    weights = OrthoGrad().weights(gramian, forget=slice(1, 3))
    assert weights.shape == (*batch, 5)
    for got, alone in zip(weights.view(-1, 5), gramian.view(-1, 5, 5), strict=True):
        torch.testing.assert_close(got, OrthoGrad().weights(alone, forget=slice(1, 3)))


def test_retain_mean_protects_the_mean_only(impl):
    rows = torch.randn(6, 40, dtype=torch.float64)
    mean = rows[1:].mean(0)
    update = OrthoGrad(alpha=0, retain="mean")(rows)
    expected = -projected(rows[0], mean[None])
    assert (update - expected).norm() <= 1e-13 * rows.norm()
    assert (update @ mean).abs() < 1e-12
    assert (rows[1:] @ update).abs().max() > 0.1
    torch.testing.assert_close(OrthoGrad(alpha=1, retain="mean")(rows), mean)


@pytest.mark.parametrize(
    "rows",
    [
        torch.cat([torch.randn(1, 30), torch.zeros(3, 30)]),
        torch.cat([torch.randn(1, 30), torch.randn(2, 30).repeat(3, 1)]),
        torch.cat([torch.randn(1, 30), torch.zeros(1, 30), torch.randn(1, 30).repeat(2, 1)]),
        torch.cat([torch.randn(1, 30), torch.randn(1, 30) * torch.tensor([[1.0], [-2], [2**-30]])]),
        torch.cat([torch.zeros(1, 30), torch.randn(3, 30)]),
    ],
    ids=["zero", "duplicate", "zero and duplicate", "parallel", "zero forget gradient"],
)
def test_degenerate_rows_add_no_directions(rows, impl):
    rows = rows.double()
    _, values, right = torch.linalg.svd(rows[1:], full_matrices=False)
    basis = right[values > 1e-10]
    expected = 0.5 * rows[1:].mean(0) - 0.5 * (rows[0] - (rows[0] @ basis.mT) @ basis)
    solution = OrthoGrad().solve(DenseJacobian(rows))
    assert (solution.weights @ rows - expected).norm() <= 1e-12 * rows.norm()
    assert solution.rank.tolist() == [len(basis)]


def test_rows_of_any_scale(impl):
    rows = torch.randn(5, 40, dtype=torch.float64)
    scales = torch.tensor([1e-12, 1e12, 1, 1e-12, 1e12], dtype=torch.float64)[:, None]
    update = OrthoGrad(alpha=0)(rows * scales)
    expected = -projected(rows[0], rows[1:]) * 1e-12
    assert (update - expected).norm() <= 1e-10 * expected.norm()


def test_solution_says_what_was_found(impl):
    jacobian = DenseJacobian(blocks(4))
    rows = jacobian.materialize()
    solution = OrthoGrad().solve(jacobian, forget=1)
    perp = projected(rows[1], rows[[0, 2, 3]])
    assert solution.kept_norm.item() == pytest.approx((perp.norm() / rows[1].norm()).item())
    assert solution.rank.tolist() == [3]
    assert solution.frozen == []
    torch.testing.assert_close(solution.gramian, rows @ rows.mT)


# granularity


@pytest.mark.parametrize("forget", [0, slice(0, 2)])
@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_granularity_projects_groups_apart(granularity, forget, impl):
    jacobian = DenseJacobian(blocks(4))
    rule = OrthoGrad(alpha=0.3, granularity=granularity)
    solution = rule.solve(jacobian, forget)
    groups = {"tensor": [[0], [1], [2], [3], [4]], "module": [[0, 1], [2, 3], [4]]}[granularity]
    count = 1 if forget == 0 else 2
    perps = {}
    for group in groups:
        rows = torch.cat([jacobian.blocks[k].flatten(1) for k in group], dim=1)
        g_u = rows[:count].mean(0)
        perp = projected(g_u, rows[count:]) if rows.shape[1] > 4 - count else torch.zeros_like(g_u)
        sizes = [jacobian.sizes[k] for k in group]
        perps |= dict(zip(group, perp.split(sizes), strict=True))
    update = jacobian.combine(solution.weights)
    for k, block in enumerate(jacobian.blocks):
        expected = 0.3 * block[count:].mean(0).flatten() - 0.7 * perps[k]
        torch.testing.assert_close(update[k].flatten(), expected, rtol=1e-9, atol=1e-12)
    kept = torch.cat(list(perps.values())).norm() / jacobian.materialize()[:count].mean(0).norm()
    assert solution.kept_norm.item() == pytest.approx(kept.item())
    assert solution.weights.shape == (5, 4)
    assert len(solution.rank) == len(groups)


def test_small_tensors_are_named_and_frozen_or_left(impl):
    # 3 retain rows span any tensor of 3 values or fewer: b.b, with 2
    jacobian = DenseJacobian(blocks(4))
    frozen = OrthoGrad(alpha=0, granularity="tensor").solve(jacobian)
    assert frozen.frozen == ["b.b"]
    update = jacobian.combine(frozen.weights)
    assert update[3].abs().max() <= 1e-12
    assert update[1].abs().max() > 1e-3

    left = OrthoGrad(alpha=0, granularity="tensor", small_tensors="leave").solve(jacobian)
    assert left.frozen == ["b.b"]
    exempt = jacobian.combine(left.weights)
    torch.testing.assert_close(exempt[3], -jacobian.blocks[3][0])
    for k in (0, 1, 2, 4):
        torch.testing.assert_close(exempt[k], update[k])
    assert left.kept_norm > frozen.kept_norm

    assert OrthoGrad(granularity="module").solve(jacobian).frozen == []
    assert OrthoGrad(granularity="module").solve(DenseJacobian(blocks(40))).frozen == NAMES


def test_leaving_small_tensors_out_keeps_the_descent(impl):
    jacobian = DenseJacobian(blocks(4))
    rule = OrthoGrad(alpha=0.25, granularity="tensor", small_tensors="leave")
    update = jacobian.combine(rule.solve(jacobian).weights)
    small = jacobian.blocks[3]
    torch.testing.assert_close(update[3], 0.25 * small[1:].mean(0) - 0.75 * small[0])


@pytest.mark.parametrize("granularity", ["model", "module", "tensor"])
def test_call_gives_the_update_like_the_rows(granularity, impl):
    given = blocks(4)
    rule = OrthoGrad(granularity=granularity)
    named = rule(DenseJacobian(given))
    assert [u.shape for u in named] == [torch.Size(shape) for shape in SHAPES]
    if granularity != "module":  # positions are no modules
        for a, b in zip(rule(list(given.values())), named, strict=True):
            assert torch.equal(a, b)


# precision and metric


def test_a_refined_projection_is_nearer_for_near_dependent_rows(impl):
    # two retain gradients 1e-5 apart, float64: the Gramian alone leaves 1e-15 / 1e-10
    basis = torch.linalg.qr(torch.randn(200, 4, dtype=torch.float64)).Q.mT
    near = basis[1] + 1e-5 * basis[2]
    rows = torch.stack([basis.sum(0), basis[1], near, basis[3]])
    expected = -projected(rows[0], rows[1:])
    errors = [
        (OrthoGrad(alpha=0, refine=refine)(rows) - expected).norm().item() for refine in (0, 1)
    ]
    assert errors[1] <= 1e-9
    assert errors[1] <= 0.1 * errors[0]


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("refine", [0, 1, 2])
def test_refine_changes_nothing_where_nothing_is_wrong(refine, granularity, impl):
    jacobian = DenseJacobian(blocks(4))
    expected = OrthoGrad(granularity=granularity).solve(jacobian, forget=2).weights
    rule = OrthoGrad(granularity=granularity, refine=refine)
    torch.testing.assert_close(
        rule.solve(jacobian, forget=2).weights, expected, rtol=1e-9, atol=1e-9
    )


def test_refine_respects_tensors_left_out(impl):
    jacobian = DenseJacobian(blocks(4))
    options = {"alpha": 0.0, "granularity": "tensor", "small_tensors": "leave"}
    plain = OrthoGrad(**options).solve(jacobian)
    refined = OrthoGrad(**options, refine=1).solve(jacobian)
    torch.testing.assert_close(refined.weights, plain.weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_refines_rows_that_are_not_stored(granularity, impl):
    # two retain samples a part in 1e5 apart; the layer has no bias: one tensor is the whole model
    model, loss = torch.nn.Linear(40, 3, bias=False).double(), lambda m, x: m(x).square().sum(1)
    x = torch.randn(4, 40).double()
    x[3] = x[2] + 1e-5 * x[3]
    rows = DenseJacobian.from_model(model, x, loss).materialize()
    expected = -projected(rows[0], rows[1:])
    with gs.tape(model) as tape:
        losses = loss(model, x)
    captured, errors = tape.jacobian(losses), []
    for refine in (0, 1):
        (update,) = OrthoGrad(alpha=0, granularity=granularity, refine=refine)(captured)
        errors.append((update.flatten() - expected).norm().item() / expected.norm().item())
    assert errors[1] <= 1e-8
    assert errors[1] <= 0.1 * errors[0]


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_metric_makes_the_scaled_update_orthogonal(granularity, refine, impl):
    jacobian = DenseJacobian(blocks(4))
    metric = [torch.rand(shape, dtype=torch.float64) + 0.1 for shape in SHAPES]
    rule = OrthoGrad(alpha=0, granularity=granularity, refine=refine)
    update = jacobian.combine(rule.solve(jacobian, metric=metric).weights)
    products = torch.stack(
        [
            block.flatten(1) @ (weight * u).flatten()
            for block, weight, u in zip(jacobian.blocks, metric, update, strict=True)
        ]
    )
    left = products.sum(0) if granularity == "model" else products
    assert left[..., 1:].abs().max() <= 1e-10
    assert products.sum(0)[0] < 0


# what it refuses


@pytest.mark.parametrize(
    "options,message",
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"refine": -1}, "refine must be 0 or more"),
        ({"rtol": 1.0}, r"rtol must be in \[0, 1\), got 1.0"),
        ({"granularity": "layer"}, "granularity must be one of .* got 'layer'"),
        ({"retain": "sample"}, "retain must be one of"),
        ({"small_tensors": "freeze"}, "small_tensors must be one of"),
        ({"precondition": "adam"}, "precondition must be one of"),
    ],
    ids=str,
)
def test_refuses_unknown_options(options, message):
    with pytest.raises(gs.InputError, match=message):
        OrthoGrad(**options)


@pytest.mark.parametrize(
    "forget,message",
    [
        (4, "forget=4 is out of range for 4 rows"),
        (-5, "forget=-5 is out of range for 4 rows"),
        (slice(0, 0), "forget selects 0 of 4 rows"),
        (slice(None), "forget selects 4 of 4 rows"),
        (torch.ones(3, dtype=torch.bool), r"forget must be a mask \[4\], got \[3\]"),
        (torch.zeros(4, dtype=torch.bool), "forget selects 0 of 4 rows"),
        (0.5, "forget must be an index, indices, a slice or a mask, got 0.5"),
        (None, "forget must be an index, indices, a slice or a mask, got None"),
        (torch.tensor([0.5]), "forget must be an index, indices, a slice or a mask, got"),
        ((0, 1.5), "forget must be an index, indices, a slice or a mask, got"),
        (True, "forget must be an index, indices, a slice or a mask, got True"),
        ("0", "forget must be an index, indices, a slice or a mask, got '0'"),
    ],
    ids=str,
)
def test_refuses_what_selects_no_rows(forget, message):
    with pytest.raises(gs.InputError, match=message):
        OrthoGrad().weights(torch.eye(4), forget)


@pytest.mark.parametrize(
    "gramian,message",
    [
        (torch.ones(3, 4), r"gramian must be \[..., m, m\], got \[3, 4\]"),
        (torch.ones(4), r"gramian must be \[..., m, m\], got \[4\]"),
        ([[1.0]], "gramian must be a Tensor, got list"),
        (torch.eye(1), "forget selects 1 of 1 rows"),
        (torch.diag(torch.tensor([1.0, float("nan"), 1])), "gramian is not finite in row"),
    ],
    ids=str,
)
def test_refuses_what_is_no_gramian(gramian, message, impl):
    with pytest.raises(gs.InputError, match=message):
        OrthoGrad().weights(gramian)


def test_names_the_row_that_is_not_finite(impl):
    rows = torch.randn(3, 20)
    rows[2, 7] = float("inf")
    with pytest.raises(gs.NonFiniteError, match="row 2 is not finite"):
        OrthoGrad()(rows)


def test_rows_and_gramian_are_untouched(impl):
    rows = torch.randn(4, 20, dtype=torch.float64)
    gramian = rows @ rows.mT
    before = rows.clone(), gramian.clone()
    for granularity in ("model", "tensor"):
        OrthoGrad(granularity=granularity, refine=1)(rows)
        OrthoGrad(granularity=granularity).weights(
            gramian, torch.tensor([True, False, True, False])
        )
    assert torch.equal(rows, before[0])
    assert torch.equal(gramian, before[1])


def test_leaving_small_tensors_out_is_differentiable():
    rows = [torch.randn(4, 6, 3).double(), torch.randn(4, 2).double()]
    for row in rows:
        row.requires_grad_()
    for refine in (0, 1):
        rule = OrthoGrad(granularity="tensor", small_tensors="leave", refine=refine)
        sum(u.square().sum() for u in rule(rows)).backward()
    assert all(row.grad.isfinite().all() for row in rows)


def test_a_step_under_inference_mode_leaves_no_trace():
    a = torch.randn(5, 7).double()
    with torch.inference_mode():
        OrthoGrad().weights(a @ a.mT)
    b = a.clone().requires_grad_()
    OrthoGrad().weights(b @ b.mT).sum().backward()
