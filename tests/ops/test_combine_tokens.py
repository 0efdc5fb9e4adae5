"""The weighted sum of weight gradients, from their tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import _backend
from gradsurgery.ops.combine_tokens import combine_tokens
from tests.ops import instruction_sets
from tests.ops.test_token_gramian import LAYOUTS, native, tokens

# |out_ab - exact| over the sum of what was added up, largest
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-14}
SHAPES = [  # n, T, a, b: around registers, panels, chunks and blocks
    *[(3, 5, a, 50) for a in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33)],
    *[(2, 4, 20, b) for b in (1, 15, 16, 17, 32, 47, 48, 49, 95, 97, 192, 193, 241)],
    *[(2, t, 17, 33) for t in (1, 2, 95, 96, 97, 191, 192, 193)],
    (40, 3, 300, 260),
    (1, 64, 769, 17),
    (385, 1, 70, 60),
    (16, 16, 9, 1540),
    (5, 7, 1540, 9),
]
BETAS = (0.0, 1.0, -0.3)


@pytest.fixture(params=LIMITS, ids=["float32", "float64"])
def dtype(request):
    return request.param


def case(n, t, a, b, dtype=torch.float32):
    weights, out = torch.randn(n).double(), torch.randn(a, b).to(dtype)
    return *tokens(n, t, a=a, b=b, dtype=dtype), weights, out


def error(left, right, weights, out, beta):
    """Of out after the sum, beside `before + sum`'s magnitudes."""
    x, y, before = left.double(), right.double(), out.double()
    exact = beta * before + (x.mT @ y * weights.double()[:, None, None]).sum(0)
    size = abs(beta) * before.abs() + (x.abs().mT @ y.abs() * weights.abs()[:, None, None]).sum(0)
    combine_tokens(left, right, weights, out, beta)
    return float(((out - exact).abs() / size.clamp(min=1e-300)).max()) if out.numel() else 0.0


@pytest.mark.parametrize("n,t,a,b", SHAPES)
@pytest.mark.parametrize("beta", BETAS)
def test_matches_the_sum_of_the_planes(n, t, a, b, beta, impl, dtype):
    assert error(*case(n, t, a, b, dtype), beta) <= LIMITS[dtype]


def test_by_hand(impl):
    left = torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]])  # two blocks of one token
    right = torch.tensor([[[1.0, 10.0]], [[4.0, 0.0]]])
    out = torch.ones(2, 2)
    combine_tokens(left, right, torch.tensor([1.0, -0.5]), out, 2)
    assert out.tolist() == [[3.0, 12.0], [-2.0, 22.0]]


@given(
    n=st.integers(0, 9), t=st.integers(0, 200), a=st.integers(0, 60), b=st.integers(0, 120),
    beta=st.sampled_from(BETAS), double=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_any_shape(n, t, a, b, beta, double):
    dtype = torch.float64 if double else torch.float32
    assert error(*case(n, t, a, b, dtype), beta) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n,t,a,b", [(6, 7, 35, 67), (4, 1, 16, 200), (2, 150, 33, 32)])
def test_reads_any_layout(layout, n, t, a, b, impl, dtype):
    make = LAYOUTS[layout]
    left, right, weights, out = case(n, t, a, b, dtype)
    same = out.clone()
    assert error(make(left), make(right), weights, out, 0.5) <= LIMITS[dtype]
    if impl == "native":
        combine_tokens(left, right, weights, same, 0.5)
        assert torch.equal(out, same)


@pytest.mark.parametrize("n,t,a,b", [(6, 7, 35, 67), (3, 200, 9, 50)])
def test_writes_planes_that_lie_otherwise(n, t, a, b, impl, dtype):
    left, right, weights, _ = case(n, t, a, b, dtype)
    turned, part = torch.randn(b, a).to(dtype).mT, torch.randn(a + 2, b + 3).to(dtype)
    rim = part.clone()
    for out in (turned, part[1:-1, 1:-2]):
        assert error(left, right, weights, out, 0.5) <= LIMITS[dtype]
    rim[1:-1, 1:-2] = part[1:-1, 1:-2]
    assert torch.equal(part, rim), "nothing beside it is written"


def test_it_is_noticed(impl):
    left, right, weights, out = case(5, 4, 20, 30)
    version = out._version
    combine_tokens(left, right, weights, out)
    assert out._version > version


def test_what_is_there_is_not_read_without_beta(impl):
    left, right, weights, out = case(5, 4, 20, 30)
    out.fill_(float("nan"))
    combine_tokens(left, right, weights, out)
    assert out.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row_and_column(bad, impl):
    left, right, weights, out = case(5, 4, 20, 60)
    left[2, 1, 7] = bad
    combine_tokens(left, right, weights, out, 1)
    assert not out[7].isfinite().any()
    assert out[torch.arange(20) != 7].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads_change_no_bit(threads, impl, dtype):
    for shape in ((16, 16, 200, 300), (100, 1, 90, 500), (1, 300, 400, 40)):
        left, right, weights, out = case(*shape, dtype)
        first = out.clone()
        torch.set_num_threads(threads)
        assert error(left, right, weights, out, 0.5) <= LIMITS[dtype]
        if impl == "native":
            torch.set_num_threads(1)
            combine_tokens(left, right, weights, first, 0.5)
            assert torch.equal(out, first)


@native
def test_the_kernel_checks_what_it_is_given():
    left, right, weights, out = case(5, 4, 9, 8)
    for arguments, message in [
        ((left, right[:, :3], weights, 0, out), r"left and right .* got \[5, 3, 8\]"),
        ((left.half(), right.half(), weights, 0, out.half()), "float32 or float64"),
        ((left, right, weights[:4], 0, out), r"weights must be a contiguous \[5\]"),
        ((left, right, weights.float(), 0, out), "expected float64, got float32"),
        ((left, right, weights, 0, out.mT), r"out must be \[9, 8\] float32"),
        ((left, right, weights, 0, out.double()), r"out must be \[9, 8\] float32"),
        ((left, right, weights, 0, torch.zeros(18, 16)[::2, ::2]), "with a stride of 1"),
        ((left, right._neg_view(), weights, 0, out), r"negated view: call resolve_neg\(\)"),
    ]:
        with pytest.raises(gs.InputError, match=message):
            _backend._C.combine_tokens_cpu(*arguments, 2)


@native
def test_obeys_the_variable(monkeypatch):
    monkeypatch.setattr(_backend._C, "combine_tokens_cpu", lambda *args: pytest.fail("native ran"))
    monkeypatch.setenv("GRADSURGERY_BACKEND", "torch")
    combine_tokens(*case(5, 4, 9, 8))


EVERY_SHAPE = """
import os
import torch
from gradsurgery import _C
from tests.ops.test_combine_tokens import LIMITS, SHAPES, case, error

assert _C.isa() == os.environ["GRADSURGERY_CPU"]
torch.set_num_threads(2)
for dtype, limit in LIMITS.items():
    for shape in [*SHAPES, *[(3, 3, a, 60 - a) for a in range(1, 60)]]:
        value = error(*case(*shape, dtype), 0.5)
        if not value <= limit:
            print(dtype, shape, value)
"""


@native
@instruction_sets.each
def test_every_instruction_set(isa):
    instruction_sets.prints_nothing(isa, EVERY_SHAPE)
