"""What a piece of work costs: seconds, and the peak of its memory beyond where it started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gradsurgery.errors import InputError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
# the kernel counts resident pages in batches, so two readings of one state differ a little
SLACK = 4 * 2**20  # bytes


@dataclass
class Cost:
    """Filled in when the block ends, also by an exception."""

    seconds: float = 0.0
    memory: int | None = None
    """Bytes of the peak beyond the start, at least 0; None where they cannot be known."""


@dataclass(eq=False)
class _Running:
    device: torch.device
    start: int | None  # bytes; None: the peak cannot be known
    peak: int


_running: list[_Running] = []


@contextmanager
def measured(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """Measure the seconds and the memory of a block: `with measured() as cost: ...`.

    Memory on CUDA is what torch's allocator has handed out on that device (its peak statistics are
    reset). On the CPU it is resident memory of the whole process, as Linux keeps its high-water
    mark, in steps of some pages: memory that was freed before and is used again costs nothing,
    while what other threads do and what libraries load on first use count too. Elsewhere, or where
    the mark cannot be reset, it is None.

    Blocks may lie inside one another: a reset for an inner one costs the outer ones nothing. They
    are not for several threads at once.

    Args:
        device: where the work is done; it is waited for before either reading of the clock.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device must be one that is here, got {device} without CUDA")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    cost = Cost()
    _wait(where)
    _keep_peaks(where)
    start = _restart(where)
    running = _Running(where, start, start or 0)
    _running.append(running)
    begin = time.perf_counter()
    try:
        yield cost
    finally:
        try:
            _wait(where)
            cost.seconds = time.perf_counter() - begin
            _keep_peaks(where)
            if running.start is not None:
                cost.memory = running.peak - running.start
        finally:
            _running.remove(running)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # and make it ready, so that it has statistics to reset
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def _keep_peaks(device: torch.device) -> None:
    """Note the peak so far in every measurement on `device` that runs."""
    concerned = [running for running in _running if running.device == device]
    peak = _peak(device) if concerned else None
    for running in concerned:
        if peak is None:
            running.start = None
        else:
            running.peak = max(running.peak, peak)


def _restart(device: torch.device) -> int | None:
    """Forget the peak so far; the bytes in use, None where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        CLEAR.write_text("5")  # 5: the high-water mark alone
    except OSError:
        return None
    mark, resident = _status("VmHWM"), _status("VmRSS")
    if mark is None or resident is None or mark - resident > SLACK:
        return None  # the mark stayed where it was
    return mark


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else None


def _status(key: str) -> int | None:
    """Bytes of a line of /proc/self/status, None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024  # kB
    return None
