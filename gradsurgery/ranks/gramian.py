"""The Gramian of the rows of all ranks: each multiplies its part of the columns, then one sum."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurgery.capture import FactoredJacobian
from gradsurgery.capture.leaves import without_autocast
from gradsurgery.capture.planner import device_of
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.errors import NonFiniteError
from gradsurgery.ranks.group import Group
from gradsurgery.ranks.kept import KeptUse, formed, keeps
from gradsurgery.ranks.slices import Rows, Slices, cut
from gradsurgery.ranks.table import Entry, Way, form_of, way
from gradsurgery.ranks.tiles import Tiles


class Exchange:
    """Makes the Gramian of rows that lie on several ranks.

    Args:
        own: this rank's rows.
        ranks: who has the others.
        ids: of this rank's rows, which of all ranks' each adds to, [own.m] int64 on the CPU.
        factors: what each is multiplied by before, [own.m] float64 on the CPU.
        m: rows of all ranks.
    """

    def __init__(
        self, own: FactoredJacobian, ranks: Group, ids: Tensor, factors: Tensor, m: int
    ) -> None:
        self.own, self.ranks, self.ids, self.m = own, ranks, ids, m
        self.factors = None if bool((factors == 1).all()) else factors
        self.like = own.parameters[0].detach()[:0] if own.parameters[0].dim() else own.parameters[0]
        self._known: dict[int, tuple[int, ...]] = {}
        self._numbers: dict[tuple[int, ...], RowNumbers] = {}
        self.bytes = 0  # that this rank sent to others

    def gramians(self, metric: Sequence[Tensor] | None, apart: bool) -> Tensor:
        """[m, m] float64, or [L, m, m] by parameter if they are wanted `apart`."""
        with torch.no_grad(), without_autocast(self.own.parameters[0]):
            grams, lost = self._made(metric, apart, False)
            if lost:  # what leaves float32's range, on any rank
                grams, _ = self._made(metric, apart, True)
        return grams if apart else grams[0]

    def _made(
        self, metric: Sequence[Tensor] | None, apart: bool, double: bool
    ) -> tuple[Tensor, bool]:
        own, ranks = self.own, self.ranks
        count = len(own.parameters) if apart else 1
        with ranks.agreed("Gramian") as said:
            own._check_usable()
            uses = self.uses(double)
            # of each parameter, or of all; then whether a rank lost something, or failed
            total = self.like.new_zeros(count * self.m**2 + 2, dtype=torch.float64)
            said.mine = tuple(self.ids.tolist()), self.entries(uses, double)
        order = [i for rows, _ in said.every for i in rows]
        ids = RowNumbers(torch.tensor(order, dtype=torch.int64, device="cpu"))
        entries = [each for _, each in said.every]
        ways, work = work_of(own, entries, [len(rows) for rows, _ in said.every], double)
        grams = total[:-2].view(count, self.m, self.m)
        rows = Rows(uses, ways, own.m, self.factors, metric, self.like)
        failed = None
        for job, received in self._passed(work, rows):
            if isinstance(received, Exception):
                failed = failed or received
            if failed is not None or isinstance(received, Exception):
                continue
            try:
                for k, gram in self._of(job, received, ids, metric, apart):
                    grams[k if apart else 0] += gram
            except Exception as error:
                failed = error
        total[-1], total[-2] = failed is not None, rows.lost and not double
        ranks.sum_(total)
        flags = total[-2:].tolist()
        if flags[1]:
            ranks.settled("Gramian", failed)
        if flags[0]:
            return grams, True
        if not bool(total.isfinite().all()):
            self._raise_not_finite()
        return grams, False

    def uses(self, double: bool) -> list[list[Use]]:
        """What this rank has of each parameter.

        The update needs the plane of a row that sums many samples anyway: it stands for their
        tokens, of which there are more.
        """
        own, through = self.own, self.own._through_derived()
        found: list[list[Use]] = []
        for k, mine in enumerate(own._uses):
            plane = None if k in through or double else own._planes[k]
            if plane is not None and keeps(plane):
                found.append([*(use for use in plane.parts[0] if use.n), KeptUse(plane)])
            else:
                found.append([use for use in (*through.pop(k, ()), *mine) if use.n])
        return found

    def entries(self, uses: Sequence[Sequence[Use]], double: bool) -> list[Entry]:
        """What others are told of them, parameter by parameter."""
        return [self._entry(mine, double) for mine in uses]

    def _entry(self, uses: Sequence[Use], double: bool) -> Entry:
        made = [use for use in uses if not isinstance(use, RowsUse)]
        kinds = {v.dtype for use in uses for v in use.values}
        kinds |= {use.dtype for use in uses if isinstance(use, KeptUse)}
        wide = double or torch.float64 in kinds
        return Entry(
            tuple(form_of(use, self._rows(use), self.scaled(use) is not None) for use in uses),
            made[0].plane if made else None,
            math.lcm(*(use.grain for use in uses)),
            wide,
            self.own.m,
        )

    def _rows(self, use: Use) -> tuple[int, ...]:
        """Of all ranks' rows, those of the blocks; one tuple for all uses of the same."""
        if id(use.rows) not in self._known:
            self._known[id(use.rows)] = tuple(self.ids[use.rows.tensor].tolist())
        return self._known[id(use.rows)]

    def scaled(self, use: Use) -> Tensor | None:
        """Factors of the blocks, [n]; None where all are 1."""
        if self.factors is None:
            return None
        mine = self.factors[use.rows.tensor]
        return None if bool((mine == 1).all()) else mine

    def numbers(self, rows: tuple[int, ...]) -> RowNumbers:
        if rows not in self._numbers:
            order = torch.tensor(rows, dtype=torch.int64, device="cpu")
            self._numbers[rows] = RowNumbers(order)
        return self._numbers[rows]

    def _of(
        self,
        job: Slices | Tiles,
        received: Tensor,
        ids: RowNumbers,
        metric: Sequence[Tensor] | None,
        apart: bool,
    ) -> list[tuple[int, Tensor]]:
        rank = self.ranks.rank
        if isinstance(job, Slices):
            return job.gramians(received, rank, ids, self.m, apart)
        own = None if metric is None else metric[job.column]
        return [(job.column, job.gramian(received, rank, self.numbers, self.m, own))]

    def _passed(
        self, work: Sequence[Slices | Tiles], rows: Rows
    ) -> Iterator[tuple[Slices | Tiles, Tensor | Exception]]:
        """Each job with what ranks sent for it, or this rank's error: the next is on its way then.

        Whatever fails here, all that others wait for is sent. So there is no memory to be had in
        the middle: two buffers for each direction are made first.
        """
        ranks = self.ranks
        each, mine = range(ranks.size), ranks.rank
        out = [[job.size(mine, other) for other in each] for job in work]
        back = [[job.size(other, mine) for other in each] for job in work]
        buffers: list[list[Tensor]] = []
        error: Exception | None = None
        try:
            for sizes in (out, back):
                largest = max(map(sum, sizes), default=0)
                like = self.like.new_empty(0, dtype=torch.uint8)
                buffers.append([like.new_empty(largest) for _ in range(2)])
        except Exception as short:
            error = short
        ranks.settled("buffers", error)
        send, receive = buffers

        def begun(i: int) -> tuple[Any, Tensor]:
            nonlocal error
            sent, into = send[i % 2][: sum(out[i])], receive[i % 2][: sum(back[i])]
            if error is None:
                try:
                    self._fill(work[i], rows, sent.split(out[i]))
                except Exception as own:
                    error = own
            if error is not None:
                sent.zero_()
            with ranks.heard():
                handle = dist.all_to_all_single(
                    into, sent, back[i], out[i], ranks.handle, async_op=True
                )
            self.bytes += sum(out[i]) - out[i][ranks.rank]
            return handle, into

        following = begun(0) if work else None
        for i, job in enumerate(work):
            assert following is not None
            handle, received = following
            with ranks.heard():
                handle.wait()
            following = begun(i + 1) if i + 1 < len(work) else None
            yield job, error or received

    def _fill(self, job: Slices | Tiles, rows: Rows, parts: Sequence[Tensor]) -> None:
        if isinstance(job, Slices):
            job.fill(rows, parts)
        else:
            job.fill([formed(use) for use in rows.uses[job.column]], parts, self.scaled)

    def _raise_not_finite(self) -> None:
        """Name the rank, its row and the parameter."""
        error: Exception | None = None
        try:
            self.own.gramian()
        except Exception as own:
            error = own
        self.ranks.settled("Gramian", error)
        raise NonFiniteError("losses: the squared norm of a row overflows float64")


def work_of(
    own: FactoredJacobian, entries: Sequence[Sequence[Entry]], counts: Sequence[int], double: bool
) -> tuple[list[Way | None], list[Slices | Tiles]]:
    """The way of each parameter, and all that passes between ranks, in order; alike on all ranks.

    Args:
        own: a rank's rows.
        entries: what each rank has of each parameter.
        counts: the rows that each has.
        double: whether rows are formed in float64.
    """
    device = device_of(own.parameters[0])
    ways: list[Way | None] = []
    for k, parameter in enumerate(own.parameters):
        theirs = [entry[k] for entry in entries]
        met = any(entry.forms for entry in theirs)
        ways.append(way(theirs, parameter.shape, device, double) if met else None)
    work: list[Slices | Tiles] = [
        Tiles(k, known, [entry[k] for entry in entries])
        for k, known in enumerate(ways)
        if known is not None and known.tiles is not None
    ]
    return ways, [*work, *cut(ways, counts)]
