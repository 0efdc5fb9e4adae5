"""g⊥ = g - its projection on the rows' span: orthogonal to the promise, whatever the rows."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import _backend
from gradsurgery.ops.project_out import project_out_cpu, project_out_native
from tests.conftest import ROUNDOFF
from tests.inputs import (
    BLOCKS,
    FAMILIES,
    LAYOUTS,
    as_matrix,
    blocks_of,
    same_values,
    with_condition,
)

# the largest |cos(g_i, g⊥)| allowed without a warning
PROMISE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
RTOL = 3e-7  # of the oracle, relative distance; between what the families hold


def oracle(grad, rows, rtol=RTOL):
    """g⊥ and the rank by SVD of the normalized rows, float64."""
    rows, grad = rows.double(), grad.double()
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, 0)
    if not unit.numel():
        return grad, 0
    _, values, right = torch.linalg.svd(unit, full_matrices=False)
    basis = right[values > rtol * values[0].clamp(min=1e-300)] if values[0] > 0 else right[:0]
    perp = grad - (grad @ basis.mT) @ basis
    return perp - (perp @ basis.mT) @ basis, len(basis)


def cosines(perp, rows):
    """|cos(g_i, g⊥)| in float64; 0 for zero rows."""
    perp, rows = perp.double(), rows.double()
    norms = rows.norm(dim=1)
    unit = rows / norms.clamp(min=1e-300)[:, None]
    return torch.where(norms * perp.norm() > 0, (unit @ perp).abs() / perp.norm(), 0)


# rows nearer than rtol, sqrt(8 m eps) > 1e-7, are one row: which side of it, and the float64
# promise of 1e-9, are left to test_beyond_its_promise_it_is_right_or_says_so
CLEAR = [family for family in FAMILIES if family != "near duplicate 1e-07"]


@pytest.mark.parametrize("family", CLEAR)
def test_is_orthogonal_to_every_row(family, impl, dtype):
    rows = FAMILIES[family](6, 1511)
    rows = (rows.clamp(-6e4, 6e4) if dtype == torch.float16 else rows).to(dtype)
    grad = (torch.randn(1511, dtype=torch.float64) + rows.double().mean(0)).to(dtype)
    perp, info = gs.project_out(grad, rows, return_info=True)
    worst = cosines(perp, rows).max().item()
    assert worst <= PROMISE[dtype]
    assert abs(info.max_cosine.item() - worst) <= 0.1 * PROMISE[dtype]


@pytest.mark.parametrize("family", CLEAR)
def test_matches_svd(family, impl):
    rows = FAMILIES[family](6, 1511).float()
    grad = torch.randn(1511) + rows[0] / rows[0].norm().clamp(min=1)
    perp, info = gs.project_out(grad, rows, return_info=True)
    expected, rank = oracle(grad, rows)
    assert info.rank.item() == rank
    assert (perp.double() - expected).norm() <= 1e-6 * grad.norm()
    assert info.kept_norm.item() == pytest.approx((expected.norm() / grad.norm()).item(), rel=1e-6)


@pytest.mark.parametrize("family", CLEAR)
def test_matches_svd_in_float64(family, impl):
    rows = FAMILIES[family](6, 307)
    grad = torch.randn(307, dtype=torch.float64)
    perp, info = gs.project_out(grad, rows, return_info=True)
    expected, rank = oracle(grad, rows)
    assert info.rank.item() == rank
    # a solve is 1e-15 / distance² off, and one correction squares that
    tolerance = 1e-6 if family == "near duplicate 1e-06" else 1e-9
    assert (perp - expected).norm() <= tolerance * grad.norm()
    kept = (expected.norm() / grad.norm()).item()
    assert info.kept_norm.item() == pytest.approx(kept, rel=tolerance)


@pytest.mark.parametrize(
    "m,n", [(1, 1), (1, 2), (2, 3), (5, 31), (16, 4099), (33, 129), (3, 70_001)]
)
def test_matches_qr(m, n, impl, dtype):
    rows, grad = torch.randn(m, n).to(dtype), torch.randn(n).to(dtype)
    q = torch.linalg.qr(rows.double().mT).Q
    expected = grad.double() - q @ (q.mT @ grad.double())
    perp = gs.project_out(grad, rows)
    assert (perp.double() - expected).norm() <= (3 * ROUNDOFF[dtype] + 1e-12) * grad.double().norm()


def test_hand_worked(impl):
    perp, info = gs.project_out(
        torch.tensor([3.0, 4, 5]), torch.tensor([[2.0, 0, 0], [0, 0, -7]]), return_info=True
    )
    assert perp.tolist() == pytest.approx([0, 4, 0], abs=1e-6)
    assert info.rank.item() == 2
    assert info.kept_norm.item() == pytest.approx(4 / math.sqrt(50))
    # the projection is subtracted, not added, whichever way the row points
    for sign in (1.0, -1.0):
        perp = gs.project_out(torch.tensor([1.0, 1]), sign * torch.tensor([[1.0, 0]]))
        assert perp.tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("m,n", [(4, 997), (16, 5003), (32, 20_011)])
def test_keeps_its_promise_up_to_condition_1e4(m, n, condition, impl):
    rows = with_condition(m, n, condition).float()
    grad = torch.randn(n) + rows.sum(0) / rows.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perp = gs.project_out(grad, rows)
    assert cosines(perp, rows).max() <= 1e-5


@pytest.mark.parametrize("condition", [1e5, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beyond_its_promise_it_is_right_or_says_so(condition, dtype, impl):
    rows = with_condition(12, 2003, condition).to(dtype)
    rows[11] = rows[0] + 1e-7 * rows[1]
    grad = torch.randn(2003, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        perp, info = gs.project_out(grad, rows, return_info=True)
    worst = cosines(perp, rows).max().item()
    assert worst <= PROMISE[dtype] or caught
    for warning in caught:
        assert warning.category is RuntimeWarning
        assert f"a cosine of {info.max_cosine.item():.1e} with a row is left" in str(
            warning.message
        )
    assert info.max_cosine.item() == pytest.approx(worst, rel=0.1, abs=0.01 * PROMISE[dtype])


def test_warns_with_the_cosine_reached(impl):
    # a tolerance that takes the second row, at a distance of 0.1, for the first
    rows = torch.tensor([[1.0, 0, 0], [1, 0.1, 0]])
    grad = torch.tensor([0.0, 1, 1])
    with pytest.warns(
        RuntimeWarning, match=r"a cosine of 7\.\de-02 with a row is left, above 1e-05"
    ):
        gs.project_out(grad, rows, rtol=0.5)


def test_a_second_pass_corrects_the_first(impl):
    rows = torch.cat([with_condition(8, 300_007, 3e4), 1e-4 * torch.randn(1, 300_007)]).float()
    grad = (rows[:8].double().sum(0) + 1e-3 * torch.randn(300_007) / 500).float()
    found = []
    for refine in (0, 1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(cosines(gs.project_out(grad, rows, refine=refine), rows).max().item())
    assert found[1] <= max(found[0], 1e-5)
    assert found[1] <= 1e-5
    assert found[2] <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m,n", [(1, 501), (5, 501), (8, 33_013)])
def test_a_gradient_in_the_span_gives_exact_zeros(m, n, dtype, impl):
    rows = torch.randn(m, n).to(dtype)
    weights = torch.randn(m, dtype=torch.float64)
    grad = (weights @ rows.double()).to(dtype)
    perp, info = gs.project_out(grad, rows, return_info=True)
    assert perp.count_nonzero() == 0
    assert info.kept_norm.item() == 0
    assert info.max_cosine.item() == 0
    assert info.rank.item() == m
    for i in (0, m - 1):
        assert gs.project_out(rows[i], rows).count_nonzero() == 0
        assert gs.project_out(-3 * rows[i], rows).count_nonzero() == 0


def test_more_rows_than_columns(impl, dtype):
    rows, grad = torch.randn(9, 5).to(dtype), torch.randn(5).to(dtype)
    perp, info = gs.project_out(grad, rows, return_info=True)
    assert perp.count_nonzero() == 0
    assert info.rank.item() == 5


@pytest.mark.parametrize("m,n", [(0, 5), (0, 0), (3, 0)])
def test_nothing_to_project(m, n, impl, dtype):
    grad = torch.randn(n).to(dtype)
    perp, info = gs.project_out(grad, torch.randn(m, n).to(dtype), return_info=True)
    assert torch.equal(perp, grad)
    assert info.rank.item() == 0
    assert info.kept_norm.item() == pytest.approx(1 if n else 0, rel=1e-7)
    assert info.kept_norm.item() <= 1
    assert info.max_cosine.item() == 0


def test_zero_gradient(impl, dtype):
    perp, info = gs.project_out(
        torch.zeros(31, dtype=dtype), torch.randn(3, 31).to(dtype), return_info=True
    )
    assert perp.count_nonzero() == 0
    assert info.rank.item() == 3
    assert info.kept_norm.item() == 0


def test_zero_rows_change_nothing(impl, dtype):
    rows, grad = torch.randn(3, 101).to(dtype), torch.randn(101).to(dtype)
    padded = torch.cat([rows.new_zeros(1, 101), rows[:1], rows.new_zeros(2, 101), rows[1:]])
    perp, info = gs.project_out(grad, padded, return_info=True)
    torch.testing.assert_close(
        perp, gs.project_out(grad, rows), rtol=1e-2, atol=2 * ROUNDOFF[dtype]
    )
    assert info.rank.item() == 3
    none, info = gs.project_out(grad, torch.zeros_like(rows), return_info=True)
    assert torch.equal(none, grad)
    assert (info.rank.item(), info.kept_norm.item()) == (0, pytest.approx(1))


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-12, 1e12, 1e25, 1e34])
@pytest.mark.parametrize("n", [53, 90_001])
def test_any_scale_of_everything(scale, n, impl):
    if impl == "torch" and n > 1000:
        pytest.skip("one path for all sizes")
    rows, grad = torch.randn(4, n), torch.randn(n)
    expected, _ = oracle(grad, rows)
    for row_scale, grad_scale in ((scale, 1), (1, scale), (scale, scale)):
        perp, info = gs.project_out(grad * grad_scale, rows * row_scale, return_info=True)
        assert info.rank.item() == 4
        assert (perp.double() / grad_scale - expected).norm() <= 1e-6 * expected.norm()
        assert info.kept_norm.item() == pytest.approx(
            (expected.norm() / grad.norm()).item(), rel=1e-6
        )
        assert cosines(perp, rows).max() <= 1e-5


def test_tiny_rows_beside_huge_ones(impl):
    rows = torch.randn(5, 2003) * torch.tensor([1e-12, 1e12, 1, 1e-12, 1e12])[:, None]
    grad = torch.randn(2003)
    perp, info = gs.project_out(grad, rows, return_info=True)
    expected, _ = oracle(grad, rows)
    assert info.rank.item() == 5
    assert (perp.double() - expected).norm() <= 1e-6 * expected.norm()
    assert cosines(perp, rows).max() <= 1e-5


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_near_duplicate_is_projected_too(distance, impl):
    # all of the gradient lies where the near duplicate differs from the row
    n = 3001
    basis = torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q.mT
    rows = torch.stack([basis[0], basis[0] + distance * basis[1]])
    grad = basis[1] + 0.5 * basis[2]
    perp, info = gs.project_out(grad, rows, return_info=True)
    assert info.rank.item() == 2
    # a solve is 1e-15 / distance² off, a correction squares that, rounding adds 1e-16 / distance
    assert (perp - 0.5 * basis[2]).norm() <= 1e-14 / distance + 10 * (1e-15 / distance**2) ** 2
    single = gs.project_out(grad.float(), rows.float())
    assert cosines(single, rows.float()).max() <= 1e-5


def test_rank_follows_rtol(impl):
    rows = torch.eye(4, 9, dtype=torch.float64)
    rows[3] = rows[0] + 1e-3 * rows[3]
    grad = torch.randn(9, dtype=torch.float64)
    ranks = []
    for rtol in (1e-2, 1e-4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ranks.append(gs.project_out(grad, rows, rtol=rtol, return_info=True)[1].rank.item())
    assert ranks == [3, 4]


def test_is_idempotent(impl, dtype):
    rows, grad = torch.randn(7, 2003).to(dtype), torch.randn(2003).to(dtype)
    once = gs.project_out(grad, rows)
    twice = gs.project_out(once, rows)
    assert (twice.double() - once.double()).norm() <= 2 * ROUNDOFF[dtype] * once.double().norm()


def test_ignores_order_and_scale_of_rows(impl):
    rows, grad = torch.randn(6, 701, dtype=torch.float64), torch.randn(701, dtype=torch.float64)
    expected = gs.project_out(grad, rows)
    scales = torch.tensor([1e-9, -1, 1e9, 3, -1e-3, 1e3], dtype=torch.float64)[:, None]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        perp = gs.project_out(grad, (rows * scales)[list(order)])
        assert (perp - expected).norm() <= 1e-13 * grad.norm()


def test_is_linear_in_the_gradient(impl):
    rows = torch.randn(4, 211, dtype=torch.float64)
    a, b = torch.randn(2, 211, dtype=torch.float64)
    both = gs.project_out(2 * a - 3 * b, rows)
    assert (both - 2 * gs.project_out(a, rows) + 3 * gs.project_out(b, rows)).norm() < 1e-12


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 12),
    n=st.integers(1, 700),
    copies=st.integers(0, 3),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 9),
)
def test_any_shape_scale_and_rank(m, n, copies, exponent, seed):
    torch.manual_seed(seed)
    rows = torch.cat([torch.randn(m, n), torch.randn(copies, m) @ torch.randn(m, n)])
    if m and copies:
        rows[m:] = rows[torch.randint(m, (copies,))] * 2.0 ** torch.randint(-9, 9, (copies, 1))
    rows = (rows.double() * 10.0**exponent).float()
    perp, info = gs.project_out(torch.randn(n), rows, return_info=True)
    assert info.rank.item() == min(m, n)
    if perp.any():
        assert cosines(perp, rows).amax() <= 1e-5 if len(rows) else True
    else:
        assert m >= n


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_any_layout(layout, impl, dtype):
    rows = LAYOUTS[layout](torch.randn(5, 1031).to(dtype))
    grad = torch.randn(1031, 2).to(dtype)[:, 1]
    perp, _ = gs.project_out(grad, rows), None
    expected, _ = oracle(grad, rows)
    assert perp.is_contiguous()
    assert (perp.double() - expected).norm() <= (3 * ROUNDOFF[dtype] + 1e-12) * grad.double().norm()


@pytest.mark.parametrize("shapes", BLOCKS, ids=str)
def test_blocks_are_one_jacobian(shapes, impl, dtype):
    rows = blocks_of(shapes, dtype)
    grad = [torch.randn(shape[1:]).to(dtype) for shape in shapes]
    perp, info = gs.project_out(grad, rows, return_info=True)
    assert [p.shape for p in perp] == [g.shape for g in grad]
    whole = torch.cat([p.flatten() for p in perp]).double()
    flat_grad, matrix = torch.cat([g.flatten() for g in grad]), as_matrix(rows)
    expected, rank = oracle(flat_grad, matrix)
    assert info.rank.item() == rank
    scale = max(flat_grad.double().norm().item(), 1e-300)
    assert (whole - expected).norm() <= (3 * ROUNDOFF[dtype] + 1e-12) * scale


def test_many_rows(impl):
    m = 1024 if impl == "native" else 130
    rows, grad = torch.randn(m, 1301), torch.randn(1301)
    perp, info = gs.project_out(grad, rows, return_info=True)
    assert info.rank.item() == m
    assert cosines(perp, rows).max() <= 1e-5


def test_threads_agree(impl):
    rows, grad = torch.randn(7, 100_003), torch.randn(100_003)
    expected, _ = oracle(grad, rows)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        perp = gs.project_out(grad, rows)
        assert torch.equal(perp, gs.project_out(grad, rows)), "not deterministic"
        assert (perp.double() - expected).norm() <= 1e-7 * grad.norm()


def test_inputs_are_untouched(impl, dtype):
    rows, grad = torch.randn(5, 301).to(dtype), torch.randn(301).to(dtype)
    before = rows.clone(), grad.clone()
    perp = gs.project_out(grad, rows)
    assert same_values(rows, before[0])
    assert same_values(grad, before[1])
    assert perp.data_ptr() != grad.data_ptr()
    same = gs.project_out(grad, rows[:0])
    assert same.data_ptr() != grad.data_ptr()


def projected(project, grad, rows, rtol, refine):
    """g⊥, the figures and the warnings, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outs, *figures = project(grad, rows, rtol, refine)
        except gs.NonFiniteError as error:
            return [], [], [str(error)]
    return outs, [figure.item() for figure in figures], [str(warning.message) for warning in caught]


@pytest.mark.skipif(not _backend.native_available("cpu"), reason="the native module is not built")
@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("n", [7, 1511, 40_003])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_is_the_steps_that_a_gpu_takes(family, n, refine, dtype):
    if _backend._C.cuda_version == "emulated":
        pytest.skip("the steps are all there is")
    rows = FAMILIES[family](6, n)
    rows = (rows.clamp(-6e4, 6e4) if dtype == torch.float16 else rows).to(dtype)
    for grad in (torch.randn(n), rows.double().sum(0) + 0.3 * torch.randn(n), torch.zeros(n)):
        grad = grad.to(dtype)
        for scale, rtol in ((1, RTOL), (1e-165, RTOL), (1, 0.3)):
            if scale != 1 and dtype != torch.float64:
                continue
            given = [grad * scale], [rows], rtol, refine
            found, figures, said = projected(project_out_cpu, *given)
            expected, steps, theirs = projected(project_out_native, *given)
            assert said == theirs
            assert figures == pytest.approx(steps, rel=1e-13, abs=1e-15)
            for part, step in zip(found, expected, strict=True):
                torch.testing.assert_close(part, step, rtol=1e-13, atol=0)
