"""`gradsurgery unlearn JOB`: options to a run directory, a table and a report."""

import argparse
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from gradsurgery.errors import InputError, TrainingError
from gradsurgery.ranks import Group
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.base import Job, JobConfig
from gradsurgery.unlearn.jobs.directory import FACTS, RunDirectory, new_directory, numbered
from gradsurgery.unlearn.jobs.environment import environment
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import Silent, make_progress
from gradsurgery.unlearn.jobs.ranks import check_together, launched, of_first, shared_directory
from gradsurgery.unlearn.jobs.tune import check, tune
from gradsurgery.unlearn.jobs.yaml import read_yaml
from gradsurgery.unlearn.report.finish import finish
from gradsurgery.unlearn.report.tables import print_summary
from gradsurgery.unlearn.training.config import differences, to_dict, update

RUNS = Path("runs")


@dataclass
class Invocation:
    """Where a run's files go and whether it continues one; not part of its config.yaml."""

    job: JobConfig
    out: Path | None = None
    """Run directory; none: a new one, runs/JOB-TASK-N."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue --out, or the newest unfinished run with the same options, or start one."""
    config: Path | None = None
    """YAML file of options, such as a run's config.yaml; other options given override it."""


def parse(job: Job[Any, Any], arguments: list[str]) -> Invocation:
    """Options of `gradsurgery unlearn JOB`: the task's, then --config's, then those given."""
    import tyro

    # these decide the defaults of all other options, so they must be known before those are parsed
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in job.early:
        early.add_argument(f"--{name}")
    early.add_argument("--config", type=Path)
    try:
        first, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    given: dict[str, Any] = read_yaml(first.config) if first.config else {}
    defaults = job.defaults(**{name: getattr(first, name) or given.get(name) for name in job.early})
    try:
        defaults = update(defaults, given)
    except InputError as error:
        raise InputError(f"--config {show(first.config)}: {error}") from None

    # an empty name: --task, not --job.task
    options: Any = Annotated[job.Config, tyro.conf.arg(name="")]
    fields: list[Any] = [("job", options, field(default_factory=lambda: defaults))]
    return tyro.cli(
        make_dataclass("Options", fields, bases=(Invocation,)),
        args=arguments,
        prog=f"gradsurgery unlearn {job.name}",
        description=job.Config.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run_job(job: Job[Any, Any], invocation: Invocation) -> None:
    """Run a job in its directory, print the table, write the report.

    Started by a launcher as several processes, all of them do the run together.

    Raises:
        InputError: options that make no sense, or a directory that cannot be written.
        TrainingError: a run that cannot go on; what to continue from is kept.
        KeyboardInterrupt: saying how to continue.
    """
    with launched() as ranks:
        _run_together(job, invocation, ranks)


def _run_together(job: Job[Any, Any], invocation: Invocation, ranks: Group) -> None:
    config = invocation.job = job.resolved(invocation.job)
    with ranks.agreed("options"):
        check_together(config, ranks)
        job.check(config)
        check(config)
    progress = make_progress() if ranks.rank == 0 else Silent()
    path = of_first(ranks, "--out", lambda: choose_directory(job, invocation))
    command = f"torchrun --nproc_per_node {ranks.size} -m gradsurgery" if ranks else "gradsurgery"
    again = f"{command} unlearn {job.name} --config {path}/config.yaml --out {path} --resume auto"
    try:
        with shared_directory(path, ranks) as (own, directory):
            progress.say(f"run directory {path}")
            facts = job.facts(config)
            size = ranks.size
            of_first(ranks, "options", lambda: open_directory(own, config, facts, size))
            run = Run(job, config, directory, progress, ranks)
            if config.tune:
                run = replace(run, config=tune(run))
                directory.write_options("config.yaml", run.config)
            summary = run.complete()
            of_first(ranks, "report", lambda: finish(run.config, own, summary))
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        where = show(error.filename or path)
        raise InputError(f"--out: cannot write to {where}: {reason}") from None
    except TrainingError as error:
        raise TrainingError(f"{error}. The last good checkpoint is kept in {path}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; to continue: {again}") from None
    if ranks.rank == 0:
        print_summary(summary)
    progress.say(f"report {path / 'report.html'}")


def choose_directory(job: Job[Any, Any], invocation: Invocation) -> Path:
    """The run directory an invocation means; `InputError` where it would write over a run."""

    config, out = invocation.job, invocation.out
    if out is not None:
        try:
            used = out.is_dir() and any(out.iterdir())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--out: cannot read {show(out)}: {reason}") from None
        if invocation.resume == "never" and used:
            raise InputError(
                f"--out: {show(out)} exists and is not empty; continue it with --resume auto "
                "or name another directory"
            )
        return out
    name = f"{job.name}-{config.task}"
    if invocation.resume == "auto":
        for path in numbered(RUNS, name):
            found = RunDirectory(path, "--resume")
            if found.complete:
                continue
            try:
                same = not found.old and stored_options(found, config) == to_dict(config)
            except InputError as error:  # it may be any run's, and does not stop this one
                print(f"gradsurgery: warning: passed over: {error}", file=sys.stderr)
                continue
            if same:
                return path
    return new_directory(RUNS, name)


def stored_options(directory: RunDirectory, config: JobConfig) -> dict[str, Any] | None:
    """The options a run directory was started with, None if it has none.

    A search for options changes them in config.yaml; what it was asked is in tuning.yaml.
    """
    searched = config.tune and directory.has("tuning.yaml")
    asked = "tuning.yaml" if searched else "config.yaml"
    return directory.options(asked) if directory.has(asked) else None


def open_directory(
    directory: RunDirectory,
    config: JobConfig,
    facts: dict[str, str | int] | None = None,
    ranks: int = 1,
) -> None:
    """Write the options, and what data and model are, into a new run directory; in an old one,
    insist that they are the same."""
    if directory.old:
        raise InputError(
            f"--out: {show(directory.path)} is of a version that kept no checksums, so it cannot "
            "be continued; name another directory"
        )
    stored = stored_options(directory, config)
    if stored is None:
        if any(directory.path.glob("stages/*.json")):
            raise InputError(f"--out: {show(directory.path)} holds a run without its config.yaml")
        if facts:
            directory.write_json(FACTS, facts)
        if config.tune:
            directory.write_options("tuning.yaml", config)
        directory.write_options("config.yaml", config)
    else:
        changed = differences(stored, to_dict(config)) or differences(
            directory.facts(), facts or {}, "data."
        )
        if changed:
            raise InputError(
                f"--resume: {show(directory.path)} was started with other options: "
                f"{'; '.join(changed)}"
            )
    directory.write_json("env.json", environment(config.threads, ranks))
