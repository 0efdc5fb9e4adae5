"""The run directory: everything a run leaves behind, written so that a kill at any moment loses
nothing.

config.yaml       the options, to be given back to --config
env.json          versions, machine, threads
data.json         what data and model are, where they are the user's
tuning.yaml       the options as they were given, where the run first searches for better ones
tuning.jsonl      one line a draw of that search
tuning/           models it starts from and compares with
metrics.jsonl     one line a step
stages/           one JSON a finished stage (a seed's original, retrained or unlearned model)
models/           its weights
checkpoint.safetensors  where the unfinished stage can continue
summary.json      every metric by method: mean, spread, values, gap to Retrain
model.safetensors the unlearned model of the first seed and method
model_card.md     what that model is and is not
report.html       all of it to look at
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from torch import nn

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs import files, tensors
from gradsurgery.unlearn.jobs.checked import CHECKPOINT as CHECKPOINT
from gradsurgery.unlearn.jobs.checked import CheckedFolder
from gradsurgery.unlearn.jobs.records import Records
from gradsurgery.unlearn.jobs.shapes import RECORD, SAVED, STAGE, TRIAL, expect

if TYPE_CHECKING:
    from gradsurgery.unlearn.training.trainer import Trainer

Stage = tuple[int, str]  # seed, method

FOLDERS = ("stages", "models")
METRICS = "metrics.jsonl"
FACTS = "data.json"
LISTED = 6  # files that a message names one by one


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file that is either the old one or the whole new one, whatever happens."""
    files.write(path.parent, path.name, content)


class RunDirectory(CheckedFolder):
    """One run's files. As a context manager it holds a lock: two processes cannot share it."""

    def __init__(self, path: Path, option: str = "--out") -> None:
        super().__init__(path, option)
        self._lock: int | None = None
        self._metrics: IO[bytes] | None = None
        self._records: dict[Stage, Records] = {}
        self._trials = ""  # checksum of the last line of tuning.jsonl

    def __enter__(self) -> RunDirectory:
        files.make_root(self.path)
        self._lock = files.open_plain(self.path, ".lock", os.O_RDWR | os.O_CREAT)
        try:
            # the lock goes when the process does, even by SIGKILL
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in FOLDERS:
                self.make_folder(folder)
            for folder in (".", *FOLDERS, "tuning", "shadows"):
                with suppress(FileNotFoundError):
                    files.remove_partial(self.path, folder)
        except BlockingIOError:
            self.__exit__()
            raise InputError(f"--out: another process is working in {self.path}") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._metrics is not None:
            with suppress(OSError):  # of a line that a full disk did not take, and that was said
                self._metrics.close()
        if self._lock is not None:
            os.close(self._lock)
        self._metrics = self._lock = None

    @property
    def complete(self) -> bool:
        return self.has("summary.json") and self.has("report.html")

    def facts(self) -> dict[str, str | int]:
        """What the run keeps of its data and model; {} where it keeps nothing."""
        return self.read_json(FACTS, {str: (str, int)}) if self.has(FACTS) else {}

    # -- stages

    def _stage(self, name: str) -> dict[str, Any]:
        """A file of stages/, with what it says of other files."""
        with self._reading(name):
            content = self.read_json(name, STAGE)
            if name != _stage_name((content["seed"], content["method"])):
                raise files.DamageError("it is of another stage than its name says")
        return content

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """Numbers of a finished stage, None if it has not finished."""
        name = _stage_name(stage)
        return _measured(self._stage(name)) if self.has(name) else None

    def miss(self, stage: Stage) -> NoReturn:
        """Say that a stage is not there, though other files were made of it."""
        raise InputError(
            f"{self.option}: {show(self.path)} has no {show(_stage_name(stage))}, which its "
            "summary is of; --resume auto makes it again"
        )

    def _stages(self) -> list[dict[str, Any]]:
        names = sorted(path.name for path in (self / "stages").glob("seed*.json"))
        return [self._stage(f"stages/{name}") for name in names]

    def results(self) -> list[dict[str, Any]]:
        """All finished stages, by seed."""
        return sorted(map(_measured, self._stages()), key=lambda result: result["seed"])

    def finish(self, stage: Stage, model: nn.Module | None, result: dict[str, Any]) -> None:
        """Keep a stage's numbers, and its weights unless they stand elsewhere; from here on a
        resumed run skips it."""
        self._sync()
        weights = {} if model is None else {"model": self.save_model(model, _model_name(stage))}
        known = {**weights, "records": self._records.get(stage, Records()).digest()}
        content = {"seed": stage[0], "method": stage[1], **result, "files": known}
        self.write_json(_stage_name(stage), content)
        with suppress(FileNotFoundError):
            os.unlink(self / CHECKPOINT)

    def add(self, stage: Stage, content: dict[str, Any]) -> None:
        """Add to the numbers of a finished stage."""
        name = _stage_name(stage)
        self.write_json(name, {**self._stage(name), **content})

    def save_model(self, model: nn.Module, name: str) -> str:
        """Keep a model's weights; the file's checksum."""
        # to bytes first: a full disk then is an OSError of ours, not a half-written file
        data, checksum = tensors.to_bytes(name, dict(model.state_dict()))
        self.write(name, data)
        return checksum

    def load_model(self, model: nn.Module, stage: Stage) -> None:
        """The weights of a finished stage."""
        name = _model_name(stage)
        with self._reading(name):
            self._same_model(stage, self.load_weights(model, name))

    def _same_model(self, stage: Stage, checksum: str) -> None:
        known = self._stage(_stage_name(stage)).get("files", {})
        if known.get("model") != checksum:
            raise files.DamageError("it is not the file its stage was finished with")

    def model_bytes(self, stage: Stage) -> bytes:
        """The file of a finished stage's model, if it is whole."""
        name = _model_name(stage)
        with self._reading(name):
            data, _, checksum = tensors.read_bytes(self.path, name)
            self._same_model(stage, checksum)
        return data

    def check_model(self, stage: Stage) -> None:
        """Raise `InputError` unless the file of a stage's model is whole, where it has one."""
        if "model" in self._stage(_stage_name(stage)).get("files", {"model": ""}):
            self.model_bytes(stage)

    def load_weights(self, model: nn.Module, name: str) -> str:
        """The weights of a file; its checksum."""
        with self._reading(name):
            found, _, checksum = tensors.read(self.path, name)
            try:
                model.load_state_dict(found)
            except RuntimeError:
                raise files.DamageError("its tensors are not those of the model") from None
        return checksum

    # -- the unfinished stage

    def save_checkpoint(self, stage: Stage, state: dict[str, Any]) -> None:
        self._sync()
        known = self._records.get(stage, Records()).digest(state["step"])
        content = {"seed": stage[0], "method": stage[1], "records": known, "trainer": state}
        data, _ = tensors.to_bytes(CHECKPOINT, *tensors.pack(content))
        self.write(CHECKPOINT, data)

    def _checkpoint(self) -> dict[str, Any] | None:
        if not self.has(CHECKPOINT):
            return None
        with self._reading(CHECKPOINT):
            found, state, _ = tensors.read(self.path, CHECKPOINT)
            content = tensors.unpack(found, state)
            expect(content, SAVED)
        return content

    def checkpoint(self, stage: Stage) -> dict[str, Any] | None:
        """The trainer state to continue `stage` from, if that is the stage that was interrupted."""
        saved = self._checkpoint()
        if saved is None or (saved["seed"], saved["method"]) != stage:
            return None
        return saved["trainer"]

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Let a trainer continue from what `checkpoint` found."""
        with self._reading(CHECKPOINT):
            try:
                trainer.load_state_dict(state)
            except InputError as error:
                raise files.DamageError(str(error)) from None

    # -- metrics.jsonl

    def _sync(self) -> None:
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def log(self, stage: Stage, record: dict[str, Any]) -> None:
        """Append one line; it survives a kill of this process as soon as this returns."""
        if self._metrics is None:
            self._metrics = self._appending("metrics.jsonl")
        line = {"seed": stage[0], "method": stage[1], **record}
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        self._metrics.write(data)
        self._metrics.flush()
        self._records.setdefault(stage, Records()).add(record["step"], data)

    def _appending(self, name: str) -> IO[bytes]:
        new = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        return open(files.open_plain(self.path, name, new), "ab")

    def _lines(self) -> list[tuple[Stage, dict[str, Any], bytes]]:
        """What metrics.jsonl holds of each step; a line that says nothing of one is left out."""
        found = []
        for line in self._read_lines("metrics.jsonl"):
            with suppress(files.DamageError):  # cut short by a kill, or not of a stage that counts
                record = files.parse_json(line)
                expect(record, RECORD)
                found.append(((record["seed"], record["method"]), record, line))
        return found

    def _require_lines(
        self, found: list[tuple[Stage, dict[str, Any], bytes]], more: tuple[str, ...] = ()
    ) -> None:
        """Raise `InputError` unless each finished stage has the lines it was finished with, so
        that none is missing.

        Args:
            more: other files that are known to lack lines.
        """
        known: dict[Stage, Records] = {}
        for stage, record, line in found:
            known.setdefault(stage, Records()).add(record["step"], line)
        lost = []
        stages = self._stages()
        for result in stages:
            stage = result["seed"], result["method"]
            wanted = result.get("files", {}).get("records")
            if wanted not in (None, known.get(stage, Records()).digest()):
                lost.append(_stage_name(stage))
        if not lost and not more:
            return
        names = [show(name, 80) for name in lost]
        if len(lost) > LISTED:  # to make all again is more than needed, and right
            names = [f"stages/*.json ({len(lost)} of {len(stages)})"]
        names += more
        several = len(lost) + len(more) > 1
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        state = "damaged: it has" if self.has(METRICS) else "lost: there are"
        raise InputError(
            f"{self.option}: {show(self / METRICS)} is {state} other lines than {listed} "
            f"{'were' if several else 'was'} made with; delete {'those' if several else 'that'}, "
            f"not {METRICS}, and --out {show(self.path)} --resume auto makes "
            f"{'them' if several else 'it'} again"
        )

    def _read_lines(self, name: str) -> list[bytes]:
        """Whole lines of a file, if there is one; a kill can have cut the last one short."""
        if not self.has(name):
            return []
        with self._reading(name):
            data = files.read(self.path, name, 4 * files.LIMIT)
        return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)

    def records(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        found = self._lines()
        self._require_lines(found)
        return [record for _, record, _ in found]

    def rewind(self) -> None:
        """Drop the lines of steps that will be taken again: those past the last checkpoint."""
        self._records = {}
        saved = self._checkpoint()
        finished = {(result["seed"], result["method"]) for result in self._stages()}
        last = None if saved is None else (saved["seed"], saved["method"])
        kept = []
        mine = Records()
        found = self._lines()
        for stage, record, line in found:
            if stage in finished:
                kept.append(line)
            elif saved and stage == last and record["step"] <= saved["trainer"]["step"]:
                kept.append(line)
                mine.add(record["step"], line)
        more = ()
        if saved and last is not None and last not in finished:
            more = () if mine.digest() == saved["records"] else (CHECKPOINT,)
            self._records[last] = mine
        self._require_lines(found, more)
        self.write("metrics.jsonl", b"".join(kept))

    # -- tuning.jsonl

    def tuning(self) -> list[dict[str, Any]]:
        """Lines of tuning.jsonl; the checksum of each is over the one before as well."""
        found, self._trials = [], ""
        for number, line in enumerate(self._read_lines("tuning.jsonl"), 1):
            try:
                if not self.unchecked or files.sealed(line):
                    self._trials = files.check(self._trials, line)
                trial = files.parse_json(line)
                expect(trial, TRIAL)
            except files.DamageError as error:
                raise InputError(
                    f"{self.option}: {show(self / 'tuning.jsonl')} is damaged: line {number}: "
                    f"{error}; delete this line and all after it, and --resume auto goes on"
                ) from None
            trial.pop("checksum", None)
            found.append(trial)
        return found

    def rewind_tuning(self) -> list[dict[str, Any]]:
        """The lines of tuning.jsonl, and no half line after them."""
        found = self.tuning()
        self.write("tuning.jsonl", b"".join(self._read_lines("tuning.jsonl")))
        return found

    def add_trial(self, trial: dict[str, Any]) -> dict[str, Any]:
        """Append a line to tuning.jsonl; it survives a loss of power as soon as this gives it."""
        line = files.seal(self._trials, files.to_json(trial, indent=None))
        with self._appending("tuning.jsonl") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._trials = files.check(self._trials, line)
        return trial


def _stage_name(stage: Stage) -> str:
    return f"stages/seed{stage[0]}-{stage[1]}.json"


def _model_name(stage: Stage) -> str:
    return f"models/seed{stage[0]}-{stage[1]}.safetensors"


def _measured(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "files"}


def new_directory(parent: Path, name: str) -> Path:
    """`parent/name-N` with the smallest N above every one that exists."""
    return parent / f"{name}-{max(_numbers(parent, name), default=0) + 1}"


def numbered(parent: Path, name: str) -> list[Path]:
    """The directories `parent/name-N` that exist, newest first."""
    return [parent / f"{name}-{n}" for n in sorted(_numbers(parent, name), reverse=True)]


def _numbers(parent: Path, name: str) -> list[int]:
    tails = (path.name.removeprefix(f"{name}-") for path in parent.glob(f"{name}-*"))
    return [int(tail) for tail in tails if tail.isdecimal()]


def fingerprint(indices: Iterable[int]) -> str:
    """SHA-256 of a forget set: its sorted sample indices, as decimal numbers joined by commas."""
    return hashlib.sha256(",".join(map(str, sorted(indices))).encode()).hexdigest()
