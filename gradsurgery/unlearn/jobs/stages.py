"""Names of a seed's stages: the original, the retrained and the unlearned models.

One of the last is named METHOD[+VARIANT][@FRACTION]: "ltu", "ltu@0.1" for a tenth of the retain
set, "ltu+first order@0.1" for other options as well.
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


def stage_name(method: str, fraction: float = 1.0, variant: str = "") -> str:
    plus = f"+{variant}" if variant else ""
    return f"{method}{plus}" if fraction == 1 else f"{method}{plus}@{fraction}"


def parts(name: str) -> Parts:
    head, at, fraction = name.rpartition("@")
    method, _, variant = (head if at else name).partition("+")
    return Parts(method, variant, float(fraction) if at else 1.0)
