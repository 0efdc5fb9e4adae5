"""Rows of a model, never stored."""

from gradsurgery.capture.check import Checked, check
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.tape import Tape, tape

__all__ = ["Checked", "FactoredJacobian", "Tape", "check", "tape"]
