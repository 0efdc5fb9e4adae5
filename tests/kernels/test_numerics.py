"""What Triton's kernels compute: in its interpreter, by `make interpret`, or on a GPU."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import InputError
from gradsurgery.ops.combine import combine_into
from gradsurgery.ops.combine_tokens import combine_tokens, combine_tokens_of
from gradsurgery.ops.formed_gramian import formed_gramian, formed_gramian_reference
from gradsurgery.ops.gramian import gramian_of
from gradsurgery.ops.token_gramian import (
    token_gramian,
    token_gramian_reference,
    token_gramians,
)
from tests.conftest import ROUNDOFF
from tests.kernels.interpreted import DEVICE, needs_triton, randn, triton  # noqa: F401 - a fixture

pytestmark = needs_triton

# of the largest |error| / (|g_i| |g_j|)
LIMITS = {
    torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6,
}  # fmt: skip


def relative(gram, exact, left=None, right=None):
    """To the norms of the rows on either side, whose squares are on `exact`'s diagonal."""
    left = exact.diagonal() if left is None else left
    right = left if right is None else right
    scale = left.sqrt()[:, None] * right.sqrt()
    return ((gram - exact).abs() / scale.clamp(min=1e-300)).max().item() if gram.numel() else 0.0


def planes_of(left, right):
    return (left.double().mT @ right.double()).flatten(1)


# n, T, a, b: one token, fewer and more than a tile, samples that share a tile and that fill many
TOKENS = [
    (1, 1, 1, 1), (3, 1, 40, 5), (70, 1, 9, 33), (5, 3, 7, 70), (2, 65, 17, 20), (3, 64, 8, 130),
    (17, 16, 20, 3), (1, 200, 5, 5), (0, 4, 3, 3), (4, 0, 3, 3), (3, 2, 0, 4),
]  # fmt: skip


@pytest.mark.parametrize("n,t,a,b", TOKENS)
def test_token_gramian(n, t, a, b, dtype):
    left, right = randn(n, t, a, dtype=dtype), randn(n, t, b, dtype=dtype)
    out, planes = token_gramian(left, right), planes_of(left, right)
    assert torch.equal(out, out.mT)
    assert relative(out, planes @ planes.mT) <= LIMITS[dtype]
    more = randn(4, 5, a, dtype=dtype), randn(4, 5, b, dtype=dtype)
    others = planes_of(*more)
    squares = planes.square().sum(1), others.square().sum(1)
    cross = token_gramian(left, right, *more)
    assert relative(cross, planes @ others.mT, *squares) <= LIMITS[dtype]


def test_token_gramian_of_many_matrices(dtype):
    left, right = randn(3, 4, 5, 6, dtype=dtype), randn(3, 4, 5, 7, dtype=dtype)
    planes = (left.double().mT @ right.double()).flatten(1)
    assert relative(token_gramian(left, right), planes @ planes.mT) <= LIMITS[dtype]


@pytest.mark.parametrize("n,t,a,b", [(5, 3, 8, 16), (70, 1, 16, 40), (2, 65, 24, 8), (3, 0, 8, 8)])
def test_token_gramians_are_those_of_each_plane(n, t, a, b, dtype):
    left = [randn(n, t, a, dtype=dtype) for _ in range(3)]
    right = [randn(n, t, b, dtype=dtype) for _ in range(3)]
    found = token_gramians(left, right)
    assert found.shape == (3, n, n)
    for gram, one, other in zip(found, left, right, strict=True):
        planes = planes_of(one, other)
        assert relative(gram, planes @ planes.mT) <= LIMITS[dtype]
    # not laid out alike: one launch each, and the same numbers
    left[1] = randn(n, t, a + 1, dtype=dtype)[..., 1:].copy_(left[1])
    assert torch.equal(token_gramians(left, right), found)


def test_token_gramian_by_hand():
    # G_0 = 1·2 + 3·1 = 5 and G_1 = -1·4 + 2·1 = -2, as 1 x 1 matrices
    left, right = (
        torch.tensor([[[1.0], [3]], [[-1], [2]]]),
        torch.tensor([[[2.0], [1]], [[4], [1]]]),
    )
    assert token_gramian(left, right).tolist() == [[25, -10], [-10, 4]]


@pytest.mark.parametrize("n,t,b", [(1, 1, 1), (5, 9, 20), (3, 70, 4), (40, 2, 3)])
def test_token_gramian_of_picked_rows(n, t, b, dtype):
    ids, right = torch.randint(-1, 6, (n, t)), randn(n, t, b, dtype=dtype)
    left = (ids[..., None] == torch.arange(6)).to(dtype)
    planes = planes_of(left, right)
    out = token_gramian(ids, right)
    assert relative(out, planes @ planes.mT) <= LIMITS[dtype]
    other, more = torch.randint(-1, 6, (2, 3)), randn(2, 3, b, dtype=dtype)
    exact = planes @ planes_of((other[..., None] == torch.arange(6)).to(dtype), more).mT
    assert (token_gramian(ids, right, other, more) - exact).abs().max() <= 1e-5
    torch.testing.assert_close(
        out, token_gramian_reference(ids, right.double()), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("scales", [(1e-15, 1e-15), (1e13, 1e13), (1e-17, 1e10)])
def test_token_gramian_out_of_float32s_range(scales):
    left, right = randn(4, 3, 20, scale=scales[0]), randn(4, 3, 30, scale=scales[1])
    planes = planes_of(left, right)
    assert relative(token_gramian(left, right), planes @ planes.mT) <= 1e-6


def test_token_gramian_of_rows_of_very_different_size():
    left, right = randn(6, 3, 20), randn(6, 3, 30)
    left[1] *= 1e-12
    right[1] *= 1e-12
    right[2] *= 1e12
    planes = planes_of(left, right)
    assert relative(token_gramian(left, right), planes @ planes.mT) <= 1e-6


@pytest.mark.parametrize("n,t", [(6, 3), (9, 1), (6, 70)])
def test_token_gramian_of_a_token_lost_on_one_side(n, t):
    left, right = randn(n, t, 20), randn(n, t, 30)
    left[5, -1] *= 1e-22
    right[5, -1] *= 1e16
    out = token_gramian(left, right)
    assert out.isnan().nonzero().tolist() == [[5, 5]]
    assert token_gramian(left, right, left, right).isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_token_gramian_not_finite_stay_in_their_row(bad):
    left, right = randn(21, 3, 20), randn(21, 3, 30)
    left[17, 1, 4] = bad
    out, rest = token_gramian(left, right), [i for i in range(21) if i != 17]
    assert not out[17].isfinite().any()
    planes = planes_of(left[rest], right[rest])
    assert relative(out[rest][:, rest], planes @ planes.mT) <= 1e-6


def test_memory_past_2_to_the_31():
    # a stride that is a 32-bit number, times a block, is none; memory never written takes none
    far = torch.empty(2**32 + 64, dtype=torch.bfloat16).as_strided((5, 2, 8), (2**30, 8, 1))
    near = randn(5, 2, 8, dtype=torch.bfloat16)
    far.copy_(near)
    assert torch.equal(token_gramian(far, near), token_gramian(near, near))
    out, expected = torch.zeros(8, 8), torch.zeros(8, 8)
    combine_tokens(far, near, torch.ones(5), out)
    combine_tokens(near, near, torch.ones(5), expected)
    assert torch.equal(out, expected)
    assert torch.equal(gramian_of([[far[:, 0]]], False), gramian_of([[near[:, 0]]], False))
    update, weights = near.new_empty(1, 8), torch.ones(1, 5, dtype=torch.float64)
    combine_into([[far[:, 0]]], weights, [[update]])
    assert (update.double() - near[:, 0].double().sum(0)).abs().max() <= 2e-2


@pytest.mark.parametrize("n,t,a,b", TOKENS)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_formed_gramian(n, t, a, b, kept, dtype):
    left, right = randn(n, t, a, dtype=dtype), randn(n, t, b, dtype=dtype)
    plane = randn(a, b, dtype=dtype) if kept else None
    out = formed_gramian([left], [right], [torch.arange(n)], n, plane)
    exact = formed_gramian_reference(
        [left.double()], [right.double()], [torch.arange(n)], n, plane.double() if kept else None
    )
    assert torch.equal(out, out.mT)
    assert relative(out, exact) <= LIMITS[dtype]


# tokens of the rows: alike but for one, so different that padding would not pay, none, many rows
LENGTHS = [[3, 4, 4], [1, 30, 2, 0, 1], [0, 0, 50, 1], [1] * 20 + [40], [1] * 70, [1] * 65 + [300]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_formed_gramian_of_rows_of_any_length(lengths, kept, dtype):
    # a row's tokens in two blocks, the rows in no order
    left = [randn(1, (t + k) // 2, 9, dtype=dtype) for k in range(2) for t in lengths]
    right = [randn(1, x.shape[1], 70, dtype=dtype) for x in left]
    index = [torch.tensor([r]) for _ in range(2) for r in range(len(lengths))]
    plane = randn(9, 70, dtype=dtype) if kept else None
    out = formed_gramian(left[::-1], right[::-1], index[::-1], len(lengths), plane)
    exact = formed_gramian_reference(
        [x.double() for x in left], [y.double() for y in right], index, len(lengths),
        plane.double() if kept else None,
    )  # fmt: skip
    assert relative(out, exact) <= LIMITS[dtype]


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 20, 1, 1]], ids=str)
@pytest.mark.parametrize(
    "dtype,size",
    [(torch.float32, 1e-12), (torch.float32, 1e10), (torch.bfloat16, 1e-12),
     (torch.bfloat16, 1e10), (torch.float16, 300.0), (torch.float16, 3e-5)],
    ids=str,
)  # fmt: skip
def test_formed_gramian_of_any_scale(lengths, dtype, size):
    count = sum(lengths)
    left, right = (randn(count, 1, 20, dtype=dtype, scale=size) for _ in range(2))
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    kept = randn(20, 20, dtype=torch.float32, scale=size**2)
    out = formed_gramian([left], [right], [index], len(lengths), kept)
    exact = formed_gramian_reference(
        [left.double()], [right.double()], [index], len(lengths), kept.double()
    )
    assert relative(out, exact) <= 1e-6


@pytest.mark.parametrize("lengths", [[3, 3], [1, 30]], ids=["chunks", "tiles"])
def test_large_float16_planes_keep_their_range(lengths):
    left = randn(sum(lengths), 1, 300, dtype=torch.float16, scale=300)
    right = randn(sum(lengths), 1, 260, dtype=torch.float16, scale=300)
    index = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    out = formed_gramian([left], [right], [index], 2)
    exact = formed_gramian_reference([left.double()], [right.double()], [index], 2)
    assert relative(out, exact) <= 1e-6


def test_tokens_of_several_dtypes():
    # as of a layer called once under autocast and once outside
    first = randn(3, 2, 20, dtype=torch.bfloat16), randn(3, 2, 30, dtype=torch.bfloat16)
    second = randn(4, 5, 20), randn(4, 5, 30)
    planes, others = planes_of(*first), planes_of(*second)
    squares = planes.square().sum(1), others.square().sum(1)
    exact = planes @ others.mT
    assert relative(token_gramian(*first, *second), exact, *squares) <= 1e-6
    assert relative(token_gramian(*second, *first), exact.mT, *squares[::-1]) <= 1e-6
    mixed = first[0], randn(3, 2, 30)
    expected = planes_of(*mixed)
    assert relative(token_gramian(*mixed), expected @ expected.mT) <= 1e-6
    out = torch.empty(20, 30)
    combine_tokens(*mixed, torch.ones(3), out)
    assert (out.double() - expected.sum(0).view(20, 30)).norm() <= 1e-5 * expected.norm()
    every = torch.cat([planes, others])
    rows = [torch.arange(3), torch.arange(3, 7)]
    out = formed_gramian([first[0], second[0]], [first[1], second[1]], rows, 7)
    assert relative(out, every @ every.mT) <= 1e-6


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 40, 1, 2]], ids=["chunks", "tiles"])
def test_large_bfloat16_planes_are_rounded(lengths):
    left = randn(sum(lengths), 1, 300, dtype=torch.bfloat16)
    right = randn(sum(lengths), 1, 260, dtype=torch.bfloat16)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    out = formed_gramian([left], [right], [index], len(lengths))
    exact = formed_gramian_reference([left.double()], [right.double()], [index], len(lengths))
    longer = [i for i, t in enumerate(lengths) if t > 1]
    assert relative(out, exact) <= 4e-4
    assert relative(out[longer][:, longer], exact[longer][:, longer]) <= 1e-4


@pytest.mark.parametrize("n,t,a,b", TOKENS)
@pytest.mark.parametrize("beta", [0, -0.3])
def test_combine_tokens(n, t, a, b, beta, dtype):
    left, right, weights = randn(n, t, a, dtype=dtype), randn(n, t, b, dtype=dtype), torch.randn(n)
    out_dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    out = randn(a, b, dtype=out_dtype) if beta else torch.full((a, b), torch.nan, dtype=out_dtype)
    before = out.double().clone()
    combine_tokens(left, right, weights, out, beta)
    scaled = left.double() * weights.double()[:, None, None]
    exact = (scaled.mT @ right.double()).sum(0) + (beta * before if beta else 0)
    size = (scaled.abs().mT @ right.double().abs()).sum(0) + (
        abs(beta) * before.abs() if beta else 0
    )
    # each weighted token is rounded as the tokens were
    bound = (ROUNDOFF[dtype] + 10 * ROUNDOFF[out_dtype]) * size + 1e-300
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("alike", [True, False])
def test_combine_tokens_of_several_planes(alike, dtype):
    left = [randn(5, 3, 8, dtype=dtype) for _ in range(3)]
    right = [randn(5, 3, 24, dtype=dtype) for _ in range(3)]
    weights = torch.randn(3, 5, dtype=torch.float64)
    weights = weights[:1].expand(3, 5) if alike else weights
    kind = torch.float32 if dtype.itemsize == 2 else dtype
    out = [torch.full((8, 24), torch.nan, dtype=kind) for _ in range(3)]
    combine_tokens_of(left, right, weights, out)
    for k in range(3):
        alone = torch.empty_like(out[k])
        combine_tokens(left[k], right[k], weights[k], alone)
        assert torch.equal(out[k], alone)


@pytest.mark.parametrize("size,weight", [(1e-4, 1e-4), (1e3, 100.0)])
def test_combine_tokens_of_weights_that_leave_float16s_range(size, weight):
    left = randn(4, 3, 20, dtype=torch.float16, scale=size)
    right = randn(4, 3, 30, dtype=torch.float16, scale=size)
    out = torch.empty(20, 30)
    combine_tokens(left, right, torch.full((4,), weight), out)
    exact = weight * (left.double().mT @ right.double()).sum(0)
    assert (out.double() - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_combine_tokens_of_a_scalar_weight_on_the_device(transposed):
    from gradsurgery.kernels.combine_tokens import combine_tokens as kernel

    left, right = randn(3, 2, 5), randn(3, 2, 4)
    out = torch.ones(4, 5).mT if transposed else torch.ones(5, 4)
    kernel(left, right, torch.ones(3), out, torch.tensor(2.0))
    torch.testing.assert_close(out, (left.mT @ right).sum(0) + 2)


@pytest.mark.parametrize("m,n", [(1, 1), (5, 300), (16, 33), (17, 100), (40, 65), (70, 20), (3, 0)])
@pytest.mark.parametrize("precise", [False, True], ids=["", "precise"])
def test_gramian(m, n, precise, dtype, monkeypatch):
    monkeypatch.setattr("gradsurgery.kernels.gramian.FEW_COLUMNS", 0)
    rows = randn(m, n, dtype=dtype)
    out, exact = gramian_of([[rows]], precise), rows.double() @ rows.double().mT
    assert torch.equal(out, out.mT)
    assert relative(out, exact) <= (1e-14 if precise else LIMITS[dtype])


def test_gramian_of_blocks_and_sources(dtype, monkeypatch):
    monkeypatch.setattr("gradsurgery.kernels.gramian.FEW_COLUMNS", 0)
    widths = [1, 0, 70, 7]
    sources = [[randn(m, n, dtype=dtype) for n in widths] for m in (3, 1, 18)]
    sources[2][2] = sources[2][2].mT.contiguous().mT
    rows = torch.cat([torch.cat([b.double() for b in source], 1) for source in sources])
    assert relative(gramian_of(sources, False), rows @ rows.mT) <= LIMITS[dtype]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gramian_leaves_the_range_of_float32(scale, monkeypatch):
    monkeypatch.setattr("gradsurgery.kernels.gramian.FEW_COLUMNS", 0)
    rows = randn(3, 300, scale=scale)
    assert relative(gramian_of([[rows]], False), rows.double() @ rows.double().mT) <= 1e-14


@pytest.mark.parametrize(
    "m,n,p", [(1, 1, 1), (3, 600, 1), (9, 100, 2), (5, 70, 3), (4, 20, 9), (0, 5, 2)]
)
def test_combine(m, n, p, dtype):
    rows, weights = randn(m, n, dtype=dtype), randn(p, m, dtype=torch.float64)
    out = rows.new_empty(p, n)
    cross, gram = weights.new_empty(p, m), weights.new_empty(p, p)
    combine_into([[rows]], weights, [[out]], cross, gram)
    exact = weights @ rows.double()
    bound = ROUNDOFF[dtype] * exact.abs() * (1 + 1e-6) + 1e-15 * (
        weights.abs() @ rows.double().abs()
    )
    bound += 1e-7 if dtype == torch.float16 else 0
    assert ((out.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(gram, out.double() @ out.double().mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross, out.double() @ rows.double().mT, rtol=1e-12, atol=1e-12)


def test_combine_writes_over_its_rows():
    rows, weights = randn(6, 700), randn(4, 6, dtype=torch.float64)
    exact = weights @ rows.double()
    combine_into([[rows]], weights, [[rows[2:]]])
    torch.testing.assert_close(rows[2:].double(), exact, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="outs that are rows must be four at most"):
        combine_into([[rows]], randn(5, 6, dtype=torch.float64), [[rows[1:]]])


def test_operators_built_on_them():
    rows, grad = [torch.randn(5, 40), torch.randn(5, 3, 7)], [torch.randn(40), torch.randn(3, 7)]
    flat = torch.cat([block.flatten(1) for block in rows], 1).double()
    g = torch.cat([t.flatten() for t in grad]).double()
    torch.testing.assert_close(gs.gramian(rows), flat @ flat.mT, rtol=1e-6, atol=1e-5)
    update = torch.cat([u.flatten() for u in gs.combine(rows, torch.arange(5.0))])
    torch.testing.assert_close(
        update.double(), torch.arange(5.0).double() @ flat, rtol=1e-6, atol=1e-5
    )
    perp = torch.cat([t.flatten() for t in gs.project_out(grad, rows)]).double()
    q = torch.linalg.qr(flat.mT).Q
    torch.testing.assert_close(perp, g - q @ (q.mT @ g), rtol=1e-5, atol=1e-5)
    # f = (1, 1) and r = (-2, 0): f loses its component against r
    f, r = gs.harmonize(torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0]))
    assert f.tolist() == [0, 1]
    assert r.tolist() == [-2, 0]


class Net(torch.nn.Module):
    """Every kind of use that a kernel serves: linear, tied embedding, convolution, bias, norm."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.linear = torch.nn.Linear(12, 20)
        self.conv = torch.nn.Conv1d(20, 12, 3, padding=1)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = self.conv(torch.tanh(self.linear(x)).mT).mT
        return x @ self.embed.weight.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["factored", "direct"])
@pytest.mark.parametrize("groups", [None, torch.tensor([0, 0, 0, 1, 2])], ids=["rows", "group"])
def test_a_captured_model(path, groups, dtype, monkeypatch):
    monkeypatch.setenv("GRADSURGERY_PATH", path)
    net, ids = Net().to(dtype), torch.randint(0, 11, (5, 6))
    with gs.tape(net) as tape:
        losses = net(ids).float().log_softmax(-1)[..., 0].mean(1)
    jacobian = tape.jacobian(losses, groups=groups)
    rows = jacobian.materialize().double()
    gram = jacobian.gramian()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # the rows themselves are rounded
    assert relative(gram, rows @ rows.mT) <= tolerance
    weights = torch.arange(1.0, jacobian.m + 1)
    jacobian.backward(weights)
    update = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
    expected = weights.double() @ rows
    assert (update - expected).norm() <= tolerance * expected.norm()
