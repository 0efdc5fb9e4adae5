"""Names of a seed's stages: the original, the retrained and the unlearned models.

One of the last is named METHOD[+VARIANT][@FRACTION][#RUN]: "ltu", "ltu@0.1" for a tenth of the
retain set, "ltu+first order@0.1" for other options as well, "ltu@0.1#2" for a second run of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

NEEDED = ("original", "retrain")  # what methods start from, and what they are compared with
# another Retrain, of other weights and another order of the data: how far apart two of them lie
AGAIN = "retrain+other seed"
TRAINED = (*NEEDED, AGAIN)  # no method made these


def trained(columns: Collection[str]) -> list[str]:
    """Of a run's stages those that no method made: where no retrained model is, Original alone."""
    return [name for name in TRAINED if name in columns]


class Parts(NamedTuple):
    """What a stage's name says."""

    method: str
    variant: str
    fraction: float
    run: int
    """1 for the first, whose name does not say it."""


def stage_name(method: str, fraction: float = 1.0, variant: str = "", run: int = 1) -> str:
    plus = f"+{variant}" if variant else ""
    share = "" if fraction == 1 else f"@{fraction}"
    return f"{method}{plus}{share}{f'#{run}' if run > 1 else ''}"


def parts(name: str) -> Parts:
    stem, _, run = name.rpartition("#")
    again = run.isdecimal() and stem != ""  # as a variant may have the sign, too
    name = stem if again else name
    head, at, fraction = name.rpartition("@")
    method, _, variant = (head if at else name).partition("+")
    return Parts(method, variant, float(fraction) if at else 1.0, int(run) if again else 1)


def repeated(name: str, runs: int) -> list[str]:
    """The stages of the runs that a method's numbers are means over, `name` the first."""
    method, variant, fraction, _ = parts(name)
    return [stage_name(method, fraction, variant, run) for run in range(1, runs + 1)]
