"""What was measured, in words and in tables of Markdown."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from gradsurgery.bench.cases import GROUPS, OURS
from gradsurgery.bench.record import Entry, Info, Machine, Record, Taken
from gradsurgery.bench.steps import PLAIN

COLUMNS = ("work", "by", "time", "ours is", "error", "memory")
HEADINGS = {
    "steps": "Whole steps",
    "operators": "Operators on rows that exist",
    "rules": "Rules on a Gramian",
    "scaling": "Steps as one number grows",
}
ABOUT = {
    "steps": "An OrthoGrad step: the samples to forget make one row, as many to retain a row each. "
    "The plain step trains on the mean of all and does no surgery, so it is a floor.",
    "operators": "Float32 rows of random numbers. Reads of the rows are a floor.",
    "rules": "Weights from a Gramian in float64. Errors are distances from the same rule in plain "
    "PyTorch; TorchJD's PCGrad draws another order, and has none.",
    "scaling": "The step above on a transformer of two layers.",
}
NOTE = (
    "Times are medians ± the range of the middle half, of calls taken in turns. Errors are "
    "relative, against float64. Memory is what a call needs beside what was there, its result "
    "included."
)


def ratio(value: float) -> str:
    """How many times faster we are than a rival, or how many times slower."""
    return f"{value:.2g}x faster" if value >= 1 else f"{1 / value:.3g}x slower"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def spread(taken: Taken) -> str:
    """A time and its spread, in one unit."""
    if taken.seconds is None:
        return taken.failure
    if taken.rounds < 2:
        return f"{duration(taken.seconds)}, one call"
    number, unit = duration(taken.seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]
    return f"{number} ± {taken.spread / scale:.2g} {unit}"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.3g} KiB"


class Row(NamedTuple):
    """A contender of a piece of work, as cells."""

    work: str
    by: str
    time: str
    against: str
    error: str
    memory: str
    slower: bool


def rows(entry: Entry) -> Iterator[Row]:
    for name, taken in entry.extra_info.contenders.items():
        times = None if name == OURS else entry.ratio(name)
        yield Row(
            entry.name if name == OURS else "",
            f"{name} (floor)" if taken.floor else name,
            spread(taken),
            "" if times is None else ratio(times),
            "" if taken.error is None else f"{taken.error:.0e}",
            size(taken.memory),
            slower=times is not None and times < 1 and not taken.floor,
        )


def line(name: str, info: dict[str, Any]) -> str:
    """A case as it is told while others are still to come."""
    entry = Entry(name, name.partition("[")[2].removesuffix("]"), msgspec.convert(info, Info))
    told = [f"{row.by} {row.against or row.time}" for row in rows(entry) if row.by != OURS]
    return f"{entry.name}: {spread(entry.ours)}; {'; '.join(told)}"


def conditions(machine: Machine) -> str:
    return (
        f"gradsurgery {machine.gradsurgery} on {machine.device}, {machine.kernels}; "
        f"{machine.processor}, {machine.threads} "
        f"{'thread' if machine.threads == 1 else 'threads'}; torch {machine.torch}, "
        f"TorchJD {machine.torchjd or 'absent'}, Python {machine.python}; memory {machine.memory}. "
        f"The device reads {machine.read_gbps:.0f} GB/s, copies {machine.copy_gbps:.0f} GB/s and "
        f"multiplies at {machine.matmul_gflops:.0f} GFLOP/s in float32"
    )


def compared(record: Record) -> Iterator[tuple[Entry, str, float]]:
    """Each other contender that does the same work, and its seconds in units of ours."""
    for entry in record.benchmarks:
        for name, taken in entry.extra_info.contenders.items():
            times = entry.ratio(name)
            if name != OURS and not taken.floor and times is not None:
                yield entry, name, times


def sentences(record: Record) -> list[str]:
    """What the numbers say, the worse of it too."""
    found = []
    steps = [(entry.ratio(PLAIN), entry.name) for entry in record.group("steps")]
    if shares := sorted((1 / times, name) for times, name in steps if times):
        (low, easy), (high, hard) = shares[0], shares[-1]
        found.append(
            f"An exact OrthoGrad step takes as long as {low:.2f} plain steps ({easy}) to "
            f"{high:.2f} ({hard})."
        )
    ratios = [times for _, _, times in compared(record)]
    lost = sum(times < 1 for times in ratios)
    if ratios:
        where = f"it is slower in {lost}, listed below" if lost else "it is slower in none"
        found.append(
            f"Of {len(ratios)} comparisons with others that do the same work, gradsurgery is the "
            f"faster one in {len(ratios) - lost}; {where}."
        )
    return found


def slower(record: Record) -> list[str]:
    """Where something that does the same work takes less time than ours."""
    return [
        f"{entry.name}: {name} takes {spread(entry.extra_info.contenders[name])}, ours "
        f"{spread(entry.ours)} ({ratio(times)})"
        for entry, name, times in compared(record)
        if times < 1
    ]


def missing(record: Record) -> list[str]:
    """What has no numbers, and why."""
    found = [f"{one.name}: {one.reason}" for one in (*record.failed, *record.left_out)]
    if record.machine_info.torchjd is None:
        found.append("TorchJD is not installed: pip install torchjd")
    found += [
        f"{entry.name}, {name}: {taken.failure}"
        for entry in record.benchmarks
        for name, taken in entry.extra_info.contenders.items()
        if taken.failure
    ]
    return found


class Change(NamedTuple):
    work: str
    by: str
    then: str
    now: str
    change: str


def changes(old: Record, new: Record) -> list[Change]:
    """Of what both have, times then and now; within both spreads they are told as the same."""
    before = {entry.name: entry.extra_info.contenders for entry in old.benchmarks}
    found = []
    for entry in new.benchmarks:
        for name, now in entry.extra_info.contenders.items():
            then = before.get(entry.name, {}).get(name)
            if then is None or then.seconds is None or now.seconds is None:
                continue
            apart = abs(then.seconds - now.seconds) > then.spread + now.spread
            times = then.seconds / now.seconds
            told = f"{times:.2f}x faster" if times >= 1 else f"{1 / times:.2f}x slower"
            change = told if apart else "within the spread"
            found.append(Change(entry.name, name, spread(then), spread(now), change))
    return found


def unlike(old: Record, new: Record) -> list[str]:
    """Conditions that the two runs do not share."""
    now = new.machine_info.conditions()
    return [
        f"{name}: then {value}, now {now[name]}"
        for name, value in old.machine_info.conditions().items()
        if value != now[name]
    ]


def table(header: tuple[str, ...], cells: Iterator[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def markdown(record: Record, old: Record | None) -> str:
    parts = ["# What gradsurgery costs here", conditions(record.machine_info) + ".", NOTE]
    parts += sentences(record)
    for group in GROUPS:
        if entries := record.group(group):
            cells = (row[:6] for entry in entries for row in rows(entry))
            parts += [f"## {HEADINGS[group]}", ABOUT[group], table(COLUMNS, cells)]
    for heading, items in (
        ("Where ours is slower", slower(record) or ["nowhere"]),
        ("Without numbers", missing(record)),
    ):
        if items:
            parts += [f"## {heading}", "\n".join(f"- {item}" for item in items)]
    if old is not None:
        parts += [f"## Beside the run of {old.datetime[:10]}"]
        if different := unlike(old, record):
            parts.append(f"Not the same conditions: {'; '.join(different)}.")
        parts.append(table(Change._fields, iter(changes(old, record))))
    return "\n\n".join(parts) + "\n"
