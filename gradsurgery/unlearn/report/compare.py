"""`gradsurgery compare`: finished runs in one table and one page, whatever each of them ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import JobConfig, Summary
from gradsurgery.unlearn.jobs.directory import RunDirectory, write_atomic
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, stage_name
from gradsurgery.unlearn.metrics.statistics import spread
from gradsurgery.unlearn.training.config import differences, to_dict, update

# besides paths, what says where things are: what is found there counts, not where it was
WHERE = ("device", "source")
FIRST = "forget_sha256"  # of a run's first seed: all seeds' forget sets are compared by themselves
COLUMNS = ("loss", "rule")  # what says which columns there are, as `method` does


class Run:
    """What a finished run measured and with which options."""

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = RunDirectory(path, "RUN")
        directory.require_finished()
        self.summary: Summary = directory.summary()
        self.job = registry.find(self.summary["job"])
        self.facts: dict[str, Any] = self.summary.get("data", {})
        options = directory.options()
        try:
            # an option that is younger than the run has its default
            self.config = to_dict(update(self.job.Config(), options))
        except InputError as error:
            raise InputError(f"RUN: {show(path / 'config.yaml')}: {error}") from None

    def options(self, name: str) -> dict[str, Any]:
        """What a column was made with, besides its seed."""
        return self.config.get("training" if name in TRAINED else parts(name).method, {})

    @property
    def decisive(self) -> dict[str, Any]:
        """Options that decide what is measured against what: of this job alone, and of training."""
        common = {field.name for field in fields(JobConfig)}
        hints = get_type_hints(self.job.Config)
        own = [
            field.name
            for field in fields(self.job.Config)
            if field.name not in (*common, *WHERE, *COLUMNS)
            and Path not in (hints[field.name], *get_args(hints[field.name]))
        ]
        return {key: self.config[key] for key in (*own, "training")}


def load(paths: Sequence[Path]) -> list[Run]:
    """The runs, if they can be compared.

    Raises:
        InputError: naming every run that cannot, and why.
    """
    runs: list[Run] = []
    wrong: list[str] = []
    for path in dict.fromkeys(paths):
        if not RunDirectory(path).has("summary.json"):
            wrong.append(f"{path} is not a finished run: it has no summary.json")
            continue
        run = Run(path)
        wrong += _conflicts(run, runs)
        runs.append(run)
    if wrong:
        raise InputError(f"RUN: cannot compare: {'; '.join(wrong)}")
    return runs


def _conflicts(run: Run, others: Sequence[Run]) -> list[str]:
    """Why a run cannot be compared with those before it; the first reason of each pair."""
    if others and run.job.name != others[0].job.name:
        first = others[0]
        return [f"{run.path} is a run of {run.job.name}, {first.path} is one of {first.job.name}"]
    found = []
    for other in others:
        if run.summary["task"] != other.summary["task"]:
            continue
        mine, theirs = run.summary["forget_sets"], other.summary["forget_sets"]
        split = [s for s in mine if s in theirs and mine[s]["sha256"] != theirs[s]["sha256"]]
        mine, theirs = (
            {key: value for key, value in each.facts.items() if key not in (*WHERE, FIRST)}
            for each in (run, other)
        )
        changed = differences(theirs, mine, "data: ")
        changed += differences(other.decisive, run.decisive)
        if split:
            found.append(
                f"{run.path} and {other.path} have different data splits: with task "
                f"{run.summary['task']} and seed {split[0]} they forget other samples"
            )
        elif changed:
            found.append(f"{run.path} differs from {other.path}: {', '.join(changed)}")
    return found


def merge(runs: Sequence[Run]) -> list[Summary]:
    """One summary a task of the runs' job; a column's seeds are all those that a run has it for.

    A column that two runs made with different options becomes two, named by their directories.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.summary["task"], []).append(run)
    return [_merged(task, by_task[task]) for task in runs[0].job.tasks if task in by_task]


def _merged(task: str, runs: list[Run]) -> Summary:
    variants: dict[str, list[Any]] = {}  # of a column, the options it was made with
    for run in runs:
        for name in run.summary["columns"]:
            known = variants.setdefault(name, [])
            if run.options(name) not in known:
                known.append(run.options(name))
    names = [run.path.resolve().name for run in runs]
    values: dict[str, dict[int, dict[str, float]]] = {}  # by column, seed and metric
    for run in runs:
        for name, column in run.summary["columns"].items():
            method, variant, fraction, _ = parts(name)
            if len(variants[name]) > 1:
                short = run.path.resolve().name
                whose = short if names.count(short) == 1 else str(run.path)
                variant = ", ".join(
                    filter(None, (variant, whose.replace("@", " ").replace("#", " ")))
                )
            seeds = values.setdefault(stage_name(method, fraction, variant), {})
            for index, seed in enumerate(run.summary["seeds"]):
                row = {key: entry["values"][index] for key, entry in column.items()}
                seeds.setdefault(seed, row)
    columns = {}
    for name, seeds in values.items():
        # a metric that not every run measured is left out
        keys = [key for key in next(iter(seeds.values())) if all(key in r for r in seeds.values())]
        columns[name] = {key: spread([row[key] for row in seeds.values()]) for key in keys}
    return {
        "job": runs[0].job.name,
        "task": task,
        "seeds": sorted({seed for run in runs for seed in run.summary["seeds"]}),
        "column_seeds": {name: list(seeds) for name, seeds in values.items()},
        "forget_sets": {
            seed: entry for run in runs for seed, entry in run.summary["forget_sets"].items()
        },
        "columns": columns,
        "data": runs[0].facts,
    }


def render(summaries: Sequence[Summary], runs: Sequence[Run]) -> str:
    """One page: a verdict for every task first, then its tables and pictures."""
    from gradsurgery.unlearn.report.page import page
    from gradsurgery.unlearn.report.render import found, not_measured

    return page(
        "compare",
        f"Unlearning {runs[0].job.name}: runs compared",
        tasks=[found(summary) for summary in summaries],
        not_measured=not_measured(summaries),
        paths=[show(run.path) for run in runs],
    )


def write(path: Path, summaries: Sequence[Summary], runs: Sequence[Run]) -> None:
    write_atomic(path, render(summaries, runs))
