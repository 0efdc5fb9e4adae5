"""What was built, what runs, with which versions, what is missing: `gradsurgery doctor`."""

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from types import ModuleType

import torch

from gradsurgery.errors import InputError
from gradsurgery.extras import fits, requirements
from gradsurgery.ops import _backend
from gradsurgery.ops._backend import OPERATORS, backend_of, native_available, triton_available
from gradsurgery.text import show

REBUILD = (
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary gradsurgery gradsurgery"
)
ABSENT = "absent"
DEVELOPERS = ("dev", "docs")  # extras that nobody misses who does not work on the package itself


def main() -> None:
    """Print the report, then what is missing and how to get it."""
    print(report())
    print("\n" + "\n".join(advice() or ["nothing is missing"]))


def report() -> str:
    """The report, as aligned lines of plain text."""
    native, reason = _load_native()
    facts = {
        "gradsurgery": _version("gradsurgery"),
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        **(_describe(native) if native else {"native module": reason}),
        **_backends(native, reason),
        "devices": ", ".join(_devices()),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads)",
    }
    facts |= {name: _serving(name) for name in OPERATORS}
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {show(value)}" for name, value in facts.items())


def advice() -> list[str]:
    """What is missing here and how to get it, one line each; empty where nothing is."""
    return [*_advice_on_builds(), *_advice_on_packages()]


def _advice_on_builds() -> list[str]:
    native, reason = _load_native()
    found = []
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        found.append(
            "torch: this build does not use the NVIDIA GPU; one that does: "
            "https://pytorch.org/get-started/locally"
        )
    if native is None:
        found.append(
            f"native module: {reason}; plain torch serves, slower. Build it with a C++20 compiler: "
            f"{REBUILD}"
        )
        return found
    if not native.openmp and sys.platform != "darwin":  # where torch's own would be loaded twice
        found.append(f"openmp: install your compiler's OpenMP (libgomp or libomp), then {REBUILD}")
    if torch.cuda.is_available() and torch.version.hip is None and not native.cuda_version:
        have = "Triton's kernels serve" if _backend.TRITON else "plain torch serves"
        found.append(f"cuda kernels: not built, {have}. With nvcc 12 or newer on PATH: {REBUILD}")
    if torch.cuda.is_available() and torch.version.hip is None and not _backend.TRITON:
        found.append("triton: its kernels are missing: pip install triton")
    return found


def _advice_on_packages() -> list[str]:
    asked = requirements()
    if not asked:
        return ["gradsurgery: not installed as a package, so its extras are unknown: pip install ."]
    found: list[str] = []
    lacks: dict[str, list[str]] = {}
    for project, versions, extra in asked:
        have = _version(project)
        there = have != ABSENT
        if extra in DEVELOPERS or (there and fits(have, versions)):
            continue
        if extra:
            note = f" ({have} is here)" if there else ""
            lacks.setdefault(extra, []).append(project + versions + note)
        else:
            note = " is too old or too new" if there else ""
            found.append(f'{project} {have}{note}: pip install --upgrade "{project}{versions}"')
    for extra, names in lacks.items():
        found.append(f'extra {extra} lacks {", ".join(names)}: pip install "gradsurgery[{extra}]"')
    return found


def _serving(name: str) -> str:
    """Which implementation of an operator serves a CPU and a CUDA tensor, and why none better."""
    served = []
    for device, label in (("cpu", "CPU"), ("cuda", "CUDA")):
        try:
            backend = backend_of(name, device)
        except InputError:  # GRADSURGERY_BACKEND names one it has not
            backend = f"none, {os.environ['GRADSURGERY_BACKEND']} is forced"
        missing = []
        if backend in ("triton", "torch") and not os.environ.get("GRADSURGERY_BACKEND"):
            built = native_available(device)
            missing.append("no native kernel" if built else f"no native {label} kernels built")
            if device == "cuda" and backend == "torch":
                if triton_available(device):
                    missing.append("none in Triton")
                else:
                    missing.append("GPU below sm_80" if _backend.TRITON else "Triton absent")
        served.append(f"{label}: {backend}" + (f" ({', '.join(missing)})" if missing else ""))
    return "; ".join(served)


def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why it does not load."""
    try:
        from gradsurgery import _C
    except ImportError as error:
        return None, f"absent: {error}"
    return _C, ""


def _describe(native: ModuleType) -> dict[str, str]:
    architectures = ", ".join(f"sm_{name.split('-')[0]}" for name in native.cuda_architectures)
    try:
        in_use = f"{native.isa()}, of {', '.join(native.isas)}"
    except InputError as error:  # GRADSURGERY_CPU names one this processor lacks
        in_use = f"none: {error}"
    return {
        "native module": str(native.__file__),
        "compiler": native.compiler,
        "openmp": "yes" if native.openmp else "no: native CPU kernels run on one thread",
        "instruction set": in_use,
        "cuda kernels": f"nvcc {native.cuda_version} for {architectures}"
        if native.cuda_version
        else "not built",
    }


def _backends(native: ModuleType | None, reason: str) -> dict[str, str]:
    """Which implementations of the operators can run here."""
    if native is None:
        state = reason
    elif not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        state = "unusable: torch 2.11 or newer is needed"
    elif torch.cuda.is_available():
        state = "live on CPU" + (" and CUDA" if native.cuda_version else "; no CUDA kernels built")
    else:
        state = "live on CPU" + ("; CUDA kernels built, no GPU here" if native.cuda_version else "")
    if importlib.util.find_spec("triton") is None:
        triton = "absent"
    elif torch.cuda.is_available():
        triton = "live on CUDA"
    else:
        triton = "importable, no GPU here"
    return {
        "backend torch": "live",
        "backend native": state,
        "backend triton": triton,
        "backend forced": os.environ.get("GRADSURGERY_BACKEND") or "none",
    }


def _devices() -> list[str]:
    cuda = range(torch.cuda.device_count())
    return ["cpu", *(f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in cuda)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT
