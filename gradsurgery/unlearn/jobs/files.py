"""Files that a run trusts: plain ones, replaced whole, each with its own checksum inside.

Links, pipes, devices and folders in the place of a file are refused, for reading and for writing,
and so are links in the place of a folder of the run. A checksum is over a file's name and all its
other bytes and lies in the file itself, so a kill leaves both or neither. It finds damage, not
forgery: whoever can write a file can write its checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradsurgery.text import brief, show

LIMIT = 64 * 2**20  # bytes of a text file; ours have some hundred thousand
BLANK = "0" * 64  # where the checksum will stand, while it is computed
PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_FIELD = re.compile(rb'(?:"checksum": ?"|\n# checksum: )([0-9a-f]{64})')
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class DamageError(ValueError):
    """What a file holds is not what was written; the message goes after "FILE is damaged: "."""


# -- plain files


@contextmanager
def _naming(root: Path, name: str) -> Iterator[None]:
    """Errors name the whole path, and what stands there in the place of a plain file."""
    path = root / name
    try:
        yield
    except ValueError:  # a zero byte, or a character no file system has
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        below = [root / part for part in (name, *map(str, Path(name).parents)) if part != "."]
        links = [found for found in below if found.is_symlink()]
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and links:
            path, reason = links[-1], "it is a symbolic link"
        elif error.errno == errno.EISDIR:
            reason = "it is a directory"
        elif error.errno == errno.ENXIO:
            reason = "it is not a regular file"
        raise OSError(error.errno, reason, str(path)) from None


@contextmanager
def _folder_of(root: Path, name: str) -> Iterator[tuple[int, str]]:
    """The folder of a file, open, and the file's name in it; no folder below `root` is a link."""
    *folders, file = name.split("/")
    held = [os.open(root, _FOLDER)]
    try:
        for folder in folders:
            held.append(os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=held[-1]))
        yield held[-1], file
    finally:
        for descriptor in held:
            os.close(descriptor)


def _require_plain(mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "it is a symbolic link")
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def open_plain(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file; nothing else is opened, waited for or followed."""
    with _naming(root, name), _folder_of(root, name) as (folder, file):
        safe = flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(file, safe, 0o666, dir_fd=folder)
        try:
            _require_plain(os.fstat(descriptor).st_mode)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def read(root: Path, name: str, limit: int = LIMIT) -> bytes:
    """A file's bytes, at most `limit` of them."""
    with open(open_plain(root, name), "rb") as file, _naming(root, name):
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {limit}")
        return file.read(limit)


def read_given(path: Path, limit: int = LIMIT) -> bytes:
    """At most `limit` bytes of what a user names: a file, a link to one, or a pipe."""
    with _naming(path, "."), open(path, "rb") as file:
        data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit} bytes")
        return data


def write(root: Path, name: str, content: bytes | str) -> None:
    """Write a file that is either the old one or the whole new one, whatever happens."""
    data = content.encode() if isinstance(content, str) else content
    with _naming(root, name), _folder_of(root, name) as (folder, file):
        with suppress(FileNotFoundError):
            _require_plain(os.stat(file, dir_fd=folder, follow_symlinks=False).st_mode)
        partial = f".{secrets.token_hex(8)}.partial"  # no one can have put a link there
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, new, 0o666, dir_fd=folder)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise
        with suppress(OSError):  # not every file system lets one wait for a folder
            os.fsync(folder)


def make_root(path: Path) -> None:
    """The folder of a run, by the path the user gave, links and all."""
    with _naming(path, "."):
        path.mkdir(parents=True, exist_ok=True)


def make_folder(root: Path, name: str) -> None:
    """A folder of `root` that is there afterwards and is no link."""
    with _naming(root, f"{name}/any"):
        with suppress(FileExistsError):
            os.mkdir(root / name)
        with _folder_of(root, f"{name}/any"):
            pass


def remove_partial(root: Path, name: str) -> None:
    """Remove what kills left of files of a folder that were being written."""
    with _folder_of(root, f"{name}/any") as (folder, _):
        for left in filter(PARTIAL.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                os.unlink(left, dir_fd=folder)


# -- checksums


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).hexdigest().encode()


def _place(data: bytes, end: int | None) -> slice | None:
    """Where the checksum stands: the last one of data[:end]."""
    found = list(_FIELD.finditer(data, 0, len(data) if end is None else end))
    return slice(*found[-1].span(1)) if found else None


def sealed(data: bytes, end: int | None = None) -> bool:
    """Whether there is a checksum, right or wrong."""
    return _place(data, end) is not None


def seal(name: str, data: bytes, end: int | None = None) -> bytes:
    """`data` with its checksum where it has `BLANK`, of data[:end] if that is given."""
    place = _place(data, end)
    if place is None:
        raise ValueError(f"{name} has no place for a checksum")
    return data[: place.start] + _digest(name, data) + data[place.stop :]


def check(name: str, data: bytes, end: int | None = None) -> str:
    """The checksum of `data`; `DamageError` if there is none or it is another file's."""
    place = _place(data, end)
    if place is None:
        raise DamageError("it has no checksum")
    blank = data[: place.start] + BLANK.encode() + data[place.stop :]
    if _digest(name, blank) != data[place]:
        raise DamageError("its content is not what its checksum is of")
    return data[place].decode()


# -- JSON


def to_json(content: dict[str, Any], indent: int | None = 2) -> bytes:
    """JSON with a place for a checksum at its end."""
    text = json.dumps({**content, "checksum": BLANK}, indent=indent, allow_nan=False)
    return f"{text}\n".encode()


def parse_json(data: bytes) -> Any:
    """What JSON says; `DamageError` for anything that is not, or says a thing twice."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could not be shown
    except RecursionError:
        raise DamageError("it is nested too deeply") from None
    except ValueError as error:
        raise DamageError(f"it is not JSON: {show(error)}") from None
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {brief(next(n for n in names if names.count(n) > 1))} twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
