"""Batches that several ranks share: each takes a part of one, and gradients are those of all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradsurgery.ops._inputs import check
from gradsurgery.ranks import Group
from gradsurgery.ranks.alike import check_alike, fingerprint
from gradsurgery.ranks.group import Said
from gradsurgery.ranks.places import as_grad, place_of
from gradsurgery.ranks.shards import Shards
from gradsurgery.ranks.table import share
from gradsurgery.ranks.update import Buckets
from gradsurgery.unlearn.objectives.base import Batch, batch_size, take
from gradsurgery.unlearn.training.data import Data, digests


def part_of(batch: Batch, ranks: Group) -> Batch | None:
    """This rank's samples of a batch that all ranks have; None where there are too few for all."""
    if not ranks:
        return batch
    mine = share(batch_size(batch), ranks.size, ranks.rank)
    return take(batch, mine) if mine.start < mine.stop else None


@contextmanager
def summed(
    parameters: Sequence[nn.Parameter], model: nn.Module, ranks: Group, shards: Shards | None
) -> Iterator[Said]:
    """Around backward passes of this rank's part: to `.grad` is added what those of all give.

    The ranks raise alike, and know afterwards what each said. Of a sharded model the passes see
    whole parameters, and `.grad` gets shards.
    """
    before = [parameter.grad for parameter in parameters]
    after = dict(enumerate(before))
    try:
        for parameter in parameters:
            parameter.grad = None
        with ranks.agreed("gradients") as said:
            _check_no_hooks(parameters)
            with _computed_with(parameters, model, shards) as computed:
                yield said
                own = [p.grad for p in computed]
            said.mine = said.mine, [grad is not None for grad in own]
        flags = [known for _, known in said.every]
        said.every = [told for told, _ in said.every]
        for k, total in enumerate(_totals(parameters, computed, own, flags, ranks)):
            if total is not None:
                known = before[k]
                after[k] = total if known is None else known + total
    finally:
        for k, parameter in enumerate(parameters):
            parameter.grad = after[k]


def added_up(
    parameters: Sequence[nn.Parameter], ranks: Group, grads: list[Tensor | None], value: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of parameters, None where there is none, and a number [], of all ranks."""
    if not ranks:
        return grads, value
    with ranks.agreed("sums of gradients") as said:
        said.mine = float(value), [grad is not None for grad in grads]
    flags = [known for _, known in said.every]
    summed = math.fsum(own for own, _ in said.every)
    total = torch.tensor(summed, dtype=torch.float64, device=parameters[0].device)
    return _totals(parameters, parameters, grads, flags, ranks), total


def _totals(
    parameters: Sequence[nn.Parameter],
    computed: Sequence[nn.Parameter],
    grads: Sequence[Tensor | None],
    flags: Sequence[Sequence[bool]],
    ranks: Group,
) -> list[Tensor | None]:
    """Sums over ranks, of which each said by `flags` what it has, as parameters have them.

    `computed`: what gradients are of, whole where parameters are shards.
    """
    own = {k: grad for k, grad in enumerate(grads) if grad is not None}
    reached = [any(each) for each in zip(*flags, strict=True)]
    found: list[Tensor | None] = [None] * len(parameters)

    def take(k: int, total: Tensor) -> None:
        found[k] = as_grad(total, parameters[k], owned=True)

    buckets = Buckets(computed, reached, set(), ranks, list(map(place_of, parameters)))
    buckets.sums(iter(own.items()), set(own), take)
    return found


@contextmanager
def _computed_with(
    parameters: Sequence[nn.Parameter], model: nn.Module, shards: Shards | None
) -> Iterator[list[nn.Parameter]]:
    """What passes inside find in the place of parameters; of one that has no shards, itself."""
    if shards is None:
        yield list(parameters)
        return
    shards.rest()
    held = {id(parameter) for parameter in parameters}
    named = {name: p for name, p in model.named_parameters() if id(p) in held}
    names = {id(p): name for name, p in named.items()}
    with shards.gathered(named) as whole:
        found = [whole.get(names.get(id(p), ""), p) for p in parameters]
        try:
            yield found
        finally:
            for parameter in found:
                parameter.grad = None


def _check_no_hooks(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        shape = list(parameter.shape)
        check(
            not hooks,
            f"model: a parameter {shape} has a hook, which would see the part of its gradient that "
            "is this rank's samples'",
        )


def check_shared(
    ranks: Group,
    about: str,
    data: Mapping[str, Data],
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Raise `InputError` on all ranks where they do not have the same method, samples and model.

    Args:
        ranks: who step together.
        about: the method and its options.
        data: the sets, by name.
        model: a replica on each.
        trained: its parameters that train, by name.
        optimizer: of these.
    """
    if not ranks:
        return
    with ranks.agreed("the beginning of a method") as said:
        sets = {}
        for kind, samples in data.items():
            check(
                not isinstance(samples, DataLoader),
                f"{kind}: a DataLoader on several ranks would give each a batch of its own: give "
                "all samples as one batch of tensors, the same on all ranks",
            )
            if samples is not None:
                sets[kind] = hashlib.sha256(b"".join(digests(samples))).hexdigest()
        said.mine = about, sets, fingerprint(model, (trained, {}), None, optimizer, None)
    first = said.every[0]
    for rank, other in enumerate(said.every):
        both = f"{ranks.name(0)} and {ranks.name(rank)}"
        check(other[0] == first[0], f"config: {both} differ, {first[0]} and {other[0]}")
        parts = [
            kind for kind in {**first[1], **other[1]} if first[1].get(kind) != other[1].get(kind)
        ]
        check(
            not parts,
            f"{' and '.join(parts)}: {both} have other samples; give all ranks the same, of which "
            "each takes its part",
        )
    check_alike([each[2] for each in said.every], ranks)
