"""The plane of a row that sums many samples, in the place of their tokens."""

import torch

from gradsurgery.capture.plane import Plane
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.ops._inputs import wide


class KeptUse(Use):
    """One block, the kept plane of a parameter: formed when it is asked for, and once."""

    def __init__(self, plane: Plane) -> None:
        self.of, self.plane = plane, plane.uses[0].plane
        self.rows = plane.parts[1][0].rows.ids

    @property
    def dtype(self) -> torch.dtype:
        """Of the block."""
        return wide(self.of.uses[0].values[-1][:0]).dtype

    def formed(self) -> RowsUse:
        """The block itself."""
        return RowsUse(self.of.group_plane()[None], self.rows)


def keeps(plane: Plane | None) -> bool:
    """Whether there is such a row, whose plane this rank's own way to a Gramian would keep."""
    return type(plane) is Plane and plane.whole is None and bool(plane.parts[1])


def formed(use: Use) -> Use:
    """The use, whose block then exists if it is a kept plane."""
    return use.formed() if isinstance(use, KeptUse) else use
