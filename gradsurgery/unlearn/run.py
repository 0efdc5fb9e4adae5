"""The run directory: everything a run leaves behind, written so that a kill at any moment loses
nothing.

config.yaml       the options, to be given back to --config
env.json          versions, machine, threads
tuning.yaml       the options as they were given, where the run first searches for better ones
tuning.jsonl      one line a draw of that search
tuning/           models it starts from and compares with
metrics.jsonl     one line a step
stages/           one JSON a finished stage (a seed's original, retrained or unlearned model)
models/           its weights
checkpoint.pt     where the unfinished stage can continue
summary.json      every metric by method: mean, spread, values, gap to Retrain
model.safetensors the unlearned model of the first seed and method
model_card.md     what that model is and is not
report.html       all of it to look at
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError

Stage = tuple[int, str]  # seed, method


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file that is either the old one or the whole new one, whatever happens."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a file, none if there is no file; one that a kill cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def environment(threads: int) -> dict[str, Any]:
    """What a run depended on besides its options."""
    packages = ("gradsurgery", "torch", "numpy", "scikit-learn", "matplotlib", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


class RunDirectory:
    """One run's files. As a context manager it holds a lock: two processes cannot share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None

    def __enter__(self) -> RunDirectory:
        for folder in (self.path, self.path / "stages", self.path / "models"):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            import fcntl  # POSIX; the lock goes when the process does, even by SIGKILL

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"--out: another process is working in {self.path}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def complete(self) -> bool:
        return (self / "summary.json").exists() and (self / "report.html").exists()

    # -- stages

    def _stage_path(self, stage: Stage) -> Path:
        return self / f"stages/seed{stage[0]}-{stage[1]}.json"

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """Numbers of a finished stage, None if it has not finished."""
        path = self._stage_path(stage)
        return read_json(path) if path.exists() else None

    def results(self) -> list[dict[str, Any]]:
        """All finished stages, by seed."""
        found = [read_json(path) for path in (self / "stages").glob("seed*.json")]
        return sorted(found, key=lambda result: result["seed"])

    def finish(self, stage: Stage, model: nn.Module, result: dict[str, Any]) -> None:
        """Keep a stage's weights and numbers; from here on a resumed run skips it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        self.save_model(model, f"models/seed{stage[0]}-{stage[1]}.safetensors")
        write_json(self._stage_path(stage), {"seed": stage[0], "method": stage[1], **result})
        (self / "checkpoint.pt").unlink(missing_ok=True)

    def add(self, stage: Stage, content: dict[str, Any]) -> None:
        """Add to the numbers of a finished stage."""
        write_json(self._stage_path(stage), {**(self.result(stage) or {}), **content})

    def save_model(self, model: nn.Module, name: str) -> None:
        from safetensors.torch import save

        # to bytes first: a full disk then is an OSError of ours, not a half-written file
        write_atomic(self / name, save({k: v.contiguous() for k, v in model.state_dict().items()}))

    def load_model(self, model: nn.Module, stage: Stage) -> None:
        """The weights of a finished stage."""
        self.load_weights(model, f"models/seed{stage[0]}-{stage[1]}.safetensors")

    def load_weights(self, model: nn.Module, name: str) -> None:
        from safetensors.torch import load

        model.load_state_dict(load((self / name).read_bytes()))

    # -- the unfinished stage

    def save_checkpoint(self, stage: Stage, state: dict[str, Any]) -> None:
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        buffer = io.BytesIO()
        torch.save({"seed": stage[0], "method": stage[1], "trainer": state}, buffer)
        write_atomic(self / "checkpoint.pt", buffer.getvalue())

    def checkpoint(self, stage: Stage) -> dict[str, Any] | None:
        """The trainer state to continue `stage` from, if that is the stage that was interrupted."""
        path = self / "checkpoint.pt"
        if not path.exists():
            return None
        saved = torch.load(path, weights_only=True)
        return saved["trainer"] if (saved["seed"], saved["method"]) == stage else None

    # -- metrics.jsonl

    def log(self, stage: Stage, record: dict[str, Any]) -> None:
        """Append one line; it survives a kill of this process as soon as this returns."""
        if self._metrics is None:
            self._metrics = (self / "metrics.jsonl").open("a", encoding="utf-8")
        line = {"seed": stage[0], "method": stage[1], **record}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()

    def records(self) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return read_lines(self / "metrics.jsonl")

    def tuning(self) -> Iterator[dict[str, Any]]:
        """Lines of tuning.jsonl."""
        return read_lines(self / "tuning.jsonl")

    def rewind(self) -> None:
        """Drop the lines of steps that will be taken again: those past the last checkpoint."""
        path = self / "checkpoint.pt"
        saved = torch.load(path, weights_only=True) if path.exists() else None

        def keep(record: dict[str, Any]) -> bool:
            stage = (record["seed"], record["method"])
            if self._stage_path(stage).exists():
                return True
            if saved is None or (saved["seed"], saved["method"]) != stage:
                return False
            return record["step"] <= saved["trainer"]["step"]

        lines = [json.dumps(record) + "\n" for record in self.records() if keep(record)]
        write_atomic(self / "metrics.jsonl", "".join(lines))


def new_directory(parent: Path, name: str) -> Path:
    """`parent/name-N` with the smallest N above every one that exists."""
    return parent / f"{name}-{max(_numbers(parent, name), default=0) + 1}"


def numbered(parent: Path, name: str) -> list[Path]:
    """The directories `parent/name-N` that exist, newest first."""
    return [parent / f"{name}-{n}" for n in sorted(_numbers(parent, name), reverse=True)]


def _numbers(parent: Path, name: str) -> list[int]:
    tails = (path.name.removeprefix(f"{name}-") for path in parent.glob(f"{name}-*"))
    return [int(tail) for tail in tails if tail.isdecimal()]


def fingerprint(indices: Tensor) -> str:
    """SHA-256 of a forget set: its sorted sample indices, as decimal numbers joined by commas."""
    import hashlib

    text = ",".join(str(i) for i in sorted(indices.tolist()))
    return hashlib.sha256(text.encode()).hexdigest()
