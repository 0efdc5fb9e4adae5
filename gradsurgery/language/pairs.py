"""Any forget loss with any rule of surgery, by names: the rule in the direction of the loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from gradsurgery.errors import InputError
from gradsurgery.language.base import LanguageLoss, Objective
from gradsurgery.ops._inputs import check, shown
from gradsurgery.surgery import RULES, Krum, OrthoGrad, Rule, TwoDirections, Weighting
from gradsurgery.text import brief, show

SHARED = tuple(field.name for field in fields(Weighting) if field.init)
HEAD = ("rule", "takes")


def rule_for(rule: str | Rule, loss: LanguageLoss | Objective, **options: Any) -> Rule:
    """A rule for a forget loss, which raises or lowers that loss as the loss asks for.

        rule_for("orthograd", npo, alpha=0.5)  # OrthoGrad(alpha=0.5, objective="lower")
        rule_for("pcgrad", npo)  # two tasks: TwoDirections(rule=PCGrad(), objective="lower")

    Args:
        rule: a name of `gs.RULES`, or a rule as it is, which is checked.
        loss: of what is to be forgotten, as `forget_loss` makes it, or its direction alone.
        options: of the rule, by name.

    Raises:
        InputError: a name or options that there are not, with those that there are; a rule that
            takes no forget loss, with the reason; a rule of the other direction.
    """
    if isinstance(loss, LanguageLoss):
        what, objective = type(loss).__name__, loss.objective
    else:
        check(loss in get_args(Objective), f"loss must be a LanguageLoss, got {shown(loss)}")
        what, objective = "the forget loss", loss
    if isinstance(rule, Rule):
        check(not options, f"options {sorted(options)} are for a name; the rule is made already")
        return _checked(rule, what, objective)
    kind = RULES.get(rule) if isinstance(rule, str) else None
    if kind is None:
        raise InputError(f"there is no rule {brief(rule)}; there are {', '.join(RULES)}")
    if why := refused(kind):
        raise InputError(f"rule: {rule} takes no forget loss: {why}")
    known = [name for name in (*kind.options(), *SHARED) if name != "objective"]
    unknown = [show(name) for name in options if name not in known]
    if unknown:
        raise InputError(
            f"{rule} has no option {', '.join(unknown)}; it has {', '.join(known)}"
            + "; its objective is the loss's" * ("objective" in options)
        )
    if "objective" in kind.options():  # which `Rule` itself has not
        return kind(objective=objective, **options)  # type: ignore[call-arg]
    shared = {name: value for name, value in options.items() if name in SHARED}
    own: Any = kind(**{name: value for name, value in options.items() if name not in SHARED})
    return TwoDirections(rule=own, objective=objective, **shared)


def refused(kind: type[Rule]) -> str:
    """Why a rule takes no forget loss; empty where it does."""
    if "forget" in kind.roles:
        return ""
    if not issubclass(kind, Weighting):
        return "it knows no forget rows, and has no weights of two; `sago` and `salun` do"
    if kind.merges:
        return "it learns without opposing a memory; `gru` does so to a forget loss"
    if kind is Krum:
        return "it chooses among three rows or more"
    return ""


def _checked(rule: Rule, what: str, objective: Objective) -> Rule:
    name, has = type(rule).__name__, getattr(rule, "objective", None)
    if has is None:
        if why := refused(type(rule)):
            raise InputError(f"rule: {name} takes no forget loss: {why}")
        raise InputError(
            f"rule: {name} lowers all its rows: take TwoDirections(rule={name}(...), "
            f"objective={objective!r}), or its name"
        )
    if has != objective:
        which = {"raise": "raised", "lower": "lowered"}
        raise InputError(
            f"rule: {name} has objective={has!r}, and {what} is to be {which[objective]}: give "
            f"objective={objective!r}"
        )
    return rule


def takes(kind: type[Rule]) -> str:
    """Which rows a rule makes its update of, in words."""
    if why := refused(kind):
        return f"no forget loss: {why}"
    if kind is OrthoGrad:
        return "the mean forget row, and that of each retain sample"
    if not issubclass(kind, Weighting):
        return "both means, value by value"
    return "both means" if "forget" in kind.roles else "both means, as two tasks"


def markdown() -> str:
    """The table of docs/language.md."""
    groups: dict[str, list[str]] = {}
    for name, kind in RULES.items():
        groups.setdefault(takes(kind), []).append(f"`{name}`")
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [(", ".join(names), rows) for rows, names in groups.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
