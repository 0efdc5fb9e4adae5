"""Edit gradients per sample or per task before the optimizer sees them."""

from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.jacobian import DenseJacobian, concat
from gradsurgery.ops import combine, gramian, harmonize, orthonormalize, project_out
from gradsurgery.step import Surgeon
from gradsurgery.surgery import OrthoGrad

__all__ = [
    "DenseJacobian",
    "InputError",
    "NonFiniteError",
    "OrthoGrad",
    "Surgeon",
    "combine",
    "concat",
    "gramian",
    "harmonize",
    "orthonormalize",
    "project_out",
]

__version__ = "0.1.0"
