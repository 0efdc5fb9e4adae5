"""Unlearning jobs: methods on one protocol, what is measured, and what a run leaves behind."""

import sys

from gradsurgery.errors import TrainingError
from gradsurgery.unlearn.function import unlearning
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.methods.bad_teacher import BadTeacher, BadTeacherConfig
from gradsurgery.unlearn.methods.boundary_shrink import BoundaryShrink, BoundaryShrinkConfig
from gradsurgery.unlearn.methods.finetune import Finetune, FinetuneConfig
from gradsurgery.unlearn.methods.gdr_gma import GDRGMAConfig, GDRGMATrainer
from gradsurgery.unlearn.methods.graddiff import GradDiff, GradDiffConfig
from gradsurgery.unlearn.methods.gru import GRUConfig, GRUTrainer
from gradsurgery.unlearn.methods.l1_sparse import L1Sparse, L1SparseConfig
from gradsurgery.unlearn.methods.ltu.config import LTUConfig
from gradsurgery.unlearn.methods.ltu.trainer import LTUTrainer
from gradsurgery.unlearn.methods.neggrad import NegGrad, NegGradConfig
from gradsurgery.unlearn.methods.neggradplus import NegGradPlus, NegGradPlusConfig
from gradsurgery.unlearn.methods.orthograd import OrthoGradConfig, OrthoGradTrainer
from gradsurgery.unlearn.methods.random_label import RandomLabel, RandomLabelConfig
from gradsurgery.unlearn.methods.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.methods.salun import SalUn, SalUnConfig
from gradsurgery.unlearn.methods.scrub import SCRUB, SCRUBConfig
from gradsurgery.unlearn.methods.ssd import SSD, SSDConfig
from gradsurgery.unlearn.metrics import attacks
from gradsurgery.unlearn.objectives import classification
from gradsurgery.unlearn.objectives.base import Objective, Outputs
from gradsurgery.unlearn.objectives.classification import Classification, cross_entropy
from gradsurgery.unlearn.training.data import Batches
from gradsurgery.unlearn.training.trainer import Trainer, TrainerConfig

# short names of two modules that users import from
sys.modules |= {f"{__name__}.attacks": attacks, f"{__name__}.classification": classification}

__all__ = [
    "METHODS",
    "SCRUB",
    "SSD",
    "BadTeacher",
    "BadTeacherConfig",
    "Batches",
    "BoundaryShrink",
    "BoundaryShrinkConfig",
    "Classification",
    "Finetune",
    "FinetuneConfig",
    "GDRGMAConfig",
    "GDRGMATrainer",
    "GRUConfig",
    "GRUTrainer",
    "GradDiff",
    "GradDiffConfig",
    "L1Sparse",
    "L1SparseConfig",
    "LTUConfig",
    "LTUTrainer",
    "NegGrad",
    "NegGradConfig",
    "NegGradPlus",
    "NegGradPlusConfig",
    "Objective",
    "OrthoGradConfig",
    "OrthoGradTrainer",
    "Outputs",
    "RandomLabel",
    "RandomLabelConfig",
    "Retrain",
    "RetrainConfig",
    "SCRUBConfig",
    "SSDConfig",
    "SalUn",
    "SalUnConfig",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "cross_entropy",
    "unlearning",
]
