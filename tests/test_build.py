"""The compiled module: what it says of itself, what it needs, how it fails without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsurgery import _C, doctor
from gradsurgery.ops import _backend

CSRC = Path(__file__).parent.parent / "csrc"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_doctor_says_what_runs():
    report = doctor.report()
    for fact in (torch.__version__, _C.compiler, _C.isa(), _C.__file__):
        assert fact in report
    for name in ("backend torch", "backend native", "backend triton", "threads", "cuda kernels"):
        assert re.search(rf"^{name} +\S", report, re.MULTILINE)


def test_doctor_says_which_kernel_serves_each_operator_and_why(monkeypatch):
    monkeypatch.setattr(_backend, "TRITON", True)
    monkeypatch.setattr(_backend, "native_available", lambda device: device == "cpu")
    monkeypatch.setattr(doctor, "native_available", lambda device: device == "cpu")
    lines = dict(line.split(maxsplit=1) for line in doctor.report().splitlines())
    missing = "no native CUDA kernels built"
    assert lines["gramian"] == f"CPU: native; CUDA: triton ({missing})"
    assert lines["orthonormalize"] == f"CPU: native; CUDA: torch ({missing}, none in Triton)"
    monkeypatch.setattr(_backend, "TRITON", False)
    lines = dict(line.split(maxsplit=1) for line in doctor.report().splitlines())
    assert lines["token_gramian"] == f"CPU: native; CUDA: torch ({missing}, Triton absent)"
    monkeypatch.setenv("GRADSURGERY_BACKEND", "native")
    lines = dict(line.split(maxsplit=1) for line in doctor.report().splitlines())
    assert lines["combine_tokens"] == "CPU: native; CUDA: none, native is forced"


def test_doctor_survives_a_missing_module():
    result = run(
        "import sys; sys.modules['gradsurgery._C'] = None; from gradsurgery import doctor; "
        "doctor.main()"
    )
    assert re.search("backend native +absent", result.stdout), result.stderr


@pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree")
def test_no_torch_header():
    includes = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")
    assert [path.name for path in CSRC.iterdir() if includes.search(path.read_text())] == []


def test_kernels_import_nothing_above_them():
    for path in (Path(doctor.__file__).parent / "kernels").glob("*.py"):
        names = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
        ours = [name for name in names if name.startswith(("gradsurgery", "."))]
        below = ("gradsurgery.kernels", "gradsurgery.errors")
        assert all(name.startswith(below) for name in ours), (path.name, ours)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["torch", "gradsurgery._C"])
def test_shares_one_openmp_runtime_with_torch(first):
    result = run(
        f"import {first}, torch, gradsurgery._C; torch.ones(2).sum()\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    assert len(result.stdout.split()) == 1, result.stdout + result.stderr


@pytest.mark.parametrize("isa", _C.isas)
def test_instruction_set_can_be_forced(isa):
    result = run("from gradsurgery import _C; print(_C.isa())", GRADSURGERY_CPU=isa)
    assert result.stdout.strip() == isa or "this processor has" in result.stderr


def test_unknown_instruction_set_is_an_error():
    result = run("from gradsurgery import _C; _C.isa()", GRADSURGERY_CPU="bogus")
    assert "InputError: GRADSURGERY_CPU=bogus: expected baseline, avx2 or avx512" in result.stderr
    result = run("from gradsurgery import doctor; doctor.main()", GRADSURGERY_CPU="bogus")
    assert "none: GRADSURGERY_CPU=bogus" in result.stdout


def test_older_torch_is_named():
    result = run(
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__; torch.__version__ = '2.9.0'\n"
        "from gradsurgery import _C; _C.describe(torch.ones(2))"
    )
    assert re.search(r"ImportError: .*torch 2\.11 or newer.*this is torch 2\.9\.0", result.stderr)


def test_another_dlpack_is_named():
    result = run(
        "import ctypes, torch\n"
        "header = (ctypes.c_uint32 * 4)(2, 0, 0, 0)\n"  # major 2, no older interface behind it
        "new = ctypes.pythonapi.PyCapsule_New\n"
        "new.restype = ctypes.py_object\n"
        "new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]\n"
        "name = b'dlpack_exchange_api'\n"
        "torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(header), name, None)\n"
        "from gradsurgery import _C; _C.describe(torch.ones(2))"
    )
    assert "ImportError: gradsurgery's compiled kernels speak DLPack 1.x" in result.stderr


def test_rejects_fake_tensors():
    # in its own process: torch itself warns on stderr when a fake tensor's pointer is read
    result = run(
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode(): fake = torch.ones(2, 3)\n"
        "from gradsurgery import _C; _C.describe(fake)"
    )
    assert "expected a tensor with memory, got a FakeTensor of shape [2, 3]" in result.stderr
