"""`gs.tape`: a recorded forward pass, on one rank or as part of those of all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery import capture
from gradsurgery.batch import trainable
from gradsurgery.capture import FactoredJacobian, Tape
from gradsurgery.ops._inputs import check
from gradsurgery.ranks.alike import columns_of
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.jacobian import RanksJacobian
from gradsurgery.ranks.shards import Shards, kind_of
from gradsurgery.ranks.wrappers import opened
from gradsurgery.spread import served


class RanksTape:
    """What `tape` gives where several ranks have samples: turns their losses into one Jacobian."""

    def __init__(self, own: Tape, ranks: Group, whole: "Whole | None" = None) -> None:
        self.own, self.ranks, self.whole = own, ranks, whole
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
            own = self._of(losses, groups)
            columns = dict(zip(own.names, own.parameters, strict=True))
            said.mine = own.m, own.reached, columns_of((columns, {}))
        numbers = {number for *_, number in said.every}
        check(len(numbers) == 1, "model: ranks record other parameters: freeze the same on all")
        rows = [m for m, *_ in said.every]
        reached = [any(each) for each in zip(*(used for _, used, _ in said.every), strict=True)]
        start = sum(rows[: self.ranks.rank])
        ids = torch.arange(start, start + own.m, device="cpu")
        ones = torch.ones(own.m, dtype=torch.float64, device="cpu")
        real = None if self.whole is None else self.whole.real(own.names, self.own)
        return RanksJacobian(own, self.ranks, ids, ones, sum(rows), reached, real)

    def _of(self, losses: Tensor, groups: Tensor | None) -> FactoredJacobian:
        """This rank's rows; of a sharded model, without need of what was gathered for them."""
        if self.whole is None:
            return self.own.jacobian(losses, groups)
        inside = self.whole.close()
        self.ranks.settled("tape.jacobian's pass")
        try:
            with self.whole:
                found = self.whole.shards.kept(self.own.jacobian(losses, groups))
        finally:
            if inside:  # though this rank raises: the others close it with this one
                self.whole.open()
        assert isinstance(found, FactoredJacobian)
        return found


class Whole:
    """The parameters of a sharded model, there for passes: from `open` to `close`, again and again.

    Args:
        model: with modules in `fully_shard` or `replicate`.
        ranks: all that hold it, which open and close alike.
        parameters: of the model, those that have rows; None for all.
    """

    def __init__(
        self, model: nn.Module, ranks: Group, parameters: Sequence[nn.Parameter] | None
    ) -> None:
        self.shards = Shards(model, ranks)
        self.shards.rest()
        with served(model):
            self.named = trainable(model, parameters)
        self._stack: ExitStack | None = None
        self.parameters: list[nn.Parameter] = []  # whole, the same ones each time

    def open(self) -> None:
        self._stack = ExitStack()
        found = self._stack.enter_context(self.shards.gathered(self.named, again=True))
        self.parameters = list(found.values())

    def close(self, *error: Any) -> bool:
        """Whether it was open."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(*(error or (None, None, None)))
        return stack is not None

    def __enter__(self) -> "Whole":
        self.open()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(*error)

    def real(self, names: Sequence[str], tape: Tape) -> list[nn.Parameter]:
        """What the optimizer has for the parameters of a tape."""
        pairs = zip(names, tape.parameters, strict=True)
        return [self.named.get(name, parameter) for name, parameter in pairs]


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
            call `model.module` in the body. One in `fully_shard` or `replicate` is called as it is;
            all its ranks enter the body, in which parameters are whole where they are used, and
            leave `.grad` of the shards to `backward`.
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
    options = {"coupled": coupled, "outside": outside}
    if not ranks:
        with capture.tape(module, parameters=parameters, **options) as recorder:
            yield recorder
        return
    whole = made = None
    if any(kind_of(module)):
        with ranks.agreed("tape"):
            whole = Whole(module, ranks, parameters)
    try:
        with whole or nullcontext():
            mine = parameters if whole is None else whole.parameters
            with capture.tape(module, parameters=mine, **options) as recorder:
                made = RanksTape(recorder, ranks, whole)
                yield made
    except Exception as error:
        if made is not None and not made.met:  # the others wait for this rank's losses
            ranks.tell("tape", error)
        raise


def opened_for(model: nn.Module, process_group: Any) -> tuple[nn.Module, Group]:
    """As `opened`; of a model that has no group of its own, this rank alone unless one is given."""
    check(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
    alone = not isinstance(model, nn.parallel.DistributedDataParallel) and not any(kind_of(model))
    return opened(model, False if process_group is None and alone else process_group)
