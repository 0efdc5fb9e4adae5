"""One fixture, `compare`: a call beside its named rivals, timed in turns."""

import os
import statistics

import pytest
import torch

from gradsurgery.bench.measuring import extra_memory, iqr, memory_kind, rates, seconds

THREADS = int(os.environ.get("GRADSURGERY_BENCH_THREADS", "2"))
CPU = torch.device("cpu")


def pytest_benchmark_update_machine_info(config, machine_info):
    from gradsurgery import _C

    torch.set_num_threads(THREADS)
    machine_info.update(
        torch=torch.__version__,
        threads=THREADS,
        isa=_C.isa(),
        compiler=_C.compiler,
        memory=memory_kind(),
        **rates(CPU),
    )


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
        taken = {name: [] for name in rivals}

        def setup():
            for name, rival in rivals.items():
                taken[name].append(seconds(rival, CPU))

        setup()
        taken = {name: [] for name in rivals}
        extra_memory(ours, CPU)  # what is made once, as an optimizer's state, is no one's extra
        memory = extra_memory(ours, CPU)
        theirs = {name: extra_memory(rivals[name], CPU) for name in memory_target or {}}
        benchmark.pedantic(ours, setup=setup, rounds=rounds, warmup_rounds=1)
        mine = benchmark.stats.stats.median
        benchmark.extra_info.update(
            rivals={
                name: {
                    "median": statistics.median(s),
                    "iqr": iqr(s),
                    "ratio": statistics.median(s) / mine,
                }
                for name, s in taken.items()
            },
            target=target or {},
            memory_target=memory_target or {},
            memory_ratio={name: memory / other for name, other in theirs.items() if other},
            gbps=nbytes / mine / 1e9,
            error=error,
            extra_memory=None if memory is None or result_bytes is None else memory - result_bytes,
        )

    return run
