"""Weighted sums of rows, added up over ranks: in buckets, each on its way while others are made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.ops._inputs import wide
from gradsurgery.ranks.group import Group

BUCKET = 25 << 20  # bytes, as in data parallelism


class Buckets:
    """Gradients of some parameters, summed over ranks in float32 or wider.

    Args:
        parameters: what gradients are of.
        reached: which of them the losses of any rank depend on: the same on all ranks.
        several: which may come in several parts.
        ranks: who adds.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        reached: Sequence[bool],
        several: set[int],
        ranks: Group,
    ) -> None:
        self.parameters, self.several, self.ranks = parameters, several, ranks
        self.buckets: list[list[int]] = []
        room, before = 0, None
        for k, parameter in enumerate(parameters):
            if not reached[k]:
                continue
            kind = wide(parameter.detach()[:0] if parameter.dim() else parameter.detach()).dtype
            size = parameter.numel() * kind.itemsize
            if not self.buckets or kind != before or room + size > BUCKET:
                self.buckets.append([])
                room = 0
            self.buckets[-1].append(k)
            room, before = room + size, kind
        self._where = {k: i for i, bucket in enumerate(self.buckets) for k in bucket}
        self._flat: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self._sent: list[tuple[int, Any]] = []

    def sums(
        self,
        updates: Iterator[tuple[int, Tensor]],
        mine: set[int],
        take: Callable[[int, Tensor], None],
    ) -> None:
        """Give each parameter's, of all ranks, to `take`: a view of a bucket that is then dropped.

        All buckets are sent whatever this rank's own updates raise, or `take` does, which is raised
        at the end.

        Args:
            updates: this rank's.
            mine: which of them there will be.
            take: called with the number of the parameter, and the sum.
        """
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
            flat = wide(first.new_empty(0)).new_zeros(sum(sizes))
            views = zip(self.buckets[i], flat.split(sizes), strict=True)
            self._flat[i] = flat, {k: v.view(self.parameters[k].shape) for k, v in views}
        return self._flat[i][1]

    def _send(self, i: int) -> None:
        self._bucket(i)
        flat = self._flat[i][0]
        with self.ranks.heard():
            handle = dist.all_reduce(flat, group=self.ranks.handle, async_op=True)
        self._sent.append((i, handle))

    def _arrived(
        self, most: int, take: Callable[[int, Tensor], None], failed: list[Exception]
    ) -> None:
        """Take what has been summed; up to `most` buckets stay on their way."""
        while len(self._sent) > most:
            i, handle = self._sent.pop(0)
            with self.ranks.heard():
                handle.wait()
            sums = self._flat.pop(i)[1]
            try:
                for k, grad in sums.items() if not failed else ():
                    take(k, grad)
            except Exception as error:
                failed.append(error)
