"""Unlearning jobs: methods on one protocol, what is measured, and what a run leaves behind."""

from gradsurgery.unlearn.data import Batches
from gradsurgery.unlearn.finetune import Finetune, FinetuneConfig
from gradsurgery.unlearn.graddiff import GradDiff, GradDiffConfig
from gradsurgery.unlearn.ltu import LTUConfig, LTUTrainer
from gradsurgery.unlearn.neggrad import NegGrad, NegGradConfig
from gradsurgery.unlearn.orthograd import OrthoGradConfig, OrthoGradTrainer
from gradsurgery.unlearn.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.trainer import Trainer, TrainerConfig, TrainingError

__all__ = [
    "METHODS",
    "Batches",
    "Finetune",
    "FinetuneConfig",
    "GradDiff",
    "GradDiffConfig",
    "LTUConfig",
    "LTUTrainer",
    "NegGrad",
    "NegGradConfig",
    "OrthoGradConfig",
    "OrthoGradTrainer",
    "Retrain",
    "RetrainConfig",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
]

# the name a user types, and in reports the order of the columns
METHODS: dict[str, type[Trainer]] = {
    "orthograd": OrthoGradTrainer,
    "graddiff": GradDiff,
    "neggrad": NegGrad,
    "finetune": Finetune,
}
