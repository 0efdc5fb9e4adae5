"""Unlearning with surgery in the Trainers of transformers, and of libraries built on them.

`SurgeryTrainer` is a `transformers.Trainer`, `SurgeryMixin` makes one of any subclass of it.
"""

from gradsurgery.extras import missing

try:
    from gradsurgery.integrations.transformers.trainer import SurgeryMixin, SurgeryTrainer
except ModuleNotFoundError as error:
    raise missing(error, "hf", "gradsurgery.integrations.transformers") from error

__all__ = ["SurgeryMixin", "SurgeryTrainer"]
