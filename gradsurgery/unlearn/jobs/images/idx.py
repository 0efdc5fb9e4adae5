"""Images in IDX files, the format of MNIST, plain or packed by gzip.

An IDX file is two bytes of 0, the type of its values, 8 for uint8, the number of dimensions, their
sizes as big-endian 32-bit integers, and the values (http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.images.arrays import WORDS, Images, Part, assemble, require_room

PARTS = {**WORDS, "t10k": "test"}
# train-images-idx3-ubyte.gz, t10k-images.idx3-ubyte, emnist-letters-train-images-idx3-ubyte
IMAGES = re.compile(rf"(.*?)({'|'.join(PARTS)})?-?images([-.])idx3-ubyte(\.gz)?")
LABELS = re.compile(r".*labels[-.]idx1-ubyte(\.gz)?")


def found(folder: Path) -> list[Path]:
    """The files of images in a folder; of one that lies there packed and plain, the plain one."""
    files = [f for f in sorted(folder.iterdir()) if IMAGES.fullmatch(f.name) and f.is_file()]
    return [file for file in files if file.suffix != ".gz" or file.with_suffix("") not in files]


def read_folder(path: Path, size: int | None) -> Images:
    """A folder with MNIST's names: train-images-idx3-ubyte, t10k-images-idx3-ubyte and so on."""
    files: dict[str, Path] = {}
    for file in found(path):
        match = IMAGES.fullmatch(file.name)
        part = PARTS[match[2]] if match and match[2] else "train"
        if part in files:
            raise InputError(
                f"--data: {show(path)} has {show(files[part].name, 80)} and "
                f"{show(file.name, 80)}, of different data sets: name one of these files"
            )
        files[part] = file
    if "train" not in files:
        names = ", ".join(show(file.name, 80) for file in files.values())
        raise InputError(f"--data: {show(path)} has {names} and no images to train on")
    files = {part: files[part] for part in dict.fromkeys(PARTS.values()) if part in files}
    return _assembled(files, size, show(path.resolve().name, 80))


def read_file(path: Path, size: int | None) -> Images:
    """One file of images, whose labels lie beside it."""
    return _assembled({"train": path}, size, show(path.name, 80))


def _assembled(files: dict[str, Path], size: int | None, name: str) -> Images:
    parts = {part: _part(file, size) for part, file in files.items()}
    count = sum(len(part.images) for part in parts.values())
    return assemble(parts, 255.0, size, f"{name}, {count:,} images in IDX files")


def _part(path: Path, size: int | None) -> Part:
    beside = _labels_of(path)
    images = _array(path, 3, None, size)
    labels = _array(beside, 1, len(images), size)
    return Part(images[:, None], labels, show(path), show(beside))


def _labels_of(images: Path) -> Path:
    match = IMAGES.fullmatch(images.name)
    assert match is not None
    before = images.name[: images.name.rindex("images")]
    other = "-" if match[3] == "." else "."
    names = [
        f"{before}labels{dot}idx1-ubyte{gz}" for dot in (match[3], other) for gz in ("", ".gz")
    ]
    for name in names:
        if images.with_name(name).is_file():
            return images.with_name(name)
    raise InputError(
        f"--data: {show(images)} has no labels beside it: {show(names[0], 80)}, plain or .gz"
    )


def _array(path: Path, dims: int, wanted: int | None, size: int | None) -> np.ndarray:
    """The uint8 values of a file, not one more than its header promises.

    Args:
        wanted: how many labels there must be.
        size: what images are to become.
    """
    kind = "images" if dims == 3 else "labels"
    where = f"--data: {show(path)}"
    magic = bytes([0, 0, 8, dims])
    try:
        with open(path, "rb") as plain:
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=plain) if packed else plain
            head = file.read(4 + 4 * dims)
            if head[:4] != magic:
                raise InputError(
                    f"{where} is not an IDX file of {kind}: it begins with "
                    f"{head[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}"
                )
            if len(head) < 4 + 4 * dims:
                raise InputError(f"{where} is cut short, in its header")
            shape = np.frombuffer(head, ">u4", dims, 4).tolist()
            if wanted is None:
                require_room(shape[0], 1, shape[1], shape[2], size, 1)
            elif shape[0] != wanted:
                raise InputError(f"{where} has {shape[0]:,} labels for {wanted:,} images")
            count = math.prod(shape)
            values = file.read(count + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{where} cannot be unpacked: {show(error)}") from None
    if len(values) != count:
        got = "more" if len(values) > count else f"{len(values):,}"
        raise InputError(f"{where} must have {count:,} values by its header, it has {got}")
    return np.frombuffer(values, np.uint8).reshape(shape)
