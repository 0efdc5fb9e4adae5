"""How a run shows where it is: bars on a terminal, one plain line a finished stage otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from gradsurgery.text import show

LONGEST = 2000  # characters of a line


class Progress(Protocol):
    """Told by a run what it does."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def stage(self, label: str, total: int, done: int) -> Any:
        """Context of one stage; its value is called after each step with the steps done."""
        ...


class PlainProgress:
    """Lines only: for logs, pipes and tests."""

    def say(self, text: str) -> None:
        print(show(text, LONGEST), flush=True)

    @contextmanager
    def stage(self, label: str, total: int, done: int) -> Iterator[Any]:
        yield lambda step: None


class Silent:
    """Nothing is shown: by all processes of a run but the first."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def stage(self, label: str, total: int, done: int) -> Iterator[Any]:
        yield lambda step: None


class RichProgress:
    """A bar that goes when its stage does, and the same lines as `PlainProgress` above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        self.console.print(show(text, LONGEST))

    @contextmanager
    def stage(self, label: str, total: int, done: int) -> Iterator[Any]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(show(label), total=total, completed=done)
            yield lambda step: bars.update(task, completed=step)


def make_progress() -> Progress:
    """Bars where standard output is a terminal and rich is installed, lines otherwise."""
    if sys.stdout.isatty():
        try:
            return RichProgress()
        except ImportError:
            pass
    return PlainProgress()
