"""Make the tables of docs/results.md: every method on every task, with all and with few samples to
keep, and what single choices within two of them are worth.

    python scripts/results.py --docs docs/results.md

Each task and seed is a run directory of its own under --out, whose original and retrained model
serve everything. Two at a time, one thread each. Interrupted, the same command goes on where it
stopped. Options of the job may follow `--`, to try it with less:

    python scripts/results.py --seeds 1 --out runs/trial -- --training.steps 20 --orthograd.steps 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from gradsurgery.errors import InputError
from gradsurgery.unlearn import TrainingError
from gradsurgery.unlearn.command import open_directory, parse
from gradsurgery.unlearn.jobs.base import Variant
from gradsurgery.unlearn.jobs.digits.data import Task
from gradsurgery.unlearn.jobs.digits.job import DigitsJob
from gradsurgery.unlearn.jobs.directory import RunDirectory, write_atomic
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, stage_name
from gradsurgery.unlearn.report import compare, tables
from gradsurgery.unlearn.report.finish import finish
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.verdict import Summary
from gradsurgery.unlearn.training.config import update

FRACTIONS = (1.0, 0.1, 0.05)
ABLATED = 0.1  # share of the retain set in the ablations: with all of it most choices tie
ABLATIONS = [  # label, method, options that differ
    ("no tuning step", "ltu", {"meta": False}),
    ("no membership feedback", "ltu", {"feedback": "random_label"}),
    ("no harmonization", "ltu", {"harmonize": "none"}),
    ("models see outputs", "ltu", {"model_features": "outputs"}),
    ("models see the loss", "ltu", {"model_features": "loss"}),
    ("first order", "ltu", {"order": "first"}),
    ("second order", "ltu", {"order": "second"}),
    ("off each sample", "orthograd", {"retain": "samples"}),
    ("off their mean", "orthograd", {"retain": "mean"}),
    ("whole model", "orthograd", {"granularity": "model"}),
    ("each tensor", "orthograd", {"granularity": "tensor"}),
]
TITLES = {
    "mislabeled": "100 training samples with wrong labels",
    "class": "One digit (a different one each seed)",
    "random": "10 % of the training samples, at random",
}
JOB = DigitsJob()
MARK = "<!-- results -->"  # the tables go between two of these


class Lines:
    """Progress of one of several processes: a line a stage, with the task before it."""

    def __init__(self, task: str) -> None:
        self.task = task

    def say(self, text: str) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the command was killed: nothing it started goes on
        print(f"{self.task:<10}  {text}", flush=True)

    @contextmanager
    def stage(self, label: str, total: int, done: int) -> Iterator[Any]:
        yield lambda step: None


def work(task: str, seed: int, path: Path, options: list[str]) -> None:
    """Do what is left of one task and seed."""
    config = parse(
        JOB,
        [
            f"--task={task}",
            "--method=all",
            f"--first-seed={seed}",
            "--seeds=1",
            "--retain-fraction",
            *map(str, FRACTIONS),
            "--threads=1",
            *options,
        ],
    ).job
    # one that changes nothing is the method as it is
    variants = [
        Variant(method, ABLATED, label, changes)
        for label, method, changes in ABLATIONS
        if method in config.methods and update(config, {method: changes}) != config
    ]
    with RunDirectory(path) as directory:
        if directory.complete:
            return
        config.check()
        open_directory(directory, config)
        run = Run(JOB, config, directory, Lines(task))
        finish(config, directory, run.complete(variants))


def markdown(summaries: list[Summary]) -> str:
    """A section a task: a table a share of the retain set, then the ablations."""
    lines = []
    for summary in summaries:
        lines += ["", f"## {TITLES[summary['task']]}"]
        main = _only(summary, lambda name: not parts(name).variant)
        for fraction in FRACTIONS:
            lines += ["", f"### {tables.heading(fraction)}", "", *_table(main, fraction)]
        for method in dict.fromkeys(method for _, method, _ in ABLATIONS):
            lines += ["", *_ablation(summary, method)]
    return "\n".join(lines).strip() + "\n"


def _ablation(summary: Summary, method: str) -> Iterator[str]:
    """A method with one choice changed at a time; the row without a change says what it has."""
    columns = summary["columns"]
    names = [name for name in columns if parts(name)[::2] == (method, ABLATED)]
    if len(names) < 2:
        return
    changed = [parts(name).variant for name in names]
    has = [label for label, of, _ in ABLATIONS if of == method and label not in changed]
    base = stage_name(method, ABLATED)
    renamed = stage_name(method, ABLATED, f"as it is: {', '.join(has)}" if has else "as it is")
    some = {name: columns[name] for name in columns if name in TRAINED}
    some |= {renamed if name == base else name: columns[name] for name in names}
    yield f"### Choices within {title(method)}, with {percent(ABLATED)} of the retain set"
    yield ""
    yield from _table({**summary, "columns": some, "column_seeds": {}}, ABLATED)


def _only(summary: Summary, wanted: Callable[[str], bool]) -> Summary:
    columns = summary["columns"]
    kept = {name: columns[name] for name in columns if name in TRAINED or wanted(name)}
    return {**summary, "columns": kept}


def _table(summary: Summary, fraction: float) -> Iterator[str]:
    header, rows = tables.main_table(summary, fraction)
    yield f"| | {' | '.join(header)} |"
    yield f"|---|{'---|' * len(header)}"
    for row in rows:
        yield f"| {row.title} | {' | '.join(map(str, row.cells))} |"


def insert(page: Path, text: str) -> None:
    """Put the tables between the two marks of a page."""
    content = page.read_text(encoding="utf-8").split(MARK)
    if len(content) != 3:
        raise InputError(f"--docs: {page} must hold {MARK} twice, the tables go between them")
    write_atomic(page, f"{content[0]}{MARK}\n{text}{MARK}{content[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=get_args(Task), default=get_args(Task))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--docs", type=Path, help="page to put the tables in; none: print them")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    units = {
        arguments.out / f"{task}-seed{seed}": (task, seed)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
    }
    failed = 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(arguments.workers, context, initializer=_die_silently) as pool:
        jobs = {
            pool.submit(work, task, seed, path, options): path
            for path, (task, seed) in units.items()
        }
        for done, job in enumerate(as_completed(jobs), 1):
            try:
                job.result()
            except (InputError, TrainingError, OSError, BrokenExecutor) as error:
                failed += 1
                print(f"{jobs[job]}: {error}", file=sys.stderr, flush=True)
            print(f"{done} of {len(units)} done: {jobs[job]}", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(units)} failed; the same command goes on with them")
    text = markdown(compare.merge(compare.load(list(units))))
    if arguments.docs:
        insert(arguments.docs, text)
    else:
        print(text)


def _die_silently() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
