"""Processes that step together: what each says of itself, and errors that all of them raise.

Ranks meet where all of them gather. A rank that raises between two meetings tells the others, who
are at the next one, and so all raise. That holds as long as two rules are kept: what adds up
tensors of all ranks follows a meeting, with nothing between that may raise on one rank alone; and
where something does in the middle, that rank sends what the others wait for, and then raises.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.errors import InputError, NonFiniteError, RankError

# bytes that a rank sends at a meeting, and the first of them, which say how many it has
SENT, HEAD = 1024, 8
# errors that other ranks raise as what they are; of any other kind, a RankError
SAME = {kind.__name__: kind for kind in (NonFiniteError, InputError)}


T = TypeVar("T")


class Said:
    """What this rank says in `Group.agreed`, and then what all of them said."""

    def __init__(self) -> None:
        self.mine: Any = None
        self.every: list[Any] = []


class Group:
    """Ranks of torch.distributed that step together, or this process alone.

    Args:
        handle: a process group; None for this process alone, which talks to nobody.
        alone: whether one rank counts as several, as where it has shards of parameters.
    """

    def __init__(self, handle: Any = None, alone: bool = False) -> None:
        self.handle, self.alone = handle, alone
        self.size = 1 if handle is None else dist.get_world_size(handle)
        self.rank = 0 if handle is None else dist.get_rank(handle)
        # whether what this rank raises is no news: others raise, too, or wait for it no more
        self._told = False
        self.meeting = False  # whether what runs is a collective of this one's

    def __bool__(self) -> bool:
        """Whether there are several."""
        return self.size > 1 or self.alone

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        return self

    def __reduce__(self) -> Any:
        if self.handle is None:
            return Group, ()
        raise InputError("process_group: a Surgeon of several ranks is not pickled")

    def name(self, rank: int) -> str:
        """Of a rank, as the launcher numbers them."""
        return f"rank {dist.get_global_rank(self.handle, rank)}"

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in order of the ranks; to be pickled.

        One collective where all of it is small, as at most meetings; two where some is not.
        """
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        sent = len(data).to_bytes(HEAD, "little") + data
        every = self._bytes(sent, SENT)
        sizes = [HEAD + int.from_bytes(each[:HEAD], "little") for each in every]
        if max(sizes) > SENT:
            every = self._bytes(sent, max(sizes))
        return [pickle.loads(each[HEAD:]) for each in every]

    def _bytes(self, mine: bytes, size: int) -> list[bytes]:
        """The first `size` of what each rank has, with zeros after it where that is less."""
        kinds = [kind.split(":")[0] for kind in dist.get_backend_config(self.handle).split(",")]
        device = "cpu" if "cpu" in kinds else kinds[0]
        own = torch.frombuffer(bytearray(mine[:size].ljust(size, b"\0")), dtype=torch.uint8)
        own = own.to(device)
        every = list(own.new_empty(self.size, size))
        with self.heard():
            dist.all_gather(every, own, group=self.handle)
        return [each.cpu().numpy().tobytes() for each in every]

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, of all ranks, added up in place; the same bits on each."""
        if self:
            with self.heard():
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def first_(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """`tensor`, which becomes that of the first rank, or of another."""
        if self:
            with self.heard():
                dist.broadcast(tensor, group=self.handle, group_src=rank)
        return tensor

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Around what needs all ranks: where one is gone, there is nobody to be told of it."""
        self.meeting = True
        try:
            yield
        except RuntimeError as error:
            self._told = True
            raise RankError(f"a rank of torch.distributed does not answer: {error}") from error
        finally:
            self.meeting = False

    @contextmanager
    def agreed(self, where: str, *, wait: bool = True) -> Iterator[Said]:
        """Around what a rank does by itself: where one raises, all do, and what each said is known.

        Inside, ranks may meet, too.

        Args:
            where: the same on all ranks.
            wait: meet at the end. Else only an error waits for the others: it is told where they
                meet next.

        Raises:
            InputError, NonFiniteError: that of another rank, by its number; ranks that are not at
                the same place.
            RankError: any other error of another rank; a rank that is gone.
        """
        said = Said()
        self._told = False
        try:
            yield said
        except Exception as error:
            self.tell(where, error)
            raise
        if wait:
            said.every = self.settled(where, None, said.mine)

    def attempt(self, call: Callable[[], T]) -> T | None:
        """What `call` returns; None on all ranks where it raises on one."""
        try:
            with self.agreed("an attempt"):
                found = call()
            return found  # noqa: RET504 - it counts once all have theirs
        except Exception:
            self._told = False  # what this rank raises from here on is news again
            return None

    def tell(self, where: str, error: Exception) -> None:
        """What is about to be raised here, to the others, where they meet next; if it is news."""
        if not self._told:
            self._told = True
            # where the others cannot be told any more, this error is still the one to show
            with suppress(RuntimeError):
                self.gather((where, _told(error), None))

    def settled(self, where: str, error: Exception | None = None, mine: Any = None) -> list[Any]:
        """Meet: what each rank says, if none has an error; else this rank's own, or the first's."""
        every = self.gather((where, None if error is None else _told(error), mine))
        self._told = True
        if error is not None:
            raise error
        for rank, (_, told, _) in enumerate(every):
            if told is not None:
                kind, message = told
                raise SAME.get(kind, RankError)(f"{self.name(rank)}: {message}")
        for rank, (other, _, _) in enumerate(every):
            if other != where:
                mine = self.name(self.rank)
                raise InputError(f"{self.name(rank)} is at {other}, {mine} at {where}")
        self._told = False
        return [value for _, _, value in every]

    def leave(self) -> None:
        """Where the others wait for this rank no more: what it raises from here on is its own."""
        self._told = True

    def weights(self, weights: Tensor) -> Tensor:
        """The first rank's: unlike processors may round a solution differently."""
        return self.first_(weights.contiguous()) if self else weights


def _told(error: Exception) -> tuple[str, str]:
    kind = next((name for name, each in SAME.items() if isinstance(error, each)), "")
    message = str(error) or type(error).__name__
    return kind, message if kind else f"{type(error).__name__}: {message}"


def world() -> Any:
    """The group of all ranks, where torch.distributed runs several; else None."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD
