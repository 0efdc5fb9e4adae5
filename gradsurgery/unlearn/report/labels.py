"""What stages are called where people read them."""

from __future__ import annotations

from gradsurgery.text import show
from gradsurgery.unlearn.jobs.stages import parts
from gradsurgery.unlearn.methods import ALL

NAMES = {"original": "Original", **{name: kind.title for name, kind in ALL.items()}}


def title(name: str) -> str:
    """Method and variant as people read them; which fraction it is the place around it says."""
    method, variant, _ = parts(name)
    shown = NAMES.get(method, method)
    return show(f"{shown}, {variant}" if variant else shown, 120)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"
