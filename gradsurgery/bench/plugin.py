"""pytest-benchmark, told what to measure and for how long; it writes the JSON.

Contenders are timed in turns, one call of each a round, so that what slows the machine slows all of
them. The time that is left is shared out among the cases that are left.
"""

import contextlib
import gc
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gradsurgery import __version__
from gradsurgery.bench import measuring, suite
from gradsurgery.bench.cases import OURS, Case, Contender
from gradsurgery.bench.report import line
from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.progress import Progress

# at least; a contender that they would cost more than its part of a case's time is called once
ROUNDS = 3


class Left(NamedTuple):
    """A case without numbers."""

    name: str
    reason: str


@dataclass
class Plugin:
    """Cases for the suite, a fixture that measures one, and what becomes of them."""

    cases: list[Case]
    device: torch.device
    seconds: float
    rounds: int
    """Of a case at most."""
    machine: dict[str, Any]
    progress: Progress
    left: list[Left] = field(default_factory=list)
    failed: list[Left] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.step: Callable[[int], None] = lambda done: None
        self.done = 0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", self.cases, ids=[case.name for case in self.cases])

    @pytest.fixture
    def measure(self, benchmark: BenchmarkFixture) -> Callable[[Case], None]:
        return partial(self._measure, benchmark)

    def _measure(self, benchmark: BenchmarkFixture, case: Case) -> None:
        start, place = time.perf_counter(), self.cases.index(case)
        left = self.seconds - (start - self.start)
        if left <= 0 and place:  # the first one is measured, however little there is
            self.left.append(Left(case.name, "no time was left"))
            pytest.skip("no time was left")
        share = max(left, 0) * case.weight / sum(other.weight for other in self.cases[place:])
        self._run(benchmark, case, start + share, share)
        self.progress.say(line(benchmark.name, benchmark.extra_info))

    def _run(self, benchmark: BenchmarkFixture, case: Case, end: float, share: float) -> None:
        gc.collect()  # of the case before, models that point to themselves
        work = case.make(self.device)
        tried = {name: _try(one, self.device) for name, one in work.contenders.items()}
        if failure := tried[OURS].get("failure"):
            raise RuntimeError(failure)
        part = share / len(work.contenders)
        again = [
            name
            for name, first in tried.items()
            if name != OURS and ROUNDS * first.get("seconds", share) < part
        ]
        taken: dict[str, list[float]] = {}

        def others() -> None:
            for name in again:
                seconds = measuring.seconds(work.contenders[name].call, self.device)
                taken.setdefault(name, []).append(seconds)

        def ours() -> None:
            work.contenders[OURS].call()
            measuring.waited(self.device)

        # errors make hooks of an optimizer, and a step after that looks for them in all objects
        ours()
        a_round = sum(tried[name]["seconds"] for name in (OURS, *again))
        if time.perf_counter() + (ROUNDS + 1) * a_round < end:  # one that is not counted
            begun = time.perf_counter()
            others()
            ours()
            a_round = time.perf_counter() - begun
            taken.clear()
        fits = int((end - time.perf_counter()) / a_round)
        rounds = min(max(fits, ROUNDS), self.rounds)
        benchmark.pedantic(ours, setup=others, rounds=rounds)
        assert benchmark.stats is not None
        stats = benchmark.stats.stats
        tried[OURS] |= {"seconds": stats.median, "spread": stats.iqr, "rounds": rounds}
        for name, values in taken.items():
            middle, spread = statistics.median(values), measuring.iqr(values)
            tried[name] |= {"seconds": middle, "spread": spread, "rounds": len(values)}
        benchmark.extra_info.update(
            group=case.group,
            kind=case.kind,
            along=case.along,
            bytes=work.bytes,
            operations=work.operations,
            contenders=tried,
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            name = report.nodeid.partition("[")[2].removesuffix("]")
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed.append(Left(name, crash.message if crash else str(report.longrepr)))
            self.progress.say(f"failed: {name}: {self.failed[-1].reason}")
        if report.when == "teardown":
            self.done += 1
            self.step(self.done)

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        return self.machine

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_commit_info(self) -> dict[str, Any]:
        # of the package: pytest-benchmark would tell of the folder that the command is started in
        return {"version": __version__}

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["seconds"] = time.perf_counter() - self.start
        output_json["left_out"] = [one._asdict() for one in self.left]
        output_json["failed"] = [one._asdict() for one in self.failed]


def _try(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Error and memory, and seconds of a call after one that made what is made once."""
    floor = {"floor": contender.floor}
    try:
        error = None
        with contextlib.suppress(torch.OutOfMemoryError):  # float64 may need more than the call
            error = contender.error() if contender.error else None
        if error is None:
            contender.call()
        start = time.perf_counter()
        memory = measuring.extra_memory(contender.call, device)
        taken = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return floor | {"failure": "out of memory"}
    except Exception as failure:  # what a rival cannot do is told, and the rest measured
        reason = next(iter(str(failure).splitlines()), "")
        return floor | {"failure": f"{type(failure).__name__}: {reason}"}
    return floor | {"error": error, "memory": memory, "seconds": taken, "rounds": 1}


def run(plugin: Plugin, out: Path) -> None:
    """Measure all cases and write pytest-benchmark's JSON to `out`.

    pytest reads no settings, plugins or conftest.py files of the folder it is started in.

    Raises:
        KeyboardInterrupt: as it came.
        InputError: nothing could be measured.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        found = Path(scratch) / "bench.json"
        arguments = [
            suite.__file__,
            *("-c", os.devnull, "--rootdir", scratch, "--noconftest", "-s"),
            *("-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:warnings"),
            *("-p", "pytest_benchmark.plugin"),
            *("-o", "python_functions=bench", "--benchmark-disable-gc", "--benchmark-quiet"),
            *(f"--benchmark-json={found}", f"--benchmark-storage=file://{scratch}"),
        ]
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        patch.delenv("PYTEST_PLUGINS", raising=False)
        # inside of one of several processes of pytest, pytest-benchmark would time nothing
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        warnings.simplefilter("ignore")  # of those that are timed
        with plugin.progress.stage("measuring", len(plugin.cases), 0) as plugin.step:
            code = pytest.main(arguments, plugins=[plugin])
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if not found.is_file() or not found.stat().st_size:
            reasons = [f"{one.name}: {one.reason}" for one in (*plugin.failed, *plugin.left)]
            why = "; ".join(reasons) or f"pytest ended with {code!r}"
            raise InputError(f"nothing was measured: {why}")
        shutil.copyfile(found, out)
