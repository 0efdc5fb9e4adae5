"""--data FILE.npz: arrays by name, to known pixels, or one line."""

import io
import zipfile

import numpy as np
import pytest
import torch

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images import arrays
from gradsurgery.unlearn.jobs.images.data import load

GREY = np.arange(24, dtype=np.uint8).reshape(4, 2, 3) * 10
COLORS = np.arange(96, dtype=np.uint8).reshape(4, 2, 4, 3)
LABELS = np.array([5, -2, 5, 12])


def save(folder, **found):
    np.savez_compressed(folder / "own.npz", **found)
    return folder / "own.npz"


def refused(path, message, size=None):
    with pytest.raises(InputError, match=message) as caught:
        load(path, size)
    assert str(caught.value).startswith(f"--data: {path}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x", "y"), ("X", "y"), ("data", "targets")]
)
def test_one_set(tmp_path, images, labels):
    found = load(save(tmp_path, **{images: GREY, labels: LABELS, "other": np.ones(3)}), None)
    assert torch.equal(found.images[:, 0], torch.from_numpy(GREY) / 255)
    assert found.images.dtype == torch.float32 and found.labels.dtype == torch.int64
    assert found.classes == ("-2", "5", "12") and found.labels.tolist() == [1, 0, 1, 2]
    assert found.names is None and found.parts == {} and found.title == "own.npz, 4 images"


@pytest.mark.parametrize(
    "names",
    ["train_{} val_{} test_{}", "{}_train {}_val {}_test", "train_{} validation_{} test_{}"],
)
def test_parts(tmp_path, names):
    images, labels = ("images", "labels") if names.startswith("train") else ("x", "y")
    train, valid, test = names.split()
    given = {}
    for name, count in ((test, 1), (train, 4), (valid, 2)):
        given |= {name.format(images): GREY[:count], name.format(labels): LABELS[:count, None]}
    found = load(save(tmp_path, **given), None)
    assert {part: ids.tolist() for part, ids in found.parts.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5],
        "test": [6],
    }
    assert found.labels.tolist() == [1, 0, 1, 2, 1, 0, 1]
    assert torch.equal(found.images[4:6], found.images[:2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_channels_first_and_last(tmp_path, channels, last):
    images = COLORS[..., :channels]
    stored = images if last else images.transpose(0, 3, 1, 2)
    found = load(save(tmp_path, images=stored, labels=LABELS), None).images
    assert torch.equal(found, torch.from_numpy(images / np.float32(255)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("stored", "white"),
    [
        (GREY, 255),
        (GREY.astype(np.uint16) * 257, 65_535),
        (GREY.astype(">u2") * 257, 65_535),
        (GREY.astype(np.float32), 255),
        (GREY.astype(np.float64) / 255, 1),
        (np.asfortranarray(GREY.astype(">f8")), 255),
        (np.minimum(GREY, 1).astype(np.float16), 1),
        (np.zeros((4, 2, 3)), 1),
    ],
)
def test_white_is_1(tmp_path, stored, white):
    found = load(save(tmp_path, images=stored, labels=LABELS), None).images
    torch.testing.assert_close(
        found[:, 0], torch.from_numpy(stored.astype(np.float64) / white).float()
    )


@pytest.mark.parametrize(("high", "value"), [(0.5, 0.5), (100.0, 0.5 / 255)])
def test_floats_are_read_as_those_of_training_are(tmp_path, high, value):
    train, test = np.full((4, 2, 3), high), np.full((4, 2, 3), 0.5)
    given = {"x_train": train, "x_test": test, "y_train": LABELS, "y_test": LABELS}
    found = load(save(tmp_path, **given), None).images
    torch.testing.assert_close(found[4:], torch.full((4, 1, 2, 3), value))


def test_labels_of_any_integers(tmp_path):
    for dtype in (np.uint8, np.int16, ">i4", np.uint64):
        found = load(
            save(tmp_path, images=GREY, labels=np.array([9, 200, 9, 30]).astype(dtype)), None
        )
        assert found.classes == ("9", "30", "200") and found.labels.tolist() == [0, 2, 0, 1]


def test_size(tmp_path):
    board = np.indices((4, 60, 60, 3)).sum(0) % 2 * 1.0
    found = load(save(tmp_path, images=board, labels=LABELS), 4).images
    assert found.shape == (4, 3, 4, 4)
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=0.02, rtol=0)
    assert load(save(tmp_path, images=GREY, labels=LABELS), 7).images.shape == (4, 1, 7, 7)


def several(**changed):
    given = {"train_images": GREY, "train_labels": LABELS}
    return given | {"test_images": GREY, "test_labels": LABELS} | changed


def without(name):
    return {key: value for key, value in several().items() if key != name}


FLOATS = GREY / 255


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": GREY}, r"has arrays \['a'\]: it must have images and labels, x and y, .* y_train"),
        ({"images": GREY}, r"has arrays \['images'\]: it must have"),
        (several(x=GREY, y=LABELS), "has sets of images by several names, x and train_images"),
        ({"x": GREY, "X": GREY, "y": LABELS}, "has both x and X"),
        (
            several(val_images=GREY, val_labels=LABELS, valid_images=GREY, valid_labels=LABELS),
            "both",
        ),
        (without("train_images"), "has arrays .*: it must have"),
        (without("test_labels"), "has test_images and no test_labels"),
        ({"x": GREY[0], "y": LABELS}, r"x must be \[N, H, W\], .* 1 or 3 channels, got \[2, 3\]"),
        (
            {"x": np.zeros((4, 9, 9, 4)), "y": LABELS},
            r"got \[4, 9, 9, 4\]; \[..., :3\] leaves alpha",
        ),
        ({"x": np.zeros((4, 9, 9, 9)), "y": LABELS}, r"got \[4, 9, 9, 9\]$"),
        ({"x": np.zeros((4, 3, 9, 3)), "y": LABELS}, r"got \[4, 3, 9, 3\]$"),
        ({"x": GREY.astype(int), "y": LABELS}, "x must be uint8, uint16 or floats, got int64"),
        ({"x": GREY > 9, "y": LABELS}, "x must be uint8, uint16 or floats, got bool"),
        ({"x": GREY.astype(object), "y": LABELS}, "x must be uint8, .* got object"),
        ({"x": GREY, "y": LABELS.astype(object)}, r"y must be integers \[N\], got object \[4\]"),
        ({"x": GREY, "y": LABELS * 1.0}, r"y must be integers \[N\], got float64 \[4\]"),
        ({"x": GREY, "y": LABELS[0]}, r"y must be integers \[N\], got int64 \[\]"),
        ({"x": GREY, "y": np.eye(4, dtype=int)}, r"y must be one integer .* got \[4, 4\]; argmax"),
        ({"x": GREY, "y": LABELS[:3]}, "y has 3 labels for 4 images"),
        ({"x": GREY, "y": LABELS * 0}, "y of .* has one class alone, 0"),
        ({"x": GREY[:0], "y": LABELS[:0]}, "x of .* holds no images"),
        ({"x": FLOATS - 0.5, "y": LABELS}, r"x must be in \[0, 1\] or \[0, 255\], got -0.5 to 0.4"),
        ({"x": FLOATS * 1.12, "y": LABELS}, r"x must be in \[0, 1\] or \[0, 255\], got 0 to 1.0"),
        ({"x": FLOATS * 300, "y": LABELS}, r"x must be in \[0, 1\] or \[0, 255\], got 0 to 270"),
        ({"x": FLOATS * np.nan, "y": LABELS}, "x holds values that are not finite"),
        ({"x": FLOATS + np.inf, "y": LABELS}, "x holds values that are not finite"),
        (several(test_images=FLOATS), "images must be of one dtype, got float and uint8"),
        (
            several(train_images=FLOATS, test_images=FLOATS * 2),
            r"test_images must be in \[0, 1\] as those of training, got 0 to 1.8",
        ),
        (several(test_images=GREY[:, :1]), r"images of one shape, got \[1, 2, 3\] and \[1, 1, 3\]"),
        (several(test_labels=LABELS + 1), "has the label -1, which train_labels of .* has not"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, given, message):
    path = save(tmp_path, **given)
    with pytest.raises(InputError, match=message) as caught:
        load(path, None)
    assert str(caught.value).startswith("--data: ") and "own.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no archive",
        lambda data: data[: len(data) // 2],
        lambda data: data[:90] + b"\xff" * 9 + data[99:],
        lambda data: data[:200] + b"\xff" * 9 + data[209:],
    ],
)
def test_damage_is_named(tmp_path, damage):
    np.savez(tmp_path / "own.npz", x=np.tile(GREY, (1, 9, 1)), y=LABELS)
    path = tmp_path / "own.npz"
    path.write_bytes(damage(path.read_bytes()))
    refused(path, "is not (an|a whole) .npz file")


def test_a_plain_array_by_that_name_is_named(tmp_path):
    content = io.BytesIO()
    np.save(content, GREY)
    (tmp_path / "own.npz").write_bytes(content.getvalue())
    refused(tmp_path / "own.npz", "is not an .npz file")


@pytest.mark.parametrize("size", [None, 8])
def test_an_array_that_would_unpack_to_more_than_the_memory_is_left_packed(tmp_path, size):
    header = io.BytesIO()
    shape = (60_000, 1000, 1000)
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    path = save(tmp_path, y=LABELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(InputError, match=r"60,000 images of 1000 x 1000 pixels .* GiB, more than"):
        load(path, size)


def test_parts_that_fit_alone_may_be_too_large_together(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LARGEST", GREY.size * 4)
    assert len(load(save(tmp_path, x=GREY, y=LABELS), None).labels) == 4
    with pytest.raises(InputError, match=r"8 images of 2 x 3 .*; --size N makes them N x N pixels"):
        load(save(tmp_path, **several()), None)
