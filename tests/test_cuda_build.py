"""The CUDA kernels compile without a warning for every GPU named, and stay in registers.

Compiling is all that is checked here; tests/test_cuda_kernels.py is about what they compute.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = [80, 90, 100]
SHARED_LIMIT = 48 << 10  # bytes a block gets without asking for more
LINE = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)

pytestmark = [
    pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]


@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    result = subprocess.run(
        [NVCC, "-std=c++20", "-O3", "-c", CSRC / source, "-o", tmp_path / "out.o", *targets,
         "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", "--threads=0"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    kernels = LINE.findall(log)
    expected = log.count("Compiling entry function")
    assert len(kernels) == expected
    # host files have none
    assert expected % len(ARCHITECTURES) == 0
    assert (expected > 0) == ("__global__" in (CSRC / source).read_text())
    for name, target, stack, stores, loads, registers, shared in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for {target} spills"
        assert int(registers) <= 255
        assert int(shared or 0) <= SHARED_LIMIT, f"{name} for {target}"
