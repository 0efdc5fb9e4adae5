"""Pages out of the templates beside this file: what a value holds is shown as text, whatever it is.

A page needs no other file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradsurgery.text import show
from gradsurgery.unlearn.report.labels import percent, title
from gradsurgery.unlearn.report.plots import color


def page(template: str, heading: str, **values: Any) -> str:
    """A page from templates/, all of its text escaped."""
    return PAGES.get_template(f"{template}.html.jinja").render(heading=heading, **values)


def plain(value: Any) -> str:
    """An option's value without brackets and quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    if value is None or value in ("", []):
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _printable(value: Any) -> Any:
    """Text with what is not printable escaped; what a macro made is, already."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return show(value, sys.maxsize)


TEMPLATES = Path(__file__).parent / "templates"
PAGES = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
PAGES.filters |= {
    "color": color,
    "percent": percent,
    "plain": plain,
    "show": show,
    "stage_title": title,
}
