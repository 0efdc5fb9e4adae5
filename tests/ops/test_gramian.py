"""G = J Jᵀ: accurate to its promise for every shape, layout, dtype and scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from tests.inputs import (
    BLOCKS,
    FAMILIES,
    LAYOUTS,
    SHAPES,
    as_matrix,
    blocks_of,
    exact_gramian,
    same_values,
)

# largest |G_ij - g_i·g_j| / (|g_i| |g_j|); the torch implementation sums as the BLAS does, which
# is off by 1e-13 for 10,000 equal values and 2e-12 for a million
PRECISE = {"native": 1e-14, "triton": 1e-14, "torch": 3e-12}
FLOAT32 = 1e-7
# beyond 32,768 columns the kernel multiplies in float32
LONG = [(1, 32_769), (5, 40_003), (13, 33_333)]


def error(gram, rows):
    exact = exact_gramian(rows)
    norms = exact.diagonal().sqrt()
    scale = norms[:, None] * norms
    return torch.where(scale > 0, (gram - exact).abs() / scale, (gram - exact).abs()).max().item()


def promise(impl, dtype, precise=False):
    return PRECISE[impl] if precise or dtype == torch.float64 else FLOAT32


@pytest.mark.parametrize("precise", [False, True], ids=["default", "precise"])
@pytest.mark.parametrize("m,n", SHAPES + LONG)
def test_matches_float64(m, n, precise, impl, dtype):
    rows = torch.randn(m, n).to(dtype)
    gram = gs.gramian(rows, precise=precise)
    assert gram.dtype == torch.float64
    assert gram.shape == (m, m)
    if m:
        assert error(gram, rows) <= promise(impl, dtype, precise)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m,n", [(5, 2053), (33, 127), (2, 1), (3, 40_003)])
def test_reads_any_layout(m, n, layout, impl, dtype):
    rows = LAYOUTS[layout](torch.randn(m, n).to(dtype))
    assert error(gs.gramian(rows), rows) <= 1e-5  # a value misread is far more
    plain = gs.gramian(rows.clone(memory_format=torch.contiguous_format))
    if impl == "native":
        assert torch.equal(gs.gramian(rows), plain), "layouts differ in order of summation"
    else:
        torch.testing.assert_close(gs.gramian(rows), plain, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precise", [False, True], ids=["default", "precise"])
def test_is_accurate_for_every_family(family, precise, impl):
    rows = FAMILIES[family](9, 33_001).float()
    assert error(gs.gramian(rows, precise=precise), rows) <= promise(impl, torch.float32, precise)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("n", [10_007, 70_001])
def test_equal_values_round_no_worse_than_others(value, n, dtype, impl):
    # rounding errors of a running sum of equal terms all have one sign: they reach the bound of the
    # 20 float32 additions that follow one another, 20 * 2^-24, instead of averaging out
    rows = torch.full((3, n), value, dtype=dtype)
    assert error(gs.gramian(rows), rows) <= max(promise(impl, dtype), 20 * 2**-24)
    assert error(gs.gramian(rows, precise=True), rows) <= promise(impl, dtype, precise=True)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-19, 1e19, 1e25])
@pytest.mark.parametrize("n", [1009, 33_013])
def test_squares_beyond_float32(n, scale, impl):
    rows = torch.randn(4, n) * scale
    assert error(gs.gramian(rows), rows) <= FLOAT32
    mixed = rows.clone()
    mixed[1:3] = torch.randn(2, n)
    assert error(gs.gramian(mixed), mixed) <= FLOAT32


def test_one_large_value_among_tiny_ones(impl):
    rows = torch.full((2, 40_009), 1e-20)
    rows[1, 40_008] = 1
    assert error(gs.gramian(rows), rows) <= FLOAT32


def test_float16_subnormals_and_extremes(impl):
    rows = torch.tensor([[6e-8, -6e-8, 1.2e-7], [65504, -65504, 65504]], dtype=torch.float16)
    assert error(gs.gramian(rows), rows) <= FLOAT32


def test_hand_worked(impl):
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])
    assert gs.gramian(rows).tolist() == [[18, -22], [-22, 38]]


@pytest.mark.parametrize("shapes", BLOCKS, ids=str)
def test_blocks_are_one_jacobian(shapes, impl, dtype, assert_close):
    blocks = blocks_of(shapes, dtype)
    m = shapes[0][0]
    whole = gs.gramian(blocks)
    assert error(whole, as_matrix(blocks)) <= promise(impl, dtype) if m else whole.shape == (0, 0)
    each = gs.gramian(blocks, per="tensor")
    assert each.shape == (len(blocks), m, m)
    assert_close(each.sum(0), whole, scale=1e5)
    for gram, block in zip(each, blocks, strict=True):
        alone = gs.gramian([block])
        assert torch.equal(gram, alone)


def test_long_blocks_are_one_jacobian(impl, dtype):
    # slices and threads begin anywhere in a block
    blocks = blocks_of([(3, 20_011), (3,), (3, 0), (3, 131, 71), (3, 5), (3, 9001)], dtype)
    matrix = as_matrix(blocks)
    assert error(gs.gramian(blocks, precise=True), matrix) <= promise(impl, dtype, precise=True)
    assert error(gs.gramian(blocks), matrix) <= 1e-5  # a column lost or taken twice is far more


def test_blocks_of_permuted_dimensions(impl, dtype):
    blocks = [
        torch.randn(3, 5, 7, 4).to(dtype).permute(3, 0, 2, 1),
        torch.randn(6, 4).to(dtype).mT,
        torch.randn(4).to(dtype),
        torch.randn(1, 4, 9).to(dtype).expand(2, 4, 9).permute(1, 2, 0),
    ]
    assert error(gs.gramian(blocks), as_matrix(blocks)) <= promise(impl, dtype)


def test_is_symmetric_and_positive_semidefinite(impl, dtype):
    gram = gs.gramian(torch.randn(65, 40).to(dtype), precise=True)
    assert (gram - gram.mT).abs().max() <= (1e-12 if impl == "torch" else 0)
    values = torch.linalg.eigvalsh(gram)
    assert values.min() >= -1e-13 * values.max()


def test_many_rows(impl):
    rows = torch.randn(1024, 67)
    assert error(gs.gramian(rows), rows) <= FLOAT32


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(0, 5000) | st.integers(32_769, 50_000),
    exponent=st.integers(-36, 36),
    seed=st.integers(0, 9),
)
def test_any_shape_and_scale(m, n, exponent, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(m, n, dtype=torch.float64) * 10.0**exponent).float()
    assert error(gs.gramian(rows), rows) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_agree(dtype, impl):
    rows = torch.randn(7, 100_003, dtype=dtype)
    grams = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        grams.append(gs.gramian(rows))
        assert torch.equal(grams[-1], gs.gramian(rows)), "not deterministic"
        assert error(grams[-1], rows) <= promise(impl, dtype)


@pytest.mark.slow
def test_columns_beyond_int32(monkeypatch):
    # no memory behind it: the columns' stride is zero. 6 s; the torch implementation takes 35
    monkeypatch.setenv("GRADSURGERY_BACKEND", "native")
    n = 2**31 + 7
    rows = torch.ones(1, 1).expand(1, n)
    assert gs.gramian(rows).item() == n


def test_rows_are_untouched(impl, dtype):
    rows = torch.randn(5, 301).to(dtype)
    before, version = rows.clone(), rows._version
    gs.gramian([rows, rows[:, :0]])
    assert same_values(rows, before)
    assert rows._version == version


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_names_the_row_that_is_not_finite(value, impl, dtype):
    rows = torch.randn(4, 2055).to(dtype)
    rows[2, 2054] = value
    with pytest.raises(gs.NonFiniteError, match=r"rows: row 2 is not finite: 1 of 2055 values"):
        gs.gramian(rows)
    blocks = [torch.randn(4).to(dtype), torch.randn(4, 0).to(dtype), rows]
    for per in ("model", "tensor"):
        with pytest.raises(gs.NonFiniteError, match=r"row 2 is not finite: tensor 2, 1 of 2055"):
            gs.gramian(blocks, per=per)


def test_says_when_a_square_overflows_float64(impl):
    rows = torch.tensor([[1.0], [1e200]], dtype=torch.float64)
    with pytest.raises(gs.NonFiniteError, match="squared norm of row 1 overflows float64"):
        gs.gramian(rows)


class Duck:
    shape, dtype = (2, 3), torch.float32


@pytest.mark.parametrize(
    "rows,message",
    [
        (torch.ones(3), r"rows must be \[m, n\], got \[3\]"),
        (torch.ones(2, 3, 4), r"rows must be \[m, n\], got \[2, 3, 4\]"),
        (torch.tensor(1.0), r"rows must be \[m, n\], got \[\]"),
        (torch.ones(2, 3, dtype=torch.int64), r"rows\[0\] must be float16.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), r"rows\[0\] must be .*got torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), r"rows\[0\] must be .*got torch.complex64"),
        (torch.ones(2, 3).to_sparse(), r"rows\[0\] must be a dense tensor, got torch.sparse_coo"),
        ([], "rows is an empty sequence"),
        ([torch.ones(2, 3), torch.ones(3, 3)], r"rows\[1\] has 3 rows, rows\[0\] has 2"),
        ([torch.ones(2), torch.tensor(1.0)], r"rows\[1\] must be .*got a scalar"),
        (
            [torch.ones(2, 3), torch.ones(2, 3).double()],
            r"rows\[1\] is torch.float64, rows\[0\] is",
        ),
        (
            [torch.ones(2), torch.ones(2, device="meta")],
            r"rows\[1\] is on meta, rows\[0\] is on cpu",
        ),
        ([torch.ones(2, 3), [1.0, 2.0]], r"rows\[1\] must be a Tensor, got list"),
        ([torch.ones(2, 3), None], r"rows\[1\] must be a Tensor, got NoneType"),
        ([Duck()], r"rows\[0\] must be a Tensor, got Duck"),
        (3, "rows must be a Tensor or a sequence of Tensors, got int"),
        (None, "rows must be a Tensor or a sequence of Tensors, got NoneType"),
    ],
)
def test_rejects_what_is_no_jacobian(rows, message, impl):
    with pytest.raises(gs.InputError, match=message):
        gs.gramian(rows)


def test_rejects_an_unknown_per():
    with pytest.raises(gs.InputError, match="per must be 'model' or 'tensor', got 'layer'"):
        gs.gramian(torch.ones(2, 3), per="layer")


def test_errors_are_value_errors():
    assert issubclass(gs.NonFiniteError, gs.InputError)
    assert issubclass(gs.InputError, ValueError)


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_gradient(per, impl):
    blocks = [block.requires_grad_() for block in blocks_of([(3, 4), (3,), (3, 2, 2), (3, 0)])]
    assert torch.autograd.gradcheck(lambda *b: gs.gramian(b, per=per), blocks)
    assert torch.autograd.gradgradcheck(lambda *b: gs.gramian(b, per=per), blocks)


def test_gradient_of_strided_rows(impl):
    rows = torch.randn(7, 3, dtype=torch.float64).mT.requires_grad_()
    assert torch.autograd.gradcheck(gs.gramian, rows)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_registration(needs_grad, per_tensor, impl, dtype):
    if needs_grad and dtype != torch.float64:
        pytest.skip("gradients are compared in float64")
    blocks = [b.requires_grad_(needs_grad) for b in blocks_of([(3, 5), (3,), (3, 2, 3)], dtype)]
    blocks[0] = blocks[0].detach().mT.contiguous().mT.requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.gradsurgery.gramian, (blocks, per_tensor, False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports torch.jit
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend, impl):
    blocks = blocks_of([(3, 5), (3,)])
    compiled = torch.compile(lambda *b: 2 * gs.gramian(b), fullgraph=True, backend=backend)
    assert torch.equal(compiled(*blocks), 2 * gs.gramian(blocks))


def test_negated_views(impl):
    # memory that holds the values with the other sign
    rows = torch.complex(torch.randn(5, 40), torch.randn(5, 40)).conj().imag
    assert rows.is_neg()
    more = torch.randn(5, 30)
    assert error(gs.gramian(rows), rows) <= FLOAT32
    assert error(gs.gramian([rows, more]), torch.cat([rows, more], dim=1)) <= FLOAT32
