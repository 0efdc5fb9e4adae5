"""Numbers over seeds: spreads, differences of pairs, gaps to Retrain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from gradsurgery.errors import InputError
from gradsurgery.extras import package


def gap(metrics: Mapping[str, float], retrain: Mapping[str, float]) -> dict[str, float]:
    """|metric - Retrain's| for every metric both have, and their mean under "mean"."""
    each = {name: abs(value - retrain[name]) for name, value in metrics.items() if name in retrain}
    if not each:
        raise InputError("gap: the two sides share no metric")
    return {**each, "mean": mean(each.values())}


def spread(values: list[float]) -> dict[str, float | list[float] | None]:
    """Mean, sample standard deviation (None for one value) and the values themselves."""
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float | list[float] | None]:
    """Mean difference a - b over pairs, such as two methods on the same seeds, and how sure it is.

    Args:
        a: n values.
        b: n values, b[i] under the conditions of a[i].

    Returns:
        mean: of the differences. stderr: its standard error, their sample standard deviation over
        sqrt(n). interval: [low, high], its 95 % interval of Student's t with n - 1 degrees of
        freedom, right where the differences are about normal. The last two are None for one pair.
    """
    if len(a) != len(b) or len(a) == 0:
        raise InputError(f"a and b must be equally many, at least 1, got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    for i, difference in enumerate(differences):
        if not math.isfinite(difference):
            raise InputError(f"a and b must be finite, got {a[i]} and {b[i]} at {i}")
    center, n = mean(differences), len(differences)
    if n == 1:
        return {"mean": center, "stderr": None, "interval": None}
    t = package("scipy.stats", "jobs", "an interval").t

    # exact, where SciPy's sem squares floats: of 1e-200 that leaves 0, of 1e200 infinity
    error = stdev(differences) / math.sqrt(n)
    reach = float(t.ppf(0.975, n - 1)) * error
    return {"mean": center, "stderr": error, "interval": [center - reach, center + reach]}
