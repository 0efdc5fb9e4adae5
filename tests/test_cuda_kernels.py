"""What the CUDA kernels compute: every path through them, on a GPU or compiled for the host.

`make emulate` runs this file without a GPU; tests/ops hold what the operators promise.
"""

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.ops._backend import _C, TRITON, native_available
from gradsurgery.ops.bargaining import bargaining_weights_native, bargaining_weights_reference
from gradsurgery.ops.combine import combine_into
from gradsurgery.ops.cone import cone_weights_native, cone_weights_reference
from gradsurgery.ops.conflict_averse import conflict_averse_weights_native
from gradsurgery.ops.deconflict import deconflict_weights_native, deconflict_weights_reference
from gradsurgery.ops.eigen import eigen_native
from gradsurgery.ops.gramian import FEW_ROWS, gramian_of
from gradsurgery.ops.orthonormalize import orthonormalize_native
from gradsurgery.ops.project_out import project_out_gpu, project_out_reference
from gradsurgery.ops.weighting import (
    projection_weights_native,
    projection_weights_reference,
    scratch_for,
)
from tests.inputs import LAYOUTS, opposed

if _C is not None and _C.cuda_version == "emulated":
    DEVICE = "cpu"
elif torch.cuda.is_available() and native_available("cuda"):
    DEVICE = "cuda"
else:
    DEVICE = None

pytestmark = pytest.mark.skipif(
    DEVICE is None,
    reason="needs a GPU and nvcc, or the kernels compiled for the host: make emulate",
)

# of the largest |error| / (|g_i| |g_j|): float32 products, in sums of 32 that few columns do not
# average out, and float64 products
GRAMIAN = {False: 3e-7, True: 1e-14}
TRITONS = 1e-6  # as tests/kernels has it
# an out is rounded once
ROUNDING = {torch.float64: 1e-13, torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# how fast float64 is there decides which kernel multiplies 5 to 16 rows of float32
DOUBLES = ["fast", "slow"] if DEVICE == "cpu" else ["as it is"]

# on each side of every tile size; columns with and without an end that fills no slice
SIZES = [  # m, n
    (1, 1), (2, 8200), (3, 257), (4, 4096), (5, 2053), (8, 520), (9, 515), (16, 256), (17, 200),
    (32, 129), (33, 67), (34, 300), (66, 33), (3, 0),
]  # fmt: skip
COMBINED = [  # m, n, p
    (1, 1, 1), (3, 3000, 1), (9, 2100, 1), (5, 1030, 2), (4, 999, 3), (6, 1024, 4), (7, 300, 9),
    (0, 10, 2), (3, 0, 1),
]  # fmt: skip
BATCHES = [  # b, m, n
    (0, 2, 5), (12, 2, 9), (1, 1, 9), (3, 4, 260), (2, 9, 300), (1, 40, 129), (2, 0, 4), (2, 3, 0),
]  # fmt: skip


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def matrix(source):
    """Rows of one source as a float64 matrix on the host."""
    return torch.cat([block.double().cpu() for block in source], 1)


def gramian_error(gram, rows):
    exact = rows @ rows.mT
    scale = exact.diagonal().sqrt()
    scale = (scale[:, None] * scale).clamp_min(1e-300)
    return ((gram.cpu() - exact).abs() / scale).max().item() if gram.numel() else 0.0


def assert_combined(out, weights, rows):
    """Within one rounding of the exact sum, and of its terms in float64."""
    exact = weights.cpu() @ rows
    bound = ROUNDING[out.dtype] * exact.abs() + 1e-15 * (weights.abs().cpu() @ rows.abs())
    bound += 1e-7 if out.dtype == torch.float16 else 0  # subnormal
    assert ((out.double().cpu() - exact).abs() <= bound).all()


@pytest.mark.parametrize("doubles", DOUBLES)
@pytest.mark.parametrize("m,n", [(5, 2053), (8, 520), (9, 3100), (16, 2100), (17, 1600)])
def test_gramian_of_few_float32_rows_on_any_gpu(m, n, doubles, monkeypatch):
    monkeypatch.setenv("EMULATED_DOUBLES", doubles)
    rows = randn(m, n)
    exact = doubles == "fast"  # float64 where it keeps up
    for sources in ([[rows]], [[rows[:-1]], [rows[-1:]]]):
        gram = gramian_of(sources, False)
        assert torch.equal(gram, gram.mT)
        assert gramian_error(gram, matrix([rows])) <= GRAMIAN[exact]


@pytest.mark.parametrize("precise", [False, True], ids=["float", "double"])
@pytest.mark.parametrize("m,n", SIZES)
def test_gramian_matches_float64(m, n, precise, dtype):
    rows = randn(m, n, dtype=dtype)
    gram = gramian_of([[rows]], precise)
    assert torch.equal(gram, gram.mT)
    assert gramian_error(gram, matrix([rows])) <= GRAMIAN[precise or dtype == torch.float64]


@pytest.mark.skipif(DEVICE == "cpu", reason="slow where kernels run on the host")
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 100, 300])
def test_gramian_of_many_columns(m, dtype):
    rows = randn(m, 1_000_003, dtype=dtype)
    # many rows of 16 bits go to Triton's kernel, for its tensor cores, if there is one
    triton = TRITON and m > FEW_ROWS and dtype.itemsize == 2
    limit = TRITONS if triton else GRAMIAN[False]
    assert gramian_error(gramian_of([[rows]], False), matrix([rows])) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m,n", [(3, 1100), (8, 601), (12, 300), (34, 70)])
def test_gramian_reads_any_layout(m, n, layout, dtype):
    rows = LAYOUTS[layout](randn(m, n, dtype=dtype))
    assert gramian_error(gramian_of([[rows]], False), matrix([rows])) <= GRAMIAN[False]


@pytest.mark.parametrize("heads", [(1, 1), (2, 1, 3), (7, 4)])
def test_gramian_of_more_tensors_than_a_launch_takes(heads, dtype):
    widths = [0, 1, 7, 64, 600, 2, 0, 33] * 13  # 104: more than fit in a table
    sources = [[randn(m, n, dtype=dtype) for n in widths] for m in heads]
    rows = torch.cat([matrix(source) for source in sources])
    assert gramian_error(gramian_of(sources, False), rows) <= GRAMIAN[False]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m,n", [(8, 1100), (16, 517), (32, 70), (64, 33), (65, 4), (4, 0)])
def test_gramian_of_rows_and_one_more(m, n, layout, dtype):
    rows, vector = LAYOUTS[layout](randn(m, n, dtype=dtype)), randn(1, n, dtype=dtype)
    gram = gramian_of([[rows], [vector]], False)
    assert torch.equal(gram, gram.mT)
    assert gramian_error(gram, matrix([torch.cat([rows, vector])])) <= GRAMIAN[False]


@pytest.mark.parametrize("m", [5, 17, 70])
def test_the_border_of_a_gramian(m, dtype):
    rows, columns = randn(m, 1100, dtype=dtype), [7, 1000, 93]
    gram = torch.full((m, m), torch.nan, dtype=torch.float64, device=DEVICE)
    scratch = gram.new_empty(_C.gramian_scratch(m))
    sources = [list(part.split(columns, 1)) for part in (rows[:-1], rows[-1:])]
    _C.gramian_border_cuda(sources, gram, scratch)
    exact = matrix([rows]) @ matrix([rows])[-1]
    size = matrix([rows]).norm(dim=1) * matrix([rows])[-1].norm()
    assert ((gram[-1].cpu() - exact).abs() <= 1e-14 * size).all()
    assert torch.equal(gram[:, -1], gram[-1])
    assert gram[:-1, :-1].isnan().all()
    with pytest.raises(InputError, match="sources have 4 rows"):
        _C.gramian_border_cuda([[rows[:4]]], gram, scratch)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gramian_of_rows_and_one_more_out_of_float32s_range(scale):
    rows, vector = (randn(8, 300).double() * scale).float(), randn(1, 300)
    gram = gramian_of([[rows], [vector]], False)
    assert gramian_error(gram, matrix([torch.cat([rows, vector])])) <= GRAMIAN[True]


@pytest.mark.parametrize("heads", [(5,), (8, 1), (3, 13, 1), (1, 9, 22), (70,)])
def test_products_of_one_sum_with_its_rows(heads, dtype):
    widths = [0, 1, 7, 64, 2100, 2, 0, 33] * 13
    sources = [[randn(m, n, dtype=dtype) for n in widths] for m in heads]
    rows = torch.cat([matrix(source) for source in sources])
    weights, m = randn(1, len(rows), dtype=torch.float64), len(rows)
    outs = [torch.empty(1, n, device=DEVICE, dtype=dtype) for n in widths]
    cross, gram = (torch.empty(1, k, device=DEVICE, dtype=torch.float64) for k in (m, 1))
    combine_into(sources, weights, [outs], cross, gram)
    found = matrix([torch.cat(outs, 1)])
    assert_combined(torch.cat(outs, 1), weights, rows)
    size = rows.norm(dim=1) * found.norm()
    assert ((cross.cpu() - found @ rows.mT).abs() <= 1e-14 * size).all()
    torch.testing.assert_close(gram.cpu(), found @ found.mT, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
@pytest.mark.parametrize("m,n", [(4, 700), (16, 2700)])
def test_products_of_a_sum_that_takes_a_rows_place(m, n, layout, dtype):
    rows, weights = LAYOUTS[layout](randn(m, n, dtype=dtype)), randn(1, m, dtype=torch.float64)
    exact = matrix([rows])
    cross, gram = weights.new_empty(1, m), weights.new_empty(1, 1)
    combine_into([[rows]], weights, [[rows[-1:]]], cross, gram)
    assert_combined(rows[-1:], weights, exact)
    found = matrix([rows[-1:]])
    size = exact.norm(dim=1) * found.norm()
    assert ((cross.cpu() - found @ exact.mT).abs() <= 1e-14 * size).all()
    torch.testing.assert_close(gram.cpu(), found @ found.mT, rtol=1e-13, atol=0)


@pytest.mark.parametrize("m", [3, 16, 20])
def test_project_out_matches_the_reference(m, dtype):
    widths = [0, 7, 1, 600]
    rows, grad = [randn(m, n, dtype=dtype) for n in widths], [randn(n, dtype=dtype) for n in widths]
    perp, rank, kept, worst = project_out_gpu(grad, rows, 1e-6, 1)
    expected, _, expected_kept, _ = project_out_reference(grad, rows, 1e-6)
    found, exact = (torch.cat(parts).double().cpu() for parts in (perp, expected))
    assert (found - exact).norm() <= 2 * ROUNDING[dtype] * exact.norm()
    assert rank == m
    assert worst <= ROUNDING[dtype]
    assert abs(kept - expected_kept) <= ROUNDING[dtype]


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_gramian_leaves_the_range_of_float32(m, scale):
    rows = (randn(m, 300).double() * scale).float()
    assert gramian_error(gramian_of([[rows]], False), matrix([rows])) <= GRAMIAN[True]


@pytest.mark.parametrize("m", [2, 8, 9, 16, 17, 33])
def test_gramian_that_nobody_repeats_has_the_same_bits_in_range(m):
    """A caller who looks at the norms has it in half the launches; what is lost there stays so."""
    rows = randn(m, 700, dtype=torch.bfloat16)
    assert torch.equal(gramian_of([[rows]], False, repeat=False), gramian_of([[rows]], False))
    tiny = rows * 2.0**-70
    lost = gramian_of([[tiny]], False, repeat=False)
    assert gramian_error(gramian_of([[tiny]], False), matrix([tiny])) <= GRAMIAN[True]
    assert float(lost.diagonal().max()) < 2.0**-80  # as its norms tell


@pytest.mark.parametrize("m", [2, 6, 15])
def test_gramian_repeats_its_bits_and_keeps_what_is_not_finite(m):
    rows = randn(m, 5000)
    first = gramian_of([[rows]], False)
    assert torch.equal(first, gramian_of([[rows]], False))
    rows[1, 4999] = torch.inf
    gram = gramian_of([[rows]], False)
    assert gram[1, 1] == torch.inf
    keep = [i for i in range(m) if i != 1]
    assert gramian_error(gram[keep][:, keep], matrix([rows[keep]])) <= GRAMIAN[True]


@pytest.mark.parametrize("m,n,p", COMBINED)
def test_combine_matches_float64(m, n, p, dtype):
    rows, weights = randn(m, n, dtype=dtype), randn(p, m, dtype=torch.float64)
    out = rows.new_empty(p, n)
    combine_into([[rows]], weights, [[out]])
    assert_combined(out, weights, matrix([rows]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_combine_reads_and_writes_any_layout(p, layout, dtype):
    rows, weights = LAYOUTS[layout](randn(6, 1100, dtype=dtype)), randn(p, 6, dtype=torch.float64)
    for make in [value for key, value in LAYOUTS.items() if "expanded" not in key]:
        out = make(rows.new_empty(p, 1100))
        combine_into([[rows]], weights, [[out]])
        assert_combined(out, weights, matrix([rows]))


def test_combine_of_many_tensors_and_sources():
    widths = [0, 1, 7, 64, 600, 2, 0, 33] * 13
    sources = [[randn(m, n) for n in widths] for m in (3, 1, 2)]
    weights = randn(2, 6, dtype=torch.float64)
    outs = [[torch.empty(1, n, device=DEVICE) for n in widths] for _ in range(2)]
    combine_into(sources, weights, outs)
    rows = torch.cat([matrix(source) for source in sources])
    assert_combined(torch.cat([torch.cat(out, 1) for out in outs]), weights, rows)


@pytest.mark.parametrize("n", [1030, 4096])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_combine_writes_over_its_rows(p, n):
    rows, weights = randn(7, n), randn(p, 7, dtype=torch.float64)
    expected = matrix([rows])
    combine_into([[rows]], weights, [[rows[:p]]])
    assert_combined(rows[:p], weights, expected)


def test_combine_refuses_to_write_many_outs_over_rows():
    rows = randn(6, 100)
    with pytest.raises(InputError, match="outs that are rows must be four at most"):
        combine_into([[rows]], randn(5, 6, dtype=torch.float64), [[rows[1:]]])


@pytest.mark.parametrize(
    "m,n,p", [(1, 50, 1), (6, 3001, 1), (7, 100, 2), (20, 300, 3), (70, 64, 2)]
)
def test_products_of_outs(m, n, p, dtype):
    rows, weights = randn(m, n, dtype=dtype), randn(p, m, dtype=torch.float64)
    out = rows.new_empty(p, n)
    cross, gram = weights.new_empty(p, m), weights.new_empty(p, p)
    combine_into([[rows]], weights, [[out]], cross, gram)
    exact, outs = matrix([rows]), out.double().cpu()
    out_norms, norms = outs.norm(dim=1)[:, None], exact.norm(dim=1)
    assert ((cross.cpu() - outs @ exact.mT).abs() / (out_norms * norms)).max() <= GRAMIAN[False]
    assert ((gram.cpu() - outs @ outs.mT).abs() / (out_norms * out_norms.mT)).max() <= GRAMIAN[
        False
    ]


@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("m", [0, 1, 5, 33, 43, 44, 60])
def test_projection_weights_match_the_reference(batch, m):
    rows = randn(batch, m, m + 3, dtype=torch.float64)
    if m == 5:
        rows[:, 3] = 2 * rows[:, 1]
        rows[:, 0] = 0
    gram, k = rows @ rows.mT, (rows @ randn(m + 3, 1, dtype=torch.float64)).squeeze(-1)
    c, rank, margin = projection_weights_native(gram, k, 1e-6)
    expected, expected_rank, _ = projection_weights_reference(gram.cpu(), k.cpu(), 1e-6)
    assert torch.equal(rank.cpu(), expected_rank)
    projected, expected = ((rows.mT.cpu() @ x[..., None]) for x in (c.cpu(), expected))
    torch.testing.assert_close(projected, expected, atol=1e-9, rtol=1e-9)
    # the margin depends on which of equally far rows comes first: the CPU's algorithm is the same
    same = [torch.empty_like(x, device="cpu") for x in (c, rank, margin)]
    _C.projection_weights_cpu(gram.cpu(), k.cpu(), *same, 1e-6, 1)
    torch.testing.assert_close(margin.cpu(), same[2], atol=1e-12, rtol=1e-8)


# batches and rows; on each side of what fits shared memory, 40 to 44, and of 32 and 128 threads
SOLVES = [
    (1, 1), (9, 2), (2, 7), (0, 3), (2, 0), (2, 32), (1, 33), (2, 40), (1, 41), (2, 42), (1, 43),
    (2, 44), (1, 128), (1, 129),
]  # fmt: skip


def gramians(batch, m):
    """Rows [b, m, n] that conflict, with a zero row, and their Gramians, on the host."""
    rows = torch.randn(batch, m, m + 3, dtype=torch.float64)
    if m > 6:
        rows[:, 3] = 0
        rows[:, 1] = 2 * rows[:, 5]
    return rows, rows @ rows.mT


def assert_rows_agree(found, expected, rows):
    """Coefficients [..., p, m] of rows give the same sums of them."""
    size = (expected.abs() @ rows.norm(dim=-1, keepdim=True)) + 1e-300
    assert (((found.cpu() - expected) @ rows).abs() <= 1e-11 * size).all()


@pytest.mark.parametrize("batch,m", SOLVES)
def test_cone_weights_match_the_reference(batch, m):
    rows, gram = gramians(batch, m)
    products = torch.cat([torch.randn(batch, 2, m + 3).double() @ rows.mT, -gram[:, :1]], 1)
    x, residual = cone_weights_native(gram.to(DEVICE), products.to(DEVICE), 1e-6, 1e-14)
    assert (residual <= 1e-12).all()  # written for no rows too
    if m:
        assert_rows_agree(x, cone_weights_reference(gram, products, 1e-6, 1e-14)[0], rows)


@pytest.mark.parametrize("batch,m", SOLVES)
def test_conflict_averse_weights_match_the_host(batch, m):
    rows, gram = gramians(batch, m)
    weights = conflict_averse_weights_native(gram.to(DEVICE), 0.5, 1e-6, 1e-14)
    # the reference bisects, a minute at a time: the CPU's algorithm is the same
    expected = torch.empty(batch, m, dtype=torch.float64)
    _C.conflict_averse_weights_cpu(gram, expected, 0.5, 1e-6, 1e-14, 1)
    assert_rows_agree(weights[:, None], expected[:, None], rows)


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("batch,m", [size for size in SOLVES if size[1] < 128] + [(1, 129)])
def test_deconflict_weights_match_the_reference(batch, m, with_targets):
    rows, gram = gramians(batch, m)
    rows[:, 1:2] += 1  # a copy is cancelled to rounding, whose cosines are rounding
    gram, order = rows @ rows.mT, torch.rand(batch, m, m).argsort(-1)
    targets = 0.4 * torch.rand(batch, m, m).double() if with_targets else None
    before = targets.to(DEVICE) if with_targets else None
    v, after = deconflict_weights_native(gram.to(DEVICE), order.to(DEVICE), before, 0.25)
    expected, expected_after = deconflict_weights_reference(gram, order, targets, 0.25)
    assert_rows_agree(v, expected, rows)
    torch.testing.assert_close(after.cpu(), expected_after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("batch,m", SOLVES)
def test_bargaining_weights_match_the_reference(batch, m, power):
    _, gram = gramians(batch, m)
    w = bargaining_weights_native(gram.to(DEVICE), power, 1e-7)
    expected = bargaining_weights_reference(gram, power, 1e-7)
    torch.testing.assert_close(w.cpu(), expected, rtol=1e-11, atol=0)
    assert m < 7 or ((w == 0).sum(-1) == 1).all()


@pytest.mark.parametrize("m", [3, 42])
def test_bargaining_weights_of_opposed_rows_are_zero(m):
    rows = opposed(m, 2 * m)
    assert not bargaining_weights_native((rows @ rows.mT).to(DEVICE), 1.0, 1e-7).any()


@pytest.mark.parametrize("batch,m", SOLVES)
def test_eigen_decomposes(batch, m):
    _, gram = gramians(batch, m)
    values, vectors = (x.cpu() for x in eigen_native(gram.to(DEVICE)))
    eye, size = torch.eye(m, dtype=torch.float64), gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((vectors @ vectors.mT - eye).abs() <= 1e-15 * (8 + m)).all()
    rebuilt = vectors.mT * values[:, None] @ vectors
    assert ((rebuilt - gram).abs() <= 1e-14 * size[:, None, None]).all()
    assert (values.diff() >= 0).all()
    if batch and m:
        torch.testing.assert_close(values, torch.linalg.eigvalsh(gram), rtol=1e-11, atol=1e-11)


def test_solves_of_equal_values_and_of_more_than_the_blocks_of_a_launch():
    gram = torch.eye(4, dtype=torch.float64).expand(1500, 4, 4).to(DEVICE)
    values, vectors = eigen_native(gram)
    assert (values == 1).all()
    assert torch.equal(vectors, gram)
    assert (bargaining_weights_native(gram, 2.0, 1e-7) == 1).all()


@pytest.mark.parametrize(
    "problem", ["cone", "conflict_averse", "deconflict", "bargaining", "eigen"]
)
def test_solves_refuse_what_does_not_fit(problem):
    m = 2050 if problem == "deconflict" else 50  # rows that shared memory does not hold
    gram = torch.eye(m, dtype=torch.float64, device=DEVICE)[None]
    vector, order = gram.new_empty(1, m), torch.arange(m, device=DEVICE).expand(1, m, m).clone()
    name, outs, options = {
        "cone": ("cone_weights_cuda", (vector, vector.clone(), gram.new_empty(1)), (1e-6, 1e-14)),
        "conflict_averse": ("conflict_averse_weights_cuda", (vector,), (0.5, 1e-6, 1e-14)),
        "deconflict": ("deconflict_weights_cuda", (order, gram.clone(), gram.clone()), (0.0,)),
        "bargaining": ("bargaining_weights_cuda", (vector,), (1.0, 1e-7)),
        "eigen": ("eigen_cuda", (vector, gram.clone()), ()),
    }[problem]
    scratch = scratch_for(problem, m if problem == "deconflict" else 1, gram)
    assert scratch.numel() > 0
    args = [gram, *outs, scratch]
    elsewhere = "cpu" if DEVICE == "cuda" else "meta"
    for k, fits in enumerate(args):
        for wrong in (fits.flatten()[1:], fits.float(), fits.to(elsewhere)):
            if problem == "cone" and k == 3 and wrong.dim() == 1:
                continue  # says how many vectors there are
            with pytest.raises(InputError, match=r"must be|memory|device"):
                getattr(_C, name)(*args[:k], wrong, *args[k + 1 :], *options)


def test_cone_weights_refuse_vectors_that_the_gramians_do_not_share():
    # 3 vectors of 2 Gramians; a third lies behind them, so that reading it is no error
    gram = torch.eye(4, dtype=torch.float64, device=DEVICE).repeat(3, 1, 1)
    vectors = gram.new_ones(3, 4)
    args = gram[:2], vectors, vectors.clone(), gram.new_empty(3), gram.new_empty(0)
    with pytest.raises(InputError, match=r"residual must be \[..., p\] for 2 Gramians"):
        _C.cone_weights_cuda(*args, 1e-6, 1e-14)


def test_solves_refuse_a_problem_that_is_none():
    with pytest.raises(InputError, match="no such problem: convex"):
        _C.weighting_scratch("convex", 1, 1)


@pytest.mark.parametrize("b,m,n", BATCHES)
def test_orthonormalize(b, m, n, dtype):
    rows = randn(b, m, n, dtype=dtype)
    q, r, rank = orthonormalize_native(rows, 1e-6)
    assert (rank == min(m, n)).all()
    assert torch.equal(r, r.triu())
    q, r, rows = q.double().cpu(), r.double().cpu(), rows.double().cpu()
    tolerance = 30 * ROUNDING[dtype]
    if n:
        assert ((q @ q.mT - torch.eye(m, dtype=torch.float64)).abs() <= tolerance).all()
    assert ((r.mT @ q - rows).abs() <= tolerance * (1 + rows.norm(dim=-1, keepdim=True))).all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_orthonormalize_dependent_rows_of_any_layout(layout):
    rows = LAYOUTS[layout](randn(6, 300))
    rows[2] = 0
    rows[4] = rows[0] - rows[3]
    q, r, rank = orthonormalize_native(rows[None], 1e-5)
    assert rank.item() == 4
    assert (q[0, [2, 4]] == 0).all()
    independent = q[0, [0, 1, 3, 5]].double()
    assert (independent @ independent.mT - torch.eye(4, device=DEVICE)).abs().max() <= 1e-6
    assert (r[0].mT @ q[0] - rows).abs().max() <= 1e-4


def test_more_sources_than_a_launch_takes_are_refused():
    with pytest.raises(InputError, match="has 81 sources, a GPU takes at most 80"):
        gramian_of([[randn(1, 3)] for _ in range(81)], False)
