"""Images in .npz files, numpy's arrays by name."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs.images.arrays import WORDS, Images, Part, assemble, require_room

# names of images and labels, in capitals too; {} is a word for a part: MedMNIST's and Keras's names
NAMES = (("images", "labels"), ("x", "y"), ("data", "targets"))
NAMES_OF_PARTS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
WANTED = (
    f"{', '.join(map(' and '.join, NAMES))}, train_images and train_labels, or x_train and y_train"
)
# resizing can leave values a little above 1: divided by 255 such images would all be black
LEAST_WHITE = 2.0
Shape = tuple[int, ...]


def read(path: Path, size: int | None) -> Images:
    """The images and labels of a file, whole or in parts for training, validation and test.

    Images are [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3. White is 255 in uint8, 65535
    in uint16; in floats it is 1 or 255, as the largest value of the training part says.
    Labels are integers [N] or [N, 1], whichever: a class is named by its integer.

    Raises:
        InputError: naming --data, the file and its array.
    """
    where = f"--data: {show(path)}"
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise InputError(f"{where} is not an .npz file, which numpy.savez writes")
    try:
        with np.load(path, allow_pickle=False) as archive, zipfile.ZipFile(path) as members:
            pairs = _pairs(archive.files, where)
            headers = {name: _header(members, name) for pair in pairs.values() for name in pair}
            orders = {}
            for images, labels in pairs.values():
                orders[images] = _order(*headers[images], f"{where}: {show(images, 80)}", size)
                _check_labels(*headers[labels], f"{where}: {show(labels, 80)}", headers[images][0])
            found = {name: archive[name] for name in headers}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile have errors of many kinds
        raise InputError(
            f"{where} is not a whole .npz file of plain arrays: {show(error)}"
        ) from None
    most = _most({images: found[images] for images, _ in pairs.values()}, where)
    parts = {}
    for part, (images, labels) in pairs.items():
        shape, axes = orders[images]
        parts[part] = Part(
            found[images].reshape(shape).transpose(axes),
            found[labels].reshape(-1),
            f"{show(images, 80)} of {show(path)}",
            f"{show(labels, 80)} of {show(path)}",
        )
    count = sum(len(part.images) for part in parts.values())
    return assemble(parts, most, size, f"{show(path.name, 80)}, {count:,} images")


def _pairs(names: list[str], where: str) -> dict[str, tuple[str, str]]:
    """By part, "train" first, the names of its images and its labels."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(name.lower(), name) != name:
            raise InputError(f"{where} has both {show(known[name.lower()])} and {show(name)}")
    layouts: list[dict[str, tuple[str, str]]] = [
        {"train": (known[images], known[labels])}
        for images, labels in NAMES
        if images in known and labels in known
    ]
    for pair in NAMES_OF_PARTS:
        found: dict[str, tuple[str, str]] = {}
        for word, part in WORDS.items():
            images, labels = (known.get(name.format(word)) for name in pair)
            if images and labels:
                if part in found:
                    raise InputError(f"{where} has both {show(found[part][0])} and {show(images)}")
                found[part] = images, labels
            elif images:
                raise InputError(f"{where} has {show(images)} and no {pair[1].format(word)}")
        if "train" in found:
            layouts.append(found)
    if len(layouts) != 1:
        sets = " and ".join(show(layout["train"][0], 80) for layout in layouts)
        problem = f"sets of images by several names, {sets}" if sets else f"arrays {brief(names)}"
        raise InputError(f"{where} has {problem}: it must have {WANTED}")
    return layouts[0]


def _header(members: zipfile.ZipFile, name: str) -> tuple[Shape, np.dtype]:
    """An array's shape and dtype, before it is unpacked."""
    with members.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        one = np.lib.format.read_array_header_1_0
        later = np.lib.format.read_array_header_2_0
        shape, _, dtype = one(file) if version == (1, 0) else later(file)
    return shape, dtype


def _order(shape: Shape, dtype: np.dtype, where: str, size: int | None) -> tuple[Shape, Shape]:
    """What to reshape images to, and how to transpose that, so that they are [N, C, H, W]."""
    if not (dtype.kind == "f" or (dtype.kind == "u" and dtype.itemsize <= 2)):
        raise InputError(f"{where} must be uint8, uint16 or floats, got {dtype}")
    full = (*shape, 1) if len(shape) == 3 else shape
    last = len(full) == 4 and full[3] in (1, 3)
    second = len(shape) == 4 and shape[1] in (1, 3)
    if last == second:
        advice = "; [..., :3] leaves alpha out" if len(shape) == 4 and 4 in shape[1:] else ""
        raise InputError(
            f"{where} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, got "
            f"{list(shape)}{advice}"
        )
    axes = (0, 3, 1, 2) if last else (0, 1, 2, 3)
    count, channels, height, width = (full[axis] for axis in axes)
    require_room(count, channels, height, width, size, dtype.itemsize)
    return full, axes


def _check_labels(shape: Shape, dtype: np.dtype, where: str, images: Shape) -> None:
    if len(shape) == 2 and shape[1] != 1:
        raise InputError(
            f"{where} must be one integer for each image, got {list(shape)}; argmax(1) makes "
            "one-hot labels so"
        )
    if dtype.kind not in "iu" or len(shape) not in (1, 2):
        raise InputError(f"{where} must be integers [N], got {dtype} {list(shape)}")
    if shape[0] != images[0]:
        raise InputError(f"{where} has {shape[0]:,} labels for {images[0]:,} images")


def _most(found: dict[str, np.ndarray], where: str) -> float:
    """What is white in images by name, those of training first."""
    kinds = {"float" if array.dtype.kind == "f" else str(array.dtype) for array in found.values()}
    if len(kinds) > 1:
        raise InputError(f"{where}: images must be of one dtype, got {' and '.join(sorted(kinds))}")
    if kinds != {"float"}:
        return float(np.iinfo(next(iter(found.values())).dtype).max)
    most, first = None, ""
    for name, array in found.items():
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{where}: {show(name, 80)} holds values that are not finite")
        if most is None:
            most, first = (1.0 if high < LEAST_WHITE else 255.0), name
        if low < 0 or high > most:
            known = most == 1 and name != first and low >= 0
            wanted = "[0, 1] as those of training" if known else "[0, 1] or [0, 255]"
            got = f"{low:g} to {high:.8g}"
            raise InputError(f"{where}: {show(name, 80)} must be in {wanted}, got {got}")
    assert most is not None
    return most
