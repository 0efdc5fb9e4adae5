"""`gradsurgery bench`: options to a directory with bench.json, table.md and report.html."""

import argparse
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from gradsurgery import __version__
from gradsurgery.bench import cases, measuring
from gradsurgery.errors import InputError, TrainingError
from gradsurgery.ops._backend import backend_of
from gradsurgery.text import show
from gradsurgery.unlearn.jobs.device import check_device
from gradsurgery.unlearn.jobs.directory import new_directory
from gradsurgery.unlearn.jobs.environment import processor
from gradsurgery.unlearn.jobs.progress import make_progress

NEEDS = ("pytest", "pytest_benchmark", "matplotlib", "jinja2")
RUNS = Path("runs")
MINUTES = 5.0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"bench: {message}; gradsurgery bench --help lists the options")


def parser() -> Parser:
    found = Parser(
        prog="gradsurgery bench",
        description="Time operators, rules and steps on this machine beside what else does the "
        "same. Writes bench.json, table.md and report.html.",
    )
    found.add_argument("--out", type=Path, metavar="DIR", help="a new directory; runs/bench-N")
    found.add_argument("--minutes", type=float, default=MINUTES, help="to take, about; %(default)g")
    found.add_argument("--device", help="cpu, cuda, cuda:1; a GPU if there is one")
    found.add_argument("--threads", type=int, help="of the CPU; as many as torch takes")
    found.add_argument(
        "--size", choices=[*cases.SIZES], help="small on a CPU, large on a GPU; tiny is a trial"
    )
    found.add_argument(
        "--only", nargs="+", choices=cases.GROUPS, metavar="GROUP", help=", ".join(cases.GROUPS)
    )
    found.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier bench.json")
    found.add_argument("--profile", action="store_true", help="a trace of a step of each model")
    return found


def main(arguments: list[str]) -> None:
    """Measure, and tell of it.

    Raises:
        InputError: options that make no sense, or a package that is not installed.
        TrainingError: some of what was to be measured failed.
    """
    options = parser().parse_args(arguments)
    for name in NEEDS:
        if importlib.util.find_spec(name) is None:
            shown = name.replace("_", "-")
            raise InputError(
                f'bench needs {shown}, which is not installed: pip install "gradsurgery[bench]"'
            )
    from gradsurgery.bench import plugin, record, report
    from gradsurgery.bench.page import page

    if not 0 < options.minutes < float("inf"):
        raise InputError(f"--minutes: must be above 0, got {options.minutes:g}")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads: must be 1 at least, got {options.threads}")
    device = _device(options.device)
    old = record.read(options.compare, "--compare") if options.compare else None
    out = options.out or new_directory(RUNS, "bench")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out: cannot make {show(out)}: {error.strerror or error}") from None
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.size or ("large" if device.type == "cuda" else "small")
    size = cases.SIZES[name]
    chosen = cases.all_cases(size, options.only or cases.GROUPS)
    progress = make_progress()
    progress.say(f"{len(chosen)} cases in some {options.minutes:g} minutes, into {out}")
    machine, seconds = _machine(device, name), 60 * options.minutes
    running = plugin.Plugin(chosen, device, seconds, size.rounds, machine, progress)
    plugin.run(running, out / "bench.json")
    found = record.read(out / "bench.json", "bench")
    text = report.markdown(found, old)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(page(found, old), encoding="utf-8")
    if options.profile:
        from gradsurgery.bench.profile import traces

        for path in traces(cases.all_cases(size, ("steps",)), device, out):
            progress.say(f"trace {show(path)}")
    for told in report.sentences(found, old):
        progress.say(told)
    for told in report.slower(found):
        progress.say(
            f"slower: {told.work}, ours {told.ours}, {told.faster} {told.takes}: {told.times}"
        )
    progress.say(f"table {show(out / 'table.md')}")
    progress.say(f"report {show(out / 'report.html')}")
    if found.failed:
        raise TrainingError(f"{len(found.failed)} of {len(chosen)} cases failed, see {show(out)}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: must be cpu or cuda, got {show(name)}")
    return device


def _machine(device: torch.device, size: str) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    small = size == "tiny"
    return {
        "device": name,
        "processor": processor(),
        "gradsurgery": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {package: _version(package) for package in cases.PACKAGES},
        "threads": torch.get_num_threads(),
        "kernels": _kernels(device.type),
        "memory": measuring.memory_kind(),
        "size": size,
        **measuring.rates(device, *((1 << 20, 256) if small else ())),
    }


def _kernels(device: str) -> str:
    """Which implementation of `gramian` serves the device, and with which instructions."""
    backend = backend_of("gramian", device)
    if backend == "native" and device == "cpu":
        from gradsurgery import _C

        return f"native kernels ({_C.isa()})"
    return f"{backend} kernels"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
