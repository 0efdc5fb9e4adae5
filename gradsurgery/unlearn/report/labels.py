"""What stages are called where people read them."""

from __future__ import annotations

from gradsurgery.text import show
from gradsurgery.unlearn.jobs.stages import parts
from gradsurgery.unlearn.methods import ALL

PAIRS = "surgery"  # the method that a loss with a rule is a variant of
NAMES = {"original": "Original", **{name: kind.title for name, kind in ALL.items()}}


def title(name: str) -> str:
    """Method and variant as people read them; which fraction it is the place around it says."""
    method, variant, *_ = parts(name)
    shown = NAMES.get(method, method)
    if method == PAIRS and variant:  # a loss with a rule, which says all
        shown = variant
    elif variant:
        shown = f"{shown}, {variant}"
    return show(shown, 120)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"
