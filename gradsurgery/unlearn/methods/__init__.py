"""Every method by its name."""

from __future__ import annotations

from gradsurgery.unlearn.methods.bad_teacher import BadTeacher
from gradsurgery.unlearn.methods.boundary_shrink import BoundaryShrink
from gradsurgery.unlearn.methods.finetune import Finetune
from gradsurgery.unlearn.methods.gdr_gma import GDRGMATrainer
from gradsurgery.unlearn.methods.graddiff import GradDiff
from gradsurgery.unlearn.methods.gru import GRUTrainer
from gradsurgery.unlearn.methods.l1_sparse import L1Sparse
from gradsurgery.unlearn.methods.ltu.trainer import LTUTrainer
from gradsurgery.unlearn.methods.neggrad import NegGrad
from gradsurgery.unlearn.methods.neggradplus import NegGradPlus
from gradsurgery.unlearn.methods.orthograd import OrthoGradTrainer
from gradsurgery.unlearn.methods.random_label import RandomLabel
from gradsurgery.unlearn.methods.salun import SalUn
from gradsurgery.unlearn.methods.scrub import SCRUB
from gradsurgery.unlearn.methods.ssd import SSD
from gradsurgery.unlearn.training.trainer import Trainer

# the name a user types, and in reports the order of the columns
METHODS: dict[str, type[Trainer]] = {
    "orthograd": OrthoGradTrainer,
    "ltu": LTUTrainer,
    "scrub": SCRUB,
    "salun": SalUn,
    "random_label": RandomLabel,
    "ssd": SSD,
    "l1_sparse": L1Sparse,
    "bad_teacher": BadTeacher,
    "boundary_shrink": BoundaryShrink,
    "gdr_gma": GDRGMATrainer,
    "gru": GRUTrainer,
    "graddiff": GradDiff,
    "neggradplus": NegGradPlus,
    "neggrad": NegGrad,
    "finetune": Finetune,
}
