"""Compiled models run uncompiled while somebody records them: what was fused has no rows."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Stance:
    """The compiler's, which is that of all threads: the first to come sets it, the last resets it.

    Each that came put back what it had found, two that overlap would leave it set for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._set: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._set = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set.__exit__(None, None, None)


_stance = _Stance()


@contextmanager
def uncompiled() -> Iterator[None]:
    """No compiled model runs as such inside; in other threads neither."""
    if "torch._dynamo" not in sys.modules:  # whoever compiled a model has imported the compiler
        yield
        return
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()
