"""Make the tables and pictures of docs/results.md: every method on real images, then on digits.

    python scripts/results.py --docs docs/results.md

The images are Fashion-MNIST, in the files of Debian's package dataset-fashion-mnist or any folder
with MNIST's names that --data gives. Each task and seed is a run directory of its own under --out,
whose original and retrained model serve everything. Two at a time, one thread each. Interrupted,
the same command goes on where it stopped. Options of the jobs may follow `--`, to try it with less:

    python scripts/results.py --only digits-class --seeds 1 --out runs/trial -- --training.steps 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.unlearn import TrainingError
from gradsurgery.unlearn.command import open_directory, parse
from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import Metric, Variant
from gradsurgery.unlearn.jobs.directory import RunDirectory, write_atomic
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.stages import TRAINED, parts, stage_name, trained
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.report import compare, plots, tables
from gradsurgery.unlearn.report.finish import finish
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.verdict import Summary, overall, ranking, sentences
from gradsurgery.unlearn.training.config import update

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package has it
SHARE = "0.1"  # of the retain set, what the methods have
SHARES = ("1", "0.3", "0.03", "0.01")  # and, of some, besides
COMPARED = [name for name in METHODS if name != "surgery"]  # which is any loss with any rule
SWEPT = ("orthograd", "ltu", "scrub", "gdr_gma", "graddiff", "finetune")
SHADOWED = 2  # seeds
MARK = "<!-- results -->"  # the tables go between two of these
OPTIONS = {
    "images": ("--size=14", "--train-samples=1000", "--model=cnn-narrow"),
    "digits": (),
}
RUNS = {"images": 2, "digits": 1}  # of each method from one original
OF_TASK = {
    ("images", "class"): ("--forget-class", "6"),
    ("images", "confusion"): ("--confused", "0", "6"),
}
TITLES = {
    ("images", "random"): "Fashion-MNIST: 90 of 900 training images, at random",
    ("images", "memorized"): "Fashion-MNIST: the 90 images most known by heart",
    ("images", "confusion"): "Fashion-MNIST: T-shirts and shirts, half with each other's label",
    ("images", "class"): "Fashion-MNIST: every shirt",
    ("digits", "mislabeled"): "Digits: 100 training samples with wrong labels",
    ("digits", "class"): "Digits: one digit, a different one each seed",
}
# what the tables beside the main ones show, by the metric
MORE = {
    "kl_forget": "KL to Retrain, forget set",
    "informed_auc": "informed attack, AUC",
    "probe_forget": "linear probe, forget set",
    "relearn": "steps to relearn",
    "uis": "UIS",
    "memory": "memory, MB",
}
SHADOWS = {
    "klom_normal_forget": "KLoM, forget set",
    "klom_normal_retain": "KLoM, retain set",
    "klom_normal_test": "KLoM, test",
    "ulira": "U-LiRA",
    "ulira_auc": "U-LiRA, AUC",
}
OPEN = {"forget_ceiling": "inf"}  # as JSON can hold it
FASTER = {"lr": 1.1e-3}
UNIFORM, HELD_OUT = ({**OPEN, "forget_loss": name} for name in ("uniform", "held_out"))
ABLATIONS = [  # tasks, label, method, options that differ
    (("random",), "never stops early", "orthograd", {"stop": "never"}),
    (("random",), "looked at every fifth step", "orthograd", {"stop_every": 5}),
    (("random",), "ten times the rate", "orthograd", FASTER),
    (("random",), "ten times the rate, every fifth step", "orthograd", FASTER | {"stop_every": 5}),
    (("random",), "ten times the rate, never stops early", "orthograd", FASTER | {"stop": "never"}),
    (("random", "memorized"), "no ceiling", "orthograd", OPEN),
    (("random",), "ceiling of 1.2 nats", "orthograd", {"forget_ceiling": 1.2}),
    (("random", "memorized"), "bounded, uniform", "orthograd", UNIFORM),
    (("random", "memorized"), "bounded, held out", "orthograd", HELD_OUT),
    (("random", "memorized"), "orthogonal to their mean", "orthograd", {"retain": "mean"}),
    (("random",), "whole model", "orthograd", {"granularity": "model"}),
    (("random",), "each tensor", "orthograd", {"granularity": "tensor"}),
    (("random",), "optimizer's metric", "orthograd", {"precondition": "optimizer"}),
    (("random",), "alpha 0.1", "orthograd", {"alpha": 0.1}),
    (("random",), "alpha 0.9", "orthograd", {"alpha": 0.9}),
    (("confusion",), "query weight 1", "ltu", {"query_weight": 1.0}),
    (("confusion",), "query weight 10", "ltu", {"query_weight": 10.0}),
    (("confusion",), "tuned by membership", "ltu", {"tune_loss": "membership"}),
    (("confusion",), "first order", "ltu", {"order": "first"}),
    (("confusion",), "no tuning step", "ltu", {"meta": False}),
    (("confusion",), "support of retain samples", "ltu", {"support": "retain", "queries": 1}),
    (("confusion",), "no harmonization", "ltu", {"harmonize": "none"}),
]


@dataclass(frozen=True)
class Unit:
    """A run directory: a task of a job on one seed."""

    job: str
    task: str
    seed: int
    kind: str = ""
    """shares: some methods with other shares of the retain set; shadows: with shadow models."""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.job, self.task, self.kind, f"seed{self.seed}")))

    def options(self) -> list[str]:
        swept = ["--method", *SWEPT]
        own = {
            "": ["--method", *COMPARED, f"--retain-fraction={SHARE}", f"--runs={RUNS[self.job]}"],
            "shares": [*swept, "--retain-fraction", *SHARES],
            "shadows": [*swept, f"--retain-fraction={SHARE}", "--shadows=8"],
        }[self.kind]
        of_task = OF_TASK.get((self.job, self.task), ())
        seed = [f"--task={self.task}", f"--first-seed={self.seed}", "--seeds=1", "--threads=1"]
        return [*seed, *OPTIONS[self.job], *of_task, *own]


def units(seeds: int) -> list[Unit]:
    """All there are, those of the page's first tables first."""
    found = [Unit(*about, seed) for about in TITLES for seed in range(seeds)]
    found += [Unit("images", "random", seed, "shares") for seed in range(seeds)]
    return found + [Unit("images", "random", seed, "shadows") for seed in range(seeds)[:SHADOWED]]


class Lines:
    """Progress of one of several processes: a line a stage, with the unit before it."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def say(self, text: str) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the command was killed: nothing it started goes on
        print(f"{self.unit.name:<25}  {text}", flush=True)

    @contextmanager
    def stage(self, label: str, total: int, done: int) -> Iterator[Any]:
        yield lambda step: None


def work(unit: Unit, path: Path, options: list[str]) -> None:
    """Do what is left of one unit."""
    job = registry.find(unit.job)
    config = parse(job, [*unit.options(), *options]).job
    variants = ablations(unit, config)
    with RunDirectory(path) as directory:
        if directory.complete:
            return
        config = job.resolved(config)
        job.check(config)
        open_directory(directory, config, job.facts(config))
        run = Run(job, config, directory, Lines(unit))
        finish(config, directory, run.complete(variants))


def ablations(unit: Unit, config: Any) -> list[Variant]:
    """What is run with one choice changed; a change that changes nothing is the method as it is."""
    if unit.job != "images" or unit.kind:
        return []
    return [
        Variant(method, float(SHARE), label, changes)
        for tasks, label, method, changes in ABLATIONS
        if unit.task in tasks and method in config.methods
        if update(config, {method: changes}) != config
    ]


def page(found: Sequence[Unit], out: Path) -> tuple[str, dict[str, str]]:
    """The text between the marks, and pictures by their file names, of finished units."""

    def merged(job: str, shadows: bool = False) -> dict[str, Summary]:
        some = [u for u in found if u.job == job and (u.kind == "shadows") == shadows]
        runs = compare.load([out / unit.name for unit in some])
        return {each["task"]: each for each in (compare.merge(runs) if runs else [])}

    lines: list[str] = []
    pictures: dict[str, str] = {}
    for job in OPTIONS:
        by_task = merged(job)
        for (of, task), heading in TITLES.items():
            if of == job and task in by_task:
                lines += ["", f"## {heading}", *section(by_task[task])]
        if job == "images" and "random" in by_task:
            some = only(by_task["random"], lambda name: parts(name).method in SWEPT)
            if len(shares := overall(some)) > 0:
                pictures["results-shares.svg"] = plots.sweep(some, shares, len(SWEPT))
                lines += ["", "### With less and less to keep", "", *share_table(some)]
            steps = [RunDirectory(out / unit.name).records() for unit in found if is_main(unit)]
            records = plots.by_stage([record for each in steps for record in each])
            names = [stage_name(method, float(SHARE)) for method in SWEPT]
            names = [name for name in names if any(name == stage for _, stage in records)]
            pictures["results-pareto.svg"] = plots.pareto(records, names)
        for summary in merged(job, shadows=True).values():
            lines += ["", "### Of an ensemble of eight models more", "", *small(summary, SHADOWS)]
    return "\n".join(lines).strip() + "\n", pictures


def is_main(unit: Unit) -> bool:
    """Whether it is of the task whose forgetting is drawn beside its keeping."""
    return (unit.job, unit.task, unit.kind) == ("images", "random", "")


def section(summary: Summary) -> Iterator[str]:
    """The verdict, the main table, more metrics, and ablations of one task."""
    share = float(SHARE)
    mine = [stage_name(method, share) for method in COMPARED]
    main = only(summary, lambda name: name in mine)
    yield from ("", sentences(main)[0], "", *markdown(*tables.main_table(main, share)))
    yield from ("", "Besides:", "", *small(main, MORE))
    for method in dict.fromkeys(method for _, _, method, _ in ABLATIONS):
        names = [n for n in summary["columns"] if parts(n)[::2] == (method, share)]
        if len(names) < 2:
            continue
        base = stage_name(method, share)
        renamed = stage_name(method, share, "as it is")
        columns = {n: summary["columns"][n] for n in (*trained(summary["columns"]), *names)}
        columns = {renamed if n == base else n: column for n, column in columns.items()}
        some = {**summary, "columns": columns, "column_seeds": {}}
        yield from ("", f"### Choices within {title(method)}", "")
        yield from markdown(*tables.main_table(some, share))


def small(summary: Summary, headings: dict[str, str]) -> Iterator[str]:
    """Of Original, Retrain and the methods, as ranked, metrics by their keys, under headings."""
    known = {metric.key: metric for metric in registry.find(summary["job"]).metrics}
    columns = summary["columns"]
    names = [*trained(columns), *(place.name for place in ranking(summary, float(SHARE)))]
    metrics: list[Metric] = [known[key] for key in headings]
    metrics = [m for m in metrics if any(m.key in columns[name] for name in names)]
    rows = [
        tables.Row(name, title(name), [tables.cell(columns[name], m) for m in metrics])
        for name in names
    ]
    return markdown([headings[metric.key] for metric in metrics], rows)


def share_table(summary: Summary) -> Iterator[str]:
    """Mean gaps by method and share of the retain set, the best first."""
    shares = sorted({float(SHARE), *map(float, SHARES)}, reverse=True)
    rows = []
    for name in overall(summary):
        stages = [stage_name(parts(name).method, share) for share in shares]
        found = [summary["columns"].get(stage, {}) for stage in stages]
        rows.append(
            tables.Row(name, title(name), [tables.cell(each, tables.GAP) for each in found])
        )
    return markdown([percent(share) for share in shares], rows)


def only(summary: Summary, wanted: Any) -> Summary:
    columns = summary["columns"]
    kept = {name: columns[name] for name in columns if name in TRAINED or wanted(name)}
    return {**summary, "columns": kept}


def markdown(header: Sequence[str], rows: Sequence[tables.Row]) -> Iterator[str]:
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
    names = ["-".join(about) for about in TITLES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="tasks of jobs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=FASHION, help="Fashion-MNIST's four files")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--docs", type=Path, help="page to put the tables in; none: print them")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    found = [u for u in units(arguments.seeds) if f"{u.job}-{u.task}" in arguments.only]
    if any(unit.job == "images" for unit in found) and not arguments.data.is_dir():
        raise InputError(
            f"--data: {arguments.data} is no folder: install Debian's package "
            "dataset-fashion-mnist, or name a folder with the four files of Fashion-MNIST"
        )
    failed = 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(arguments.workers, context, initializer=_die_silently) as pool:
        data = [f"--data={arguments.data}"]
        jobs = {
            pool.submit(
                work,
                unit,
                arguments.out / unit.name,
                [*(data if unit.job == "images" else []), *options],
            ): unit
            for unit in found
        }
        for done, job in enumerate(as_completed(jobs), 1):
            try:
                job.result()
            except (InputError, TrainingError, OSError, BrokenExecutor) as error:
                failed += 1
                print(f"{jobs[job].name}: {error}", file=sys.stderr, flush=True)
            print(f"{done} of {len(found)} done: {jobs[job].name}", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(found)} failed; the same command goes on with them")
    text, pictures = page(found, arguments.out)
    if not arguments.docs:
        print(text)
        return
    for name, svg in pictures.items():
        write_atomic(arguments.docs.parent / "pictures" / name, svg)
    insert(arguments.docs, text)


def _die_silently() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stopped")
