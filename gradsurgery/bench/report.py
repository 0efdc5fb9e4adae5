"""What was measured, in words and in tables of Markdown."""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from gradsurgery.bench.cases import GROUPS, OURS
from gradsurgery.bench.record import Entry, Info, Machine, Record, Taken
from gradsurgery.bench.steps import PLAIN

COLUMNS = ("work", "by", "time", "ours is", "error", "memory")
LOST = ("work", "faster", "ours is", "its time", "ours")
SLOWER = "Where gradsurgery is slower than what does the same work"
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
    if value < 1:
        return f"{_short(1 / value, 3)}x slower"
    return f"{_short(value, 2 if value >= 1.095 else 3)}x faster"


def apart(one: Taken, other: Taken) -> bool:
    """Whether the medians differ by more than the calls did."""
    assert one.seconds is not None and other.seconds is not None
    return abs(one.seconds - other.seconds) > (one.spread + other.spread) / 2


def _told(times: float, one: Taken, other: Taken) -> str:
    return ratio(times) + ("" if apart(one, other) else ", within the spread")


def duration(seconds: float) -> str:
    unit, scale = _unit(seconds)
    return f"{_short(seconds / scale, 3)} {unit}"


def _unit(seconds: float) -> tuple[str, float]:
    units = ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)
    return next((unit for unit in units if seconds >= 0.9995 * unit[1]), units[-1])


def _short(value: float, digits: int) -> str:
    """So many digits, more where the number is large: no powers of ten."""
    return f"{value:.{digits}g}" if value < 10**digits - 0.5 else f"{value:.0f}"


def spread(taken: Taken) -> str:
    """A time and its spread, in one unit."""
    if taken.seconds is None:
        return taken.failure
    if taken.rounds < 2:
        return f"{duration(taken.seconds)}, one call"
    unit, scale = _unit(taken.seconds)
    return f"{_short(taken.seconds / scale, 3)} ± {_short(taken.spread / scale, 2)} {unit}"


def size(count: int | None) -> str:
    if count is None:
        return ""
    unit, scale = ("MiB", 2**20) if count >= 2**20 / 10 else ("KiB", 2**10)
    return f"{_short(count / scale, 3)} {unit}"


class Row(NamedTuple):
    """A contender of a piece of work, as cells."""

    work: str
    by: str
    time: str
    against: str
    error: str
    memory: str


def rows(entry: Entry) -> Iterator[Row]:
    for name, taken in entry.extra_info.contenders.items():
        times = None if name == OURS else entry.ratio(name)
        yield Row(
            entry.name if name == OURS else "",
            f"{name} (floor)" if taken.floor else name,
            spread(taken),
            "" if times is None else _told(times, entry.ours, taken),
            "" if taken.error is None else f"{taken.error:.0e}",
            size(taken.memory),
        )


def line(name: str, info: dict[str, Any]) -> str:
    """A case as it is told while others are still to come."""
    entry = Entry(name, name.partition("[")[2].removesuffix("]"), msgspec.convert(info, Info))
    told = [f"{row.by} {row.against or row.time}" for row in rows(entry) if row.by != OURS]
    return f"{entry.name}: {spread(entry.ours)}; {'; '.join(told)}"


def conditions(machine: Machine) -> str:
    others = ", ".join(
        f"{name} {version or 'absent'}" for name, version in machine.packages.items()
    )
    return (
        f"gradsurgery {machine.gradsurgery} on {machine.device}, {machine.kernels}; "
        f"{machine.processor}, {machine.threads} "
        f"{'thread' if machine.threads == 1 else 'threads'}; torch {machine.torch}, "
        f"{others}, Python {machine.python}; memory {machine.memory}. "
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


def sentences(record: Record, old: Record | None = None) -> list[str]:
    """What the numbers say, the worse of it too."""
    found = []
    steps = [(entry.ratio(PLAIN), entry.name) for entry in record.group("steps")]
    if shares := sorted((1 / times, name) for times, name in steps if times):
        (low, easy), (high, hard) = shares[0], shares[-1]
        found.append(
            f"An exact OrthoGrad step takes as long as {low:.2f} plain steps ({easy}) to "
            f"{high:.2f} ({hard})."
        )
    known = list(compared(record))
    clear = [
        times
        for entry, name, times in known
        if apart(entry.ours, entry.extra_info.contenders[name])
    ]
    if known:
        won = sum(times >= 1 for times in clear)
        found.append(
            f"Of {len(known)} comparisons with others that do the same work, gradsurgery is the "
            f"faster one in {won} and the slower one in {len(clear) - won}; in "
            f"{len(known) - len(clear)} the medians differ by less than the calls."
        )
    if old is not None:
        found.append(change(old, record))
    return found


class Lost(NamedTuple):
    """A comparison that is lost."""

    work: str
    faster: str
    times: str
    takes: str
    ours: str


def slower(record: Record) -> list[Lost]:
    """Where something that does the same work takes less time than ours, the worst first."""
    lost = sorted((item for item in compared(record) if item[2] < 1), key=lambda item: item[2])
    return [
        Lost(
            entry.name,
            name,
            _told(times, entry.ours, entry.extra_info.contenders[name]),
            spread(entry.extra_info.contenders[name]),
            spread(entry.ours),
        )
        for entry, name, times in lost
    ]


def missing(record: Record) -> list[str]:
    """What has no numbers, and why."""
    found = [f"{one.name}: {one.reason}" for one in (*record.failed, *record.left_out)]
    found += [
        f"{name} is not installed: pip install {name}"
        for name, version in record.machine_info.packages.items()
        if version is None
    ]
    found += [
        f"{entry.name}, {name}: {taken.failure}"
        for entry in record.benchmarks
        for name, taken in entry.extra_info.contenders.items()
        if taken.failure
    ]
    return found


class Change(NamedTuple):
    """The same work in two runs."""

    work: str
    by: str
    change: str
    then: str
    now: str


def _both(old: Record, new: Record) -> Iterator[tuple[Entry, str, Taken, Taken, float]]:
    """What both runs timed, and how many times faster it is now."""
    before = {entry.name: entry.extra_info.contenders for entry in old.benchmarks}
    for entry in new.benchmarks:
        for name, now in entry.extra_info.contenders.items():
            then = before.get(entry.name, {}).get(name)
            if then is not None and then.seconds and now.seconds:
                yield entry, name, then, now, then.seconds / now.seconds


def changes(old: Record, new: Record) -> list[Change]:
    return [
        Change(entry.name, name, _told(times, then, now), spread(then), spread(now))
        for entry, name, then, now, times in _both(old, new)
    ]


def change(old: Record, new: Record) -> str:
    """What became of ours, beside what became of the others, which is the machine's doing."""
    ours = [found for found in _both(old, new) if found[1] == OURS]
    others = [times for _, name, _, _, times in _both(old, new) if name != OURS]
    if not ours:
        return f"The run of {old.datetime[:10]} has no work in common with this one."
    clear = [times for _, _, then, now, times in ours if apart(then, now)]
    faster = sum(times > 1 for times in clear)
    told = (
        f"Since the run of {old.datetime[:10]} gradsurgery became faster in {faster} and slower in "
        f"{len(clear) - faster} of {len(ours)} pieces of work"
    )
    if not others:
        return f"{told}."
    middle = ratio(statistics.median(others))
    return f"{told}; what it is timed beside became {middle} in the median."


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
    lines = [
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in (header, *cells)
    ]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def markdown(record: Record, old: Record | None) -> str:
    parts = ["# What gradsurgery costs here", conditions(record.machine_info) + ".", NOTE]
    parts += sentences(record, old)
    for group in GROUPS:
        if entries := record.group(group):
            cells = (row for entry in entries for row in rows(entry))
            parts += [f"## {HEADINGS[group]}", ABOUT[group], table(COLUMNS, cells)]
    if lost := slower(record):
        parts += [f"## {SLOWER}", table(LOST, iter(lost))]
    if items := missing(record):
        parts += ["## Without numbers", "\n".join(f"- {item}" for item in items)]
    if old is not None and (rows_of_both := changes(old, record)):
        parts.append(f"## Beside the run of {old.datetime[:10]}")
        if different := unlike(old, record):
            parts.append(f"Not the same conditions: {'; '.join(different)}.")
        parts.append(table(Change._fields, iter(rows_of_both)))
    return "\n\n".join(parts) + "\n"
