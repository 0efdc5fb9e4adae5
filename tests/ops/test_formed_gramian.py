"""The Gramian of weight gradients that are formed tile by tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.ops import _backend
from gradsurgery.ops import formed_gramian as module
from gradsurgery.ops.formed_gramian import formed_gramian
from tests.ops import instruction_sets
from tests.ops.test_token_gramian import LAYOUTS, native, tokens

# |K_ij - <R_i, R_j>| / (|R_i| |R_j|), largest; where a row's terms cancel, what they would come to
# if each were orthogonal to the others
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-13}
SHAPES = [  # n, T, a, b: around registers, panels, tiles and pieces of tokens
    *[(3, 5, a, 50) for a in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33)],
    *[(2, 4, 20, b) for b in (1, 15, 16, 17, 32, 47, 48, 49, 95, 97, 192, 193, 241)],
    *[(2, t, 17, 33) for t in (1, 2, 127, 128, 129, 257)],
    (40, 3, 300, 260),
    (1, 64, 385, 17),
    (130, 1, 70, 60),
    (16, 16, 16, 4000),
    (5, 7, 4000, 9),
]


@pytest.fixture(params=LIMITS, ids=["float32", "float64"])
def dtype(request):
    return request.param


def exact(left, right, rows, count, kept=None):
    """The rows' inner products, and the norms of what they are sums of."""
    shape = left[0].shape[-1], right[0].shape[-1]
    sums = torch.zeros(count + (kept is not None), *shape, dtype=torch.float64)
    sizes = torch.zeros(len(sums), dtype=torch.float64)
    for x, y, where in zip(left, right, rows, strict=True):
        x, y = x.double(), y.double()
        sums.index_add_(0, where, x.mT @ y)
        sizes.index_add_(0, where, (x.norm(dim=2) * y.norm(dim=2)).square().sum(1).sqrt())
    if kept is not None:
        sums[-1], sizes[-1] = kept.double(), kept.double().norm()
    return sums.flatten(1) @ sums.flatten(1).mT, sizes


def error(out, *arguments):
    expected, sizes = exact(*arguments)
    assert out.dtype == torch.float64
    assert out.shape == expected.shape
    assert torch.equal(out, out.mT)
    sizes = torch.maximum(sizes, expected.diagonal().sqrt())  # terms that agree come to more
    scale = torch.outer(sizes, sizes).clamp(min=1e-300)
    return float(((out - expected).abs() / scale).max()) if out.numel() else 0.0


def one(n, t, a, b, dtype=torch.float32):
    left, right = tokens(n, t, a=a, b=b, dtype=dtype)
    return [left], [right], [torch.arange(n)], n


@pytest.mark.parametrize("n,t,a,b", SHAPES)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_matches_the_gramian_of_the_planes(n, t, a, b, kept, impl, dtype):
    arguments = *one(n, t, a, b, dtype), torch.randn(a, b).to(dtype) if kept else None
    assert error(formed_gramian(*arguments), *arguments) <= LIMITS[dtype]


def test_blocks_of_several_uses_are_summed_into_their_rows(impl, dtype):
    parts = [tokens(n, t, a=30, b=70, dtype=dtype) for n, t in ((5, 3), (9, 140))]
    left, right = zip(*parts, strict=True)
    rows = [torch.tensor([4, 0, 0, 4, 1]), torch.tensor([1, 1, 0, 4, 4, 4, 0, 1, 0])]
    arguments = left, right, rows, 6, torch.randn(30, 70).to(dtype)
    out = formed_gramian(*arguments)
    assert error(out, *arguments) <= LIMITS[dtype]
    for empty in (2, 3, 5):
        assert not out[empty].any(), "a row without blocks is zero"


@given(
    n=st.integers(0, 9), t=st.integers(0, 9), u=st.integers(0, 200), a=st.integers(0, 60),
    b=st.integers(0, 120), count=st.integers(1, 5), kept=st.booleans(), double=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
# the same each time: where a plane is one number, the sum of 200 tokens in float32 is now and then
# (two in a thousand) away by up to 2e-6, for there are no others that its roundings even out with
@settings(deadline=None, max_examples=200, derandomize=True)
def test_any_shape(n, t, u, a, b, count, kept, double, seed):
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    left, right = zip(*(tokens(n, x, a=a, b=b, dtype=dtype) for x in (t, u)), strict=True)
    rows = [torch.randint(count, (n,)) for _ in range(2)]
    arguments = left, right, rows, count, torch.randn(a, b).to(dtype) if kept else None
    assert error(formed_gramian(*arguments), *arguments) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n,t,a,b", [(6, 7, 35, 67), (4, 1, 16, 200), (2, 150, 33, 32)])
def test_reads_any_layout(layout, n, t, a, b, impl, dtype):
    make = LAYOUTS[layout]
    left, right, rows, count = one(n, t, a, b, dtype)
    kept = torch.randn(1, a, b).to(dtype)
    moved = [make(left[0])], [make(right[0])], rows, count, make(kept)[0]
    out = formed_gramian(*moved)
    assert error(out, left, right, rows, count, kept[0]) <= LIMITS[dtype]
    if impl == "native":
        assert torch.equal(out, formed_gramian(left, right, rows, count, kept[0]))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_equal_values(value, impl):
    # whose rounding errors all have one sign
    arguments = one(9, 200, 400, 300)
    for side in arguments[:2]:
        side[0].fill_(value)
    out, (expected, _) = formed_gramian(*arguments), exact(*arguments)
    assert ((out - expected).abs() / expected).max() <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads(threads, impl, dtype):
    for shape in ((16, 16, 200, 300), (100, 1, 90, 500), (1, 300, 400, 40)):
        arguments = *one(*shape, dtype), torch.randn(shape[2:]).to(dtype)
        torch.set_num_threads(threads)
        out = formed_gramian(*arguments)
        assert error(out, *arguments) <= LIMITS[dtype]
        if impl == "native":
            assert all(torch.equal(out, formed_gramian(*arguments)) for _ in range(5))


@pytest.mark.parametrize("exponent", [-18, -12, 9, 15])
def test_products_beyond_float32(exponent, impl):
    # squares of the values that planes hold leave its range
    left, right, rows, count = one(5, 6, 300, 200)
    left[0] *= 10.0**exponent
    assert error(formed_gramian(left, right, rows, count), left, right, rows, count) <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(21, 3, 20, 30), (21, 3, 200, 300)])
def test_not_finite_stays_in_its_row(bad, shape, impl):
    left, right, rows, count = one(*shape)
    left[0][17, 1, 4] = bad
    finite = formed_gramian(left, right, rows, count).isfinite()
    assert not finite[17].any()
    assert not finite[:, 17].any()
    rest = torch.arange(21) != 17
    assert finite[rest][:, rest].all()


def test_the_reference_forms_slices(monkeypatch):
    arguments = *one(5, 4, 37, 11, torch.float64), torch.randn(37, 11).double()
    whole = module.formed_gramian_reference(*arguments)
    monkeypatch.setattr(module, "CHUNK", 1)
    torch.testing.assert_close(module.formed_gramian_reference(*arguments), whole)


@native
def test_the_kernel_checks_what_it_is_given():
    (left,), (right,), (rows,), count = one(5, 4, 9, 8)
    out, kept = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(9, 8)
    for arguments, message in [
        (([], [], [], count, None, out), "one at least"),
        (([left], [right, right], [rows], count, None, out), "as many"),
        (([left], [right[:, :3]], [rows], count, None, out), r"left and right .* got \[5, 3, 8\]"),
        (([left.half()], [right.half()], [rows], count, None, out), "float32 or float64"),
        (([left], [right], [rows[:4]], count, None, out), r"rows must be a contiguous \[5\]"),
        (([left], [right], [rows.int()], count, None, out), "int32|int64"),
        (([left], [right], [rows + 1], count, None, out), "rows must be from 0 to 4, got 5"),
        (([left], [right], [rows - 1], count, None, out), "rows must be from 0 to 4, got -1"),
        (([left], [right], [rows], count, kept.mT, out), r"kept must be \[9, 8\]"),
        (([left], [right], [rows], count, kept.double(), out), "kept must be .*float32"),
        (([left], [right], [rows], count, kept, out), r"out must be .*\[6, 6\]"),
    ]:
        with pytest.raises((gs.InputError, TypeError), match=message):
            _backend._C.formed_gramian_cpu(*arguments, 2)


@native
def test_obeys_the_variable(monkeypatch):
    monkeypatch.setattr(_backend._C, "formed_gramian_cpu", lambda *args: pytest.fail("native ran"))
    monkeypatch.setenv("GRADSURGERY_BACKEND", "torch")
    formed_gramian(*one(5, 4, 9, 8))


EVERY_SHAPE = """
import os
import torch
from gradsurgery import _C
from tests.ops.test_formed_gramian import LIMITS, SHAPES, error, one, formed_gramian

assert _C.isa() == os.environ["GRADSURGERY_CPU"]
torch.set_num_threads(2)
for dtype, limit in LIMITS.items():
    for shape in [*SHAPES, *[(3, 3, a, 60 - a) for a in range(1, 60)]]:
        arguments = *one(*shape, dtype), torch.randn(shape[2:]).to(dtype)
        value = error(formed_gramian(*arguments), *arguments)
        if not value <= limit:
            print(dtype, shape, value)
"""


@native
@instruction_sets.each
def test_every_instruction_set(isa):
    instruction_sets.prints_nothing(isa, EVERY_SHAPE)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("lengths", [[5] * 4, [1, 40, 2, 3], [0, 3, 0, 0]], ids=str)
@pytest.mark.parametrize("height", [0, 1, 64, 200])
def test_slices_of_a_gpu(height, lengths, kept, monkeypatch):
    """Its way over several slices, which no CPU takes by itself."""
    monkeypatch.setattr(module, "SLICE", 1)  # as few rows as it may
    left, right = torch.randn(sum(lengths), height), torch.randn(sum(lengths), 7)
    plane = torch.randn(height, 7) if kept else None
    out = module.formed_gramian_chunked(left, right, lengths, plane)
    rows = [x.mT @ y for x, y in zip(left.split(lengths), right.split(lengths), strict=True)]
    rows = torch.stack(rows + [plane] * kept).flatten(1).double()
    size = rows.norm(dim=1)
    assert ((out - rows @ rows.mT).abs() <= 1e-6 * size[:, None] * size).all()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2,
                                    (torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("height", [1, 64, 200])
def test_several_planes_of_a_gpu(height, dtypes, kept, monkeypatch):
    """Planes in the same memory, one after another, of one slice or several."""
    for size in (1, module.SLICE):
        monkeypatch.setattr(module, "SLICE", size)
        left = [torch.randn(3, 5, height).to(dtypes[0]) for _ in range(4)]
        right = [torch.randn(3, 5, 7).to(dtypes[1]) for _ in range(4)]
        planes = [torch.randn(height, 7) for _ in range(4)] if kept else None
        out = module.formed_gramians(left, right, planes)
        assert out.shape == (4, 3 + kept, 3 + kept)
        for k, gram in enumerate(out):
            rows = torch.arange(3)
            plane = None if planes is None else planes[k]
            assert error(gram, [left[k]], [right[k]], [rows], 3, plane) <= 1e-6
