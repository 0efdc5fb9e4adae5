"""Many processes that make one step: the rows of all ranks, one Gramian, one update.

`Group` is who takes part, `RanksJacobian` the rows of all. What passes between ranks, and how it is
chosen, stands in `table`.
"""

from gradsurgery.ranks.group import Group
from gradsurgery.ranks.jacobian import RanksJacobian

__all__ = ["Group", "RanksJacobian"]
