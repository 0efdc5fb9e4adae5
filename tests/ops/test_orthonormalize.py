"""J = Rᵀ Q: as orthonormal and as exact as Householder QR of the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import _backend
from tests.conftest import ROUNDOFF
from tests.inputs import (
    LAYOUTS,
    duplicate,
    graded,
    kahan,
    parallel,
    same_values,
    with_condition,
    zero_rows,
)

# [m, n]: Gram-Schmidt serves up to 4 rows of 65,536 values in all, Cholesky the rest
SHAPES = [
    (1, 1),
    (1, 5),
    (2, 7),
    (3, 4099),
    (4, 16_384),
    (4, 16_385),
    (5, 31),
    (5, 5),
    (9, 1003),
    (33, 129),
    (64, 1301),
]


def orthogonality(q):
    """Largest |q_i·q_j - δ_ij| over the nonzero rows."""
    q = q.double()
    keep = q.abs().amax(-1) > 0
    eye = torch.diag_embed(keep.double())
    return (q @ q.mT - eye).abs().max().item() if q.numel() else 0.0


def reconstruction(rows, q, r):
    """Largest |g_i - (Rᵀ Q)_i| / |g_i|."""
    rows = rows.double()
    error = (rows - r.double().mT @ q.double()).norm(dim=-1)
    norms = rows.norm(dim=-1)
    return torch.where(norms > 0, error / norms, error).max().item() if rows.numel() else 0.0


def householder(rows):
    """The same two errors of torch's own QR in float32, which serves 16 bits too."""
    q, r = torch.linalg.qr(rows.mT if rows.dtype == torch.float64 else rows.float().mT)
    return orthogonality(q.mT), reconstruction(rows, q.mT, r)


def check(rows, q, r, rank=None, allowance=4.0, condition=1.0):
    m, n = rows.shape[-2:]
    assert q.dtype == r.dtype == rows.dtype
    assert q.shape == rows.shape
    assert r.shape == (*rows.shape[:-1], m)
    assert not torch.cat([q.flatten(), r.flatten()]).isnan().any()
    assert torch.equal(r, r.triu()), "R is upper triangular"
    assert (r.diagonal(dim1=-2, dim2=-1) >= 0).all()
    zero = q.abs().amax(-1) == 0 if n else torch.ones(rows.shape[:-1], dtype=torch.bool)
    assert torch.equal(zero, r.diagonal(dim1=-2, dim2=-1) == 0)
    assert not r[zero].any(), "a dependent row has a zero row in R"
    if rank is not None:
        assert torch.equal((~zero).sum(-1), rank)
    orthogonal, exact = householder(rows)
    # 16-bit results are rounded where Householder's, in float32, are not; a value is the product of
    # two rounded ones, and its square doubles that: 4 roundings where Householder is exact by luck
    rounding = ROUNDOFF[rows.dtype] * (4 if rows.dtype.itemsize > 2 else 3)
    assert orthogonality(q) <= allowance * (orthogonal if rows.dtype.itemsize > 2 else 0) + rounding
    # R is the factor of a float64 Gramian: off by its rounding times the condition
    assert reconstruction(rows, q, r) <= allowance * exact + rounding + 1e-17 * condition


@pytest.mark.parametrize("m,n", SHAPES)
def test_is_as_accurate_as_householder_qr(m, n, impl, dtype):
    rows = torch.randn(m, n, dtype=torch.float64).to(dtype)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    check(rows, q, r, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("m,n", [(3, 1009), (4, 401), (16, 3001), (40, 997)])
def test_is_so_up_to_condition_1e6(m, n, condition, dtype, impl):
    rows = with_condition(m, n, condition).to(dtype)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    # LAPACK fuses multiply and add. Without, every product of sums that cancel is rounded too:
    # 4.2 to 5 times MKL's error on a Xeon, where the other instruction sets reach 3.5 to 3.9
    fused = impl != "native" or _backend._C.isa() != "baseline"
    check(rows, q, r, rank, allowance=4.0 if fused else 5.0)


@pytest.mark.parametrize("m,angle", [(12, 0.8), (16, 0.8), (16, 1.0), (32, 1.2), (48, 1.3)])
def test_is_so_where_no_single_distance_tells_the_condition(m, angle, impl, dtype):
    rows = kahan(m, 2003, angle).to(dtype)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    check(rows, q, r, rank, condition=1e6)


@pytest.mark.parametrize("m,n", [(3, 50), (7, 50)])
def test_equals_qr_with_a_positive_diagonal(m, n, impl):
    rows = torch.randn(m, n, dtype=torch.float64)
    q, r = gs.orthonormalize(rows)
    expected_q, expected_r = torch.linalg.qr(rows.mT)
    signs = expected_r.diagonal().sign()
    torch.testing.assert_close(q, (expected_q * signs).mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(r, expected_r * signs[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [2, 5])
def test_hand_worked(m, impl):
    rows = torch.zeros(m, 6)
    rows[0, 0], rows[1, :2] = -3, torch.tensor([1.0, -2])
    for i in range(2, m):
        rows[i, i] = 7
    q, r = gs.orthonormalize(rows)
    assert q[0].tolist() == pytest.approx([-1, 0, 0, 0, 0, 0], abs=1e-6)
    assert q[1].tolist() == pytest.approx([0, -1, 0, 0, 0, 0], abs=1e-6)
    assert r[0, :2].tolist() == pytest.approx([3, -1])
    assert r[1, :2].tolist() == pytest.approx([0, 2])


@pytest.mark.parametrize(
    "family,m,rank",
    [
        (duplicate, 4, 2),
        (duplicate, 9, 5),
        (zero_rows, 3, 1),
        (zero_rows, 8, 4),
        (parallel, 4, 1),
        (parallel, 7, 1),
    ],
)
def test_dependent_rows_are_zero(family, m, rank, impl, dtype):
    if family is parallel and dtype.itemsize == 2:
        pytest.skip("rounded to 16 bits, multiples are no longer parallel")
    rows = family(m, 211)
    if family is duplicate:  # powers of two: exact in any dtype
        rows = rows / torch.arange(1, m + 1)[:, None] * 2.0 ** (torch.arange(m)[:, None] % 3)
    rows = rows.to(dtype)
    if family is parallel:
        rows = rows[:1] * 2.0 ** torch.arange(-2, m - 2)[:, None].to(dtype)
    q, r, found = gs.orthonormalize(rows, return_rank=True)
    assert found.item() == rank
    check(rows, q, r, found)


def test_the_first_of_equal_rows_is_kept(impl):
    for m in (3, 6):
        rows = torch.eye(m, 20)
        rows[2] = rows[0]
        q, r, rank = gs.orthonormalize(rows, return_rank=True)
        assert rank.item() == m - 1
        assert q[0].any()
        assert not q[2].any()
        assert r[0, 2] == pytest.approx(1)


@pytest.mark.parametrize("distance,rank", [(1e-3, 2), (1e-5, 2), (1e-6, 2), (1e-9, 1)])
@pytest.mark.parametrize("extra", [0, 4])
def test_near_duplicates(distance, rank, extra, impl):
    rows = torch.eye(2 + extra, 300, dtype=torch.float64)
    rows[1] = rows[0] + distance * rows[1]
    q, r, found = gs.orthonormalize(rows, return_rank=True)
    assert found.item() == rank + extra
    if rank == 2:
        check(rows, q, r, found)
        assert q[1, 1].item() == pytest.approx(1)
        assert r[1, 1].item() == pytest.approx(distance, rel=1e-4)


def test_rtol_is_a_relative_distance_to_the_rows_before(impl):
    for extra in (0, 4):
        rows = torch.eye(2 + extra, 30)
        rows[1] = 1e5 * (rows[0] + 1e-2 * rows[1])
        for rtol, rank in ((9e-3, 2), (1.1e-2, 1)):
            assert gs.orthonormalize(rows, rtol=rtol, return_rank=True)[2].item() == rank + extra


@pytest.mark.parametrize("m,n", [(3, 2), (9, 5), (70, 33), (4, 1)])
def test_more_rows_than_columns(m, n, impl, dtype):
    rows = torch.randn(m, n).to(dtype)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == n
    assert orthogonality(q) <= 8 * ROUNDOFF[dtype] * n**0.5
    # rows beyond the rank come from the float64 factor, off by its rounding times the condition
    assert reconstruction(rows, q, r) <= 8 * ROUNDOFF[dtype] * n**0.5 + 1e-12


@pytest.mark.parametrize("m", [4, 9])
def test_tiny_rows_beside_huge_ones(m, impl):
    rows = graded(m, 301).float()
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    assert orthogonality(q) <= 1e-6
    assert reconstruction(rows, q, r) <= 1e-6


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("m", [3, 8])
def test_any_scale(m, scale, impl):
    rows = torch.randn(m, 301) * scale
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    assert orthogonality(q) <= 1e-6
    assert reconstruction(rows, q, r) <= 1e-6 + 1e-44 / scale


@pytest.mark.parametrize(
    "shape", [(3, 0), (0, 5), (0, 0), (2, 3, 0), (0, 3, 4), (2, 0, 4), (3, 6, 0), (2, 0, 5, 7)]
)
def test_empty_shapes(shape, impl, dtype):
    q, r, rank = gs.orthonormalize(torch.zeros(shape, dtype=dtype), return_rank=True)
    assert q.shape == shape
    assert r.shape == (*shape[:-1], shape[-2])
    assert rank.shape == shape[:-2]
    assert not r.any()
    assert not rank.any()


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("m,n", [(1, 3), (2, 65), (4, 33), (8, 129), (3, 2)])
def test_is_batched(batch, m, n, impl, dtype):
    rows = torch.randn(*batch, m, n).to(dtype)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    for index in (
        torch.cartesian_prod(*(torch.arange(b) for b in batch)).view(-1, len(batch)).tolist()
    ):
        at = tuple(index)
        alone = gs.orthonormalize(rows[at], return_rank=True)
        assert rank[at] == alone[2] == min(m, n)
        for got, expected in ((q, alone[0]), (r, alone[1])):
            tolerance = 4 * ROUNDOFF[dtype] + 1e-14
            torch.testing.assert_close(got[at], expected, rtol=tolerance, atol=tolerance)


def test_more_rows_than_dimensions_have_no_larger_rank(impl):
    """However near to one another those before are: some of these are 1e-4 apart."""
    rows = torch.randn(2000, 3, 2, dtype=torch.float64)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert (rank == 2).all()
    apart = (r.mT @ q - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert apart.max() <= 1e-8  # what a row left out is made of comes from the Gramian


def test_a_batch_of_different_ranks(impl):
    rows = torch.stack([torch.randn(6, 40), torch.zeros(6, 40), duplicate(6, 40).float()])
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.tolist() == [6, 0, 3]
    assert orthogonality(q) <= 1e-6
    assert reconstruction(rows, q, r) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [3, 7])
def test_reads_any_layout(m, layout, impl, dtype):
    rows = LAYOUTS[layout](torch.randn(m, 259).to(dtype))
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    expected = gs.orthonormalize(
        rows.clone(memory_format=torch.contiguous_format), return_rank=True
    )
    for got, wanted in zip((q, r, rank), expected, strict=True):
        assert torch.equal(got, wanted) or impl == "torch"
    assert q.is_contiguous()
    assert reconstruction(rows, q, r) <= 8 * ROUNDOFF[dtype]


def test_reads_permuted_batches(impl):
    rows = torch.randn(50, 4, 3).permute(2, 1, 0)
    q, r = gs.orthonormalize(rows)
    assert orthogonality(q) <= 1e-6
    assert reconstruction(rows, q, r) <= 1e-6
    expanded = torch.randn(1, 5, 30).expand(4, 5, 30)
    assert orthogonality(gs.orthonormalize(expanded)[0]) <= 1e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 500),
    exponent=st.integers(-35, 35),
    seed=st.integers(0, 9),
)
def test_any_shape_and_scale(m, n, exponent, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(m, n).double() * 10.0**exponent).float()
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == min(m, n)
    assert orthogonality(q) <= 1e-6
    assert reconstruction(rows, q, r) <= 2e-6


@pytest.mark.parametrize("shape", [(3, 20_011), (16, 20_011), (40, 3, 301), (40, 6, 301)])
def test_threads_agree(shape, impl):
    rows = torch.randn(shape)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(gs.orthonormalize(rows))
        assert all(
            torch.equal(a, b) for a, b in zip(found[-1], gs.orthonormalize(rows), strict=True)
        )
    for q, r in found[1:]:
        torch.testing.assert_close(q, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(r, found[0][1], rtol=1e-6, atol=1e-5)


def test_many_rows(impl):
    m = 512 if impl == "native" else 100
    rows = torch.randn(m, 700)
    q, r, rank = gs.orthonormalize(rows, return_rank=True)
    assert rank.item() == m
    check(rows, q, r, rank)


def test_rows_are_untouched(impl, dtype):
    for m in (3, 6):
        rows = torch.randn(m, 301).to(dtype)
        before = rows.clone()
        gs.orthonormalize(rows)
        assert same_values(rows, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [3, 6])
def test_names_the_row_that_is_not_finite(m, value, impl, dtype):
    rows = torch.randn(2, m, 301).to(dtype)
    rows[1, 2, 300] = value
    with pytest.raises(gs.NonFiniteError, match=r"row 2 of matrix \[1\] is not finite"):
        gs.orthonormalize(rows)
    with pytest.raises(gs.NonFiniteError, match="rows: row 2 is not finite"):
        gs.orthonormalize(rows[1])


@pytest.mark.parametrize(
    "rows,options,message",
    [
        (torch.ones(3), {}, r"rows must be \[..., m, n\], got \[3\]"),
        ([torch.ones(3)], {}, "rows must be a Tensor, got list"),
        (torch.ones(2, 3).int(), {}, "rows must be float16.*got torch.int32"),
        (torch.ones(2, 3).to_sparse(), {}, "rows must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 3), {"rtol": 1.0}, r"rtol must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_rejects_what_is_no_matrix(rows, options, message, impl):
    with pytest.raises(gs.InputError, match=message):
        gs.orthonormalize(rows, **options)


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (5, 6), (2, 2, 3), (2, 2)])
def test_gradient(shape, impl):
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gs.orthonormalize, rows)
    if rows.numel() < 10:
        assert torch.autograd.gradgradcheck(gs.orthonormalize, rows)


def test_gradient_through_one_result(impl):
    rows = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gs.orthonormalize(x)[0], rows)
    assert torch.autograd.gradcheck(lambda x: gs.orthonormalize(x)[1], rows)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("m", [3, 6])
def test_registration(m, needs_grad, impl, dtype):
    if needs_grad and dtype != torch.float64:
        pytest.skip("gradients are compared in float64")
    rows = torch.randn(2, 17, m).to(dtype).mT.requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gradsurgery.orthonormalize, (rows, 1e-7))


def test_compiles_into_one_graph(impl):
    rows = torch.randn(5, 41)
    compiled = torch.compile(gs.orthonormalize, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(rows), gs.orthonormalize(rows), strict=True):
        assert torch.equal(got, expected)
