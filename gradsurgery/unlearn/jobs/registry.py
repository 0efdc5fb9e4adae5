"""Every job by its name: a folder here with a job.py is found by being here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.base import Job

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/job.py"))


def find(name: str) -> Job[Any, Any]:
    """The job of that name, which has read no data yet; `InputError` where there is none."""
    if name not in names():
        raise InputError(f"there is no job named {show(name, 80)}, only {', '.join(names())}")
    module = import_module(f"{__package__}.{name}.job")
    (kind,) = (each for each in vars(module).values() if _is_job(each, module.__name__))
    return kind()


def _is_job(found: Any, module: str) -> bool:
    return isinstance(found, type) and issubclass(found, Job) and found.__module__ == module
