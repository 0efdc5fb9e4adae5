"""Rows corrected one by one: PCGrad's and GradVac's loop, on a Gramian as on whole vectors."""

import itertools
import math

import pytest
import torch

import gradsurgery as gs
from gradsurgery.ops import deconflict_weights
from tests.inputs import CONFLICTING, exact_gramian, gaussian, signed

# rows that cancel leave a vector of rounding and its cosines; the sine of -1 is off by sqrt(eps)
UNCLEAR = ("parallel", "opposed", "duplicate", "near")
CLEAR = [family for family in CONFLICTING if not any(name in family for name in UNCLEAR)]


def orders(*shape):
    return torch.rand(*shape, shape[-1]).argsort(-1)


def problem(family):
    """Rows, K, an order and targets."""
    rows = CONFLICTING[family]()
    m = len(rows)
    return rows, exact_gramian(rows), orders(m), 1.6 * torch.rand(m, m).double() - 0.8


def corrected(rows, order, targets=None, beta=0.0):
    """The loop of the docstring on whole vectors, for as many as there are orders; the targets."""
    out, after = rows[: len(order)].clone(), None if targets is None else targets.clone()
    for i, step in itertools.product(range(len(out)), range(len(rows))):
        j = int(order[i, step])
        v, g = out[i], rows[j]
        if i == j or not rows[i].any() or not g.any():
            continue
        if targets is None:
            out[i] = v - min(v @ g, 0.0) / (g @ g) * g
            continue
        cosine, t = (v @ g) / (v.norm() * g.norm()), targets[i, j]
        assert after is not None
        if cosine < t:
            part = t * (1 - cosine**2).clamp_min(0).sqrt() - cosine * (1 - t**2).sqrt()
            out[i] = v + v.norm() * part / (g.norm() * (1 - t**2).sqrt()) * g
        after[i, j] = (1 - beta) * t + beta * cosine
    return out, after


@pytest.mark.parametrize("family", CONFLICTING)
def test_without_targets_the_conflicting_part_goes(family, impl):
    rows, gramian, order, _ = problem(family)
    v, targets = deconflict_weights(gramian, order)
    expected, _ = corrected(rows, order)
    assert targets is None
    error = (v @ rows - expected).norm(dim=1)
    assert (error <= (1e-9 if "near" in family else 1e-12) * rows.norm(dim=1)).all()


@pytest.mark.parametrize("family", CONFLICTING)
def test_with_targets_cosines_are_raised_to_them(family, impl):
    rows, gramian, order, targets = problem(family)
    v, after = deconflict_weights(gramian, order, targets, 0.25)
    expected, expected_after = corrected(rows, order, targets, 0.25)
    clear = family in CLEAR
    error = (v @ rows - expected).norm(dim=1)
    assert (error <= (1e-12 if clear else 1e-6) * rows.norm(dim=1)).all()
    if clear:
        torch.testing.assert_close(after, expected_after, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", CONFLICTING)
def test_implementations_agree(family, monkeypatch):
    rows, gramian, order, targets = problem(family)
    found = []
    for impl in ("torch", "native"):
        monkeypatch.setenv("GRADSURGERY_BACKEND", impl)
        found.append(
            (
                *deconflict_weights(gramian, order, targets, 0.1),
                deconflict_weights(gramian, order)[0],
            )
        )
    (v, after, plain), (other_v, other_after, other_plain) = found
    size = rows.norm(dim=1)
    assert (((plain - other_plain) @ rows).norm(dim=1) <= 1e-12 * size).all()
    assert (((v - other_v) @ rows).norm(dim=1) <= (1e-12 if family in CLEAR else 1e-6) * size).all()
    if family in CLEAR:
        torch.testing.assert_close(after, other_after, rtol=0, atol=1e-11)


def test_two_rows(impl):
    # each less its part along the other; their sum is PCGrad's of torchjd's example
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])
    v, _ = deconflict_weights(rows @ rows.mT, orders(2))
    assert v.tolist() == [pytest.approx([1, 22 / 38]), pytest.approx([22 / 18, 1])]
    assert (v.sum(0).float() @ rows).tolist() == pytest.approx([0.5848, 3.8012, 3.8012], abs=5e-5)


def test_the_order_decides(impl):
    # row 0 = (1, 0) meets a = (-1, 1) / √2 and b = (0, -1), whichever comes first
    rows = torch.tensor([[1, 0], [-1, 1], [0, -1]]).double()
    for order, expected in (((1, 2, 0), [0.5, 0]), ((2, 0, 1), [0.5, 0.5])):
        v, _ = deconflict_weights(rows @ rows.mT, torch.tensor([order] * 3))
        assert (v[0] @ rows).tolist() == pytest.approx(expected, abs=1e-15)
        assert v[0, 0] == 1


def test_a_target_by_hand(impl):
    # the cosine of orthogonal rows of norms 3 and 2 becomes 0.6: v = (3, 3 · 0.6 / 0.8)
    gramian, order = torch.diag(torch.tensor([9.0, 4])), torch.tensor([[0, 1], [0, 1]])
    targets = torch.tensor([[0.1, 0.6], [-0.5, 0.2]])
    v, after = deconflict_weights(gramian, order, targets, 0.25)
    assert v.tolist() == [pytest.approx([1, 3 * 0.75 / 2]), [0, 1]]
    # 0.75 t + 0.25 φ, φ before the visit; row 1 meets row 0 as it was given; none meets itself
    assert after.tolist() == [pytest.approx([0.1, 0.45]), pytest.approx([-0.375, 0.2])]


@pytest.mark.parametrize("target", [1.0, math.sqrt(1 - 1e-10)])
def test_the_sine_of_a_target_is_bounded_below(target, impl):
    targets = torch.tensor([[0, target], [-1, 0]]).double()
    v, _ = deconflict_weights(torch.eye(2), orders(2), targets)
    assert v.tolist() == [pytest.approx([1, target * 1e4]), [0, 1]]


def test_a_target_of_minus_one_changes_nothing(impl):
    _, gramian, order, targets = problem("gaussian")
    v, after = deconflict_weights(gramian, order, torch.full_like(targets, -1), 0.0)
    assert torch.equal(v, torch.eye(6).double())
    assert torch.equal(after, torch.full_like(targets, -1))


def test_zero_targets_are_none(impl):
    _, gramian, order, targets = problem("gaussian")
    v, _ = deconflict_weights(gramian, order, torch.zeros_like(targets))
    torch.testing.assert_close(v, deconflict_weights(gramian, order)[0], rtol=1e-12, atol=1e-13)


def test_zero_rows_are_neither_changed_nor_visited(impl):
    rows, gramian, order, targets = problem("zero rows")
    v, after = deconflict_weights(gramian, order, targets, 0.5)
    zero = ~rows.any(1)
    assert torch.equal(v[zero], torch.eye(6).double()[zero])
    assert (v[~zero][:, zero] == 0).all()
    assert after is not None
    kept = zero | zero[:, None] | torch.eye(6).bool()
    assert torch.equal(after[kept], targets[kept])
    assert (after[~kept] != targets[~kept]).all()


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("spread", [20, 40])  # norms 1 to 1e12, 1e-12 to 1e12
def test_scales_change_nothing_but_scale(spread, with_targets, impl):
    _, gramian, order, targets = problem("gaussian")
    targets = targets if with_targets else None
    v, after = deconflict_weights(gramian, order, targets, 0.5)
    s = 2.0 ** torch.randint(-spread, spread + 1, (6,)).double()
    scaled, scaled_after = deconflict_weights(gramian * s * s[:, None], order, targets, 0.5)
    assert torch.equal(scaled * s / s[:, None], v)
    assert not with_targets or torch.equal(scaled_after, after)


@pytest.mark.parametrize("m,n", [(1, 3), (33, 20), (130, 200), (256, 64)])
def test_many_rows(m, n, impl):
    rows, order, targets = signed(gaussian(m, n)), orders(m), 0.2 * torch.rand(m, m).double()
    for t in (None, targets):
        v, after = deconflict_weights(rows @ rows.mT, order, t, 0.1)
        expected, expected_after = corrected(rows, order[:9], t, 0.1)
        error = (v[:9] @ rows - expected).norm(dim=1)
        assert (error <= 1e-12 * (v[:9].abs() @ rows.norm(dim=1))).all()
        assert t is None or (after - expected_after)[:9].abs().max() <= 1e-11


def test_a_float32_gramian_is_used_as_it_is(impl):
    _, gramian, order, targets = problem("gaussian")
    v, after = deconflict_weights(gramian.float(), order, targets.float(), 0.1)
    same, same_after = deconflict_weights(
        gramian.float().double(), order, targets.float().double(), 0.1
    )
    assert v.dtype == after.dtype == torch.float64
    assert torch.equal(v, same)
    assert torch.equal(after, same_after)


def test_is_batched(impl):
    families = ["gaussian", "duplicate", "zero rows", "graded", "alike", "all zero"]
    _, *batch = (torch.stack(t) for t in zip(*map(problem, families), strict=True))
    shaped = [t.view(2, 3, 6, 6) for t in batch]
    v, after = deconflict_weights(*shaped, 0.1)
    assert v.shape == after.shape == (2, 3, 6, 6)
    for k, args in enumerate(zip(*batch, strict=True)):
        alone, alone_after = deconflict_weights(*args, 0.1)
        torch.testing.assert_close(v.view(6, 6, 6)[k], alone, rtol=1e-13, atol=0)
        torch.testing.assert_close(after.view(6, 6, 6)[k], alone_after, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 0), (4, 0, 0), (0, 3, 3)])
def test_empty_shapes(shape, impl):
    order = torch.zeros(shape, dtype=torch.int64)
    for targets in (None, torch.zeros(shape)):
        v, after = deconflict_weights(torch.zeros(shape), order, targets)
        assert v.shape == shape
        assert targets is None or after.shape == shape


def test_reads_strided_tensors_and_leaves_them(impl):
    _, gramian, order, targets = problem("gaussian")
    args = gramian, order, targets
    before = [t.clone() for t in args]
    v, after = deconflict_weights(*args, 0.1)
    for spaced in (
        [torch.stack([t, t], -1)[..., 0] for t in args],
        [t.mT.contiguous().mT for t in args],
        [args[0], order, targets.mT.contiguous().mT],
    ):
        same, same_after = deconflict_weights(*spaced, 0.1)
        assert torch.equal(v, same)
        assert torch.equal(after, same_after)
    assert all(map(torch.equal, args, before))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gramian_that_is_not_finite_is_never_taken_for_zero_rows(value, impl):
    gramian = torch.eye(3)
    gramian[1, 1] = value
    with pytest.raises(gs.NonFiniteError, match="gramian is not finite in row 1"):
        deconflict_weights(gramian, orders(3))


@pytest.mark.parametrize(
    "gramian,order,targets,message",
    [
        (torch.ones(2, 3), orders(2), None, r"gramian must be \[..., m, m\], got \[2, 3\]"),
        ([[1.0]], orders(1), None, "gramian must be a Tensor, got list"),
        (torch.eye(1).int(), orders(1), None, "gramian must be floating point, got torch.int32"),
        (torch.eye(3), orders(2), None, r"order must be \[3, 3\] to match gramian, got \[2, 2\]"),
        (torch.eye(3), orders(3)[0], None, r"order must be \[3, 3\] to match gramian, got \[3\]"),
        (torch.eye(2), torch.eye(2), None, "order must be int64, got torch.float32"),
        (torch.eye(2), orders(2), torch.ones(2), r"targets must be \[2, 2\] .*, got \[2\]"),
    ],
)
def test_rejects_what_does_not_fit(gramian, order, targets, message):
    with pytest.raises(gs.InputError, match=message):
        deconflict_weights(gramian, order, targets)


@pytest.mark.parametrize("with_targets", [False, True])
def test_has_no_gradient_and_says_so(with_targets, impl):
    _, gramian, order, targets = problem("gaussian")
    targets = targets if with_targets else None
    v, _ = deconflict_weights(gramian.requires_grad_(), order, targets)
    with pytest.raises(gs.InputError, match="deconflict_weights has no derivative here"):
        v.sum().backward()


@pytest.mark.parametrize("with_targets", [False, True])
def test_registration(with_targets, impl):
    _, gramian, order, targets = problem("gaussian")
    args = gramian, order, targets if with_targets else None, 0.1
    torch.library.opcheck(torch.ops.gradsurgery.deconflict_weights, args)


@pytest.mark.parametrize("with_targets", [False, True])
def test_compiles_into_one_graph(with_targets, impl):
    _, gramian, order, targets = problem("gaussian")
    args = gramian, order, targets if with_targets else None, 0.1
    compiled = torch.compile(deconflict_weights, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args), deconflict_weights(*args), strict=True):
        assert a is b is None or torch.equal(a, b)
