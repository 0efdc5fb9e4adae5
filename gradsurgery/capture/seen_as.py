"""Uses of one parameter over one plane, where passes have seen it as different matrices."""

from collections.abc import Sequence

import torch

from gradsurgery.capture.ranges import in_range
from gradsurgery.capture.row_numbers import RowNumbers
from gradsurgery.capture.uses import RowsUse, Use
from gradsurgery.ops._inputs import wide


def seen_as(use: Use, plane: tuple[int, int]) -> Use:
    """The use over a plane of this shape; formed where its tokens multiply to another."""
    if use.plane == plane or not use.n:
        return use
    if not isinstance(use, RowsUse):
        # in float64 where float32 would lose some of it
        use = use.wide() if in_range(use) else use.double()
        blocks = wide(use.values[-1][:0]).new_empty(use.n, *use.plane)
        each = RowNumbers(torch.arange(use.n, device="cpu"))
        use.write_rows(blocks, each, 0, use.plane[0])
        use = RowsUse(blocks, use.rows)
    return use.viewed(plane)


def seen_alike(uses: Sequence[Use]) -> list[Use]:
    """All as the first that is no stored row is seen, where they are seen differently."""
    planes = [use.plane for use in uses if use.n and not isinstance(use, RowsUse)]
    alike = len(set(planes)) < 2
    return list(uses) if alike else [seen_as(use, planes[0]) for use in uses]
