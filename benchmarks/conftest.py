"""One fixture, `compare`: a call beside its named rivals, timed in turns."""

import ctypes
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("GRADSURGERY_BENCH_THREADS", "2"))


def pytest_benchmark_update_machine_info(config, machine_info):
    from gradsurgery import _C

    torch.set_num_threads(THREADS)
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)
    copies = [_seconds(lambda: target.copy_(source)) for _ in range(9)]
    reads = [_seconds(source.sum) for _ in range(9)]
    machine_info.update(
        torch=torch.__version__,
        threads=THREADS,
        isa=_C.isa(),
        compiler=_C.compiler,
        copy_gbps=2 * 4 * source.numel() / statistics.median(copies) / 1e9,
        read_gbps=4 * source.numel() / statistics.median(reads) / 1e9,
        memory="reused" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "fresh",
    )


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _extra_memory(call):
    """Bytes by which the process grows while `call` runs, its result included; Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what an allocator keeps would be taken unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)


@pytest.fixture
def compare(benchmark):
    """Times `ours` against rivals, each once a round, and keeps what the report prints.

    compare(ours, rivals, nbytes=..., error=..., result_bytes=..., target={"rival": ratio})

    nbytes: the least that must move through memory, for GB/s. error: relative, against float64.
    result_bytes: of what the call returns, which its extra memory is compared with. target: how
    many times faster than a rival at least; below 1 it bounds how much slower. memory_target: our
    extra memory, the result included, as a multiple of a rival's at most.
    """

    def run(
        ours,
        rivals,
        *,
        nbytes,
        error,
        result_bytes=None,
        target=None,
        memory_target=None,
        rounds=15,
    ):
        torch.set_num_threads(THREADS)
        seconds = {name: [] for name in rivals}

        def setup():
            for name, rival in rivals.items():
                seconds[name].append(_seconds(rival))

        setup()
        seconds = {name: [] for name in rivals}
        _extra_memory(ours)  # what is made once, such as an optimizer's state, is no one's extra
        memory = _extra_memory(ours)
        theirs = {name: _extra_memory(rivals[name]) for name in memory_target or {}}
        benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=1)
        mine = benchmark.stats.stats.median
        benchmark.extra_info.update(
            rivals={
                name: {
                    "median": statistics.median(s),
                    "iqr": _iqr(s),
                    "ratio": statistics.median(s) / mine,
                }
                for name, s in seconds.items()
            },
            target=target or {},
            memory_target=memory_target or {},
            memory_ratio={name: memory / other for name, other in theirs.items() if other},
            gbps=nbytes / mine / 1e9,
            error=error,
            extra_memory=None if memory is None or result_bytes is None else memory - result_bytes,
        )

    return run


def _iqr(values):
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
