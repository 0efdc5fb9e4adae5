"""A run's numbers: over the seeds, every model against its seed's Retrain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsurgery.unlearn.jobs.base import COSTS, Job, Measured, Summary
from gradsurgery.unlearn.jobs.stages import TRAINED, parts
from gradsurgery.unlearn.metrics.statistics import gap, spread


def gaps(job: Job[Any, Any], measured: Measured, retrain: Measured) -> Measured:
    """Distance to Retrain of every metric that counts, and their mean under "mean"."""
    return gap({key: measured[key] for key in job.compared if key in measured}, retrain)


def summarize(
    job: Job[Any, Any],
    task: str,
    results: list[dict[str, Any]],
    forget_sets: dict[str, Any],
    names: Sequence[str],
) -> Summary:
    """Mean, spread and values over seeds of every metric, gap to Retrain and cost, by stage.

    step: seconds of one OrthoGrad step and of one plain training step on the same samples.
    """
    by_stage = {(result["seed"], result["method"]): result for result in results}
    seeds = [int(seed) for seed in forget_sets]
    columns: dict[str, Any] = {}
    for name in names:
        rows: dict[str, list[float]] = {}
        for seed in seeds:
            for key, value in _numbers(job, task, by_stage, seed, name).items():
                rows.setdefault(key, []).append(value)
        # a number that some seed has not is none over all of them
        columns[name] = {k: spread(v) for k, v in rows.items() if len(v) == len(seeds)}
    stages = [result for result in results if result["method"] == _timed(names)]
    timed = [result["step_seconds"] for result in stages if "step_seconds" in result]
    step = {}
    if timed and len(timed) == len(stages):  # older versions did not time them
        step = {kind: spread([t[kind] for t in timed]) for kind in timed[0]}
    return {
        "job": job.name,
        "task": task,
        "seeds": seeds,
        "forget_sets": forget_sets,
        "columns": columns,
        **({"step": {"seconds": step}} if step else {}),
    }


def _numbers(
    job: Job[Any, Any], task: str, by_stage: dict[tuple[int, str], Any], seed: int, name: str
) -> Measured:
    """All there are of one stage."""
    result = by_stage[seed, name]
    measured: Measured = result["metrics"]
    original, retrain = (by_stage[seed, other]["metrics"] for other in TRAINED)
    found = {**measured, **{c.key: result[c.key] for c in COSTS if c.key in result}}
    found["seconds_ratio"] = result["seconds"] / by_stage[seed, "retrain"]["seconds"]
    if name == "retrain":
        return {**found, **job.scores(task, measured, original, None)}
    found |= {f"gap_{key}": value for key, value in gaps(job, measured, retrain).items()}
    return {**found, **job.scores(task, measured, original, retrain)}


def _timed(names: Sequence[str]) -> str:
    """The stage whose steps were timed: OrthoGrad's with the most retain samples."""
    return next((name for name in names if parts(name).method == "orthograd"), "")
