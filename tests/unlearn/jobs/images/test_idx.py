"""--data of IDX files, MNIST's format: to known pixels, or one line."""

import gzip
import struct

import numpy as np
import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images import arrays
from gradsurgery.unlearn.jobs.images.data import load

TRAIN = np.arange(24, dtype=np.uint8).reshape(4, 2, 3) * 10
TEST = 255 - TRAIN[:2]


def idx(values, kind=8):
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, kind, values.ndim]) + shape + values.tobytes()


def put(path, values):
    data = values if isinstance(values, bytes) else idx(np.asarray(values, np.uint8))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def mnist(folder, images="{}-images-idx3-ubyte", labels="{}-labels-idx1-ubyte", test="t10k"):
    for part, values, known in (("train", TRAIN, [7, 3, 3, 9]), (test, TEST, [3, 9])):
        put(folder / images.format(part), values)
        put(folder / labels.format(part), known)
    return folder


def refused(path, message, size=None):
    with pytest.raises(InputError, match=message) as caught:
        load(path, size)
    assert str(caught.value).startswith("--data: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"),
        ("{}-images.idx3-ubyte", "{}-labels.idx1-ubyte"),
        ("{}-images-idx3-ubyte", "{}-labels-idx1-ubyte.gz"),
        ("{}-images.idx3-ubyte.gz", "{}-labels-idx1-ubyte"),
        (
            "emnist-letters-{}-images-idx3-ubyte.gz",
            "emnist-letters-{}-labels-idx1-ubyte.gz",
            "test",
        ),
    ],
)
def test_a_folder_with_the_names_of_mnist(tmp_path, names):
    found = load(mnist(tmp_path / "digits", *names), None)
    assert torch.equal(found.images[:4, 0], torch.from_numpy(TRAIN) / 255)
    assert torch.equal(found.images[4:, 0], torch.from_numpy(TEST) / 255)
    assert found.images.dtype == torch.float32 and found.labels.dtype == torch.int64
    assert found.classes == ("3", "7", "9") and found.labels.tolist() == [1, 0, 0, 2, 0, 2]
    assert {part: ids.tolist() for part, ids in found.parts.items()} == {
        "train": [0, 1, 2, 3],
        "test": [4, 5],
    }
    assert found.names is None and found.title == "digits, 6 images in IDX files"


def test_one_file_is_one_set(tmp_path):
    found = load(mnist(tmp_path) / "train-images-idx3-ubyte", None)
    assert found.images.shape == (4, 1, 2, 3) and found.parts == {}
    assert found.title == "train-images-idx3-ubyte, 4 images in IDX files"


def test_train_alone_is_one_set(tmp_path):
    mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    assert load(tmp_path, None).parts == {} and len(load(tmp_path, None).labels) == 4


def test_packed_and_plain_are_told_by_their_content(tmp_path):
    mnist(tmp_path)
    plain = tmp_path / "train-images-idx3-ubyte"
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    put(tmp_path / "train-images-idx3-ubyte.gz", b"another, left over")
    assert torch.equal(load(tmp_path, None).images[:4, 0], torch.from_numpy(TRAIN) / 255)


def test_size(tmp_path):
    put(tmp_path / "images-idx3-ubyte", np.indices((3, 60, 60)).sum(0) % 2 * 255)
    put(tmp_path / "labels-idx1-ubyte", [0, 1, 1])
    found = load(tmp_path, 4).images
    assert found.shape == (3, 1, 4, 4)
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=0.02, rtol=0)


def test_white_stays_1(tmp_path):
    put(tmp_path / "images-idx3-ubyte", np.full((2, 7, 7), 255))
    put(tmp_path / "labels-idx1-ubyte", [0, 1])
    assert load(tmp_path, 3).images.max() == 1


def test_size_in_chunks_is_that_of_each(tmp_path, monkeypatch):
    mnist(tmp_path)
    whole = load(tmp_path, 5).images
    monkeypatch.setattr(arrays, "CHUNK", 3)
    assert torch.equal(load(tmp_path, 5).images, whole)
    assert whole.min() >= 0 and whole.max() <= 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "images-idx3",
            b"",
            "is not an IDX file of images: it begins with nothing, not 00 00 08 03",
        ),
        ("images-idx3", idx(TRAIN, 9), "is not an IDX file of images: it begins with 00 00 09 03"),
        ("images-idx3", idx(TRAIN[0]), "is not an IDX file of images: it begins with 00 00 08 02"),
        ("labels-idx1", idx(TRAIN), "is not an IDX file of labels: .* not 00 00 08 01"),
        ("images-idx3", idx(TRAIN)[:9], "is cut short, in its header"),
        ("images-idx3", idx(TRAIN)[:-1], "must have 24 values by its header, it has 23"),
        ("images-idx3", idx(TRAIN) + b"0", "must have 24 values by its header, it has more"),
        ("images-idx3", idx(TRAIN[:0]), "holds no images"),
        ("images-idx3", idx(TRAIN[:, :0]), "holds no images"),
        ("labels-idx1", idx(TRAIN[0, 0]), "has 3 labels for 4 images"),
        ("labels-idx1", idx(np.zeros(4, np.uint8)), "has one class alone, 0"),
    ],
)
def test_what_is_no_idx_file_is_named(tmp_path, name, content, message, suffix):
    put(tmp_path / f"train-images-idx3-ubyte{suffix}", TRAIN)
    count = content[7] if "holds no" in message else 4
    put(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.arange(count))
    put(tmp_path / f"train-{name}-ubyte{suffix}", content)
    refused(tmp_path, rf"train-{name[:6]}-idx\d-ubyte{suffix} {message}")


def test_labels_of_a_test_set_alone_are_named(tmp_path):
    mnist(tmp_path)
    put(tmp_path / "t10k-labels-idx1-ubyte", [3, 8])
    refused(tmp_path, r"t10k-labels-idx1-ubyte has the label 8, which \S*train-labels\S* has not")


def test_images_of_other_sizes_are_named(tmp_path):
    mnist(tmp_path)
    put(tmp_path / "t10k-images-idx3-ubyte", TEST.reshape(2, 3, 2))
    refused(
        tmp_path, r"train-images\S* and \S*t10k-images\S* must have .* \[1, 2, 3\] and \[1, 3, 2\]"
    )


def test_files_that_are_missing_or_too_many_are_named(tmp_path):
    mnist(tmp_path)
    refused(tmp_path / "train-labels-idx1-ubyte", "none of these: .*; name the file of images$")
    put(tmp_path / "emnist-letters-train-images-idx3-ubyte", TRAIN)
    refused(tmp_path, "emnist-letters-train-images-idx3-ubyte and train-images-idx3-ubyte, of diff")
    (tmp_path / "emnist-letters-train-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    refused(
        tmp_path, "train-images.* has no labels beside it: train-labels-idx1-ubyte, plain or .gz"
    )
    (tmp_path / "train-images-idx3-ubyte").unlink()
    refused(tmp_path, "has t10k-images-idx3-ubyte and no images to train on")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:20] + b"\xff" * 20 + data[40:]]
)
def test_damaged_gzip_is_named(tmp_path, damage):
    mnist(tmp_path, "{}-images-idx3-ubyte.gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, "train-images-idx3-ubyte.gz cannot be unpacked: ")


def test_no_more_is_unpacked_than_the_header_promises(tmp_path, monkeypatch):
    mnist(tmp_path, "{}-images-idx3-ubyte.gz")
    put(tmp_path / "train-images-idx3-ubyte.gz", idx(TRAIN) + bytes(2**26))
    unpacked, read = [], gzip.GzipFile.read

    def counted(file, size=-1):
        unpacked.append(read(file, size))
        return unpacked[-1]

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    refused(tmp_path, "by its header, it has more")
    assert sum(map(len, unpacked)) == 16 + 24 + 1


@pytest.mark.parametrize("shape", [(2**31, 2**31, 2**31), (60_000, 1000, 1000)])
def test_a_header_that_promises_more_than_there_is_memory(tmp_path, shape):
    mnist(tmp_path)
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head)
    refused(
        tmp_path, rf"{shape[0]:,} images of .* GiB, more than the 8 GiB that are held in memory$"
    )
    refused(tmp_path, "images of .* made 8 x 8 take .* held in memory$", size=8)


def test_images_that_would_fit_if_they_were_smaller(tmp_path):
    mnist(tmp_path)
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 60_000, 250, 250)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head)
    refused(
        tmp_path, "60,000 images of 250 x 250 pixels take 14.0 GiB, .*; --size N makes them N x N"
    )
    refused(tmp_path, "must have 3,750,000,000 values by its header, it has 0", size=28)
