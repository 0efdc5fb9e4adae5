"""What a run depended on besides its options."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(threads: int, ranks: int = 1) -> dict[str, Any]:
    """What a run depended on besides its options."""
    packages = ("gradsurgery", "torch", "numpy", "scikit-learn", "matplotlib", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "ranks": ranks,  # processes that made it together
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {package: _version(package) for package in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
