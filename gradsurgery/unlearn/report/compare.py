"""`gradsurgery compare`: finished runs in one table and one page, whatever each of them ran."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

from gradsurgery.errors import InputError
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.digits.data import Task
from gradsurgery.unlearn.jobs.digits.job import DigitsConfig
from gradsurgery.unlearn.jobs.directory import RunDirectory, write_atomic
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, stage_name
from gradsurgery.unlearn.metrics.statistics import spread
from gradsurgery.unlearn.report.verdict import Summary
from gradsurgery.unlearn.training.config import differences, to_dict, update

# options that decide what is measured against what
SHARED = ("forget_class", "random_percent", "training")


class Run:
    """What a finished run measured and with which options."""

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = RunDirectory(path, "RUN")
        directory.require_finished()
        self.summary: Summary = directory.summary()
        options = directory.options()
        try:
            # an option that is younger than the run has its default
            self.config = to_dict(update(DigitsConfig(), options))
        except InputError as error:
            raise InputError(f"RUN: {show(path / 'config.yaml')}: {error}") from None

    def options(self, name: str) -> dict[str, Any]:
        """What a column was made with, besides its seed."""
        return self.config.get("training" if name in TRAINED else parts(name).method, {})


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
    found = []
    if run.summary["job"] != "digits":
        return [f"{run.path} is of the job {run.summary['job']}"]
    for other in others:
        if run.summary["task"] != other.summary["task"]:
            continue
        mine, theirs = run.summary["forget_sets"], other.summary["forget_sets"]
        split = [s for s in mine if s in theirs and mine[s]["sha256"] != theirs[s]["sha256"]]
        theirs, mine = ({key: each.config[key] for key in SHARED} for each in (other, run))
        if split:
            found.append(
                f"{run.path} and {other.path} have different data splits: with task "
                f"{run.summary['task']} and seed {split[0]} they forget other samples"
            )
        elif changed := differences(theirs, mine):
            found.append(f"{run.path} differs from {other.path}: {', '.join(changed)}")
    return found


def merge(runs: Sequence[Run]) -> list[Summary]:
    """One summary a task; a column's seeds are all those that a run has it for.

    A column that two runs made with different options becomes two, named by their directories.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.summary["task"], []).append(run)
    return [_merged(task, by_task[task]) for task in get_args(Task) if task in by_task]


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
            method, variant, fraction = parts(name)
            if len(variants[name]) > 1:
                short = run.path.resolve().name
                whose = short if names.count(short) == 1 else str(run.path)
                variant = ", ".join(filter(None, (variant, whose.replace("@", " "))))
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
        "job": "digits",
        "task": task,
        "seeds": sorted({seed for run in runs for seed in run.summary["seeds"]}),
        "column_seeds": {name: list(seeds) for name, seeds in values.items()},
        "forget_sets": {
            seed: entry for run in runs for seed, entry in run.summary["forget_sets"].items()
        },
        "columns": columns,
    }


def render(summaries: Sequence[Summary], runs: Sequence[Run]) -> str:
    """One page: a verdict for every task first, then its tables and pictures."""
    from gradsurgery.unlearn.report.page import numbers, page, sweep, verdict
    from gradsurgery.unlearn.report.render import REAL, TITLES, asked, cost, not_measured

    title = "Unlearning digits: runs compared"
    body = f"<h1>{title}</h1>"
    for summary in summaries:
        body += f"<h3>{TITLES[summary['task']]}</h3>{verdict(summary)}"
    for summary in summaries:
        heading = TITLES[summary["task"]]
        body += f'<h2>{heading}</h2><p class="soft">{escape(asked(summary))}</p>'
        body += numbers(summary) + sweep(summary) + cost(summary)
    body += f"<h2>What is real, and what these numbers cannot say</h2><p>{REAL}</p>"
    body += f"<p>{not_measured(summaries)}</p><h2>Runs</h2><ul>"
    body += "".join(f"<li>{escape(show(run.path))}</li>" for run in runs)
    return page(title, f"{body}</ul>")


def write(path: Path, summaries: Sequence[Summary], runs: Sequence[Run]) -> None:
    write_atomic(path, render(summaries, runs))
