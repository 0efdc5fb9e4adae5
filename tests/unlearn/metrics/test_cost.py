"""Seconds and peak memory: what is counted, and that an unknown number stays unknown."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.metrics import cost
from gradsurgery.unlearn.metrics.cost import measured

MB = 2**20
SIZE = 64 * MB


def touch(device, size=SIZE):
    if torch.device(device).type != "cpu":
        torch.ones(size // 8, dtype=torch.float64, device=device)
        return
    # pages of its own, given back when it is closed: the C library would use again what other tests
    # of this process have freed, which costs nothing
    with mmap.mmap(-1, size) as pages:
        torch.frombuffer(pages, dtype=torch.float64).fill_(1)


needs_mark = pytest.mark.skipif(
    not os.access(cost.CLEAR, os.W_OK), reason="the high-water mark of memory cannot be reset here"
)


def test_seconds_are_those_of_the_block():
    with measured() as found:
        time.sleep(0.05)
    assert 0.05 <= found.seconds < 5


@needs_mark
def test_memory_is_the_peak_beyond_the_start(device):
    touch(device, 4 * SIZE)  # a peak before the block is none of its business
    kept = torch.ones(SIZE // 8, dtype=torch.float64, device=device)
    with measured(device) as found:
        touch(device)
        touch(device)  # after the first is freed: the peak is one of them
    assert found.memory == pytest.approx(SIZE, abs=8 * MB)
    assert kept.numel()


@needs_mark
def test_nothing_done_costs_next_to_nothing(device):
    touch(device)
    with measured(device) as found:
        pass
    assert found.memory == pytest.approx(0, abs=8 * MB)


@needs_mark
def test_an_inner_measurement_takes_nothing_from_an_outer_one(device):
    with measured(device) as outer:
        touch(device, 2 * SIZE)
        with measured(device) as inner:
            touch(device)
        with measured(device) as idle:
            pass
    assert outer.memory == pytest.approx(2 * SIZE, abs=8 * MB)
    assert inner.memory == pytest.approx(SIZE, abs=8 * MB)
    assert idle.memory == pytest.approx(0, abs=8 * MB)


@needs_mark
def test_an_outer_measurement_sees_what_an_inner_one_sees(device):
    with measured(device) as outer, measured(device):
        touch(device)
    assert outer.memory == pytest.approx(SIZE, abs=8 * MB)


def test_a_block_that_fails_is_measured():
    with pytest.raises(RuntimeError, match="stop"), measured() as found:
        raise RuntimeError("stop")
    assert found.seconds > 0
    assert not cost._running


def test_memory_that_cannot_be_known_is_none(monkeypatch):
    monkeypatch.setattr(cost, "CLEAR", Path("/nowhere/clear_refs"))
    with measured() as found:
        touch("cpu", MB)
    assert found.memory is None
    assert found.seconds > 0


def status(tmp_path, text):
    path = tmp_path / "status"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "Name:\tx\n",  # no marks at all
        "VmHWM:\t  90000 kB\nVmRSS:\t  10000 kB\n",  # the mark did not come down
    ],
)
def test_a_mark_that_cannot_be_believed_is_none(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CLEAR", tmp_path / "clear_refs")
    monkeypatch.setattr(cost, "STATUS", status(tmp_path, text))
    with measured() as found:
        pass
    assert found.memory is None


def test_a_mark_lost_on_the_way_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CLEAR", tmp_path / "clear_refs")
    path = status(tmp_path, "VmHWM:\t  10000 kB\nVmRSS:\t  10000 kB\n")
    monkeypatch.setattr(cost, "STATUS", path)
    with measured() as found:
        path.unlink()
    assert found.memory is None


def test_units_and_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CLEAR", tmp_path / "clear_refs")
    path = status(tmp_path, "VmHWM:\t  10000 kB\nVmRSS:\t  10000 kB\n")
    monkeypatch.setattr(cost, "STATUS", path)
    with measured() as found:
        status(tmp_path, "VmHWM:\t  10007 kB\nVmRSS:\t  9000 kB\n")
    assert found.memory == 7 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_is_named():
    with pytest.raises(InputError, match="device must be one that is here, got cuda without CUDA"):
        measured("cuda").__enter__()
