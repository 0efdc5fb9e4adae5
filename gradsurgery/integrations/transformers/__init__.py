"""Unlearning with surgery in the Trainers of transformers, and of libraries built on them.

`SurgeryTrainer` is a `transformers.Trainer`, `SurgeryMixin` makes one of any subclass of it.
"""

from gradsurgery.integrations.transformers.trainer import SurgeryMixin, SurgeryTrainer

__all__ = ["SurgeryMixin", "SurgeryTrainer"]
