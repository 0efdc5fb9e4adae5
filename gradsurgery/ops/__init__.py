"""Operators on rows that exist: one file each, public function first, registration last."""

from gradsurgery.ops.combine import combine
from gradsurgery.ops.gramian import gramian
from gradsurgery.ops.harmonize import harmonize
from gradsurgery.ops.orthonormalize import orthonormalize
from gradsurgery.ops.project_out import Projection, project_out
from gradsurgery.ops.weighting import projection_weights

__all__ = [
    "Projection",
    "combine",
    "gramian",
    "harmonize",
    "orthonormalize",
    "project_out",
    "projection_weights",
]
