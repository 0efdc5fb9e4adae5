"""What the files of a run hold, and whether they do: types first, then what must fit together."""

from __future__ import annotations

import re
from typing import Any

from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.files import DamageError
from gradsurgery.unlearn.jobs.stages import TRAINED, parts

# A shape is a type; a list of one shape; a tuple of several that do; or a dictionary: of names,
# with ? at the end where they may be missing, and under `str` the shape of everything else.
Shape = Any
LARGEST = 1e30  # no number of a run is larger: training stops there

STAGE: Shape = {
    "seed": int,
    "method": str,
    "steps?": int,
    "seconds?": float,
    "retain_samples?": int,
    "memory?": float,
    "changes?": dict,
    "step_seconds?": {"orthograd": float, "plain": float},
    "metrics?": {str: float},
    "losses?": {"forget": [float], "test": [float]},
    "details?": {
        "note?": str,
        "tables?": {str: {str: float}},
        "examples?": [{"title": str, "wanted": str, "written": str, "picture?": [[float]]}],
    },
    "files?": {"model?": str, "records": str},
}
RECORD: Shape = {"seed": int, "method": str, "step": int, str: (str, bool, float, None)}
SAVED: Shape = {"seed": int, "method": str, "records": str, "trainer": {"step": int, str: object}}
TRIAL: Shape = {"method": str, "options": dict, "gap?": float, "error?": str, "measured?": dict}
ENVIRONMENT: Shape = {"packages": dict}
SPREAD: Shape = {"mean": float, "std": (float, None), "values": [float]}
SUMMARY: Shape = {
    "job": str,
    "task": str,
    "seeds": [int],
    "runs?": int,
    "forget_sets": {str: {"samples": int, "sha256": str, str: (int, str, None)}},
    "columns": {str: {str: SPREAD}},
    "data?": {str: (str, int)},
    "step?": {"seconds": {"orthograd": SPREAD, "plain": SPREAD}},
}


def expect(value: Any, shape: Shape, where: str = "") -> None:
    """Raise `DamageError` naming the first thing in `value` that is not as `shape` says."""
    if isinstance(shape, tuple):
        if not any(fits(value, each) for each in shape):
            names = " or ".join(map(_name, shape))
            raise DamageError(f"{where or 'it'} must be {names}, got {brief(value)}")
    elif isinstance(shape, dict):
        expect(value, dict, where)
        names = {name.rstrip("?"): each for name, each in shape.items() if name is not str}
        for name in shape:
            if name is not str and not name.endswith("?") and name not in value:
                raise DamageError(f"{where or 'it'} has no {name}")
        for name, item in value.items():
            if name in names or str in shape:
                inner = f"{where}.{name}" if where else name
                expect(item, names[name] if name in names else shape[str], show(inner, 80))
    elif isinstance(shape, list):
        expect(value, list, where)
        for item in value:
            expect(item, shape[0], f"every one of {where or 'it'}")
    elif not fits(value, shape):
        raise DamageError(f"{where or 'it'} must be {_name(shape)}, got {brief(value)}")


def fits(value: Any, shape: type | None) -> bool:
    if shape is None:
        return value is None
    if shape is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST
    return isinstance(value, shape) and not (shape is int and isinstance(value, bool))


def _name(shape: type | None) -> str:
    names = {dict: "a table of names", list: "a list", str: "text", int: "a whole number"}
    return names.get(shape, "a number" if shape is float else str(shape))  # type: ignore[arg-type]


def check_summary(summary: Any) -> None:
    """Raise `DamageError` unless tables and pages can be made of a summary.json."""
    expect(summary, SUMMARY)
    known = summary["job"] in registry.names()
    if not known or summary["task"] not in registry.find(summary["job"]).tasks:
        raise DamageError(f"it is of {show(summary['job'])}, {show(summary['task'])}")
    job = registry.find(summary["job"])
    missing = [name for name in job.described if name not in summary.get("data", {})]
    if missing:
        raise DamageError(f"data has no {', '.join(missing)}")
    seeds, columns = summary["seeds"], summary["columns"]
    if not seeds or list(summary["forget_sets"]) != [str(seed) for seed in dict.fromkeys(seeds)]:
        raise DamageError("its seeds and its forget sets differ")
    for entry in summary["forget_sets"].values():
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise DamageError(f"sha256 must have 64 digits, got {brief(entry['sha256'])}")
    try:
        job.texts(summary)
    except (KeyError, TypeError, ValueError):
        raise DamageError("forget_sets or data are not those of its job") from None
    if "original" not in columns:
        raise DamageError("columns has no original")
    compared = "retrain" in {*job.makes, *columns}
    for name in ("original", *job.makes, *columns):
        needed = {"seconds"} if name in job.makes or name not in TRAINED else set()
        needed |= {"gap_mean"} if compared and name != "retrain" else set()
        missing = needed - set(columns.get(name, ()))
        if missing:
            raise DamageError(f"columns.{show(name, 80)} has no {', '.join(sorted(missing))}")
        try:
            share = parts(name).fraction
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise DamageError(f"{show(name, 80)} names no share of the retain set")
    spreads = [entry for column in columns.values() for entry in column.values()]
    plain = list(summary.get("step", {}).get("seconds", {}).values())
    if any(len(entry["values"]) != len(seeds) for entry in (*spreads, *plain)):
        raise DamageError("it has not one value a seed of everything")
    timed = [columns[name]["seconds"]["mean"] for name in ("retrain",) if name in job.makes]
    if any(mean <= 0 for mean in timed) or any(min(e["values"]) <= 0 for e in plain):
        raise DamageError("it has seconds that are not positive")
