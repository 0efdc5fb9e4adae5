"""Which implementation runs, and that each instruction set computes the same."""

import pytest
import torch

import gradsurgery as gs
from gradsurgery.ops import _backend
from tests.ops import instruction_sets

REFERENCE = ("torch", "any")


def reference():
    return "reference"


def native():
    return "native"


def triton():
    return "triton"


@pytest.fixture
def chosen(monkeypatch):
    """What runs for a forced backend, with or without the native module."""

    def choose(forced, built=True, implementations=None, device="cpu"):
        monkeypatch.setenv("GRADSURGERY_BACKEND", forced)
        monkeypatch.setattr(_backend, "native_available", lambda device: built)
        given = {REFERENCE: reference, ("native", "cpu"): native}
        return _backend.choose(
            "op", given if implementations is None else implementations, device
        )()

    return choose


def test_native_runs_where_it_is_built(chosen):
    assert chosen("") == "native"
    assert chosen("", built=False) == "reference"
    assert chosen("", device="xpu") == "reference"
    assert chosen("", implementations={REFERENCE: reference}) == "reference"


def test_the_backend_of_an_operator_is_named(monkeypatch):
    monkeypatch.setattr(_backend, "native_available", lambda device: device == "cpu")
    for triton, served in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(_backend, "triton_available", lambda device, triton=triton: triton)
        for name in ("combine", "combine_tokens", "cone_weights", "gramian"):
            assert _backend.backend_of(name, "cpu") == "native"
            assert _backend.backend_of(name, "cuda") == served
    monkeypatch.setenv("GRADSURGERY_BACKEND", "torch")
    assert _backend.backend_of("combine_tokens", "cuda") == "torch"


def seen_by_dispatcher(run):
    """Names of gradsurgery's operators that torch's dispatcher saw."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Spy():
        run()
    return [name for name in seen if name.startswith("gradsurgery::")]


def test_whoever_must_see_a_call_sees_it():
    """Modes, autograd, transforms and tangents; plain tensors go straight to the kernel."""
    gramian, products = torch.eye(3).double(), torch.ones(1, 3).double()
    solve = gs.ops.cone_weights
    assert seen_by_dispatcher(lambda: solve(gramian, products)) == ["gradsurgery::cone_weights"]
    assert _backend.plain([gramian, products])

    wanted = products.clone().requires_grad_()
    assert not _backend.plain([gramian, wanted])
    assert solve(gramian, wanted)[0].requires_grad
    with torch.no_grad():
        assert _backend.plain([gramian, wanted])

    states = []
    torch.func.vmap(lambda row: states.append(_backend.plain([row])) or row)(products)
    with torch.autograd.forward_ad.dual_level():
        states.append(_backend.plain([products]))
    torch.compile(lambda x: x + (1 if _backend.plain([x]) else 0), backend="eager", fullgraph=True)(
        products
    )
    with torch._subclasses.FakeTensorMode() as mode:
        states.append(_backend.plain([mode.from_tensor(products)]))
    states.append(_backend.plain([torch.nn.Parameter(products, requires_grad=False)]))
    assert states == [False] * 4


def test_triton_serves_a_gpu_where_no_native_kernel_does(chosen, monkeypatch):
    every = {REFERENCE: reference, ("native", "cuda"): native, ("triton", "cuda"): triton}
    without = {REFERENCE: reference, ("native", "cpu"): native, ("triton", "cuda"): triton}
    for found in (True, False):
        monkeypatch.setattr(_backend, "TRITON", found)
        assert chosen("", implementations=every, device="cuda") == "native"
        second = "triton" if found else "reference"
        assert chosen("", built=False, implementations=every, device="cuda") == second
        assert chosen("", implementations=without, device="cuda") == second
        assert chosen("", implementations=without, device="cpu") == "native"
    with pytest.raises(gs.InputError, match="op has no triton implementation for cuda"):
        chosen("triton", implementations=every, device="cuda")


@pytest.mark.parametrize("capability,serves", [((7, 5), "reference"), ((9, 0), "triton")])
def test_triton_leaves_old_gpus_to_torch(chosen, monkeypatch, capability, serves):
    monkeypatch.setattr(_backend, "TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    _backend._capable.cache_clear()
    given = {REFERENCE: reference, ("triton", "cuda"): triton}
    try:
        assert chosen("", implementations=given, device="cuda") == serves
    finally:
        _backend._capable.cache_clear()


def test_triton_serves_a_cpu_in_its_interpreter_and_by_force_alone(chosen, monkeypatch):
    given = {REFERENCE: reference, ("triton", "cuda"): triton}
    monkeypatch.setattr(_backend, "TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("", implementations=given) == "reference"
    assert chosen("triton", implementations=given) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(gs.InputError, match="op has no triton implementation for cpu"):
        chosen("triton", implementations=given)


def test_a_forced_backend_runs(chosen):
    assert chosen("torch") == "reference"
    assert chosen("native") == "native"


def test_a_forced_backend_that_is_absent_is_an_error(chosen):
    for options in (
        {"forced": "native", "built": False},
        {"forced": "native", "device": "xpu"},
        {"forced": "native", "implementations": {REFERENCE: reference}},
        {"forced": "triton"},
    ):
        with pytest.raises(
            gs.InputError, match=rf"GRADSURGERY_BACKEND={options['forced']}: op has no"
        ):
            chosen(**options)


def test_an_unknown_backend_is_an_error(chosen):
    with pytest.raises(gs.InputError, match="BACKEND=Native: must be one of torch, native, triton"):
        chosen("Native")


def test_a_failure_is_not_hidden_by_another_backend(monkeypatch):
    def broken(*args):
        raise RuntimeError("broken kernel")

    monkeypatch.setenv("GRADSURGERY_BACKEND", "")
    given = {REFERENCE: reference, ("native", "cpu"): broken}
    monkeypatch.setattr(_backend, "native_available", lambda device: True)
    with pytest.raises(RuntimeError, match="broken kernel"):
        _backend.choose("op", given, "cpu")()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_operators_obey_the_variable(backend, monkeypatch):
    if backend == "native" and not _backend.native_available("cpu"):
        pytest.skip("the native module is not built")
    called = []
    served = {
        "gramian_cpu", "combine_cpu", "orthonormalize_cpu", "projection_weights_cpu",
        "project_out_cpu",
    }  # fmt: skip
    for name in served:
        kernel = getattr(_backend._C, name, None)
        if kernel is not None:
            spy = lambda *args, kernel=kernel, name=name: called.append(name) or kernel(*args)  # noqa: E731
            monkeypatch.setattr(_backend._C, name, spy)
    monkeypatch.setenv("GRADSURGERY_BACKEND", backend)
    rows = torch.randn(5, 40)
    gs.gramian(rows)
    gs.combine(rows, torch.ones(5))
    gs.orthonormalize(rows)
    gs.project_out(rows[0], rows[1:])
    gs.ops.projection_weights(torch.eye(3), torch.ones(3))
    gs.harmonize(rows[0], rows[1])
    if backend == "torch":
        assert called == []
    else:
        assert set(called) == served


def test_what_is_forced_to_plain_torch_is_marked(impl, request):
    # the checks of other instruction sets and of memory leave it out by that
    assert (request.node.get_closest_marker("plain_torch") is not None) == (impl == "torch")


# one process per instruction set: the choice is made once

PREAMBLE = """
import os
import torch
import gradsurgery as gs
from gradsurgery import _C
from tests.inputs import exact_gramian

assert _C.isa() == os.environ["GRADSURGERY_CPU"]
os.environ["GRADSURGERY_BACKEND"] = "native"
torch.set_num_threads(2)
torch.manual_seed(0)
failures = []

def check(error, limit, case):
    if not error <= limit:
        failures.append(f"{case}: {float(error):.1e} > {limit:.1e}")

def gramian_error(gram, rows):
    exact = exact_gramian(rows)
    norms = exact.diagonal().sqrt()
    return ((gram - exact).abs() / torch.outer(norms, norms)).max()
"""

EVERY_OPERATOR = """
ROUNDOFF = {torch.float64: 1.2e-16, torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# every tail of every vector, every edge of every tile of rows, both kinds of sums
SHAPES = [(m, 16 * 9 + tail) for tail, m in enumerate([*range(1, 14), 17, 33, 64, 5, 6, 7])]
SHAPES += [(m, n) for m in (1, 4, 7) for n in range(1, 36, 3)] + [(9, 40_003), (3, 200_007)]
for dtype, roundoff in ROUNDOFF.items():
    for m, n in SHAPES:
        case = f"{dtype} {m} x {n}"
        rows, weights = torch.randn(m, n).to(dtype), torch.randn(m).double()
        if (m + n) % 3 == 0:
            rows = rows.mT.contiguous().mT
        exact = rows.double()
        check(gramian_error(gs.gramian(rows, precise=True), rows), 1e-14, f"gramian {case}")
        check(gramian_error(gs.gramian(rows), rows), 1e-5, f"gramian {case}")

        expected = weights @ exact
        allowed = roundoff * expected.abs() + 1e-15 * (weights.abs() @ exact.abs())
        allowed += 1e-7 if roundoff > 1e-4 else 0  # subnormals of 16 bits
        excess = (gs.combine(rows, weights).double() - expected).abs() - allowed
        check(excess.max(), 0.0, f"combine {case}")

        grad = torch.randn(n).to(dtype)
        perp, info = gs.project_out(grad, rows, return_info=True)
        q = torch.linalg.qr(exact.mT).Q
        expected = grad.double() - q @ (q.mT @ grad.double())
        check((info.rank - min(m, n)).abs(), 0, f"rank {case}")
        error = (perp.double() - expected).norm() / grad.double().norm()
        check(error, 3 * roundoff + 1e-12, f"project_out {case}")

        q, r, rank = gs.orthonormalize(rows, return_rank=True)
        check((rank - min(m, n)).abs(), 0, f"rank of orthonormalize {case}")
        error = (r.double().mT @ q.double() - exact).norm(dim=1) / exact.norm(dim=1)
        check(error.max(), 8 * roundoff + 1e-12, f"orthonormalize {case}")
        kept = q.double()[q.abs().amax(1) > 0]
        error = (kept @ kept.mT - torch.eye(len(kept))).abs().max()
        check(error, 8 * roundoff + 1e-13, f"orthonormality {case}")

        retain = 0.5 * rows[-1] - rows[0]
        f, _ = gs.harmonize(rows[0], retain)
        left = f.double() @ retain.double() / (exact[0].norm() * retain.double().norm())
        check(-left, 2 * roundoff + 1e-6, f"harmonize {case}")
"""

GRAMIAN_IN_FLOAT32 = """
from tests.ops.test_gramian import FLOAT32
for name, make in {
    "normal": torch.randn,
    "positive": torch.rand,
    "heavy tails": lambda m, n: torch.randn(m, n) ** 5,
    "half zeros": lambda m, n: torch.randn(m, n).relu(),
}.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (40_003, 300_007):
            rows = make(3, n).to(dtype)
            check(gramian_error(gs.gramian(rows), rows), FLOAT32, f"{name} {dtype} {n}")
"""


@pytest.mark.skipif(not _backend.native_available("cpu"), reason="the native module is not built")
@instruction_sets.each
@pytest.mark.parametrize(
    "code", [EVERY_OPERATOR, GRAMIAN_IN_FLOAT32], ids=["operators", "gramian in float32"]
)
def test_every_instruction_set_agrees_with_float64(code, isa):
    instruction_sets.prints_nothing(isa, PREAMBLE + code + "print(*failures, sep='\\n')")
