"""update = wᵀ J: the float64 sum, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops._backend import native_available
from gradsurgery.ops.combine import combine_into
from tests.conftest import ROUNDOFF
from tests.inputs import BLOCKS, LAYOUTS, SHAPES, as_matrix, blocks_of, same_values


def assert_rounded_once(update, rows, weights):
    """Within half a unit in the last place of the exact sum, and what float64 sums are off by."""
    exact = weights.double() @ rows.double()
    float64_error = 1e-15 * (weights.double().abs() @ rows.double().abs())
    # going through float32 on the way to 16 bits may add 2⁻²⁴
    half_ulp = (
        ROUNDOFF[update.dtype] + (2**-24 if update.element_size() == 2 else 0)
    ) * exact.abs()
    subnormal = torch.finfo(update.dtype).smallest_normal * torch.finfo(update.dtype).eps / 2
    excess = (update.double() - exact).abs() - half_ulp - float64_error - subnormal
    assert not excess.isnan().any()
    assert (excess <= 0).all(), f"{excess.max():.1e} more than a rounding"


@pytest.mark.parametrize("m,n", SHAPES)
def test_is_the_float64_sum_rounded_once(m, n, impl, dtype):
    rows, weights = torch.randn(m, n).to(dtype), torch.randn(m, dtype=torch.float64)
    update = gs.combine(rows, weights)
    assert update.dtype == dtype
    assert update.shape == (n,)
    assert_rounded_once(update, rows, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m,n", [(5, 2053), (33, 127), (2, 1)])
def test_reads_any_layout(m, n, layout, impl, dtype):
    rows, weights = LAYOUTS[layout](torch.randn(m, n).to(dtype)), torch.randn(m)
    assert_rounded_once(gs.combine(rows, weights), rows, weights)


def test_cancellation_keeps_float64_digits(impl):
    # float32 sums would lose the 1e-6
    rows = torch.tensor([[1.0] * 37, [1.0] * 37, [1e-6] * 37])
    update = gs.combine(rows, torch.tensor([1e6, -1e6, 1.0], dtype=torch.float64))
    assert torch.equal(update, torch.full((37,), 1e-6))


def test_hand_worked(impl):
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]])
    assert gs.combine(rows, torch.tensor([0.6, 0.4])).tolist() == pytest.approx([0, 1, 1], abs=1e-6)


@pytest.mark.parametrize("shapes", BLOCKS, ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_blocks_keep_their_shapes(shapes, per_tensor, impl, dtype):
    blocks = blocks_of(shapes, dtype)
    m = shapes[0][0]
    weights = torch.randn(len(shapes), m) if per_tensor else torch.randn(m)
    update = gs.combine(blocks, weights)
    assert [list(u.shape) for u in update] == [list(shape[1:]) for shape in shapes]
    for u, block, w in zip(update, blocks, weights.expand(len(shapes), m), strict=True):
        assert_rounded_once(u.flatten(), as_matrix([block]), w)


def test_blocks_of_permuted_dimensions(impl, dtype):
    blocks = [
        torch.randn(3, 5, 7, 4).to(dtype).permute(3, 0, 2, 1),
        torch.randn(1, 4, 9).to(dtype).expand(2, 4, 9).permute(1, 2, 0),
    ]
    weights = torch.randn(4, dtype=torch.float64)
    for update, block in zip(gs.combine(blocks, weights), blocks, strict=True):
        expected = torch.einsum("i,i...->...", weights, block.double()).to(dtype)
        torch.testing.assert_close(update, expected, rtol=2 * ROUNDOFF[dtype], atol=1e-7)


def test_many_rows(impl):
    rows, weights = torch.randn(1024, 67), torch.randn(1024, dtype=torch.float64)
    assert_rounded_once(gs.combine(rows, weights), rows, weights)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 40),
    n=st.integers(0, 5000),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 9),
)
def test_any_shape_and_scale(m, n, exponent, seed):
    torch.manual_seed(seed)
    rows = torch.randn(m, n)
    weights = torch.randn(m, dtype=torch.float64) * 10.0**exponent
    assert_rounded_once(gs.combine(rows, weights), rows, weights)


def test_weights_of_extreme_size_cancel_extreme_rows(impl):
    rows = torch.randn(3, 501) * torch.tensor([[1e-30], [1e30], [1.0]])
    weights = torch.tensor([1e30, 1e-30, 1.0], dtype=torch.float64)
    assert_rounded_once(gs.combine(rows, weights), rows, weights)


def test_threads_agree_bit_for_bit(impl):
    # every column is one sum, whoever computes it
    rows, weights = torch.randn(7, 100_003), torch.randn(7)
    updates = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        updates.append(gs.combine(rows, weights))
    assert all(torch.equal(update, updates[0]) for update in updates) or impl == "torch"
    assert_rounded_once(updates[-1], rows, weights)


def test_inputs_are_untouched(impl, dtype):
    rows, weights = torch.randn(5, 301).to(dtype), torch.randn(5, dtype=torch.float64)
    before = rows.clone(), weights.clone()
    gs.combine(rows, weights)
    assert same_values(rows, before[0])
    assert same_values(weights, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_what_is_not_finite(value, impl, dtype):
    blocks = [torch.randn(3).to(dtype), torch.randn(3, 1023).to(dtype)]
    with pytest.raises(gs.InputError, match="weights must be finite, got"):
        gs.combine(blocks, torch.tensor([1, value, 1]))
    blocks[1][2, 1022] = value
    # a weight of zero does not hide it
    for weights in (torch.ones(3), torch.tensor([1.0, 1, 0]), torch.ones(2, 3)):
        with pytest.raises(gs.NonFiniteError, match="row 2 is not finite: tensor 1, 1 of 1023"):
            gs.combine(blocks, weights)


def test_says_when_the_update_overflows(impl):
    rows = torch.full((2, 5), 60000.0, dtype=torch.float16)
    with pytest.raises(gs.NonFiniteError, match=r"update overflows torch.float16"):
        gs.combine(rows, torch.ones(2))
    assert gs.combine(rows, torch.tensor([1.0, -0.5])).tolist() == [30000] * 5


@pytest.mark.parametrize(
    "rows,weights,message",
    [
        (torch.ones(3), torch.ones(3), r"rows must be \[m, n\], got \[3\]"),
        (torch.ones(2, 3), torch.ones(3), r"weights must be \[2\] or \[1, 2\] to match rows"),
        (torch.ones(2, 3), torch.tensor(1.0), r"weights must be \[2\].* got \[\]"),
        (torch.ones(2, 3), torch.ones(2, 2), r"weights must be .* got \[2, 2\]"),
        ([torch.ones(2, 3)] * 3, torch.ones(2, 2), r"weights must be \[2\] or \[3, 2\]"),
        (torch.ones(2, 3), [1.0, 2.0], "weights must be a Tensor, got list"),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.int64), "weights must be floating point, got"),
        (torch.ones(2, 3), torch.ones(2, device="meta"), "weights is on meta, rows is on cpu"),
        (torch.ones(2, 3), torch.ones(2).to_sparse(), "weights must be a dense tensor, got"),
        (7, torch.ones(2), "rows must be a Tensor or a sequence of Tensors, got int"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(rows, weights, message, impl):
    with pytest.raises(gs.InputError, match=message):
        gs.combine(rows, weights)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_gradient(per_tensor, impl):
    blocks = [block.requires_grad_() for block in blocks_of([(3, 4), (3,), (3, 2, 2), (3, 0)])]
    weights = torch.randn((4, 3) if per_tensor else 3, dtype=torch.float64, requires_grad=True)
    check = lambda w, *b: tuple(gs.combine(b, w))  # noqa: E731
    assert torch.autograd.gradcheck(check, (weights, *blocks))
    assert torch.autograd.gradgradcheck(check, (weights, *blocks))


def test_gradient_of_one_tensor_of_the_update(impl):
    blocks = [block.requires_grad_() for block in blocks_of([(3, 4), (3,)])]
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *b: gs.combine(b, w)[1], (weights, *blocks))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_registration(needs_grad, per_tensor, impl, dtype):
    if needs_grad and dtype != torch.float64:
        pytest.skip("gradients are compared in float64")
    blocks = [b.requires_grad_(needs_grad) for b in blocks_of([(3, 5), (3,), (3, 2, 3)], dtype)]
    blocks[2] = blocks[2].detach().permute(0, 2, 1).requires_grad_(needs_grad)
    weights = torch.randn(
        (3, 3) if per_tensor else 3, dtype=torch.float64, requires_grad=needs_grad
    )
    torch.library.opcheck(torch.ops.gradsurgery.combine, (blocks, weights))


def test_compiles_into_one_graph(impl):
    blocks, weights = blocks_of([(3, 5), (3,)]), torch.randn(3)
    compiled = torch.compile(
        lambda w, *b: [2 * u for u in gs.combine(b, w)], fullgraph=True, backend="aot_eager"
    )
    for update, expected in zip(
        compiled(weights, *blocks), gs.combine(blocks, weights), strict=True
    ):
        assert torch.equal(update, 2 * expected)


# the pass beneath: several outs, their products, in place


@pytest.mark.skipif(not native_available("cpu"), reason="the native module is not built")
@pytest.mark.parametrize(
    "m,n,p", [(1, 1, 1), (5, 1003, 1), (7, 333, 7), (4, 64, 2), (3, 70_001, 5)]
)
def test_one_pass_yields_the_products_of_its_outs(m, n, p, dtype):
    rows = torch.randn(m, n).to(dtype)
    weights = torch.randn(p, m, dtype=torch.float64)
    cut = n // 3
    out = rows.new_empty(p, n)
    cross, gram = weights.new_empty(p, m), weights.new_empty(p, p)
    sources, outs = [[rows[:, :cut], rows[:, cut:]]], [[out[:, :cut], out[:, cut:]]]
    assert combine_into(sources, weights, outs, cross, gram)
    for r in range(p):
        assert_rounded_once(out[r], rows, weights[r])
    norms = out.double().norm(dim=1), rows.double().norm(dim=1)
    # of what was written, not of the sums before rounding
    assert ((cross - out.double() @ rows.double().mT) / torch.outer(*norms)).abs().max() < 1e-6
    assert (
        (gram - out.double() @ out.double().mT) / torch.outer(norms[0], norms[0])
    ).abs().max() < 1e-6


@pytest.mark.skipif(not native_available("cpu"), reason="the native module is not built")
@pytest.mark.parametrize("m,n", [(2, 5), (6, 5003)])
def test_outs_may_be_the_rows(m, n, dtype):
    rows = torch.randn(m, n).to(dtype)
    weights = torch.randn(m, m, dtype=torch.float64)
    expected = [gs.combine(rows, w) for w in weights]
    combine_into([[rows]], weights, [[rows]])
    assert torch.equal(rows, torch.stack(expected))
