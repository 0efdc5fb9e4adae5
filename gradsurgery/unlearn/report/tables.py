"""A run's numbers as tables: the main ones by method, all of them by metric, and as plain text."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import COSTS, GAP, Metric
from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED, trained
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.verdict import (
    Difference,
    Place,
    Summary,
    compared,
    fractions,
    in_retrains,
    methods,
    ranking,
    seeds_of,
    sentences,
)

NOTHING = "Original (do nothing)"  # with a Retrain to be near to, it is what others must beat
TIE = "(tie)"
SECONDS = next(metric for metric in COSTS if metric.key == "seconds")


class Cell(NamedTuple):
    """A mean, and its spread if there are several seeds."""

    text: str = ""
    spread: str = ""
    tie: bool = False
    """Whether it is a difference that the seeds cannot tell from none."""

    def __str__(self) -> str:
        shown = f"{self.text} ± {self.spread}" if self.spread else self.text
        return f"{shown} {TIE}" if self.tie else shown


class Row(NamedTuple):
    name: str  # of the stage or the metric
    title: str
    cells: list[Cell]


def cell(column: dict[str, Any], metric: Metric) -> Cell:
    """Mean and standard deviation of a metric over seeds; empty where it was not measured."""
    if metric.key not in column:
        return Cell()
    value, spread = column[metric.key]["mean"], column[metric.key]["std"]
    shown = spread is not None and metric.key != "steps"
    return Cell(f"{value:.{metric.digits}f}", f"{spread:.{metric.digits}f}" if shown else "")


def behind(place: Place | None) -> Cell:
    """Paired difference to the best method and half of its 95 % interval."""
    if place is None or place.behind is None:
        return Cell()
    best = place.behind.mean == 0 and not place.behind.reach
    return Cell("best") if best else _difference(place.behind)


def nearer(place: Place | None) -> Cell:
    """How much nearer to Retrain than doing nothing, and half of the 95 % interval of that, or that
    it is not."""
    if place is None or place.nearer is None:
        return Cell()
    return _difference(place.nearer) if place.nearer.mean > 0 else Cell("no nearer")


def _difference(found: Difference) -> Cell:
    reach = "" if found.reach is None else f"{found.reach:.3f}"
    return Cell(f"{found.mean:.3f}", reach, tie=found.told_apart is False)


def times(summary: Summary, name: str) -> Cell:
    """A gap in units of the one between two Retrains."""
    found = None if name == "retrain" else in_retrains(summary, name)
    return Cell() if found is None else Cell(f"{found:.1f}")


def main_table(summary: Summary, fraction: float) -> tuple[list[str], list[Row]]:
    """Original, Retrain and the methods with a share of the retain set, as `ranking` has them.

    over chance: the gap in units of the one between two Retrains. behind: how much farther from
    Retrain than the best. nearer: how much nearer than doing nothing. Of both, ± half of the 95 %
    interval of the paired differences over the seeds, and that it is a tie where that holds 0.
    """
    columns = summary["columns"]
    places = {place.name: place for place in ranking(summary, fraction)}
    names = trained(columns) + list(places)
    measured = {key for name in names for key in columns[name]}
    metrics = [m for m in registry.find(summary["job"]).metrics if m.short and m.key in measured]
    metrics = [*(metric for metric in metrics if metric is not GAP), SECONDS]
    first: dict[str, list[Cell]] = {}
    if compared(summary):
        first["gap"] = [cell(columns[name], GAP) for name in names]
        if AGAIN in columns:
            first["over chance"] = [times(summary, name) for name in names]
        if len(places) > 1:
            first["behind"] = [behind(places.get(name)) for name in names]
        if places:
            first["nearer"] = [nearer(places.get(name)) for name in names]
    last: dict[str, list[Cell]] = {}
    if len({tuple(seeds_of(summary, name)) for name in names}) > 1:
        last["seeds"] = [Cell(str(len(seeds_of(summary, name)))) for name in names]
    measured = {m.short or m.title: [cell(columns[n], m) for n in names] for m in metrics}
    table = {**first, **measured, **last}
    titles = {"original": NOTHING} if compared(summary) else {}
    rows = [
        Row(name, titles.get(name, title(name)), [cells[row] for cells in table.values()])
        for row, name in enumerate(names)
    ]
    return list(table), rows


def stages(summary: Summary, fraction: float) -> list[str]:
    """Original, Retrain and the methods with a share of the retain set, as they ran."""
    return [*trained(summary["columns"]), *methods(summary, fraction)]


def full_table(summary: Summary, fraction: float) -> dict[str, list[Row]]:
    """Every metric of the same stages, in groups; a row a metric, a cell a stage."""
    columns = [summary["columns"][name] for name in stages(summary, fraction)]
    groups: dict[str, list[Row]] = {}
    for metric in registry.find(summary["job"]).metrics:
        if any(metric.key in column for column in columns):
            row = Row(metric.key, metric.title, [cell(column, metric) for column in columns])
            groups.setdefault(metric.group, []).append(row)
    return groups


def caption(summary: Summary, spread: bool = True) -> str:
    """What the numbers of the main table are."""
    seeds = len(summary["seeds"])
    means = "means ± standard deviation" if spread else "means"
    over = f"{means} over {seeds} seeds" if seeds > 1 else "one seed"
    runs = summary.get("runs", 1)
    over += f", each the mean of {runs} runs" if runs > 1 else ""
    what = "mean gap to Retrain and what it is of" if compared(summary) else "what was measured"
    return f"{summary['job']}, {summary['task']}: {what}; {over}"


def heading(fraction: float) -> str:
    share = "all" if fraction == 1 else percent(fraction)
    return f"With {share} of the retain set"


def _shares(summary: Summary) -> list[float]:
    return fractions(summary) or [1.0]


def lines(header: list[str], rows: list[Row], first: str = "") -> list[str]:
    """Aligned plain text, a line a row."""
    texts = [[first, *header], *([row.title, *map(str, row.cells)] for row in rows)]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in texts
    ]


def print_summary(summary: Summary) -> None:
    """The verdict and the main tables: drawn on a terminal, aligned plain text otherwise."""
    if sys.stdout.isatty():
        try:
            _draw(summary)
        except ImportError:
            pass
        else:
            return
    print()
    for sentence in sentences(summary):
        print(sentence)
    print(f"\n{caption(summary)}")
    shares = _shares(summary)
    for fraction in shares:
        if shares != [1.0]:
            print(f"\n{heading(fraction)}")
        for line in lines(*main_table(summary, fraction)):
            print(line)
    print(flush=True)


def _draw(summary: Summary) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # names are shown as they are: [red] in one is no color
    console = Console(highlight=False, markup=False, emoji=False)

    def make(fraction: float, narrow: bool) -> Table:
        drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        header, rows = main_table(summary, fraction)
        for index, name in enumerate(["", *header]):
            drawn.add_column(name, justify="right" if index else "left")
        for row in rows:
            cells = [each.text if narrow else str(each) for each in row.cells]
            drawn.add_row(row.title, *cells, style="dim" if row.name in TRAINED else None)
        return drawn

    shares = _shares(summary)
    wide = [make(fraction, narrow=False) for fraction in shares]
    # measured as if there were room: a table says it needs no more than it is given
    room = console.options.update(max_width=1000)
    narrow = max(console.measure(table, options=room).maximum for table in wide) > console.width
    console.print()
    for sentence in sentences(summary):
        console.print(sentence)
    console.print(f"\n{caption(summary, not narrow)}", style="bold")
    for fraction, table in zip(shares, wide, strict=True):
        if shares != [1.0]:
            console.print(heading(fraction), style="bold")
        console.print(make(fraction, narrow) if narrow else table)
