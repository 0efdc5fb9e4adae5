"""Every method by its name: one file of this folder is one method, and is found by being here.

A method's class says its name, title, paper, color, space of options and what it asks of a task;
the command line, searches, reports and docs take all of that from `METHODS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from gradsurgery.unlearn.training.trainer import Trainer

# in reports the order of the columns; methods that are not named here follow by name
ORDER = (
    "orthograd",
    "ltu",
    "scrub",
    "salun",
    "random_label",
    "ssd",
    "l1_sparse",
    "bad_teacher",
    "boundary_shrink",
    "gdr_gma",
    "gru",
    "surgery",
    "graddiff",
    "neggradplus",
    "neggrad",
    "finetune",
)
REFERENCE = "retrain"  # what all others are measured by


def methods_in(module: ModuleType) -> Iterator[type[Trainer]]:
    """Those that a file, or a folder's `__init__`, holds: trainers with a name of their own."""
    for found in vars(module).values():
        named = isinstance(found, type) and issubclass(found, Trainer) and vars(found).get("name")
        if named and f"{found.__module__}.".startswith(f"{module.__name__}."):
            yield found


def check_described(methods: Iterable[type[Trainer]]) -> None:
    """Raise `TypeError` naming a method that lacks something, or has what another has already."""
    taken: dict[str, type[Trainer]] = {}
    for method in methods:
        where = f"{method.__module__}.{method.__name__}"
        for field in ("name", "title", "about", "color"):
            if not vars(method).get(field):
                raise TypeError(f"{where} has no {field} of its own")
        if not re.fullmatch("[a-z][a-z0-9_]*", method.name):
            raise TypeError(f"{where}: name must be lower-case letters, digits and _")
        if not re.fullmatch("#[0-9a-f]{6}", method.color):
            raise TypeError(f"{where}: color must be #rrggbb, got {method.color}")
        for mark in (method.name, method.title, method.color):
            if taken.setdefault(mark, method) is not method:
                raise TypeError(f"{where} and {taken[mark].__name__} are both {mark}")


def _found() -> dict[str, type[Trainer]]:
    names = sorted(module.name for module in iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    found = [method for module in modules for method in methods_in(module)]
    check_described(found)
    place = {name: k for k, name in enumerate(ORDER)}
    found.sort(key=lambda method: (place.get(method.name, len(place)), method.name))
    return {method.name: method for method in found}


ALL: dict[str, type[Trainer]] = _found()  # retraining among them
METHODS: dict[str, type[Trainer]] = {k: v for k, v in ALL.items() if k != REFERENCE}
"""Every method by its name, as `unlearning(method=...)` and `--method` take it."""
