"""Unlearning jobs: methods on one protocol, what is measured, and what a run leaves behind."""

from gradsurgery.unlearn.bad_teacher import BadTeacher, BadTeacherConfig
from gradsurgery.unlearn.boundary_shrink import BoundaryShrink, BoundaryShrinkConfig
from gradsurgery.unlearn.data import Batches
from gradsurgery.unlearn.finetune import Finetune, FinetuneConfig
from gradsurgery.unlearn.gdr_gma import GDRGMAConfig, GDRGMATrainer
from gradsurgery.unlearn.graddiff import GradDiff, GradDiffConfig
from gradsurgery.unlearn.gru import GRUConfig, GRUTrainer
from gradsurgery.unlearn.l1_sparse import L1Sparse, L1SparseConfig
from gradsurgery.unlearn.ltu import LTUConfig, LTUTrainer
from gradsurgery.unlearn.methods import METHODS, unlearning
from gradsurgery.unlearn.neggrad import NegGrad, NegGradConfig
from gradsurgery.unlearn.neggradplus import NegGradPlus, NegGradPlusConfig
from gradsurgery.unlearn.orthograd import OrthoGradConfig, OrthoGradTrainer
from gradsurgery.unlearn.random_label import RandomLabel, RandomLabelConfig
from gradsurgery.unlearn.retrain import Retrain, RetrainConfig
from gradsurgery.unlearn.salun import SalUn, SalUnConfig
from gradsurgery.unlearn.scrub import SCRUB, SCRUBConfig
from gradsurgery.unlearn.ssd import SSD, SSDConfig
from gradsurgery.unlearn.trainer import Trainer, TrainerConfig, TrainingError

__all__ = [
    "METHODS",
    "SCRUB",
    "SSD",
    "BadTeacher",
    "BadTeacherConfig",
    "Batches",
    "BoundaryShrink",
    "BoundaryShrinkConfig",
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
    "OrthoGradConfig",
    "OrthoGradTrainer",
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
    "unlearning",
]
