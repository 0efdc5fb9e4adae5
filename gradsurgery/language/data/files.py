"""Examples read from local files."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.language.data.examples import Example, collect
from gradsurgery.text import brief, show

ENDS = (".jsonl", ".json", ".txt")  # and with .gz after them
FORMATS = f"{', '.join(ENDS)}, these with .gz, and .parquet"
BOM = b"\xef\xbb\xbf"


def read(path: str | os.PathLike[str], first_id: int = 0) -> list[Example]:
    """The examples of a file, in its order.

    | a file | has |
    |---|---|
    | .jsonl | a row on each line; blank lines are left out |
    | .json | a list of rows, or a row on each line, as TOFU's files |
    | .txt | one text, the whole file, as MUSE's raw ones |
    | .parquet | rows; the extra `parquet` brings the reader |

    Rows are as `from_rows` takes them. The first three may be compressed, with .gz after their
    name. Text is UTF-8.

    Args:
        path: a file.
        first_id: the id of the first example; the others count on. Let sets that train together,
            as forget and retain, not share ids.

    Raises:
        InputError: naming the file, the line (of a list or a table, the row, from 1) and what is
            wrong with it.
        MissingPackageError: a .parquet file without pyarrow.
    """
    path = Path(path)
    name = show(path)
    if path.is_dir():
        raise InputError(f"{name} is a folder: name a file in it, or take read_requests")
    if not path.is_file():
        raise InputError(f"{name} {'is not a file' if os.path.lexists(path) else 'is not there'}")
    end = path.name.lower().removesuffix(".gz")
    try:
        if end.endswith(".parquet"):
            rows = _table(path)
        elif end.endswith(ENDS):
            with _opened(path) as file:
                rows = list(_whole(file, name) if end.endswith(".txt") else _rows(file, name))
        else:
            raise InputError(f"{name}: of this kind none is read; there are {FORMATS}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name}: {reason}") from None
    if not rows:
        raise InputError(f"{name} holds no row")
    return collect(rows, first_id)


def read_requests(folder: str | os.PathLike[str], name: str = "forget") -> list[list[Example]]:
    """The files forget_1, forget_2, ... of a folder in order, as MUSE's scal and sust have them.

    Ids count on from file to file.

    Args:
        folder: where they are; other files in it are not looked at.
        name: what stands before the number.

    Raises:
        InputError: a folder without such files, a number that is missing or there twice; as `read`.
    """
    shown = show(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{shown} is not a folder")
    ends = r"\.parquet|\.(?:json|jsonl|txt)(?:\.gz)?"
    pattern = re.compile(rf"{re.escape(name)}_([1-9][0-9]{{0,8}})(?:{ends})")
    files: dict[int, str] = {}
    for file in sorted(os.listdir(folder)):
        if found := pattern.fullmatch(file):
            number = int(found[1])
            if number in files:
                both = f"{show(files[number])} and {show(file)}"
                raise InputError(f"{shown} holds {both}: which one is meant?")
            files[number] = file
    missing = next(number for number in range(1, len(files) + 2) if number not in files)
    if missing <= len(files) or not files:
        raise InputError(f"{shown} holds no {show(name)}_{missing}")
    requests: list[list[Example]] = []
    for number in range(1, missing):
        first_id = sum(map(len, requests))
        requests.append(read(Path(folder) / files[number], first_id))
    return requests


def _opened(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


Rows = Iterator[tuple[str, Any]]


def _whole(file: BufferedIOBase, name: str) -> Rows:
    text = _decoded(file.read().removeprefix(BOM), name)
    if "\0" in text:
        raise InputError(f"{name} holds zero bytes: it is not a text file")
    yield name, text


def _rows(file: BufferedIOBase, name: str) -> Rows:
    """Of a list that is the whole file, or of lines."""
    began = False
    for at, line in enumerate(file, 1):
        line = line.removeprefix(BOM) if at == 1 else line
        if not line.strip():
            continue
        if not began and line.lstrip().startswith(b"["):
            yield from _listed(b"\n" * (at - 1) + line + file.read(), name)
            return
        began = True
        where = f"{name}, line {at}"
        yield where, _row(line, where)


def _listed(data: bytes, name: str) -> Rows:
    text = _decoded(data, name)
    try:
        rows = _json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}, line {error.lineno}: no JSON: {error.msg}") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    for at, row in enumerate(rows, 1):
        yield f"{name}, row {at}", row


def _row(data: bytes, where: str) -> Any:
    text = _decoded(data, where)
    try:
        return _json(text.strip())
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no JSON: {error.msg}: {brief(text.strip())}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        where = f"{where}, line {line + 1}" if line else where
        raise InputError(f"{where}: byte {data[error.start]:#x} is not UTF-8") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise InputError("nested too deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(show(error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise InputError(f"the key {brief(twice)} is there twice")
    return found


def _table(path: Path) -> list[tuple[str, Any]]:
    package("pyarrow", "parquet", show(path))
    from pyarrow import ArrowInvalid, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise InputError(f"{show(path)} is no parquet file: {show(error)}") from None
    return [(f"{show(path)}, row {at}", row) for at, row in enumerate(rows, 1)]
