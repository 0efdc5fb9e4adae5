"""Conflicting gradients lose what opposes the other; nothing else changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from tests.conftest import ROUNDOFF
from tests.inputs import same_values

MODES = ["forget", "retain", "both"]
SHAPES = [(2, 3), (), (0,), (4, 1, 2), (1009,)]


def oracle(forget, retain, mode):
    """Off each other's original, where f·r < 0, in float64."""
    f, r = forget.double(), retain.double()
    f_scale, r_scale = f.abs().amax(), r.abs().amax()
    if not (f_scale > 0 and r_scale > 0):
        return f, r
    a, b = f / f_scale, r / r_scale
    conflict = min(a @ b, 0)
    new_f = f - conflict / (b @ b) * b * f_scale if mode != "retain" else f
    new_r = r - conflict / (a @ a) * a * r_scale if mode != "forget" else r
    return new_f, new_r


@pytest.mark.parametrize(
    "mode,expected",
    [
        ("forget", ([0.5, 0.5], [-1, 1])),
        ("retain", ([1, 0], [0, 1])),
        ("both", ([0.5, 0.5], [0, 1])),
    ],
)
def test_hand_worked_conflict(mode, expected, impl, dtype):
    f, r = gs.harmonize(
        torch.tensor([1.0, 0], dtype=dtype), torch.tensor([-1.0, 1], dtype=dtype), mode=mode
    )
    assert (f.tolist(), r.tolist()) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("retain", [[1.0, 1], [0, 1], [2, 0], [0, 0]])
def test_without_conflict_every_value_stays(retain, mode, impl, dtype):
    forget, retain = torch.tensor([3.0, 0], dtype=dtype), torch.tensor(retain, dtype=dtype)
    f, r = gs.harmonize(forget, retain, mode=mode)
    assert torch.equal(f, forget)
    assert torch.equal(r, retain)


@pytest.mark.parametrize("mode", MODES)
def test_opposite_gradients_cancel(mode, impl, dtype):
    grad = torch.tensor([2.0, -4, 1], dtype=dtype)
    f, r = gs.harmonize(grad, -2 * grad, mode=mode)
    assert f.abs().max() <= (0 if mode != "retain" else 4)
    assert r.abs().max() <= (0 if mode != "forget" else 8)
    assert torch.equal(f, grad) == (mode == "retain")
    assert torch.equal(r, -2 * grad) == (mode == "forget")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 2, 7, 1009, 100_003])
def test_matches_float64(n, mode, impl, dtype):
    forget = torch.randn(n).to(dtype)
    for retain in (
        torch.randn(n),
        -forget.float() + torch.randn(n),
        forget.float() + torch.randn(n),
    ):
        retain = retain.to(dtype)
        for new, expected, old in zip(
            gs.harmonize(forget, retain, mode=mode),
            oracle(forget, retain, mode),
            (forget, retain),
            strict=True,
        ):
            assert new.dtype == dtype
            # what is removed is known to 1e-7 of the gradients
            tolerance = ROUNDOFF[dtype] + (0 if dtype == torch.float64 else 2e-7) + 1e-13
            assert (new.double() - expected).norm() <= tolerance * old.double().norm()


@pytest.mark.parametrize("mode", MODES)
def test_no_conflict_is_left(mode, impl):
    forget, retain = torch.randn(2, 301, dtype=torch.float64)
    retain -= 2 * forget
    assert forget @ retain < 0
    f, r = gs.harmonize(forget, retain, mode=mode)
    scale = forget.norm() * retain.norm()
    assert (f @ retain).abs() < 1e-14 * scale or mode == "retain"
    assert (r @ forget).abs() < 1e-14 * scale or mode == "forget"


def test_both_is_pcgrad_of_two(impl):
    rows = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
    f, r = gs.harmonize(rows[0], rows[1], mode="both")
    assert (f + r).tolist() == pytest.approx([0.5848, 3.8012, 3.8012], abs=1e-4)


def test_both_treats_the_two_alike(impl):
    forget, retain = torch.randn(2, 57)
    retain -= forget
    f, r = gs.harmonize(forget, retain, mode="both")
    r_first, f_second = gs.harmonize(retain, forget, mode="both")
    assert torch.equal(f, f_second)
    assert torch.equal(r, r_first)


def lists():
    forget = [torch.randn(shape) for shape in SHAPES]
    return forget, [torch.randn(shape) - 0.3 * f for shape, f in zip(SHAPES, forget, strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_per_tensor_decides_each_pair_alone(mode, impl):
    forget, retain = lists()
    f, r = gs.harmonize(forget, retain, mode=mode, per="tensor")
    for k, (a, b) in enumerate(zip(forget, retain, strict=True)):
        alone = gs.harmonize(a, b, mode=mode)
        assert torch.equal(f[k], alone[0])
        assert torch.equal(r[k], alone[1])


@pytest.mark.parametrize("mode", MODES)
def test_per_model_decides_by_the_whole(mode, impl):
    forget, retain = lists()
    f, r = gs.harmonize(forget, retain, mode=mode)
    flat = [torch.cat([t.flatten() for t in side]) for side in (forget, retain)]
    for side, expected, old in zip((f, r), oracle(*flat, mode), flat, strict=True):
        assert [t.shape for t in side] == [torch.Size(shape) for shape in SHAPES]
        whole = torch.cat([t.flatten() for t in side]).double()
        assert (whole - expected).norm() <= 2e-7 * old.norm()


def test_model_and_tensor_differ_where_signs_do(impl):
    # the first pair conflicts, the second agrees and outweighs it
    forget = [torch.tensor([1.0, 0]), torch.tensor([3.0])]
    retain = [torch.tensor([-1.0, 0]), torch.tensor([3.0])]
    assert gs.harmonize(forget, retain)[0][0].tolist() == [1, 0]
    assert gs.harmonize(forget, retain, per="tensor")[0][0].tolist() == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_the_mode_leaves_alone_are_returned_themselves(mode, impl):
    forget, retain = lists()
    f, r = gs.harmonize(forget, retain, mode=mode)
    assert all(a is b for a, b in zip(f, forget, strict=True)) == (mode == "retain")
    assert all(a is b for a, b in zip(r, retain, strict=True)) == (mode == "forget")


@pytest.mark.parametrize("scale_f", [1e-30, 1, 1e30])
@pytest.mark.parametrize("scale_r", [1e-30, 1, 1e30])
def test_any_scale(scale_f, scale_r, impl):
    forget, retain = torch.randn(2, 1009)
    retain = (retain - forget) * scale_r
    forget = forget * scale_f
    for mode in MODES:
        for new, expected, old in zip(
            gs.harmonize(forget, retain, mode=mode),
            oracle(forget, retain, mode),
            (forget, retain),
            strict=True,
        ):
            assert (new.double() - expected).norm() <= 2e-7 * old.double().norm()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 300), seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_conflict_never_grows(n, seed, mode):
    torch.manual_seed(seed)
    forget, retain = torch.randn(2, n)
    f, r = gs.harmonize(forget, retain, mode=mode)
    band = 1e-6 * forget.double().norm() * retain.double().norm()
    before = forget.double() @ retain.double()
    if before > band:
        assert torch.equal(f, forget)
        assert torch.equal(r, retain)
    if mode != "retain":
        assert f.double() @ retain.double() >= -band
    if mode != "forget":
        assert r.double() @ forget.double() >= -band


def test_reads_strided_gradients(impl, dtype):
    forget, retain = torch.randn(2, 31, 7, 2).to(dtype)[..., 0].transpose(1, 2)
    retain = retain - forget
    f, r = gs.harmonize(forget, retain, mode="both")
    expected = gs.harmonize(forget.contiguous(), retain.contiguous(), mode="both")
    assert torch.equal(f, expected[0])
    assert torch.equal(r, expected[1])


def test_inputs_are_untouched(impl, dtype):
    forget = torch.randn(301).to(dtype)
    retain = -forget + torch.randn(301).to(dtype)
    before = forget.clone(), retain.clone()
    gs.harmonize(forget, retain, mode="both")
    assert same_values(forget, before[0])
    assert same_values(retain, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_names_the_gradient_that_is_not_finite(side, value, impl, dtype):
    grads = [torch.randn(2, 401).to(dtype) for _ in range(2)]
    grads[side][1, 7] = value
    name = ("forget_grad", "retain_grad")[side]
    for per in ("model", "tensor"):
        with pytest.raises(gs.NonFiniteError, match=f"{name}.* 1 of 802 values"):
            gs.harmonize([grads[0]], [grads[1]], per=per)


def test_says_when_the_result_overflows(impl):
    # f - (f·r / |r|²) r may have larger values than f
    forget = torch.tensor([6e4, 6e4], dtype=torch.float16)
    retain = torch.tensor([0.3827, -0.9239], dtype=torch.float16)
    with pytest.raises(gs.NonFiniteError, match=r"overflows torch.float16"):
        gs.harmonize(forget, retain)


@pytest.mark.parametrize(
    "forget,retain,options,message",
    [
        (torch.ones(3), torch.ones(4), {}, r"retain_grad\[0\] must be \[3\] to match forget_grad"),
        ([torch.ones(3)], [torch.ones(3)] * 2, {}, "retain_grad has 2 tensors, forget_grad has 1"),
        (torch.ones(3), torch.ones(3).double(), {}, "retain_grad is torch.float64, forget_grad is"),
        (torch.ones(3), torch.ones(3, device="meta"), {}, "retain_grad is on meta, forget_grad is"),
        (torch.ones(3).long(), torch.ones(3), {}, r"forget_grad\[0\] must be .*got torch.int64"),
        ([], [], {}, "forget_grad is an empty sequence"),
        (None, torch.ones(3), {}, "forget_grad must be a Tensor or a sequence .* got NoneType"),
        (torch.ones(3), torch.ones(3), {"mode": "Forget"}, "mode must be one of .*got 'Forget'"),
        (torch.ones(3), torch.ones(3), {"per": "layer"}, "per must be .*got 'layer'"),
    ],
    ids=str,
)
def test_rejects_what_does_not_fit(forget, retain, options, message, impl):
    with pytest.raises(gs.InputError, match=message):
        gs.harmonize(forget, retain, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("sign", [-1, 1], ids=["conflict", "agreement"])
def test_gradient(mode, per, sign, impl):
    forget = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 2), (4,), ())]
    retain = [(sign * f + 0.1 * torch.randn_like(f)).requires_grad_() for f in forget]
    forget = [f.requires_grad_() for f in forget]

    def check(*tensors):
        f, r = gs.harmonize(tensors[:3], tensors[3:], mode=mode, per=per)
        return (*f, *r)

    assert torch.autograd.gradcheck(check, (*forget, *retain))
    assert torch.autograd.gradgradcheck(check, (*forget, *retain))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_registration(needs_grad, mode, impl, dtype):
    if dtype not in (torch.float64, torch.bfloat16) or (needs_grad and dtype != torch.float64):
        pytest.skip("one 16-bit type is enough; gradients are compared in float64")
    forget = [torch.randn(shape).to(dtype) for shape in ((3, 2), (4,))]
    retain = [(0.1 * torch.randn_like(f) - f).requires_grad_(needs_grad) for f in forget]
    forget = [f.requires_grad_(needs_grad) for f in forget]
    torch.library.opcheck(torch.ops.gradsurgery.harmonize, (forget, retain, mode, True))


@pytest.mark.parametrize("mode", MODES)
def test_compiles_into_one_graph(mode, impl):
    forget, retain = torch.randn(2, 41)
    retain = retain - forget
    compiled = torch.compile(
        lambda f, r: [2 * t for t in gs.harmonize(f, r, mode=mode)],
        fullgraph=True,
        backend="aot_eager",
    )
    for new, expected in zip(
        compiled(forget, retain), gs.harmonize(forget, retain, mode=mode), strict=True
    ):
        assert torch.equal(new, 2 * expected)
