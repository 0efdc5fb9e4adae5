"""What was built, what runs, and with which versions: `gradsurgery doctor`."""

import importlib.util
import os
import platform
import sys
from importlib import metadata
from types import ModuleType

import torch

from gradsurgery.errors import InputError
from gradsurgery.ops import _backend
from gradsurgery.ops._backend import OPERATORS, backend_of, native_available, triton_available
from gradsurgery.text import show


def main() -> None:
    """Print the report."""
    print(report())


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
        return "absent"
