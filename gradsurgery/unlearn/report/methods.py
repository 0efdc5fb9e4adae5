"""The methods as a table, for docs/unlearning.md."""

from __future__ import annotations

import re

from gradsurgery.unlearn.methods import METHODS

HEAD = ("name", "a step, or what it does", "asks of the task", "source")


def markdown() -> str:
    rows = [
        (f"`{kind.name}`", kind.about, ", ".join(sorted(kind.asks)), _linked(kind.paper))
        for kind in METHODS.values()
    ]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _linked(paper: str) -> str:
    return re.sub(r"(.+) \(arXiv:([\d.]+)\)", r"[\1](https://arxiv.org/abs/\2)", paper)
