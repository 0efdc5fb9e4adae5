"""What every test shares: tolerances, implementations, seeds, memory that shows it is unwritten."""

import gc
import os
import sys
from collections import Counter

# before torch starts OpenMP: a thread that spins while it waits takes the core of another process
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests run
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report that a trainer is made

import numpy
import pytest
import torch
from torch.utils._device import _device_constructors

from gradsurgery.capture import hooked
from gradsurgery.capture.hooks import others
from gradsurgery.ops import _backend

TOLERANCES = {  # (atol, rtol)
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
DTYPES = list(TOLERANCES)
# unit roundoff: the largest relative error of one rounding to nearest
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
THREADS = (
    2  # two OpenMP threads on a busy machine can be ten times slower than one: never left to chance
)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


# `make interpret`: Triton's kernels on the CPU, and nothing compiled
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if INTERPRETED:
    numpy.seterr(all="ignore")  # a GPU does not warn of what is not finite


PLAIN_TORCH = pytest.param("torch", marks=pytest.mark.plain_torch)


@pytest.fixture(params=["triton"] if INTERPRETED else [PLAIN_TORCH, "native"])
def impl(request, monkeypatch):
    """Each implementation of an operator in turn, forced."""
    if request.param == "native" and not _backend.native_available("cpu"):
        pytest.skip("the native module is not built")
    monkeypatch.setenv("GRADSURGERY_BACKEND", request.param)
    return request.param


@pytest.fixture
def assert_close():
    """Compares with a float64 oracle, within the tolerance of what was computed."""

    def compare(actual, expected, scale=1.0):
        atol, rtol = TOLERANCES[actual.dtype]
        assert expected.dtype == torch.float64, "the oracle is float64"
        torch.testing.assert_close(actual.double(), expected, atol=atol * scale, rtol=rtol)

    return compare


# what the workers of pytest-xdist attacked is counted in each of them; tests/fuzz/conftest.py
@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    attacks = getattr(node, "workeroutput", {}).get("attacks")
    if attacks:
        from tests.fuzz.profiles import TALLY

        for kind, count in attacks.items():
            TALLY.setdefault(kind, Counter()).update(count)


def pytest_terminal_summary(terminalreporter):
    profiles = sys.modules.get("tests.fuzz.profiles")
    if profiles and profiles.TALLY:
        terminalreporter.section("attacks")
        terminalreporter.write_line(profiles.table(profiles.TALLY))


# what torch.device(...) as a context moves is looked up once: before `unwritten_is_nan`
_device_constructors()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """Memory the package allocates without a value holds NaN: an output left unwritten fails."""

    def poisoned(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] == "gradsurgery" and type(out) is torch.Tensor:
                with torch.no_grad():
                    out.fill_(float("nan") if out.is_floating_point() else -(2**62))
            return out

        return call

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def alone(monkeypatch):
    """As in a process where nobody else has hooks: those that other tests left are not found."""
    gc.collect()
    found, theirs = hooked._found, [each for part in hooked._found() for each in part]
    known = set(map(id, theirs))

    def of_this_test():
        return tuple([each for each in part if id(each) not in known] for part in found())

    monkeypatch.setattr(hooked, "_found", of_this_test)
    monkeypatch.setattr(hooked, "live_hooks", hooked.LiveHooks(others))
