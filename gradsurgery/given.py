"""What `Surgeon` is given: its parts, the parameters that have rows, batches for its rule."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from gradsurgery.batch import batch_size, micro_batches, trainable
from gradsurgery.collect import ROLES, Added
from gradsurgery.errors import InputError
from gradsurgery.ops._inputs import check
from gradsurgery.spread import check_one_rank, is_split
from gradsurgery.surgery import Rule

# the model's parameters that have rows, and others that the optimizer holds
Columns = tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]


def check_kinds(model: Any, optimizer: Any, rule: Any) -> None:
    """Raise `InputError` naming the first part that is of another class."""
    for name, given, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("rule", rule, Rule),
    ):
        got = given.__name__ if isinstance(given, type) else type(given).__name__
        check(isinstance(given, kind), f"{name} must be a {kind.__name__}, got {got}")


def check_precondition(rule: Rule, optimizer: torch.optim.Optimizer) -> None:
    """Raise `InputError` where a rule is to precondition as an optimizer that does not."""
    plain = isinstance(optimizer, torch.optim.Adam) and not any(
        group["amsgrad"] for group in optimizer.param_groups
    )
    check(
        plain or rule.weighting is None or rule.weighting.precondition is None,
        "precondition='optimizer' needs Adam or AdamW without amsgrad, "
        f"got {type(optimizer).__name__}",
    )


def check_split(rule: Rule, rows: str, project: Any) -> None:
    """Raise `InputError` where something needs rows or steps whole, and the model is split."""
    split = "a model that parallelize_module split"
    check(rows == "captured", f"rows='stored': {split} has captured rows only")
    check(project is None, f"project: steps of {split} are not projected")
    name, weighting = type(rule).__name__, rule.weighting
    check(weighting is not None, f"rule: {name} needs whole rows, and no rank of {split} has them")
    check(
        weighting is None or weighting.precondition is None,
        f"precondition='optimizer': {split} has plain inner products only",
    )


def looked_up(
    model: nn.Module, optimizer: torch.optim.Optimizer, known: Mapping[str, nn.Parameter]
) -> Columns:
    """What the optimizer holds and is not frozen: the model's parameters, and others.

    Args:
        model: whose parameters have rows.
        optimizer: what steps.
        known: parameters of the model as they were before, by name.

    Raises:
        InputError: a parameter was replaced, and the optimizer holds the one from before; as
            `trainable`.
    """
    held, outside = {}, {}
    own = {id(parameter) for parameter in model.parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for k, parameter in enumerate(group["params"]):
            held[id(parameter)] = parameter
            if parameter.requires_grad and id(parameter) not in own:
                names = group.get("param_names")
                name = names[k] if names else f"optimizer.param_groups[{g}]['params'][{k}]"
                outside[name] = parameter
    check(
        bool(held.keys() & own) or not any(map(is_split, model.parameters())),
        "optimizer holds no parameter of the model: make it after fully_shard, or what else "
        "replaced them",
    )
    foreign = held.keys() - own
    gone = {name for name, before in known.items() if id(before) in foreign}
    for name, parameter in model.named_parameters() if gone else ():
        if name in gone and parameter.requires_grad and id(parameter) not in held:
            check_one_rank(model)  # what spreads a model replaces parameters too
            raise InputError(
                f"model: parameter {name} was replaced, and the optimizer holds the one from "
                "before: make an optimizer and a Surgeon of the model as it is"
            )
    return trainable(model, list(held.values())), outside


def batches(rule: Rule, **parts: Any) -> list[dict[str, Any]]:
    """The batches that were given, by name, if the rule has a use for them.

    Of lists of micro-batches the first of each come first, and so on; where one list is shorter,
    there are none of it at the end.
    """
    given = {part: micro_batches(batch) for part, batch in parts.items() if batch is not None}
    name, roles = type(rule).__name__, rule.roles
    for role in ("second", "memory"):
        check(role in roles or role not in given, f"{name} has no {role} rows")
    if "forget" in roles:
        check("batch" not in given, f"{takes(rule)}, got {list(given)}")
    else:
        foreign = "forget" in given or "retain" in given
        check(not foreign, f"{takes(rule)}, got {list(given)}")
    for part, several in given.items():
        for k, batch in enumerate(several):
            batch_size(batch, part if len(several) == 1 else f"{part}[{k}]")
    return [
        {part: batch for part, batch in zip(given, each, strict=True) if batch is not None}
        for each in zip_longest(*given.values())
    ]


def takes(rule: Rule) -> str:
    """What a rule is to be given, for a message."""
    name = type(rule).__name__
    if "forget" in rule.roles:
        return f"{name} takes forget= and retain="
    return f"{name} lowers every loss it is given: it takes batch="


def check_complete(rule: Rule, added: Added, *given: Mapping[str, Any]) -> None:
    """Raise `InputError` unless all that a rule needs is `given` or was added before."""
    if added.overflowed:
        return
    parts = added.parts.union(*given)
    needed = {"forget", "retain"} if "forget" in rule.roles else {"batch"}
    got = [part for part in ROLES if part in parts]
    check(needed <= parts, f"{takes(rule)}, got {got}")
