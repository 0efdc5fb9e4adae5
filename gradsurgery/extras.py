"""Optional packages, by the extra of this package that brings them: pip install "gradsurgery[cli]".

Which extra has what stands in pyproject.toml alone, and is read from the installed package.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata
from typing import Any, NamedTuple

from gradsurgery.errors import MissingPackageError

# projects whose modules have other names
PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# name, options of its own, versions, and a marker: torchjd[cagrad]>=0.18; extra == "bench"
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;\s*(.*))?")
ONLY_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")


class Requirement(NamedTuple):
    """A project that this package asks for, as it was installed."""

    project: str
    versions: str
    """The range, such as ">=0.22,<3"; empty: any."""
    extra: str
    """The extra that asks for it; empty: the package itself does."""


def requirements() -> list[Requirement]:
    """All projects that the package asks for; none if it is not installed.

    One with a marker besides its extra, which some machines alone need, is left out.
    """
    try:
        lines = metadata.requires("gradsurgery") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        match = REQUIREMENT.fullmatch(line)
        if match is None:
            continue
        project, versions, marker = match.groups()
        extra = ONLY_EXTRA.fullmatch(marker) if marker else None
        if extra or not marker:
            found.append(Requirement(project, versions.strip("() "), extra[1] if extra else ""))
    return found


def fits(version: str, versions: str) -> bool:
    """Whether a version lies in a range of lower and upper bounds: 2.13.0+cpu in ">=2.11,<3"."""
    have = _numbers(version)
    for bound in filter(None, versions.split(",")):
        match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", bound)
        if match is not None and (have >= _numbers(match[2])) != (match[1] == ">="):
            return False
    return True


def _numbers(version: str) -> list[int]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def project_of(module: str) -> str:
    """The project whose top module is the first part of a dotted name."""
    top = module.partition(".")[0]
    return PROJECTS.get(top, top.replace("_", "-"))


def extra_of(module: str) -> str | None:
    """The first extra that brings a module, or None."""
    project = project_of(module).lower()
    found = (each.extra for each in requirements() if each.extra and each.project == project)
    return next(found, None)


def package(module: str, extra: str, needed_by: str) -> Any:
    """A module that is there if `extra` is installed.

    Raises:
        MissingPackageError: it is not, with what to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error, extra, needed_by) from error


def missing(error: ModuleNotFoundError, extra: str, needed_by: str) -> ModuleNotFoundError:
    """What to raise in the place of an error of an import: one that says what to install."""
    if error.name is None or error.name.partition(".")[0] == "gradsurgery":
        return error
    return MissingPackageError(
        f"{needed_by} needs {project_of(error.name)}: pip install 'gradsurgery[{extra}]'"
    )
