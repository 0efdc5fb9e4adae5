"""Group norm whose gradient is differentiated by one kernel."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import gradsurgery as gs
from gradsurgery.ops import _backend
from gradsurgery.ops.group_norm import group_norm
from tests.ops import instruction_sets
from tests.ops.test_token_gramian import native

# largest distance to torch's derivatives in float64, over their norm
LIMITS = {torch.float32: 2e-6, torch.float64: 1e-14}
SHAPES = [  # [N, C, *], groups: around vectors, chunks and groups of one channel or of all
    *[((2, 4, n), 2) for n in (7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 600)],
    ((1, 1, 9), 1),
    ((2, 24, 1), 2),
    ((3, 6, 4, 2), 6),
    ((2, 6, 5, 3), 1),
    ((2, 3, 2, 2, 3), 3),
    ((64, 32, 8, 8), 4),
    ((1, 2, 90, 90), 1),
]


@pytest.fixture(params=LIMITS, ids=["float32", "float64"])
def dtype(request):
    return request.param


def case(shape):
    sizes = (shape, shape[1:2], shape[1:2], shape, shape, shape[1:2], shape[1:2])
    return [torch.randn(size).double() for size in sizes]


def derivatives(norm, groups, given, dtype):
    """Of <vx, dx> + <vw, dw> + <vb, db> in x, the weight and dy."""
    x, weight, bias, dy = (each.to(dtype).requires_grad_() for each in given[:4])
    along = [each.to(dtype) for each in given[4:]]
    y = norm(x, groups, weight, bias, 1e-5)
    first = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    return [y, *first, *torch.autograd.grad(first, (x, weight, dy), along)]


def errors(shape, groups, dtype, given=None):
    given = case(shape) if given is None else given
    exact = derivatives(F.group_norm, groups, given, torch.float64)
    found = derivatives(group_norm, groups, given, dtype)
    # the derivative in x of groups that are constant is a difference of larger numbers
    return [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-3))
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("shape,groups", SHAPES)
def test_matches_torch(shape, groups, impl, dtype):
    assert max(errors(shape, groups, dtype)) <= LIMITS[dtype]


@pytest.mark.parametrize("shape,groups", [((2, 4, 3, 2), 2), ((3, 2, 5), 1)])
def test_is_the_derivative(shape, groups, impl):
    x, weight, bias, _ = (each.requires_grad_() for each in case(shape)[:4])
    arguments = (x, groups, weight, bias)
    assert torch.autograd.gradcheck(group_norm, arguments)
    assert torch.autograd.gradgradcheck(group_norm, arguments)


def test_by_hand(impl):
    """One group of 1 and -1, weight 1: n = x, r = 1, P removes all of two values."""
    x = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (1, 0))
    dy = torch.tensor([[[3.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    y = group_norm(x, 1, weight, bias, 0.0)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    assert dx.tolist() == [[[0.0, 0.0]]]
    assert (dw.tolist(), db.tolist()) == ([2.0], [4.0])  # 3 - 1, 3 + 1
    # dw = sum dy n: in dy it is n
    assert torch.autograd.grad(dw, dy)[0].tolist() == [[[1.0, -1.0]]]


def test_constant_groups(impl, dtype):
    """As after a ReLU that let nothing through: the variance is 0, eps alone counts."""
    given = case((2, 4, 6))
    given[0][:, :2] = 0.25
    assert max(errors((2, 4, 6), 2, dtype, given)) <= LIMITS[dtype]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_badly_scaled(scale, impl, dtype):
    given = case((3, 8, 20))
    given[0].mul_(scale).add_(3 * scale)
    assert max(errors((3, 8, 20), 2, dtype, given)) <= 10 * LIMITS[dtype]


def test_strided_weights(impl, dtype):
    x, *_ = case((2, 4, 5))
    x = x.to(dtype).requires_grad_()
    weights = torch.randn(4, 2, dtype=dtype, requires_grad=True)

    def second(norm):
        y = norm(x, 2, *weights.unbind(1))
        first = torch.autograd.grad(y.pow(3).sum(), (x, weights), create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weights))]

    for a, b in zip(second(group_norm), second(F.group_norm), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_layouts(impl, dtype):
    """Channels last, and gradients that come in strided or as zeros."""
    x, weight, bias, dy, *_ = case((2, 4, 3, 5))
    x, weight, bias = (each.to(dtype).requires_grad_() for each in (x, weight, bias))
    dy = dy.to(dtype)

    def second(norm, x, dy):
        y = norm(x, 2, weight, bias)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return torch.autograd.grad(dx.mT.contiguous().pow(2).sum(), (x, weight))

    expected = second(F.group_norm, x, dy)
    turned = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for given in (x, turned):
        for gradient in (dy, dy.mT.contiguous().mT):
            for a, b in zip(second(group_norm, given, gradient), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 4, 3), 2),
        (torch.randn(2, 4, 3), 2, torch.randn(4)),
        (torch.randn(2, 4), 2, torch.randn(4), torch.randn(4)),
        (torch.randn(0, 4, 3), 2, torch.randn(4), torch.randn(4)),
        (torch.randn(2, 4, 3).bfloat16(), 2, torch.randn(4).bfloat16(), torch.randn(4).bfloat16()),
    ],
    ids=["no weight", "no bias", "flat", "empty", "bfloat16"],
)
def test_the_rest_is_torchs(arguments):
    assert torch.equal(group_norm(*arguments), F.group_norm(*arguments))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_are_torchs():
    x, w = torch.randn(3, 2, 4, 5), torch.randn(4)
    torch.testing.assert_close(
        torch.func.vmap(lambda each: group_norm(each, 2, w, w))(x),
        torch.stack([F.group_norm(each, 2, w, w) for each in x]),
    )
    tangents = []
    for norm in (group_norm, F.group_norm):
        one = partial(norm, num_groups=2, weight=w, bias=w)
        tangents.append(torch.func.jvp(one, (x[0],), (x[1],))[1])
    torch.testing.assert_close(*tangents)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        tangent = forward_ad.unpack_dual(group_norm(dual, 2, w, w)).tangent
    torch.testing.assert_close(tangent, tangents[0])


def test_torch_says_what_is_wrong():
    x, w = torch.randn(2, 4, 3), torch.randn(4)
    for arguments in [(x, 3, w, w), (x, 2, w[:3], w), (x, 0, w, w), (x, 2, w.double(), w.double())]:
        with pytest.raises(Exception) as ours:
            group_norm(*arguments)
        with pytest.raises(type(ours.value)) as theirs:
            F.group_norm(*arguments)
        assert str(ours.value) == str(theirs.value)


def test_a_third_derivative_is_refused():
    x, w = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    (first,) = torch.autograd.grad(group_norm(x, 2, w, w).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(gs.InputError, match="no third derivative"):
        torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads, dtype):
    given = case((7, 12, 40, 40))
    torch.set_num_threads(1)
    expected = derivatives(group_norm, 3, given, dtype)
    torch.set_num_threads(threads)
    found = derivatives(group_norm, 3, given, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found[4:], expected[4:], strict=True))


@native
def test_the_kernel_checks_what_it_is_given():
    x, c, g, s = torch.ones(2, 4, 3), torch.ones(4), torch.ones(2, 2), torch.ones(2, 4)
    good = [x, x, x, c, c, c, g, g, x.clone(), x.clone(), s]
    for place, wrong, message in [
        (1, torch.ones(2, 12), r"x must be \[N, C, L\]"),
        (1, x.half(), "float32 or float64, got .* float16"),
        (1, torch.ones(0, 4, 3), "not empty"),
        (0, x[:1], "dy must be 24 contiguous"),
        (2, x.mT.contiguous().mT, "u must be 24 contiguous"),
        (3, torch.ones(3), "weight must be 4"),
        (4, torch.ones(4).double(), "p must be .* float32, got .* float64"),
        (6, torch.ones(2, 3), "G a divisor of 4"),
        (7, torch.ones(2, 1), "rstd must be 4"),
        (10, torch.ones(2, 3), "to_weight must be 8"),
    ]:
        arguments = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(gs.InputError, match=message):
            _backend._C.group_norm_double_backward_cpu(*arguments, 2)


@native
def test_obeys_the_variable(monkeypatch):
    monkeypatch.setattr(
        _backend._C, "group_norm_double_backward_cpu", lambda *args: pytest.fail("native ran")
    )
    monkeypatch.setenv("GRADSURGERY_BACKEND", "torch")
    derivatives(group_norm, 2, case((2, 4, 3)), torch.float32)


EVERY_SHAPE = """
import os
import torch
from gradsurgery import _C
from tests.ops.test_group_norm import LIMITS, SHAPES, errors

assert _C.isa() == os.environ["GRADSURGERY_CPU"]
torch.manual_seed(0)
torch.set_num_threads(2)
for dtype, limit in LIMITS.items():
    for shape, groups in SHAPES:
        value = max(errors(shape, groups, dtype))
        if not value <= limit:
            print(dtype, shape, value)
"""


@native
@instruction_sets.each
def test_every_instruction_set(isa):
    instruction_sets.prints_nothing(isa, EVERY_SHAPE)
