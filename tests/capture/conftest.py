"""What every test of capture shares."""

import gc

import pytest
import torch

from gradsurgery.capture import hooked
from gradsurgery.capture.hooks import others


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Of tensors this small; `threads` puts the number back. tests/ops is about several."""
    torch.set_num_threads(1)


@pytest.fixture
def alone(monkeypatch):
    """As in a process where nobody else has hooks: those that other tests left are not found."""
    gc.collect()
    found, theirs = hooked._found, [each for part in hooked._found() for each in part]
    known = set(map(id, theirs))

    def of_this_test():
        return tuple([each for each in part if id(each) not in known] for part in found())

    monkeypatch.setattr(hooked, "_found", of_this_test)
    monkeypatch.setattr(hooked, "live_hooks", hooked.LiveHooks(others))
