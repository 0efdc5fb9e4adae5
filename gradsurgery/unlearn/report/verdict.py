"""Who comes closest to Retrain, by how much, and what the seeds cannot tell apart: in words.

Where there is no Retrain, none is closest: what was measured of the first ones is said instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.stages import TRAINED, parts
from gradsurgery.unlearn.metrics.statistics import paired
from gradsurgery.unlearn.report.labels import percent, title

Summary = dict[str, Any]
NAMED = 3  # runners-up and ties named in a sentence; the table has them all


class Place(NamedTuple):
    """A method's place: distances to Retrain are means over metrics and seeds, in [0, 1]."""

    name: str
    gap: float | None
    """None where there is no Retrain."""
    behind: float | None
    """Paired difference to the best method over the seeds of both, None where they share none."""
    error: float | None
    """Its standard error, None for fewer than two seeds."""
    seeds: int
    """How many seeds both have."""

    @property
    def told_apart(self) -> bool | None:
        """Whether it is behind by over two standard errors; None: too few seeds to say."""
        # fewer than three seeds give no standard error worth the name
        if self.behind is None or self.error is None or self.seeds < 3:
            return None
        return self.behind > 2 * self.error


def seeds_of(summary: Summary, name: str) -> list[int]:
    """Seeds a column's values are of; in a table made of several runs they can differ."""
    return summary.get("column_seeds", {}).get(name, summary["seeds"])


def fractions(summary: Summary) -> list[float]:
    """Shares of the retain set methods ran with, the largest first."""
    found = {parts(name).fraction for name in summary["columns"] if name not in TRAINED}
    return sorted(found, reverse=True)


def methods(summary: Summary, fraction: float) -> list[str]:
    """Columns of methods that ran with a share of the retain set."""
    names = [name for name in summary["columns"] if name not in TRAINED]
    return [name for name in names if parts(name).fraction == fraction]


def compared(summary: Summary) -> bool:
    """Whether there is a Retrain that the others were measured against."""
    return "retrain" in summary["columns"]


def ranking(summary: Summary, fraction: float) -> list[Place]:
    """The methods that ran with a share of the retain set, the closest to Retrain first; without
    Retrain in the order they ran in."""
    columns = summary["columns"]
    names = methods(summary, fraction)
    if not compared(summary):
        return [Place(name, None, None, None, 0) for name in names]
    names.sort(key=lambda name: columns[name]["gap_mean"]["mean"])

    def by_seed(name: str) -> dict[int, float]:
        values = columns[name]["gap_mean"]["values"]
        return dict(zip(seeds_of(summary, name), values, strict=True))

    places = []
    for name in names:
        best, mine = by_seed(names[0]), by_seed(name)
        shared = [seed for seed in mine if seed in best]
        behind, error = None, None
        if shared:
            found = paired([mine[seed] for seed in shared], [best[seed] for seed in shared])
            behind, error = found["mean"], found["stderr"]
        gap = columns[name]["gap_mean"]["mean"]
        # `paired` returns floats and an interval in one dictionary: these two are floats
        places.append(Place(name, gap, behind, error, len(shared)))  # type: ignore[arg-type]
    return places


def overall(summary: Summary) -> list[str]:
    """Methods that ran with several shares, by their mean gap over them; names without a share."""
    gaps: dict[str, list[float]] = {}
    if not compared(summary):
        return []
    for name, column in summary["columns"].items():
        if name not in TRAINED:
            gaps.setdefault(name.partition("@")[0], []).append(column["gap_mean"]["mean"])
    several = [name for name in gaps if len(gaps[name]) > 1]
    return sorted(several, key=lambda name: sum(gaps[name]) / len(gaps[name]))


def sentences(summary: Summary) -> list[str]:
    """The verdict: a paragraph for the largest share of the retain set, a sentence for others."""
    shares = fractions(summary)
    if not shares:
        return [
            "Only the original and the retrained model were made: "
            "there is no unlearning method to judge."
        ]
    if not compared(summary):
        return _alone(summary)
    first, *rest = shares
    columns = summary["columns"]
    best = ranking(summary, first)[0].name
    start = _points(columns["original"]["gap_mean"]["mean"])
    lead = [
        f"{_where(first)}{_closest(summary, first)}.",
        f"The original model starts {start} points away.",
        f"{title(best)} took {columns[best]['seconds']['mean']:.1f} s{_times(columns, best)}.",
    ]
    text = [" ".join(lead), *(f"{_where(share)}{_closest(summary, share)}." for share in rest)]
    if len({tuple(seeds_of(summary, name)) for name in columns}) > 1:
        text.append(
            "Not every method ran on the same seeds: differences are over those that two share."
        )
    return text


def _times(columns: dict[str, Any], name: str) -> str:
    """What a method's seconds are of Retrain's, where these are known."""
    if "seconds" not in columns["retrain"]:
        return ""
    retrain, seconds = (columns[each]["seconds"]["mean"] for each in ("retrain", name))
    return f", {seconds / retrain:.2f} times retraining ({retrain:.1f} s)"


def _alone(summary: Summary) -> list[str]:
    """The verdict without Retrain: what a reader would compare, and that there is nothing to."""
    columns = summary["columns"]
    known = [metric for metric in registry.find(summary["job"]).metrics if metric.compared]
    told = [metric for metric in known if all(metric.key in column for column in columns.values())]
    shown = ["original", *methods(summary, fractions(summary)[0])[:NAMED]]
    text = [
        "No retrained model was given, so nothing here says how near a method comes to a model "
        "that never saw the forget set. The methods stand in the order they ran in."
    ]
    for metric in told[:2]:
        values = "; ".join(
            f"{title(name)} {columns[name][metric.key]['mean']:.{metric.digits}f}" for name in shown
        )
        text.append(f"{metric.title[0].upper()}{metric.title[1:]}: {values}.")
    return text


def _where(fraction: float) -> str:
    return "" if fraction == 1 else f"With {percent(fraction)} of the retain set, "


def _points(gap: float | None) -> str:
    assert gap is not None, "there is a Retrain"
    return f"{100 * gap:.1f}"


def _closest(summary: Summary, fraction: float) -> str:
    best, *others = ranking(summary, fraction)
    if not others:
        return (
            f"{title(best.name)} ends {_points(best.gap)} points from Retrain on average over the "
            "metrics below"
        )
    named = ", ".join(f"{title(place.name)} {_points(place.gap)}" for place in others[:NAMED])
    more = f", {len(others) - NAMED} more" if len(others) > NAMED else ""
    text = (
        f"{title(best.name)} comes closest to Retrain: {_points(best.gap)} points away on average "
        f"({named}{more})"
    )
    tied = [title(place.name) for place in others if place.told_apart is False]
    if tied:
        text += f"; these seeds cannot tell {_listed(tied)} from it"
    return text


def _listed(names: list[str]) -> str:
    if len(names) > NAMED + 1:
        names = [*names[:NAMED], f"{len(names) - NAMED} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
