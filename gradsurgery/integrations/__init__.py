"""The interfaces of other libraries, on gradsurgery's Jacobians; none of them is imported."""

from gradsurgery.integrations import torchjd

__all__ = ["torchjd"]
