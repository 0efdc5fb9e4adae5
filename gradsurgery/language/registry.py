"""Losses by name, those of the forget set and those of the retain set, and their table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.language.base import LanguageLoss
from gradsurgery.language.losses import (
    CEU,
    KL,
    NLL,
    PDU,
    RAUL,
    UNDIAL,
    WGA,
    GradAscent,
    IdkNLL,
    SatImp,
)
from gradsurgery.language.preference import DPO, NPO, SimNPO
from gradsurgery.language.states import RMU, RMURetain
from gradsurgery.text import brief, show

FORGET: dict[str, type[LanguageLoss]] = {
    "grad_ascent": GradAscent,
    "wga": WGA,
    "satimp": SatImp,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "idk_dpo": DPO,
    "altpo": DPO,
    "idk_nll": IdkNLL,
    "undial": UNDIAL,
    "ceu": CEU,
    "pdu": PDU,
    "raul": RAUL,
    "rmu": RMU,
}
"""Every loss of what is to be forgotten by its name, as `forget_loss` and `--loss` take it."""

RETAIN: dict[str, type[LanguageLoss]] = {"nll": NLL, "kl": KL, "rmu": RMURetain}
"""Every loss of what is to be kept by its name, as `retain_loss` takes it."""

HEAD = ("set", "name", "loss of a sample", "a rule", "needs of the original", "source")


def forget_loss(name: str, **options: Any) -> LanguageLoss:
    """A loss of what is to be forgotten; `FORGET` has the names.

        forget_loss("npo", beta=0.1, reference=LogProbs.of(model, loader))

    Raises:
        InputError: a name or options that there are not, with those that there are; a value out of
            range; a reference missing.
    """
    return _made("forget", FORGET, name, options)


def retain_loss(name: str, **options: Any) -> LanguageLoss:
    """A loss of what is to be kept, lowered; `RETAIN` has the names. Errors as `forget_loss`."""
    return _made("retain", RETAIN, name, options)


def _made(
    which: str, known: dict[str, type[LanguageLoss]], name: str, options: dict[str, Any]
) -> LanguageLoss:
    kind = known.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"there is no {which} loss {brief(name)}; there are {', '.join(known)}")
    takes = [field.name for field in fields(kind)]
    unknown = [show(option) for option in options if option not in takes]
    if unknown:
        has = ", ".join(takes) or "none"
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {has}")
    return kind(**options)


def markdown() -> str:
    """The table of docs/language.md."""
    lines = [HEAD, ("---",) * len(HEAD), *_rows("forget", FORGET), *_rows("retain", RETAIN)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(which: str, known: dict[str, type[LanguageLoss]]) -> Iterable[tuple[str, ...]]:
    for kind in dict.fromkeys(known.values()):
        names = ", ".join(f"`{name}`" for name, each in known.items() if each is kind)
        formula = kind.formula.replace("|", "\\|")
        does = "raises it" if kind.objective == "raise" else "lowers it"
        yield which, names, formula, does, kind.needs, kind.paper
