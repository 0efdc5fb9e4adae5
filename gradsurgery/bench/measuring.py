"""Seconds and memory of a call on a CPU or a GPU, and what the machine itself can do."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

REPETITIONS = 9  # of what is measured of the machine


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device has done all of it."""
    waited(device)
    start = time.perf_counter()
    call()
    waited(device)
    return time.perf_counter() - start


def waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grows while `call` runs, its result included.

    Of a GPU what torch allocates, of a CPU what the process holds, which only Linux tells.
    """
    if device.type == "cuda":
        waited(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        waited(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _reset()
    result = call()
    peak = _status("VmHWM")
    del result
    return None if before is None or peak is None else max(0, peak - before)


def _reset() -> int | None:
    """Lower the high-water mark of the process to what it holds, which is returned."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what an allocator keeps would be taken unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no Linux, no glibc
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    kibibytes = next(values, None)
    return None if kibibytes is None else kibibytes * 1024


def iqr(values: Sequence[float]) -> float:
    """The range that holds the middle half of the values; 0 of one."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def rates(device: torch.device, count: int = 1 << 26, side: int = 1024) -> dict[str, float]:
    """Bytes a second of a copy and of a read, and float32 operations a second of a product.

    copy_gbps and read_gbps of `count` float32 values, matmul_gflops of two squares of `side`: what
    plain torch reaches, in 1e9.
    """
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device)

    def median(call: Callable[[], object]) -> float:
        call()
        return statistics.median(seconds(call, device) for _ in range(REPETITIONS))

    return {
        "copy_gbps": 2 * source.nbytes / median(lambda: target.copy_(source)) / 1e9,
        "read_gbps": source.nbytes / median(source.sum) / 1e9,
        "matmul_gflops": 2 * side**3 / median(lambda: square @ square) / 1e9,
    }


def memory_kind() -> str:
    """Whether the allocator is told to keep large blocks, or every large result has new pages."""
    return "reused" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "fresh"
