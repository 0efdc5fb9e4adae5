"""`gs.tape`: a recorded forward pass, on one rank or as part of those of all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery import capture
from gradsurgery.capture import Tape
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.alike import columns_of
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.jacobian import RanksJacobian
from gradsurgery.ranks.wrappers import opened


class RanksTape:
    """What `tape` gives where several ranks have samples: turns their losses into one Jacobian."""

    def __init__(self, own: Tape, ranks: Group) -> None:
        self.own, self.ranks = own, ranks
        self.met = False  # whether the others know of this pass, or raise as this rank does

    def jacobian(self, losses: Tensor, groups: Tensor | None = None) -> RanksJacobian:
        """The gradients of the losses of all ranks, those of lower ranks first.

        To be called by all ranks, a rank without samples with losses [0]. Where one raises, all do.

        Args:
            losses: this rank's, as for a tape of one rank.
            groups: the row of each loss, counted from 0 on each rank.

        Raises:
            InputError, NonFiniteError: as for one rank; the message of another's has its number.
        """
        self.met = True
        with self.ranks.agreed("tape.jacobian") as said:
            own = self.own.jacobian(losses, groups)
            columns = dict(zip(own.names, own.parameters, strict=True))
            said.mine = own.m, own.reached, columns_of((columns, {}))
        numbers = {number for *_, number in said.every}
        check(len(numbers) == 1, "model: ranks record other parameters: freeze the same on all")
        rows = [m for m, *_ in said.every]
        reached = [any(each) for each in zip(*(used for _, used, _ in said.every), strict=True)]
        start = sum(rows[: self.ranks.rank])
        ids = torch.arange(start, start + own.m, device="cpu")
        ones = torch.ones(own.m, dtype=torch.float64, device="cpu")
        return RanksJacobian(own, self.ranks, ids, ones, sum(rows), reached)


@contextmanager
def tape(
    model: nn.Module,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    coupled: Literal["refuse", "exact"] = "refuse",
    outside: Mapping[str, nn.Parameter] | None = None,
    process_group: Any = None,
) -> Iterator[Any]:
    """Record a forward pass of `model`, for the Jacobian of its losses.

    Inside, compiled models run uncompiled: what a compiler fused has no rows. Nothing else changes,
    and nothing stays on the model.

    Args:
        model: its parameters that require gradients make the columns. One in
            `DistributedDataParallel` stands for the module inside, with the rows of all its ranks;
            call `model.module` in the body.
        parameters: only these of them.
        coupled: what to do about operations that compute across samples, such as batch
            normalization in training mode: "refuse" them by name, or get the rows below them
            "exact", by a backward pass per row.
        outside: parameters that are not the model's, by name, such as learned weights of losses:
            more columns, after the model's.
        process_group: whose rows the Jacobian has: a ProcessGroup or a DeviceMesh of one dimension,
            of ranks that have replicas. None or False: this rank's alone, but for a model that has
            a group of its own.

    Yields:
        A `Tape`, or a `RanksTape`.
    """
    module, ranks = opened_for(model, process_group)
    with capture.tape(module, parameters=parameters, coupled=coupled, outside=outside) as recorder:
        if not ranks:
            yield recorder
            return
        made = RanksTape(recorder, ranks)
        try:
            yield made
        except Exception as error:
            if not made.met:  # the others wait for this rank's losses
                ranks.tell("tape", error)
            raise


def opened_for(model: nn.Module, process_group: Any) -> tuple[nn.Module, Group]:
    """As `opened`; of a model that has no group of its own, this rank alone unless one is given."""
    alone = not isinstance(model, nn.parallel.DistributedDataParallel)
    return opened(model, False if process_group is None and alone else process_group)
