"""Weighted sums of rows, added up over ranks: in buckets, each on its way while others are made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.ops._inputs import wide
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.places import Place

BUCKET = 25 << 20  # bytes at most, as in data parallelism
SHARE = 8  # three buckets are there at once: of a small model each is this part, but no less than
LEAST = 1 << 20  # bytes
# its name since torch 2.13, and before
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Sent(NamedTuple):
    """A bucket on its way."""

    handle: Any
    given: Tensor  # in use until it has arrived
    received: Tensor
    views: dict[int, Tensor]  # of what is received, by parameter
    replicas: Any  # who adds it up then


class Buckets:
    """Gradients of some parameters, summed over ranks in float32 or wider.

    Args:
        parameters: what gradients are of.
        reached: which of them the losses of any rank depend on: the same on all ranks.
        several: which may come in several parts.
        ranks: who adds.
        places: of each parameter, where its shards go; None for sums that all ranks get whole.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        reached: Sequence[bool],
        several: set[int],
        ranks: Group,
        places: Sequence[Place | None] | None = None,
    ) -> None:
        self.parameters, self.several, self.ranks = parameters, several, ranks
        self.places = [None] * len(parameters) if places is None else places
        self.buckets: list[list[int]] = []
        total = sum(p.numel() for p, used in zip(parameters, reached, strict=True) if used)
        most = min(BUCKET, max(LEAST, 4 * total // SHARE))
        room, before = 0, None
        for k, parameter in enumerate(parameters):
            if not reached[k]:
                continue
            dtype = wide(parameter.detach().new_empty(0)).dtype
            kind, size = (dtype, self.places[k]), parameter.numel() * dtype.itemsize
            if not self.buckets or kind != before or room + size > most:
                self.buckets.append([])
                room = 0
            self.buckets[-1].append(k)
            room, before = room + size, kind
        self._where = {k: i for i, bucket in enumerate(self.buckets) for k in bucket}
        self._copied: set[int] = set()
        self._flat: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self._sent: list[_Sent] = []

    def sums(
        self,
        updates: Iterator[tuple[int, Tensor]],
        mine: set[int],
        take: Callable[[int, Tensor], None],
    ) -> None:
        """Give each parameter's, of all ranks, or this rank's piece of it, to `take`.

        It is a view of a bucket, of which nobody needs any part again.

        All buckets are sent whatever this rank's own updates raise, or `take` does, which is raised
        at the end.

        Args:
            updates: this rank's.
            mine: which of them there will be.
            take: called with the number of the parameter, and the sum.
        """
        self._copied = mine - self.several  # what is written over, and need not be zero before
        missing = [set(bucket) & mine for bucket in self.buckets]
        following, failed = 0, []
        try:
            for k, grad in updates:
                i = self._where[k]
                place = self._bucket(i)[k]
                if k in self.several:
                    place += grad
                else:
                    place.copy_(grad)
                    missing[i].discard(k)
                while following < len(missing) and not missing[following]:
                    self._send(following)
                    following += 1
                self._arrived(2, take, failed)
        except Exception as error:
            failed.append(error)
        try:
            for i in range(following, len(self.buckets)):
                for k in missing[i] & self._copied:  # after an error, which all will be told
                    self._bucket(i)[k].zero_()
                self._send(i)
                self._arrived(2, take, failed)
            self._arrived(0, take, failed)
        except Exception as error:  # without memory for what all wait for there is nothing to send
            self.ranks.leave()
            raise (failed or [error])[0] from error
        if failed:
            raise failed[0]

    def _bucket(self, i: int) -> dict[int, Tensor]:
        if i not in self._flat:
            first = self.parameters[self.buckets[i][0]].detach()
            sizes = [self.parameters[k].numel() for k in self.buckets[i]]
            flat = wide(first.new_empty(0)).new_empty(sum(sizes))
            views = dict(zip(self.buckets[i], flat.split(sizes), strict=True))
            for k in views.keys() - self._copied:
                views[k].zero_()
            self._flat[i] = flat, {k: v.view(self.parameters[k].shape) for k, v in views.items()}
        return self._flat[i][1]

    def _send(self, i: int) -> None:
        views = self._bucket(i)
        flat, _ = self._flat.pop(i)
        place = self.places[self.buckets[i][0]]
        if place is None:
            with self.ranks.heard():
                handle = dist.all_reduce(flat, group=self.ranks.handle, async_op=True)
            self._sent.append(_Sent(handle, flat, flat, views, None))
            return
        dealt = place.dealt(list(views.values()))
        mine = dealt.new_empty(dealt.numel() // place.pieces)
        pieces = place.taken(mine, [view.shape for view in views.values()])
        with self.ranks.heard():
            handle = _reduce_scatter(mine, dealt, group=place.group, async_op=True)
        known = dict(zip(views, pieces, strict=True))
        self._sent.append(_Sent(handle, dealt, mine, known, place.replicas))

    def _arrived(
        self, most: int, take: Callable[[int, Tensor], None], failed: list[Exception]
    ) -> None:
        """Take what has been summed; up to `most` buckets stay on their way."""
        while len(self._sent) > most:
            sent = self._sent.pop(0)
            with self.ranks.heard():
                sent.handle.wait()
                if sent.replicas is not None:
                    dist.all_reduce(sent.received, group=sent.replicas)
            try:
                for k, grad in sent.views.items() if not failed else ():
                    take(k, grad)
            except Exception as error:
                failed.append(error)
