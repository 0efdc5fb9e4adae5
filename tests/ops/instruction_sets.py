"""The native kernels with each instruction set that this processor has."""

import os
import subprocess
import sys

import pytest

from gradsurgery.ops import _backend

ISAS = ["baseline", "avx2", "avx512"]
each = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.each_isa) for isa in ISAS]
)


def prints_nothing(isa, code):
    """Whether `code`, which prints what it finds wrong, does so in a process of its own."""
    if _backend._C is None or isa not in _backend._C.isas:
        pytest.skip(f"not built for {isa}")
    environment = {"GRADSURGERY_CPU": isa, "GRADSURGERY_BACKEND": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if "this processor has" in result.stderr:
        pytest.skip(result.stderr.strip().rpartition("\n")[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
