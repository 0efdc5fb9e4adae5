"""--data FOLDER: class folders of PNG and JPEG files, to known pixels, or one line."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gradsurgery.errors import InputError
from gradsurgery.unlearn.jobs.images import arrays
from gradsurgery.unlearn.jobs.images import folder as folders
from gradsurgery.unlearn.jobs.images.data import load

RED, GREY = (255, 0, 51), 102


def put(path, pixels, mode=None, **options):
    """An image of [H, W] or [H, W, C] values; its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)


def grey(value=GREY, height=2, width=3):
    return np.full((height, width), value, np.uint8)


def red(height=2, width=3):
    return np.full((height, width, 3), RED, np.uint8)


def pair(folder, first="cats/a.png", second="dogs/b.png"):
    put(folder / first, grey(0))
    put(folder / second, grey(255))


def close(image, expected):
    torch.testing.assert_close(image.flatten(1)[:, 0], torch.tensor(expected) / 255)
    assert (image == image[:, :1, :1]).all()


def refused(folder, message, size=None):
    with pytest.raises(InputError, match=message) as caught:
        load(folder, size)
    assert str(caught.value).startswith("--data: ") and "\n" not in str(caught.value)


# -- what is read


def test_class_folders_in_the_order_of_their_names(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for name in ("dogs/b.PNG", "dogs/a.png", "cats/z.png"):
        put(tmp_path / name, grey(0) if name != "dogs/b.PNG" else pixels)
    put(tmp_path / "cats/c.JPeG", grey(255))
    found = load(tmp_path, None)
    assert found.classes == ("cats", "dogs")
    assert found.names == ("cats/c.JPeG", "cats/z.png", "dogs/a.png", "dogs/b.PNG")
    assert found.labels.tolist() == [0, 0, 1, 1] and found.labels.dtype == torch.int64
    assert found.images.shape == (4, 1, 2, 3) and found.images.dtype == torch.float32
    assert (found.images[0] == 1).all()
    assert torch.equal(found.images[3, 0], torch.arange(6.0).view(2, 3) / 255)
    assert found.parts == {}
    assert found.title == f"{tmp_path.name}, a folder of 4 images"


def test_what_is_hidden_or_of_another_kind_is_left_out(tmp_path):
    pair(tmp_path)
    for name in (
        "labels.csv",
        "cats/note.txt",
        "cats/.hidden.png",
        "dogs/.git/x.png",
        ".git/x.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert load(tmp_path, None).names == ("cats/a.png", "dogs/b.png")


@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_parts(tmp_path, valid):
    for part, count in (("test", 1), ("train", 2), (valid, 3)):
        for k in range(count):
            pair(tmp_path, f"{part}/cats/{k}.png", f"{part}/dogs/{k}.png")
    found = load(tmp_path, None)
    assert {part: ids.tolist() for part, ids in found.parts.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5, 6, 7, 8, 9],
        "test": [10, 11],
    }
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1]
    names = found.names or ()
    assert names[0] == "train/cats/0.png" and names[-1] == "test/dogs/0.png"
    assert found.images[11].min() == 1


def test_train_alone_is_one_set_and_a_class_may_be_called_train(tmp_path):
    pair(tmp_path / "one", "train/cats/a.png", "train/dogs/b.png")
    assert load(tmp_path / "one", None).parts == {}
    assert load(tmp_path / "one", None).classes == ("cats", "dogs")
    pair(tmp_path / "other", "bus/a.png", "train/b.png")
    assert load(tmp_path / "other", None).classes == ("bus", "train")


def test_links_are_followed(tmp_path):
    pair(tmp_path / "data")
    put(tmp_path / "elsewhere/x.png", grey(51))
    (tmp_path / "data/cats/link.png").symlink_to(tmp_path / "elsewhere/x.png")
    (tmp_path / "data/mice").symlink_to(tmp_path / "elsewhere")
    found = load(tmp_path / "data", None)
    assert found.names == ("cats/a.png", "cats/link.png", "dogs/b.png", "mice/x.png")
    close(found.images[1], [51.0])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_one_image_of_colors_gives_all_three_channels(tmp_path, mode):
    put(tmp_path / "cats/a.png", grey())
    put(tmp_path / f"dogs/b.{'jpg' if mode == 'CMYK' else 'png'}", red(16, 16)[:2, :3], mode)
    found = load(tmp_path, None).images
    assert found.shape == (2, 3, 2, 3)
    close(found[0], [102.0, 102.0, 102.0])
    expected = torch.tensor(RED).view(3, 1, 1).expand(3, 2, 3) / 255
    torch.testing.assert_close(found[1], expected, atol=0.02 if mode == "CMYK" else 0, rtol=0)


@pytest.mark.parametrize("mode", ["LA", "1"])
def test_grey_with_alpha_and_black_and_white_are_grey(tmp_path, mode):
    pair(tmp_path)
    put(tmp_path / "dogs/c.png", grey(255), mode)
    assert load(tmp_path, None).images.shape == (3, 1, 2, 3)
    assert (load(tmp_path, None).images[2] == 1).all()


def test_colors_below_transparency_are_taken_as_they_are(tmp_path):
    pair(tmp_path)
    put(tmp_path / "dogs/c.png", np.dstack([red(), grey(0)]))
    palette = Image.fromarray(red()).convert("P")
    palette.save(tmp_path / "dogs/d.png", transparency=bytes(256))
    found = load(tmp_path, None).images
    close(found[2], [255.0, 0.0, 51.0])
    close(found[3], [255.0, 0.0, 51.0])


@pytest.mark.parametrize("size", [None, 2])
def test_grey_of_16_bits_keeps_them(tmp_path, size):
    pair(tmp_path)
    put(tmp_path / "cats/c.png", np.full((2, 3), 40_000, np.uint16))
    put(tmp_path / "cats/d.png", np.full((2, 3), 65_535, np.uint16))
    found = load(tmp_path, size).images
    torch.testing.assert_close(found[1], torch.full_like(found[1], 40_000 / 65_535))
    assert found.shape[1] == 1 and (found[2] == 1).all() and (found[3] == 1).all()
    put(tmp_path / "dogs/e.png", red())
    close(load(tmp_path, size).images[1], [40_000 / 257] * 3)


def test_images_are_turned_as_a_camera_says(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    put(tmp_path / "cats/a.png", pixels, exif=exif)
    put(tmp_path / "dogs/b.png", np.rot90(pixels, -1))
    found = load(tmp_path, None).images
    assert found.shape == (2, 1, 3, 2) and torch.equal(found[0], found[1])


def test_size_makes_images_of_any_size_alike(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    put(tmp_path / "cats/a.png", board.astype(np.uint8))
    put(tmp_path / "dogs/b.png", grey(51, 3, 200))
    found = load(tmp_path, 4).images
    assert found.shape == (2, 1, 4, 4)
    close(found[1], [51.0])
    # smoothed: single pixels of a chessboard would be 0 or 1
    torch.testing.assert_close(found[0], torch.full((1, 4, 4), 0.5), atol=0.02, rtol=0)


# -- what is refused


def test_images_of_different_sizes_are_named(tmp_path):
    pair(tmp_path)
    put(tmp_path / "dogs/c.png", grey(0, 4, 5))
    refused(tmp_path, r"cats/a.png is 2 x 3, \S*dogs/c.png is 4 x 5, .*--size N makes them N x N")


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def bomb(path, side):
    """A PNG of a few bytes that says it is side x side."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


def cut(path):
    put(path, np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8))
    path.write_bytes(path.read_bytes()[:1200])


def link_to_nothing(path):
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.png", lambda path: path.write_text("no image"), "x.png is not a PNG or JPEG image"),
        ("x.jpg", lambda path: path.write_bytes(b""), "x.jpg is not a PNG or JPEG image"),
        ("x.png", lambda path: put(path, grey(), format="GIF"), "x.png is not a PNG or JPEG image"),
        ("x.png", cut, "cannot read .*x.png: .*truncated"),
        ("x.jpg", cut, "cannot read .*x.jpg: .*truncated"),
        ("x.png", lambda path: bomb(path, 11_000), "cannot read .*x.png: .*decompression bomb"),
        ("x.png", lambda path: bomb(path, 60_000), "cannot read .*x.png: .*decompression bomb"),
        ("x.png", link_to_nothing, "cannot read .*x.png: it is not a file"),
        ("x.png", os.mkfifo, "cannot read .*x.png: it is not a file"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, name, make, message):
    pair(tmp_path)
    make(tmp_path / "dogs" / name)
    refused(tmp_path, message)


def test_classes_that_make_no_sense_are_named(tmp_path):
    refused(tmp_path, "has no folders: it must have one for each class")
    put(tmp_path / "cats/a.png", grey())
    refused(tmp_path, "has one class alone, cats")
    (tmp_path / "dogs").mkdir()
    refused(tmp_path, "dogs has no PNG or JPEG files: it is empty")
    for name in ("b.gif", ".c.png"):
        (tmp_path / "dogs" / name).write_text("text")
    refused(tmp_path, r"dogs has no .* files: it has 2 of other kinds, \['.c.png', 'b.gif'\]")
    put(tmp_path / "dogs/b.png", grey())
    put(tmp_path / "dogs/more/c.png", grey())
    refused(tmp_path, "dogs/more is a folder within a class")


def test_parts_that_make_no_sense_are_named(tmp_path):
    for part in ("train", "test"):
        pair(tmp_path, f"{part}/cats/a.png", f"{part}/dogs/b.png")
    put(tmp_path / "test/mice/c.png", grey())
    refused(
        tmp_path, "has the class mice for test alone: train and test must have the same classes"
    )
    put(tmp_path / "train/mice/c.png", grey())
    put(tmp_path / "train/birds/c.png", grey())
    refused(tmp_path, "has the class birds for train alone")
    put(tmp_path / "test/birds/c.png", grey())
    put(tmp_path / "extra/cats/a.png", grey())
    refused(tmp_path, "has test/, train/ and beside them extra/: it must hold parts or classes")
    (tmp_path / "extra").rename(tmp_path / "val")
    (tmp_path / "valid").mkdir()
    refused(tmp_path, "has val/ and valid/, which mean the same part")


def test_test_without_train_is_named(tmp_path):
    pair(tmp_path, "test/cats/a.png", "val/cats/a.png")
    refused(tmp_path, "test/cats is a folder within a class")


def test_images_beyond_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    pair(tmp_path)
    monkeypatch.setattr(arrays, "LARGEST", 2 * 2 * 3 * 4)
    assert len(load(tmp_path, None).labels) == 2
    put(tmp_path / "dogs/c.png", red())
    (tmp_path / "dogs/d.png").write_text("not looked at")
    refused(
        tmp_path, "4 images of 2 x 3 pixels take .* GiB, more than .* --size N makes them N x N"
    )
    monkeypatch.setattr(folders, "_array", None)  # none is made large to find it out
    refused(tmp_path, "4 images of 3 x 3 pixels made 3 x 3 take", size=3)
