"""Images in folders, one for each class: PNG and JPEG files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs.images.arrays import WORDS, Images, in_parts, require_room

SUFFIXES = (".png", ".jpg", ".jpeg")


def read(path: Path, size: int | None) -> Images:
    """A folder of class folders, or one of train/, test/ and validation/, each of class folders.

    Samples are in the order of their paths, class by class. Images that are all grey keep one
    channel, others have three; of transparent ones the colors are taken as they are, as
    torchvision's ImageFolder does. All are turned as their EXIF orientation says.

    Args:
        size: images become `size` x `size`; where none is given all must be of one size.
    """
    found = {part: _files_by_class(folder) for part, folder in _parts(path).items()}
    classes = list(found["train"])
    if len(classes) < 2:
        raise InputError(f"--data: {show(path)} has one class alone, {show(classes[0], 80)}")
    for part, by_class in found.items():
        apart = sorted(set(by_class) ^ set(classes))
        if apart:
            where = part if apart[0] in by_class else "train"
            raise InputError(
                f"--data: {show(path)} has the class {show(apart[0], 80)} for {where} alone: train "
                f"and {part} must have the same classes"
            )
    files = [file for by_class in found.values() for each in by_class.values() for file in each]
    numbers = {name: k for k, name in enumerate(classes)}
    labels = [numbers[file.parent.name] for file in files]
    counts = {part: sum(map(len, by_class.values())) for part, by_class in found.items()}
    return Images(
        _tensor(_arrays(files, size)),
        torch.tensor(labels),
        tuple(classes),
        tuple(file.relative_to(path).as_posix() for file in files),
        in_parts(counts),
        f"{show(path.resolve().name, 80)}, a folder of {len(files):,} images",
    )


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, hidden ones aside."""
    return [entry for entry in sorted(path.iterdir()) if _seen(entry) and entry.is_dir()]


def _seen(path: Path) -> bool:
    return not path.name.startswith(".")


def _parts(path: Path) -> dict[str, Path]:
    """The folders of class folders by part, "train" first."""
    known = [folder for folder in _folders(path) if folder.name.lower() in WORDS]
    others = [folder for folder in _folders(path) if folder not in known]
    found: dict[str, Path] = {}
    for folder in known:
        part = WORDS[folder.name.lower()]
        if part in found:
            names = f"{show(found[part].name)}/ and {show(folder.name)}/"
            raise InputError(f"--data: {show(path)} has {names}, which mean the same part")
        found[part] = folder
    if "train" not in found or (others and len(found) == 1):
        return {"train": path}  # these are classes
    if others:
        names = ", ".join(f"{show(folder.name, 80)}/" for folder in known)
        raise InputError(
            f"--data: {show(path)} has {names} and beside them {show(others[0].name, 80)}/: "
            "it must hold parts or classes"
        )
    return {part: found[part] for part in dict.fromkeys(WORDS.values()) if part in found}


def _files_by_class(path: Path) -> dict[str, list[Path]]:
    """By class, in the order of their names, the files of images in each class folder."""
    folders = _folders(path)
    if not folders:
        raise InputError(
            f"--data: {show(path)} has no folders: it must have one for each class, or IDX files "
            "with MNIST's names"
        )
    found = {}
    for folder in folders:
        entries = sorted(folder.iterdir())
        seen = list(filter(_seen, entries))
        for entry in seen:
            if entry.is_dir():
                raise InputError(
                    f"--data: {show(entry)} is a folder within a class: images of a class lie side "
                    "by side in its folder"
                )
        found[folder.name] = [file for file in seen if file.suffix.lower() in SUFFIXES]
        if not found[folder.name]:
            names = [entry.name for entry in entries]
            others = f"has {len(names):,} of other kinds, {brief(names)}" if names else "is empty"
            raise InputError(f"--data: {show(folder)} has no PNG or JPEG files: it {others}")
    return found


def _arrays(files: Sequence[Path], size: int | None) -> list[np.ndarray]:
    """Each image as [H, W] or [H, W, 3], of uint8, or of floats in [0, 1] that had 16 bits."""
    from PIL import Image, UnidentifiedImageError

    arrays: list[np.ndarray] = []
    channels = 0
    if size:  # before the first is made so large
        require_room(len(files), 1, size, size, size, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file in files:
            try:
                array = _array(file, size)
            except UnidentifiedImageError:
                raise InputError(f"--data: {show(file)} is not a PNG or JPEG image") from None
            except Exception as error:  # Pillow's readers raise errors of any kind
                reason = show(getattr(error, "strerror", None) or error)
                raise InputError(f"--data: cannot read {show(file)}: {reason}") from None
            height, width = array.shape[:2]
            if arrays and (height, width) != arrays[0].shape[:2]:
                first = " x ".join(map(str, arrays[0].shape[:2]))
                raise InputError(
                    f"--data: images must be of one size: {show(files[0])} is {first}, "
                    f"{show(file)} is {height} x {width}, height x width; --size N makes them N x N"
                )
            depth = 3 if array.ndim == 3 else 1
            if depth > channels:
                channels = depth
                require_room(len(files), channels, height, width, size, 1)
            arrays.append(array)
    return arrays


def _array(file: Path, size: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    if not file.is_file():
        raise OSError("it is not a file")
    with Image.open(file, formats=("PNG", "JPEG")) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # grey of 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.float32) / 65535)
    else:
        image.info.pop("transparency", None)  # of a palette, which would be warned of
        image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _tensor(arrays: list[np.ndarray]) -> torch.Tensor:
    """[N, C, H, W] float32 in [0, 1]; C is 1 where all are grey, and 3 otherwise."""
    channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    images = torch.empty(len(arrays), channels, *arrays[0].shape[:2])
    for image, array in zip(images, arrays, strict=True):
        pixels = torch.from_numpy(array)
        pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
        image[:] = pixels if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return images
