"""Packages of the extra `language`, imported where something needs them."""

from importlib import import_module
from typing import Any

from gradsurgery.errors import InputError


def package(name: str, needed_by: str) -> Any:
    """A module that is there if the extra is installed.

    Raises:
        InputError: it is not, with what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        project = name.partition(".")[0].replace("_", "-")
        raise InputError(
            f"{needed_by} needs {project}: pip install 'gradsurgery[language]'"
        ) from error
