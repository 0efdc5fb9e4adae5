"""Checksums of what a run says of its steps."""

from __future__ import annotations

import hashlib


class Records:
    """Checksums of a stage's lines of metrics.jsonl, up to every step."""

    def __init__(self) -> None:
        self._sum, self._steps = hashlib.sha256(), dict[int, str]()

    def add(self, step: int, line: bytes) -> None:
        self._sum.update(line)
        self._steps[step] = self._sum.hexdigest()

    def digest(self, step: int | None = None) -> str:
        """Of all lines, or of those up to a step."""
        if step is None or not self._steps:
            return self._sum.hexdigest()
        return self._steps[max(known for known in self._steps if known <= step)]
