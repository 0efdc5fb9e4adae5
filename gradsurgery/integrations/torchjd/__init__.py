"""torchjd's interfaces, module by module as theirs: `autogram.Engine`, `aggregation.UPGrad`, ..."""

from gradsurgery.integrations.torchjd import aggregation, autogram
from gradsurgery.integrations.torchjd.autogram import Engine

__all__ = ["Engine", "aggregation", "autogram"]
