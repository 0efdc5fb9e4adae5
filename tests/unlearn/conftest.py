"""A problem small enough for float64 and exact claims."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.unlearn.broken import make, parsed


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


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A finished run and a killed one, in one folder, with their options beside them."""
    folder = tmp_path_factory.mktemp("kinds")
    make(folder / "finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make(folder / "killed", monkeypatch)
    shutil.copy(folder / "finished/config.yaml", folder / "options.yaml")
    return folder


@pytest.fixture
def copied(kinds, tmp_path):
    """A copy of one of them, by name."""

    def copy(kind):
        shutil.copytree(kinds / kind, tmp_path / "run")
        return tmp_path / "run"

    return copy


@pytest.fixture
def quick(monkeypatch):
    """The command line of resumes read as `command` writes it, without a parser of all options."""
    monkeypatch.setattr("gradsurgery.unlearn.command.parse", parsed)
