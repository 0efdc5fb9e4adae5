"""A problem small enough for float64 and exact claims."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


@pytest.fixture
def problem():
    """A two-layer network in float64, 12 samples to forget, 24 to retain, 10 held out."""
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()

    def samples(n):
        images = torch.randn(n, 6, dtype=torch.float64)
        return {"image": images, "label": torch.randint(0, 3, (n,))}

    sets = {"forget": samples(12), "retain": samples(24), "validation": samples(10)}
    return SimpleNamespace(model=model, loss=cross_entropy, **sets)


@pytest.fixture(autouse=True)
def threads():
    """One thread: the tensors here are tiny, and waiting for a second costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
