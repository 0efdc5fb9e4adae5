"""bench.json, as pytest-benchmark writes it, with what `plugin` adds."""

from pathlib import Path

import msgspec

from gradsurgery.bench.cases import OURS
from gradsurgery.errors import InputError
from gradsurgery.text import show


class Taken(msgspec.Struct):
    """What a contender took, or why there are no numbers."""

    seconds: float | None = None
    """Median of the calls."""
    spread: float = 0.0
    """The range that holds the middle half of them, in seconds."""
    rounds: int = 0
    error: float | None = None
    """Relative, against float64."""
    memory: int | None = None
    """Bytes beside what was held before the call."""
    floor: bool = False
    """It does less than the work asks."""
    failure: str = ""


class Info(msgspec.Struct):
    group: str
    kind: str
    along: dict[str, int]
    bytes: int
    operations: int
    contenders: dict[str, Taken]


class Entry(msgspec.Struct):
    fullname: str
    param: str | None
    extra_info: Info

    @property
    def name(self) -> str:
        return self.param or self.fullname

    @property
    def ours(self) -> Taken:
        return self.extra_info.contenders[OURS]

    def ratio(self, name: str) -> float | None:
        """A contender's seconds in units of ours."""
        theirs, ours = self.extra_info.contenders[name].seconds, self.ours.seconds
        return theirs / ours if theirs and ours else None


class Machine(msgspec.Struct):
    device: str
    processor: str
    gradsurgery: str
    python: str
    torch: str
    packages: dict[str, str | None]
    """Versions of others' libraries; none: not installed."""
    threads: int
    kernels: str
    memory: str
    copy_gbps: float
    read_gbps: float
    matmul_gflops: float
    size: str

    def conditions(self) -> dict[str, str]:
        """What two runs must share for their times to be comparable."""
        return {
            name: str(getattr(self, name))
            for name in ("device", "processor", "threads", "torch", "kernels", "memory")
        }


class Left(msgspec.Struct):
    name: str
    reason: str


class Record(msgspec.Struct):
    machine_info: Machine
    datetime: str
    benchmarks: list[Entry]
    seconds: float
    left_out: list[Left]
    failed: list[Left]

    def group(self, name: str) -> list[Entry]:
        return [entry for entry in self.benchmarks if entry.extra_info.group == name]


def read(path: Path, option: str) -> Record:
    """A finished run's bench.json.

    Raises:
        InputError: it cannot be read or is something else; the message begins with `option`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{option}: cannot read {show(path)}: {reason}") from None
    try:
        record = msgspec.json.decode(data, type=Record)
    except msgspec.DecodeError as error:  # JSON's and the types'
        raise InputError(
            f"{option}: {show(path)} is no bench.json of gradsurgery bench: {error}"
        ) from None
    if any(OURS not in entry.extra_info.contenders for entry in record.benchmarks):
        raise InputError(f"{option}: {show(path)} is no bench.json of gradsurgery bench: no {OURS}")
    return record
