"""Rules: from the Gramian of some gradients to the weights of one update."""

from gradsurgery.surgery.orthograd import OrthoGrad

__all__ = ["OrthoGrad"]
