"""Text of files, names and paths as a terminal may show it: one line, no codes, not too long."""

from __future__ import annotations

import reprlib

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel = 2


def show(text: object, limit: int = 200) -> str:
    r"""`text` with every character that is not printable escaped (\n, \x1b, a change of direction).

    What is longer than `limit` characters loses its middle.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    half = (limit - 5) // 2
    return line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}"


def brief(value: object) -> str:
    """The repr of a value of any size and depth, short."""
    return show(_repr.repr(value), 120)
