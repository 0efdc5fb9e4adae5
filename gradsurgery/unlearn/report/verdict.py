"""Who comes closest to Retrain, by how much, and what the seeds cannot tell apart: in words.

Two yardsticks go with every gap: that of doing nothing, which is Original's, and the one between
two Retrains of other seeds, which is chance.
Where there is no Retrain, none is closest: what was measured of the first ones is said instead.
"""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.stages import AGAIN, TRAINED, parts
from gradsurgery.unlearn.metrics.statistics import paired
from gradsurgery.unlearn.report.labels import percent, title

Summary = dict[str, Any]
NAMED = 3  # runners-up and ties named in a sentence; the table has them all


class Difference(NamedTuple):
    """A paired difference of two columns' mean gaps over the seeds that both have."""

    mean: float
    reach: float | None
    """Half of its 95 % interval of Student's t over the seeds, None for fewer than two."""
    seeds: int
    """How many seeds both have."""

    @property
    def told_apart(self) -> bool | None:
        """Whether the interval is above 0; None: too few seeds to say."""
        # fewer than three seeds give no interval worth the name
        if self.reach is None or self.seeds < 3:
            return None
        return self.mean > self.reach


class Place(NamedTuple):
    """A method's place: distances to Retrain are means over metrics and seeds, in [0, 1]."""

    name: str
    gap: float | None = None
    """None where there is no Retrain."""
    behind: Difference | None = None
    """How much farther from Retrain than the best method, None where they share no seed."""
    nearer: Difference | None = None
    """How much nearer to Retrain than Original, which is what doing nothing ends with."""


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
        return [Place(name) for name in names]
    names.sort(key=lambda name: columns[name]["gap_mean"]["mean"])
    return [
        Place(
            name,
            columns[name]["gap_mean"]["mean"],
            difference(summary, name, names[0]),
            difference(summary, "original", name),
        )
        for name in names
    ]


def difference(summary: Summary, name: str, other: str) -> Difference | None:
    """How much farther from Retrain one column is than another; None where no seed has both."""
    mine, others = _shared(summary, name, other)
    if not mine:
        return None
    found: Any = paired(mine, others)
    interval = found["interval"]
    reach = None if interval is None else (interval[1] - interval[0]) / 2
    return Difference(found["mean"], reach, len(mine))


def in_retrains(summary: Summary, name: str) -> float | None:
    """A column's gap over the gap between two Retrains, both means over the seeds they share; None
    where there is no second Retrain or it is at no distance."""
    if AGAIN not in summary["columns"]:
        return None
    mine, unit = _shared(summary, name, AGAIN)
    return mean(mine) / mean(unit) if unit and mean(unit) > 0 else None


def _shared(summary: Summary, name: str, other: str) -> tuple[list[float], list[float]]:
    """Mean gaps of two columns on the seeds that both have."""

    def by_seed(name: str) -> dict[int, float]:
        values = summary["columns"][name]["gap_mean"]["values"]
        return dict(zip(seeds_of(summary, name), values, strict=True))

    mine, others = by_seed(name), by_seed(other)
    shared = [seed for seed in mine if seed in others]
    return [mine[seed] for seed in shared], [others[seed] for seed in shared]


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
        alone = (
            "Only the original and the retrained model were made: "
            "there is no unlearning method to judge."
        )
        return [alone, _yardsticks(summary)] if compared(summary) else [alone]
    if not compared(summary):
        return _alone(summary)
    first, *rest = shares
    columns = summary["columns"]
    best = ranking(summary, first)[0].name
    lead = [
        f"{_where(first)}{_closest(summary, first)}.",
        _yardsticks(summary),
        *_no_nearer(summary, first),
        f"{title(best)} took {columns[best]['seconds']['mean']:.1f} s{_times(columns, best)}.",
    ]
    text = [" ".join(lead)]
    for share in rest:
        closest = f"{_where(share)}{_closest(summary, share)}."
        text.append(" ".join([closest, *_no_nearer(summary, share)]))
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


def _yardsticks(summary: Summary) -> str:
    """How far from Retrain doing nothing is, and another Retrain."""
    columns = summary["columns"]
    nothing = _points(columns["original"]["gap_mean"]["mean"])
    text = f"Doing nothing leaves the original model {nothing} points away"
    if AGAIN in columns:
        chance = _points(columns[AGAIN]["gap_mean"]["mean"])
        text += f"; Retrain of another seed is {chance} points away, by chance alone"
    return f"{text}."


def _no_nearer(summary: Summary, fraction: float) -> list[str]:
    """Sentences that name the methods that are no nearer than doing nothing, or may not be."""
    places = ranking(summary, fraction)
    known = [(place.name, place.nearer) for place in places if place.nearer is not None]
    lost = [title(name) for name, nearer in known if nearer.mean <= 0]
    unsure = [
        title(name) for name, nearer in known if nearer.mean > 0 and nearer.told_apart is False
    ]
    text = []
    if lost and len(lost) == len(places):
        text.append("No method is nearer to Retrain than doing nothing.")
    elif lost:
        verb = "is" if len(lost) == 1 else "are"
        all_of_them = _listed(lost, "and", len(lost))
        text.append(f"{all_of_them} {verb} no nearer to Retrain than doing nothing.")
    if unsure:
        text.append(f"These seeds cannot tell {_listed(unsure)} from doing nothing.")
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
    tied = [
        title(place.name) for place in others if place.behind and place.behind.told_apart is False
    ]
    if tied:
        text += f"; these seeds cannot tell {_listed(tied)} from it"
    return text


def _listed(names: list[str], last: str = "or", most: int = NAMED) -> str:
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
