"""A run's folder as jobs see it: a file is checked when it is read, and named if it is damaged."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs import files
from gradsurgery.unlearn.jobs.shapes import check_summary, expect
from gradsurgery.unlearn.jobs.yaml import parse_yaml, to_yaml

CHECKPOINT = "checkpoint.safetensors"


class CheckedFolder:
    """The files of a folder.

    What is read is checked first; a file that is damaged, or is none, is an `InputError` that names
    it and says what to delete. What cannot be written is an `OSError`.

    Args:
        option: what the messages say the path was given as.
    """

    def __init__(self, path: Path, option: str = "--out") -> None:
        self.path, self.option = path, option
        self.unchecked = False  # files without checksums will do, if none has one

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def make_folder(self, name: str) -> None:
        files.make_folder(self.path, name)

    def has(self, name: str) -> bool:
        """Whether something of that name is there, whatever it is."""
        return os.path.lexists(self / name)

    @property
    def old(self) -> bool:
        """Made before files had checksums: those that every run has are there and have none."""
        names = filter(self.has, ("config.yaml", "env.json", "summary.json"))
        found = [files.sealed(self.read(name)) for name in names]
        return bool(found) and not any(found)

    def require_finished(self) -> None:
        """`InputError` unless this is a finished run; one without checksums has a warning."""
        if not self.has("summary.json"):
            raise InputError(
                f"{self.option}: {show(self.path)} is not a finished run: it has no summary.json"
            )
        if self.old:
            self.unchecked = True
            print(
                f"gradsurgery: warning: {show(self.path)} is of a version that kept no checksums: "
                "what it holds is taken as it is",
                file=sys.stderr,
            )

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """What goes wrong inside is an `InputError` that names the file and the way out."""
        stage = name.removeprefix("models/").removesuffix(".safetensors")
        again = f"--out {show(self.path)} --resume auto"  # without --out a finished run is no match
        there = self.has(name)
        way_out = f"{'delete it and ' if there else ''}continue the run with {again}"
        if name == "env.json":
            way_out = f"{'delete it, and ' if there else ''}{again} writes it anew, of this machine"
        elif name == "metrics.jsonl":
            way_out = f"delete it, stages/*.json and {CHECKPOINT}, and {again} makes all again"
        elif name.startswith("models/"):
            way_out = f"delete stages/{stage}.json, and --resume auto makes it again"
        elif name.endswith(".yaml"):
            way_out = "start the run anew in another directory"
        try:
            yield
        except OSError as error:
            where, reason = show(error.filename or self / name), error.strerror or error
            raise InputError(f"{self.option}: cannot read {where}: {reason}; {way_out}") from None
        except files.DamageError as error:
            where = show(self / name)
            raise InputError(f"{self.option}: {where} is damaged: {error}; {way_out}") from None

    def read(self, name: str) -> bytes:
        with self._reading(name):
            return files.read(self.path, name)

    def _checked(self, name: str) -> bytes:
        data = files.read(self.path, name)
        if not self.unchecked or files.sealed(data):
            files.check(Path(name).name, data)
        return data

    def read_json(self, name: str, shape: Any) -> dict[str, Any]:
        """A JSON file's content, if its checksum is right and it has the shape."""
        with self._reading(name):
            content = files.parse_json(self._checked(name))
            expect(content, shape)
            content.pop("checksum", None)
        return content

    def write(self, name: str, content: bytes | str) -> None:
        files.write(self.path, name, content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, files.seal(Path(name).name, files.to_json(content)))

    def summary(self) -> dict[str, Any]:
        """summary.json, if tables and pages can be made of it."""
        with self._reading("summary.json"):
            content = self.read_json("summary.json", {})
            check_summary(content)
        return content

    def options(self, name: str = "config.yaml") -> dict[str, Any]:
        """The options of a YAML file of the run, by section."""
        with self._reading(name):
            return parse_yaml(self._checked(name))

    def write_options(self, name: str, config: Any) -> None:
        data = f"{to_yaml(config)}# checksum: {files.BLANK}\n".encode()
        self.write(name, files.seal(name, data))
