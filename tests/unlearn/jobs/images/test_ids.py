"""--ids: samples by number or path, each once, or one line."""

import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images.arrays import Images
from gradsurgery.unlearn.jobs.images.data import numbers

NAMES = ("cats/a.png", "cats/b c.png", "dogs/1", "dogs/#2.png", "dogs/\udcff.png")


def made(names=NAMES):
    labels = torch.tensor([0, 0, 1, 1, 1])
    return Images(torch.zeros(5, 1, 2, 2), labels, ("cats", "dogs"), names, {}, "few")


def write(folder, content):
    path = folder / "ids.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("3\n0\n", [3, 0]),
        ("3", [3]),
        ("\ufeff# to be forgotten\r\n\r\n  04 \r\n", [4]),
        ("cats/b c.png\n2\n./cats/a.png", [1, 2, 0]),
        ("dogs/#2.png\n\t\ndogs/1\n", [3, 2]),
        (b"dogs/\xff.png", [4]),
    ],
)
def test_lines_are_numbers_or_paths(tmp_path, content, expected):
    found = numbers(write(tmp_path, content), made())
    assert found.tolist() == expected and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0\ncats/z.png",
            r"line 2: no sample is cats/z.png: numbers .* 0 to 4, paths are as cats/a",
        ),
        ("0\n\n# few\n5", "line 4: no sample is 5: numbers go from 0 to 4"),
        ("-1", "line 1: no sample is -1"),
        ("1.0", "line 1: no sample is 1.0"),
        ("9" * 6000, "line 1: no sample is 99"),
        ("\u0663", "line 1: no sample is \u0663"),
        ("0 1", "line 1: no sample is 0 1"),
        ("a\x1b[31m", r"line 1: no sample is a\\x1b\[31m"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<i8'}", "line 1: no sample is "),
        ("2\n0\n00\n", "line 3: 00 is there already, in line 2"),
        ("dogs/1\n0\n2", "line 3: 2 is there already, in line 1"),
        ("", "names no sample"),
        ("# none\n\n", "names no sample"),
        ("0\n1\n2\n3\n4", "names all 5 samples, which leaves none to retain"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        numbers(path, made())
    assert str(caught.value).startswith(f"--ids: {path}") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_paths_need_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"no sample is cats/a.png: numbers go from 0 to 4$"):
        numbers(write(tmp_path, "cats/a.png"), made(None))


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^--ids: cannot read \S+none: No such file"):
        numbers(tmp_path / "none", made())
    with pytest.raises(InputError, match=r"^--ids: cannot read .*: it is a directory"):
        numbers(tmp_path, made())
