"""Whether ranks have the same: names in every step; in the first, all that an update depends on."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from gradsurgery.errors import InputError
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.places import place_of
from gradsurgery.spread import local

# the model's parameters that have rows, and others that the optimizer holds
Columns = tuple[Mapping[str, nn.Parameter], Mapping[str, nn.Parameter]]
Figures = tuple[float, float]

NONE = (0.0, 0.0)
CHUNK = 1 << 22  # values looked at together
SAME = 1e-6  # of a norm: processors may round differently
UNSEEN = ("params", "param_names", "foreach", "fused")  # options that change no step


class Fingerprint(NamedTuple):
    """What a rank has, in figures."""

    rule: str
    columns: list[tuple[Any, ...]]  # name, shape, dtype
    parameters: dict[str, Figures]
    state: dict[str, Figures]  # of the rule
    optimizer: list[tuple[str, Any]]
    steps: dict[str, dict[str, Any]]  # the optimizer's state, by parameter
    project: str
    observed: dict[str, dict[str, Figures]]  # by the projection
    piece: int  # of shards, which this rank has
    shards: dict[str, Figures]


def columns_of(columns: Columns) -> int:
    """A number that stands for the names, shapes and dtypes of what has rows, in order."""
    return crc32(repr(_listed(columns)).encode())


def fingerprint(
    model: nn.Module,
    columns: Columns,
    rule: Any,
    optimizer: torch.optim.Optimizer,
    project: Any,
) -> Fingerprint:
    """What must be the same on all ranks; parameters in figures, those that are frozen too."""
    named = {**dict(model.named_parameters()), **columns[1]}
    trained = {**columns[0], **columns[1]}
    places = [place for place in map(place_of, named.values()) if place is not None]
    return Fingerprint(
        # functions among a rule's options have an address of their own
        re.sub(r" at 0x[0-9a-f]+", "", repr(rule)),
        _listed(columns),
        {name: _figures(p) for name, p in named.items() if place_of(p) is None},
        {name: _figures(value) for name, value in getattr(rule, "_state", {}).items()},
        [("class", type(optimizer).__name__), *_options(optimizer)],
        {name: _of_state(optimizer.state.get(p, {})) for name, p in trained.items()},
        type(project).__name__,
        {} if project is None else _of_projection(project.state_dict()),
        places[0].piece if places else 0,
        {name: _figures(p) for name, p in named.items() if place_of(p) is not None},
    )


def check_alike(every: list[Fingerprint], ranks: Group) -> None:
    """Raise `InputError` where ranks differ, by the first thing that does.

    Args:
        every: of each rank.
        ranks: whose they are.
    """
    first = every[0]
    for rank, other in enumerate(every[1:], 1):
        both = f"{ranks.name(0)} and {ranks.name(rank)}"
        if other.rule != first.rule:
            raise InputError(f"rule: {both} have different ones, {first.rule} and {other.rule}")
        odd = _odd(first.columns, other.columns)
        if odd is not None:
            raise InputError(f"model: {both} train different parameters, as {odd[0]}")
        name = _differs(first.parameters, other.parameters)
        if name is None:  # of shards, each replica has the same
            like = next(k for k, each in enumerate(every) if each.piece == other.piece)
            name = _differs(every[like].shards, other.shards)
            both = f"{ranks.name(like)} and {ranks.name(rank)}" if name is not None else both
        if name is not None:
            raise InputError(
                f"model: parameter {name} differs between {both}: let all begin with the same "
                "weights, as DistributedDataParallel does, or load one checkpoint"
            )
        name = _differs(first.state, other.state)
        if name is not None:
            raise InputError(
                f"rule: what it remembers, {name}, differs between {both}: give all the same "
                "state_dict()"
            )
        odd = _odd(first.optimizer, other.optimizer)
        if odd is not None:
            raise InputError(f"optimizer: {both} have different ones: {odd[0]} is {odd[1]} on one")
        for name, state in first.steps.items():
            if _differs(state, other.steps[name]) is not None:
                raise InputError(
                    f"optimizer: its state of {name} differs between {both}: load one checkpoint"
                )
        if other.project != first.project:
            raise InputError(
                f"project: {both} have different ones, {first.project} and {other.project}"
            )
        for name in {**first.observed, **other.observed}:
            known = (each.observed.get(name) for each in (first, other))
            a, b = (each if each is not None else {"": NONE} for each in known)
            if _differs(a, b) is not None:
                raise InputError(
                    f"project: {both} have observed different inputs of {name}: give observe the "
                    "process_group"
                )


def check_stepped(failed: list[bool], ranks: Group) -> None:
    """Raise `InputError` where the optimizer's last step failed on some ranks and not on others.

    Shards that stayed behind look like any other: no rank has the same.
    """
    if any(failed) and not all(failed):
        some, others = ranks.name(failed.index(True)), ranks.name(failed.index(False))
        raise InputError(
            f"optimizer: its last step failed on {some} and not on {others}, whose shards have "
            "moved: load one checkpoint on all, and make the Surgeon anew"
        )


def _listed(columns: Columns) -> list[tuple[Any, ...]]:
    return [(name, tuple(p.shape), str(p.dtype)) for part in columns for name, p in part.items()]


def _odd(first: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """What one has and the other has not, or at another place."""
    if first == other:
        return None
    alone = [each for each in first if each not in other]
    alone += [each for each in other if each not in first]
    return alone[0] if alone else next(a for a, b in zip(first, other, strict=False) if a != b)


def _differs(first: Mapping[str, Figures], other: Mapping[str, Figures]) -> str | None:
    """The first name of what differs."""
    for name in {**first, **other}:
        a, b = first.get(name), other.get(name)
        if a is None or b is None:
            return name
        least = SAME * max(abs(a[0]), abs(b[0]))
        for x, y in zip(a, b, strict=True):
            if not (x == y or (x != x and y != y) or abs(x - y) <= least):
                return name
    return None


def _figures(tensor: Tensor) -> Figures:
    """The norm, and a product with a vector that tells what is turned or in another order."""
    square = product = 0.0
    if tensor.is_meta:  # offloaded until it is used
        return NONE
    with torch.no_grad():
        for k, part in enumerate(local(tensor).flatten().split(CHUNK)):
            values = part.double()
            ramp = torch.arange(len(part), dtype=torch.float64, device=part.device) + k * CHUNK
            square += float(values.square().sum())
            product += float(values @ (ramp * 0.6180339887).frac())
    return square**0.5, product


def _options(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Any]]:
    for k, group in enumerate(optimizer.param_groups):
        for name, value in sorted(group.items()):
            if isinstance(value, Tensor) and value.numel() == 1:
                value = float(value)
            if name not in UNSEEN and isinstance(value, (bool, int, float, str, tuple)):
                yield f"{name} of group {k}", value


def _of_projection(state: Mapping[str, Any]) -> dict[str, dict[str, Figures]]:
    return {
        name: {"not held": NONE} if seen is None else {str(d): _figures(t) for d, t in seen.items()}
        for name, seen in state.items()
    }


def _of_state(entries: Mapping[str, Any]) -> dict[str, Figures]:
    return {
        name: _figures(value) if isinstance(value, Tensor) else (float(value), 0.0)
        for name, value in entries.items()
        if isinstance(value, (Tensor, int, float)) and place_of(value) is None
    }
