"""Weights and trainer states as safetensors files with a checksum: nothing in them is ever run.

A state is a tree of dictionaries, lists, numbers, text and tensors. Its tensors go into the file as
they are, the rest as JSON into the file's header, a tensor there as its number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import files
from gradsurgery.unlearn.jobs.files import BLANK, DamageError

LARGEST_HEADER = 2**24  # bytes


def to_bytes(name: str, tensors: dict[str, Tensor], state: str = "") -> tuple[bytes, str]:
    """The content of the file `name`, and the checksum in it."""
    from safetensors.torch import save

    # of one note alone the bytes depend on the tensors and nothing else: several have no order
    notes = {"checksum": BLANK, **({"state": state} if state else {})}
    data = save(_apart(tensors), notes)
    end, file = _header_end(data, len(data)), Path(name).name
    data = files.seal(file, data, end)
    return data, files.check(file, data, end)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as tied weights do."""
    seen: set[int] = set()
    found = {}
    for key, value in tensors.items():
        whole = value.contiguous()
        memory = whole.untyped_storage().data_ptr()
        found[key] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return found


def read_bytes(root: Path, name: str) -> tuple[bytes, str, str]:
    """A file as it is, its state as text, "" if it has none, and its checksum, which is right."""
    with open(files.open_plain(root, name), "rb") as stream:
        # looked at before it is read: a file made longer may be larger than the memory
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        end = _header_end(start, size)
        header = stream.read(end - 8)
        try:
            known = files.parse_json(header)
            state = known.pop("__metadata__").get("state", "")
            length = end + max([0, *(entry["data_offsets"][1] for entry in known.values())])
        except (AttributeError, LookupError, TypeError):
            raise DamageError("it is not a safetensors file with a checksum") from None
        if length != size or not isinstance(state, str):
            raise DamageError(f"it has {size} bytes, not the {brief(length)} of its header")
        data = start + header + stream.read()
    return data, state, files.check(Path(name).name, data, end)


def read(root: Path, name: str) -> tuple[dict[str, Tensor], str, str]:
    """The tensors of a file, its state as text, "" if it has none, and its checksum."""
    from safetensors.torch import load

    data, state, checksum = read_bytes(root, name)
    try:
        return load(data), state, checksum
    except Exception as error:  # safetensors has an exception of its own, and torch several
        raise DamageError(f"it is not a safetensors file: {show(error)}") from None


def _header_end(start: bytes, size: int) -> int:
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 8 < end <= min(size, LARGEST_HEADER):
        raise DamageError("it is not a safetensors file")
    return end


def pack(state: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state by number, and everything else as JSON."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, Mapping):  # keys can be numbers, as an optimizer's are
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [plain(item) for item in value]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise InputError(f"a state holds tensors, numbers and text, got {type(value).__name__}")

    return tensors, json.dumps(plain(state), allow_nan=False)


def unpack(tensors: dict[str, Tensor], text: str) -> Any:
    """The state of `pack`."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[str(content)]
        if kind == "dict":
            return {made(key): made(item) for key, item in content}
        return {"tuple": lambda: tuple(map(made, content)), "float": lambda: float(content)}[kind]()

    try:
        return made(files.parse_json(text.encode()))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise DamageError(f"it holds no state: {show(error)}") from None
