"""A run's numbers: over the seeds, every model against its seed's Retrain, where there is one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from statistics import mean
from typing import Any

from gradsurgery.unlearn.jobs.base import COSTS, Job, Measured, Summary
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, repeated
from gradsurgery.unlearn.metrics.statistics import gap, spread


def common(each: Iterable[Measured]) -> frozenset[str]:
    """The metrics that all of them have; a held-out set may lack the class that a seed forgets."""
    return frozenset.intersection(*map(frozenset, each))


def gaps(
    job: Job[Any, Any], measured: Measured, retrain: Measured, among: Collection[str]
) -> Measured:
    """Distance to Retrain of every metric `among` those that counts, and their mean under "mean".

    Means over seeds are means of the same metrics only where `among` is what all seeds have.
    """
    return gap({key: measured[key] for key in job.compared if key in among}, retrain)


def summarize(
    job: Job[Any, Any],
    task: str,
    results: list[dict[str, Any]],
    forget_sets: dict[str, Any],
    names: Sequence[str],
    runs: int = 1,
) -> Summary:
    """Mean, spread and values over seeds of every metric, gap to Retrain and cost, by stage.

    A seed's value is the mean over those of the `runs` of a method that there are, of gaps too.

    step: seconds of one OrthoGrad step and of one plain training step on the same samples.
    """
    by_stage = {(result["seed"], result["method"]): result for result in results}
    seeds = [int(seed) for seed in forget_sets]
    among = common(by_stage[seed, name]["metrics"] for seed in seeds for name in names)
    columns: dict[str, Any] = {}
    for name in names:
        rows: dict[str, list[float]] = {}
        for seed in seeds:
            every = [name] if name in TRAINED else repeated(name, runs)
            there = [run for run in every if (seed, run) in by_stage]
            found = [_numbers(job, task, by_stage, seed, run, among) for run in there]
            for key, value in _means(found).items():
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
        **({"runs": runs} if runs > 1 else {}),
        "forget_sets": forget_sets,
        "columns": columns,
        **({"step": {"seconds": step}} if step else {}),
    }


def _means(runs: Sequence[Measured]) -> Measured:
    """Of several runs; a number that not all have, as that of shadows, is of those that do."""
    keys = dict.fromkeys(key for each in runs for key in each)
    return {key: mean(each[key] for each in runs if key in each) for key in keys}


def _numbers(
    job: Job[Any, Any],
    task: str,
    by_stage: dict[tuple[int, str], Any],
    seed: int,
    name: str,
    among: Collection[str],
) -> Measured:
    """All there are of one stage, gaps of metrics `among` those."""
    result = by_stage[seed, name]
    measured: Measured = result["metrics"]
    original = by_stage[seed, "original"]["metrics"]
    reference = by_stage.get((seed, "retrain"), {})
    found = {**measured, **{c.key: result[c.key] for c in COSTS if c.key in result}}
    if "seconds" in result and "seconds" in reference:
        found["seconds_ratio"] = result["seconds"] / reference["seconds"]
    retrain = None if name == "retrain" else reference.get("metrics")
    if retrain is not None:
        found |= {f"gap_{key}": value for key, value in gaps(job, measured, retrain, among).items()}
    return {**found, **job.scores(task, measured, original, retrain)}


def _timed(names: Sequence[str]) -> str:
    """The stage whose steps were timed: OrthoGrad's with the most retain samples."""
    return next((name for name in names if parts(name).method == "orthograd"), "")
