"""The command line: gradsurgery unlearn | report | compare | bench | rules | doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gradsurgery import __version__
from gradsurgery.errors import InputError, RankError, TrainingError
from gradsurgery.extras import extra_of, project_of
from gradsurgery.text import show

DESCRIPTION = "Gradient surgery and unlearning: jobs, reports, benchmarks."
LONGEST = 800  # characters of a message
COMMANDS = ("report", "compare", "bench", "rules", "doctor")  # and unlearn
EXTRAS = ("cli", "jobs")  # what brings the packages that every command needs


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; how it ends is in the exit code.

    0: done. 1: a run that failed. 2: input that makes no sense. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="gradsurgery", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"gradsurgery {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    unlearn = commands.add_parser("unlearn", help="run an unlearning job", add_help=False)
    unlearn.add_argument("rest", nargs=argparse.REMAINDER)
    report = commands.add_parser("report", help="a run's verdict and tables; its report.html anew")
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    compare = commands.add_parser("compare", help="finished runs in one table and one page")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    compare.add_argument("--out", type=Path, metavar="FILE", help="HTML page to write")
    bench = commands.add_parser("bench", help="what it costs here, beside others", add_help=False)
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    commands.add_parser("rules", help="the rules of surgery: name, update, what holds of it")
    commands.add_parser("doctor", help="what is built, which backends work, versions, threads")

    try:
        # argparse's REMAINDER does not take a leading --option, so these two are cut off first
        if arguments[:1] in (["unlearn"], ["bench"]):
            command = _unlearn if arguments[0] == "unlearn" else _bench
            command(arguments[1:])
            return
        chosen = parser.parse_args(arguments)
        if chosen.command == "report":
            _report(chosen.run)
        elif chosen.command == "compare":
            _compare(chosen.runs, chosen.out)
        elif chosen.command == "rules":
            from gradsurgery.surgery import table

            print(table.text())
        else:
            from gradsurgery import doctor

            doctor.main()
    except InputError as error:
        fail(str(error), 2)
    except (TrainingError, RankError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        fail(f"this command {_lacks(error)}", 2)


def _lacks(error: ModuleNotFoundError) -> str:
    """What is not installed, and all that a command then needs; an error of our own is raised."""
    if error.name is None or error.name.startswith("gradsurgery"):
        raise error
    more = extra_of(error.name)
    names = [*EXTRAS, *([more] if more and more not in EXTRAS else [])]
    advice = f'pip install "gradsurgery[{",".join(names)}]"'
    return f"needs {project_of(error.name)}, which is not installed: {advice}"


def fail(message: str, code: int) -> NoReturn:
    """End the program with one line on standard error."""
    print(f"gradsurgery: error: {show(message, LONGEST)}", file=sys.stderr)
    raise SystemExit(code)


def _unlearn(arguments: list[str]) -> None:
    from gradsurgery.unlearn.jobs import registry

    if arguments[:1] in ([], ["-h"], ["--help"]):
        print("usage: gradsurgery unlearn JOB [options]; gradsurgery unlearn JOB --help\n\njobs:")
        for name in registry.names():
            try:
                about = registry.find(name).about
            except ModuleNotFoundError as error:  # the others are there all the same
                about = _lacks(error)
            print(f"  {name:<8} {about}")
        if not arguments:
            raise SystemExit(2)
        return
    if arguments[0] not in registry.names():
        known = arguments[0] in COMMANDS
        advice = f"; {arguments[0]} is a command: gradsurgery {arguments[0]}" if known else ""
        there = " and ".join(registry.names())
        raise InputError(f"unlearn has no job named {arguments[0]}; there are {there}{advice}")
    from gradsurgery.unlearn.command import parse, run_job

    job = registry.find(arguments[0])
    run_job(job, parse(job, arguments[1:]))


def _report(path: Path) -> None:
    from gradsurgery.unlearn.jobs.directory import RunDirectory
    from gradsurgery.unlearn.report.finish import write_report
    from gradsurgery.unlearn.report.tables import print_summary

    directory = RunDirectory(path, "RUN")
    directory.require_finished()
    try:
        summary = write_report(directory)
    except OSError as error:
        name = show(error.filename or path)
        raise InputError(f"RUN: cannot write to {name}: {error.strerror or error}") from None
    print_summary(summary)
    print(f"report {show(directory / 'report.html')}")


def _compare(paths: list[Path], out: Path | None) -> None:
    from gradsurgery.unlearn.report import compare
    from gradsurgery.unlearn.report.tables import print_summary

    if out is not None and os.path.isdir(out):
        example = show(out / "compare.html")
        raise InputError(
            f"--out: cannot write to {show(out)}: it is a directory; name a file, such as {example}"
        )
    runs = compare.load(paths)
    summaries = compare.merge(runs)
    for summary in summaries:
        print_summary(summary)
    if out is None:
        return
    try:
        compare.write(out, summaries, runs)
    except OSError as error:
        name = show(error.filename or out)
        raise InputError(f"--out: cannot write to {name}: {error.strerror or error}") from None
    print(f"page {show(out)}")


def _bench(arguments: list[str]) -> None:
    from gradsurgery.bench import command

    command.main(arguments)
