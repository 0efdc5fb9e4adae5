"""What is measured of single cases, and what becomes of those that fail."""

import time

import pytest
import torch

from gradsurgery.bench import measuring, report
from gradsurgery.bench.cases import OURS, Case, Contender, Work
from gradsurgery.bench.plugin import Plugin, run
from gradsurgery.bench.record import Taken, read
from gradsurgery.bench.report import changes, missing, sentences, slower
from gradsurgery.errors import InputError

CPU = torch.device("cpu")
MACHINE = {
    **dict.fromkeys(("device", "processor", "gradsurgery", "python", "torch", "kernels"), "?"),
    **{"memory": "fresh", "size": "tiny", "packages": {"torchjd": "1"}, "threads": 1},
    **dict.fromkeys(("copy_gbps", "read_gbps", "matmul_gflops"), 1.0),
}


class Quiet:
    """A progress that keeps its lines."""

    def __init__(self):
        self.told = []

    def say(self, text):
        self.told.append(text)

    def stage(self, label, total, done):
        return self

    def __enter__(self):
        return self.told.append

    def __exit__(self, *_):
        pass


def sleeps(milliseconds, error=0.0):
    return Contender(lambda: time.sleep(milliseconds / 1e3), lambda: error)


def raises(error):
    def call():
        raise error

    return Contender(call)


def case(name="work", **contenders):
    work = Work({OURS: sleeps(2), **contenders}, 1, 1)
    return Case("operators", name, lambda device: work, 1)


def there(value):
    assert value is not None
    return value


def measured(tmp_path, *cases, seconds=60.0):  # that no busy machine runs out of
    plugin = Plugin(list(cases), CPU, seconds, 20, MACHINE, Quiet())
    run(plugin, tmp_path / "bench.json")
    return read(tmp_path / "bench.json", "test"), plugin.progress.told


def test_times_are_those_of_the_calls(tmp_path):
    record, told = measured(tmp_path, case(slow=sleeps(20), fast=sleeps(0.2)))
    (entry,) = record.benchmarks
    assert 2e-3 < there(entry.ours.seconds) < 0.5
    assert there(entry.ratio("slow")) > 1 > there(entry.ratio("fast"))
    assert entry.ours.rounds == entry.extra_info.contenders["slow"].rounds >= 3
    ((work, faster, *_),) = slower(record)
    assert (work, faster) == ("work", "fast")
    assert told[0].startswith("work: ") and "fast" in told[0] and told[1] == 1


def test_what_a_rival_cannot_do_is_told_and_the_rest_measured(tmp_path):
    record, _ = measured(
        tmp_path,
        case(full=raises(torch.OutOfMemoryError("CUDA")), broken=raises(ValueError("no\nreason"))),
    )
    (entry,) = record.benchmarks
    assert entry.ours.seconds
    assert missing(record) == ["work, full: out of memory", "work, broken: ValueError: no"]
    assert not slower(record)


def test_work_of_ours_that_fails_is_told(tmp_path):
    broken = Case(
        "rules", "broken", lambda device: Work({OURS: raises(ValueError("why"))}, 1, 1), 1
    )
    record, told = measured(tmp_path, broken, case())
    assert [entry.name for entry in record.benchmarks] == ["work"]
    ((name, reason),) = [(one.name, one.reason) for one in record.failed]
    assert name == "broken" and "ValueError: why" in reason
    assert told[0].startswith("failed: broken: ")


def test_what_no_time_is_left_for_is_told(tmp_path):
    record, _ = measured(tmp_path, case("one"), case("two"), seconds=0.01)
    assert [entry.name for entry in record.benchmarks] == ["one"]
    assert missing(record) == ["two: no time was left"]


def test_a_rival_that_takes_long_is_called_once_more(tmp_path):
    record, _ = measured(tmp_path, case(slow=sleeps(300)), seconds=0.6)
    slow = record.benchmarks[0].extra_info.contenders["slow"]
    assert slow.rounds == 1 and 0.3 < there(slow.seconds) < 3


def test_nothing_measured_is_an_error(tmp_path):
    broken = Case(
        "rules", "broken", lambda device: Work({OURS: raises(ValueError("why"))}, 1, 1), 1
    )
    with pytest.raises(InputError, match=r"nothing was measured: broken: .*why"):
        measured(tmp_path, broken)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_goes_through(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, case(stopped=raises(KeyboardInterrupt())))


def test_noise_is_no_difference(tmp_path):
    """Medians nearer than the calls were to each other."""
    record, _ = measured(tmp_path, case(other=sleeps(2)))
    entry = record.benchmarks[0]
    entry.ours.seconds, entry.ours.spread = 1.0, 0.5
    entry.extra_info.contenders["other"].seconds = 0.9
    assert "in 1 the medians differ by less" in sentences(record)[0]
    assert slower(record)[0].times == "1.11x slower, within the spread"
    old, _ = measured(tmp_path, case(other=sleeps(2)))
    old.benchmarks[0].ours.seconds = 1.2
    old.benchmarks[0].ours.spread = 0.0
    assert changes(old, record)[0].change == "1.2x faster, within the spread"
    entry.ours.spread = 0.1
    assert changes(old, record)[0].change == "1.2x faster"


@pytest.mark.parametrize(
    ("seconds", "spread", "told"),
    [
        (0.0123456, 0.00211, "12.3 ± 2.1 ms"),
        (246e-6, 99.7e-6, "246 ± 100 µs"),
        (0.9996, 1630e-3, "1 ± 1.6 s"),
        (1630.4, 12.0, "1630 ± 12 s"),
    ],
)
def test_times_are_told_in_one_unit_and_without_powers_of_ten(seconds, spread, told):
    assert report.spread(Taken(seconds=seconds, spread=spread, rounds=3)) == told


@pytest.mark.skipif(measuring.extra_memory(int, CPU) is None, reason="Linux tells")
def test_memory_is_what_a_call_needs():
    needed = there(measuring.extra_memory(lambda: torch.ones(1 << 24), CPU))
    assert 0.9 * 2**26 < needed < 1.3 * 2**26
    assert there(measuring.extra_memory(lambda: None, CPU)) < 2**22
