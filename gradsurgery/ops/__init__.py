"""Operators on rows that exist, on tokens of rows that do not, and on Gramians; a group norm.

One file each, public function first.
"""

from gradsurgery.ops.bargaining import bargaining_weights
from gradsurgery.ops.combine import combine
from gradsurgery.ops.cone import cone_weights
from gradsurgery.ops.conflict_averse import conflict_averse_weights
from gradsurgery.ops.deconflict import deconflict_weights
from gradsurgery.ops.eigen import eigen
from gradsurgery.ops.gramian import gramian
from gradsurgery.ops.group_norm import group_norm
from gradsurgery.ops.harmonize import harmonize
from gradsurgery.ops.orthonormalize import orthonormalize
from gradsurgery.ops.project_out import Projection, project_out
from gradsurgery.ops.weighting import projection_weights

__all__ = [
    "Projection",
    "bargaining_weights",
    "combine",
    "cone_weights",
    "conflict_averse_weights",
    "deconflict_weights",
    "eigen",
    "gramian",
    "group_norm",
    "harmonize",
    "orthonormalize",
    "project_out",
    "projection_weights",
]
