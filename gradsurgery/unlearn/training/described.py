"""What a method says of itself, for reports, pictures, searches, docs and the command line.

All of it stands in the method's own file, so that a new method is one file. Also what searches draw
from: random choices of options.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class LogUniform:
    """Positive numbers whose logarithm is uniform, to two digits."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return float(f"{self.low * (self.high / self.low) ** rng.random():.1e}")


Space = Mapping[str, Sequence[Any] | LogUniform]  # by option, what it is drawn from
# the methods of an `Objective`
Asked = Literal[
    "losses",
    "outputs",
    "relabel",
    "classes",
    "inputs",
    "with_inputs",
    "with_labels",
    "forget_loss",
    "retain_loss",
]

CEILINGS = (1.2, 2.3, 4.0, 8.0, math.inf)  # nats; 2.3 = ln 10: no better than chance
BATCHES = (32, 64, 128)
# parts of many methods' spaces
CLIMB: Space = {"forget_ceiling": CEILINGS, "forget_batch": BATCHES}
PAIRED: Space = {
    "forget_batch": BATCHES,
    "steps": (40, 80, 160),
    "lr": LogUniform(1e-4, 3e-3),
    "retain_batch": (32, 64),
}
SURGERY: Space = {
    **CLIMB,
    "steps": (40, 80),
    "lr": LogUniform(1e-4, 3e-3),
    "retain_batch": (32, 64),
}


class Described:
    """A method's name, and all that is said of it.

    A class with a `name` of its own, in a file of gradsurgery/unlearn/methods/, is a method that
    the command line, reports and searches know. Trainers elsewhere need none of this.
    """

    name: ClassVar[str] = ""  # what a user types; files of a run have it
    title: ClassVar[str] = ""  # as people read it
    about: ClassVar[str] = ""  # what a step does, or all of it, in a line
    paper: ClassVar[str] = ""  # "Authors et al. year (arXiv:number)"
    color: ClassVar[str] = ""  # "#rrggbb", that no other method has
    # the methods of an `Objective` that it calls: a task that lacks one is refused
    asks: ClassVar[frozenset[Asked]] = frozenset({"losses"})
    space: ClassVar[Space] = MappingProxyType({})  # none: drawn around the config's defaults
    # for tasks of one name, options that are set by the task and not searched for
    space_by_task: ClassVar[Mapping[str, Space]] = MappingProxyType({})
