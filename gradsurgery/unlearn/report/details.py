"""What a job shows of its models besides numbers that all jobs have: tables, and some samples with
what each model has written. All are of the first seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradsurgery.unlearn.report import plots
from gradsurgery.unlearn.report.pictures import Picture, picture


class Table(NamedTuple):
    """A number for each stage in each row."""

    heading: str
    stages: list[str]
    rows: list[tuple[str, list[str]]]


class Example(NamedTuple):
    """A sample, what is wanted of it, and by stage what was written."""

    title: str
    wanted: str
    written: list[tuple[str, str]]
    picture: Picture | None


class Details(NamedTuple):
    note: str
    tables: list[Table]
    examples: list[Example]


def details(
    seed: int, stages: Sequence[str], results: Sequence[Mapping[str, Any]]
) -> Details | None:
    """Of the stages that have some, in their order; None where none has."""
    known = {r["method"]: r["details"] for r in results if r["seed"] == seed and "details" in r}
    shown = [name for name in stages if name in known]
    if not shown:
        return None
    found = [known[name] for name in shown]
    tables = [
        Table(heading, shown, _rows(heading, found)) for heading in found[0].get("tables", {})
    ]
    each = [one.get("examples", []) for one in found]
    examples = [
        _example(same[0], [(name, one["written"]) for name, one in zip(shown, same, strict=True)])
        for same in zip(*each, strict=False)
    ]
    note = f"{found[0].get('note', '')} Seed {seed}.".strip()
    return Details(note, tables, examples)


def _rows(heading: str, found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    each = [one.get("tables", {}).get(heading, {}) for one in found]
    return [
        (row, [f"{values[row]:.3f}" if row in values else "" for values in each]) for row in each[0]
    ]


def _example(first: Mapping[str, Any], written: list[tuple[str, str]]) -> Example:
    drawn = None
    rows = first.get("picture")
    if rows and rows[0] and len({len(row) for row in rows}) == 1:
        alt = f"spectrogram of: {first['wanted']}"
        drawn = picture(plots.spectrogram(rows), caption="", alt=alt)
    return Example(first["title"], first["wanted"], written, drawn)
