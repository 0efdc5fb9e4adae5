"""Edit gradients per sample or per task before the optimizer sees them."""

from gradsurgery import integrations
from gradsurgery.capture import FactoredJacobian, check, tape
from gradsurgery.errors import InputError, NonFiniteError
from gradsurgery.jacobian import DenseJacobian, concat
from gradsurgery.ops import combine, gramian, harmonize, orthonormalize, project_out
from gradsurgery.step import Surgeon
from gradsurgery.surgery import OrthoGrad

__all__ = [
    "DenseJacobian",
    "FactoredJacobian",
    "InputError",
    "NonFiniteError",
    "OrthoGrad",
    "Surgeon",
    "check",
    "combine",
    "concat",
    "gramian",
    "harmonize",
    "integrations",
    "orthonormalize",
    "project_out",
    "tape",
]

__version__ = "0.1.0"
