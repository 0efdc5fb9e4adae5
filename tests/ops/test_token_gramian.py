"""Inner products of sums of outer products, from their factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import _backend
from gradsurgery.ops import token_gramian as module
from gradsurgery.ops.token_gramian import token_gramian
from tests.ops import instruction_sets

# |K_ij - <G_i, G_j>| / sum_tu |left_t| |left_u| |right_t| |right_u|, largest
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-13}
SHAPES = [  # n, T, a, b: around registers, panels, chunks and squares of tokens
    *[(n, 1, 33, 5) for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 100)],
    *[(3, t, 20, 193) for t in (2, 3, 7, 16, 50, 197)],
    (1, 64, 7, 7),
    (5, 3, 191, 192),
    (16, 16, 385, 17),
    (2, 400, 9, 16),
    (13, 61, 1, 4),
    (390, 1, 8, 8),
    (7, 129, 33, 1),
]


@pytest.fixture(params=LIMITS, ids=["float32", "float64"])
def dtype(request):
    return request.param


def exact(left, right, other_left=None, other_right=None):
    planes = [left.double().mT @ right.double()]
    if other_left is not None:
        planes.append(other_left.double().mT @ other_right.double())
    rows = [plane.flatten(1) for plane in planes]
    return rows[0] @ rows[-1].mT


def sizes(left, right):
    """Of each G_i, did nothing cancel."""
    norms = left.double().norm(dim=-1) * right.double().norm(dim=-1)
    return norms.flatten(1).sum(1)


def error(out, left, right, other_left=None, other_right=None):
    expected = exact(left, right, other_left, other_right)
    assert out.dtype == torch.float64
    assert out.shape == expected.shape
    if other_left is None:
        assert torch.equal(out, out.mT)
        other_left, other_right = left, right
    if out.numel() == 0:
        return 0.0
    scale = torch.outer(sizes(left, right), sizes(other_left, other_right))
    return ((out - expected).abs() / scale.clamp(min=1e-300)).max().item()


def tokens(*shape, a, b, dtype=torch.float32):
    return torch.randn(*shape, a).to(dtype), torch.randn(*shape, b).to(dtype)


@pytest.mark.parametrize("n,t,a,b", SHAPES)
def test_matches_the_gramian_of_the_planes(n, t, a, b, impl, dtype):
    first = tokens(n, t, a=a, b=b, dtype=dtype)
    assert error(token_gramian(*first), *first) <= LIMITS[dtype]


@pytest.mark.parametrize("n,t,a,b", SHAPES)
@pytest.mark.parametrize("k,u", [(1, 1), (5, 16), (70, 6)])
def test_matches_the_products_with_other_planes(n, t, a, b, k, u, impl, dtype):
    both = tokens(n, t, a=a, b=b, dtype=dtype) + tokens(k, u, a=a, b=b, dtype=dtype)
    assert error(token_gramian(*both), *both) <= LIMITS[dtype]


def test_is_accurate_to_the_norms(impl):
    # relative to the norms of the sums themselves, as their Gramian is
    for n, t, a, b in [(16, 16, 2304, 768), (32, 1, 2048, 2048), (16, 64, 128, 384)]:
        first = tokens(n, t, a=a, b=b)
        expected = module.token_gramian_reference(*[x.double() for x in first])
        norms = expected.diagonal().sqrt()
        difference = (token_gramian(*first) - expected).abs() / torch.outer(norms, norms)
        assert difference.max() <= 1e-6


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_equal_values(value, impl):
    # whose rounding errors all have one sign
    left, right = torch.full((9, 5, 4000), value), torch.full((9, 5, 3000), value)
    assert error(token_gramian(left, right), left, right) <= 2e-5


@given(
    n=st.integers(0, 40), t=st.integers(0, 20), k=st.integers(0, 40), u=st.integers(0, 20),
    a=st.integers(0, 40), b=st.integers(0, 40), symmetric=st.booleans(), double=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_any_shape(n, t, k, u, a, b, symmetric, double):
    dtype = torch.float64 if double else torch.float32
    both = tokens(n, t, a=a, b=b, dtype=dtype)
    if not symmetric:
        both += tokens(k, u, a=a, b=b, dtype=dtype)
    out = token_gramian(*both)
    if 0 in both[0].shape[1:] or 0 in both[-1].shape[1:]:
        assert torch.equal(out, torch.zeros(len(both[0]), len(both[-2]), dtype=torch.float64))
    else:
        assert error(out, *both) <= LIMITS[dtype]


LAYOUTS = {
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "values first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "values before tokens": lambda x: x.mT.contiguous().mT,
    "part of more values": lambda x: torch.cat([x, x, x], 2)[..., x.shape[2] : 2 * x.shape[2]],
    "every other value": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "later blocks": lambda x: torch.cat([x, x])[len(x) :],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n,t,a,b", [(6, 7, 35, 67), (40, 1, 16, 200), (2, 50, 33, 32)])
def test_reads_any_layout(layout, n, t, a, b, impl, dtype):
    make = LAYOUTS[layout]
    both = tokens(n, t, a=a, b=b, dtype=dtype) + tokens(n + 1, t, a=a, b=b, dtype=dtype)
    moved = [make(x) for x in both]
    assert all(torch.equal(x, y) for x, y in zip(both, moved, strict=True))
    for x, y in ((both, moved), (both[:2], moved[:2])):
        assert error(token_gramian(*y), *x) <= LIMITS[dtype]
        if impl == "native":
            assert torch.equal(token_gramian(*x), token_gramian(*y)), "layouts differ in the order"


def test_one_token_for_all(impl):
    left, right = torch.randn(1, 1, 40).expand(9, 4, 40), torch.randn(9, 4, 3)
    assert error(token_gramian(left, right), left, right) <= 1e-6


@pytest.mark.parametrize("n,g,t,a,b", [(5, 3, 4, 6, 7), (2, 1, 50, 33, 8), (3, 8, 1, 1, 9)])
def test_many_matrices(n, g, t, a, b, impl, dtype):
    left, right = tokens(n, g, t, a=a, b=b, dtype=dtype)
    more = tokens(n + 2, g, t + 1, a=a, b=b, dtype=dtype)
    out = token_gramian(left, right)
    cross = token_gramian(left, right, *more)
    planes, others = ((x.double().mT @ y.double()).flatten(1) for x, y in ((left, right), more))
    for actual, expected in ((out, planes @ planes.mT), (cross, planes @ others.mT)):
        assert (actual - expected).abs().max() <= 10 * LIMITS[dtype] * planes.square().sum()


@pytest.mark.parametrize("n,t", [(1, 1), (40, 1), (16, 16), (3, 50), (5, 197), (390, 2)])
def test_symmetric_is_the_same_as_with_itself(n, t, impl, dtype):
    first = tokens(n, t, a=50, b=300, dtype=dtype)
    out, cross = token_gramian(*first), token_gramian(*first, *first)
    scale = sizes(*first)
    assert ((out - cross).abs() / torch.outer(scale, scale)).max() <= LIMITS[dtype]


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads(threads, impl, dtype):
    for n, t, k, u in [(16, 16, 3, 40), (100, 1, 500, 1), (3, 197, 1, 1), (900, 1, 30, 3)]:
        both = tokens(n, t, a=150, b=60, dtype=dtype) + tokens(k, u, a=150, b=60, dtype=dtype)
        torch.set_num_threads(threads)
        for x in (both, both[:2]):
            out = token_gramian(*x)
            assert error(out, *x) <= LIMITS[dtype]
            if impl == "native":
                assert all(torch.equal(out, token_gramian(*x)) for _ in range(5))


def test_products_beyond_float32(impl):
    # each inner product is in its range, their product is not
    if impl == "torch":
        pytest.skip("multiplies in the dtype of the arguments")
    for scale in (1e-15, 1e13):
        first = tokens(5, 6, a=20, b=30)
        first = tuple(scale * x for x in first)
        assert error(token_gramian(*first), *first) <= 1e-6


def mixed(n=9, t=3):
    """One token, the second of block 5, of which float32 loses one side of the products."""
    left, right = tokens(n, t, a=40, b=50)
    left[5, 1], right[5, 1] = 1e-22 * left[5, 1], 1e16 * right[5, 1]
    return left, right


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n,t", [(9, 3), (6, 1), (6, 200), (50, 2)])
def test_a_token_lost_on_one_side_is_not_a_number(n, t, turned, impl):
    left, right = mixed(n, t + 1)
    left, right = (right, left) if turned else (left, right)
    out = token_gramian(left, right)
    lost = torch.zeros(n, n, dtype=torch.bool)
    lost[5, 5] = True
    assert torch.equal(out.isnan(), lost)
    assert token_gramian(left, right, left, right).isfinite().all()
    four = token_gramian(torch.stack([left, left], 1), torch.stack([right, right], 1))
    assert torch.equal(four.isnan(), lost)
    assert token_gramian(left.double(), right.double()).isfinite().all()


def test_padding_is_not_lost(impl):
    left, right = tokens(4, 3, a=40, b=50)
    left[:, 1], right[1:, 2] = 0, 0
    left[:2, 2] *= 30
    assert error(token_gramian(left, right), left, right) <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(bad, impl):
    left, right = tokens(21, 3, a=20, b=30)
    left[17, 1, 4] = bad
    finite = token_gramian(left, right).isfinite()
    assert not finite[17].any()
    assert not finite[:, 17].any()
    rest = torch.arange(21) != 17
    assert finite[rest][:, rest].all()


def test_few_wide_tokens(impl, monkeypatch):
    both = tokens(2, 2, a=9000, b=300) + tokens(1, 3, a=9000, b=300)
    for few in (module.FEW_PAIRS, 0):
        monkeypatch.setattr(module, "FEW_PAIRS", few)
        assert error(token_gramian(*both), *both) <= 1e-6
        assert error(token_gramian(*both[:2]), *both[:2]) <= 1e-6


native = pytest.mark.skipif(
    not _backend.native_available("cpu") or _backend._C.cuda_version == "emulated",
    reason="the native module is not built",
)


@native
def test_the_kernel_adds():
    left, right = tokens(5, 4, a=9, b=8)
    once = token_gramian(left, right)
    out = once.clone()
    _backend._C.token_gramian_cpu(left, right, None, None, out, 2)
    torch.testing.assert_close(out, 2 * once, rtol=1e-6, atol=1e-9)
    assert torch.equal(out, out.mT)


@native
def test_the_kernel_checks_what_it_is_given():
    left, right = tokens(5, 4, a=9, b=8)
    out = torch.zeros(5, 5, dtype=torch.float64)
    for arguments, message in {
        (left, right[:, :3], None, None, out): r"left and right .* got \[5, 3, 8\]",
        (left, right.double(), None, None, out): "of one dtype",
        (left[0], right[0], None, None, out): r"two \[n, T, \.\]",
        (left.half(), right.half(), None, None, out): "float32 or float64, not float16",
        (left, right, left[..., :8], right, out): "as wide as the first",
        (left, right, left.double(), right.double(), out): "of one dtype",
        (left, right, left, None, out): "other_left and other_right",
        (left, right, None, None, out[:4]): r"out must be .*\[5, 5\]",
        (left, right, None, None, out.float()): "out must be a contiguous float64",
    }.items():
        with pytest.raises(gs.InputError, match=message):
            _backend._C.token_gramian_cpu(*arguments, 2)


@native
def test_obeys_the_variable(monkeypatch):
    first = tokens(5, 4, a=9, b=8)
    monkeypatch.setattr(_backend._C, "token_gramian_cpu", lambda *args: pytest.fail("native ran"))
    monkeypatch.setenv("GRADSURGERY_BACKEND", "torch")
    token_gramian(*first)


EVERY_SHAPE = """
import os
import torch
from gradsurgery import _C
from gradsurgery.ops.token_gramian import token_gramian
from tests.ops.test_token_gramian import LIMITS, error, mixed, tokens

assert _C.isa() == os.environ["GRADSURGERY_CPU"]
torch.set_num_threads(2)
for dtype, limit in LIMITS.items():
    for n, t, k, u, a, b in [
        *[(n, 1, n + 1, 1, 40 + n, 3) for n in range(1, 50)],
        *[(3, t, 2, 50 - t, t, 200) for t in range(1, 50)],
        (16, 16, 20, 16, 300, 500),
        (2, 500, 3, 400, 8, 8),
    ]:
        both = tokens(n, t, a=a, b=b, dtype=dtype) + tokens(k, u, a=a, b=b, dtype=dtype)
        for x in (both, both[:2]):
            value = error(token_gramian(*x), *x)
            if not value <= limit:
                print(dtype, n, t, k, u, a, b, len(x), value)
for n, t in [(9, 3), (6, 200), (50, 2)]:
    lost = token_gramian(*mixed(n, t)).isnan().nonzero().tolist()
    if lost != [[5, 5]]:
        print(n, t, lost)
"""


@native
@instruction_sets.each
def test_every_instruction_set(isa):
    instruction_sets.prints_nothing(isa, EVERY_SHAPE)
