"""Rules: from some gradients to one update.

A rule listed in `RULES` has a name on the command line, a row in docs/rules.md and its tests.
`Weighting`, `ForgetRetain` and `Elementwise` are what rules are written from.
"""

from gradsurgery.surgery.alignedmtl import AlignedMTL
from gradsurgery.surgery.blur import BLUR
from gradsurgery.surgery.cagrad import CAGrad
from gradsurgery.surgery.conicgrad import ConicGrad
from gradsurgery.surgery.crmogm import CRMOGM
from gradsurgery.surgery.elementwise import (
    SAGO,
    Elementwise,
    GradDrop,
    SalUn,
    SignAgreement,
    TrimmedMean,
)
from gradsurgery.surgery.fairgrad import FairGrad
from gradsurgery.surgery.fixed import Constant, Mean, Random, Sum
from gradsurgery.surgery.forget_retain import ForgetRetain
from gradsurgery.surgery.gdrgma import GDRGMA
from gradsurgery.surgery.gem import AGEM, GEM
from gradsurgery.surgery.gradops import GradOPS
from gradsurgery.surgery.gradvac import GradVac
from gradsurgery.surgery.gru import GRU
from gradsurgery.surgery.imtlg import IMTLG, ConFIG
from gradsurgery.surgery.inputs import OWM, InputProjection, NullSpace
from gradsurgery.surgery.krum import Krum
from gradsurgery.surgery.ltu import LTUHarmonize
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.modo import MoDo
from gradsurgery.surgery.munba import MUNBa
from gradsurgery.surgery.nashmtl import NashMTL
from gradsurgery.surgery.ngdiff import NGDiff
from gradsurgery.surgery.orthograd import OrthoGrad
from gradsurgery.surgery.pcd import PCD
from gradsurgery.surgery.pcgrad import PCGrad
from gradsurgery.surgery.rule import Rule, Solution, Weighting
from gradsurgery.surgery.sdmgrad import SDMGrad
from gradsurgery.surgery.two import TwoDirections
from gradsurgery.surgery.upgrad import DualProj, UPGrad

RULES: dict[str, type[Rule]] = {
    rule.__name__.lower(): rule
    for rule in (
        OrthoGrad, PCGrad, GradVac, GradOPS, CAGrad, ConicGrad, MGDA, NashMTL, IMTLG, AlignedMTL,
        UPGrad, DualProj, FairGrad, ConFIG, PCD, GEM, AGEM, GDRGMA, MUNBa, NGDiff, GRU, BLUR,
        LTUHarmonize, MoDo, SDMGrad, Mean, Sum, Constant, Random, GradDrop, SAGO, SignAgreement,
        SalUn, TrimmedMean, Krum, CRMOGM,
    )
}  # fmt: skip
"""Every rule by its lower-case name, as `gradsurgery rules` and `--rule` take it."""

__all__ = [
    "AGEM",
    "BLUR",
    "CRMOGM",
    "GDRGMA",
    "GEM",
    "GRU",
    "IMTLG",
    "MGDA",
    "OWM",
    "PCD",
    "RULES",
    "SAGO",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "Constant",
    "DualProj",
    "Elementwise",
    "FairGrad",
    "ForgetRetain",
    "GradDrop",
    "GradOPS",
    "GradVac",
    "InputProjection",
    "Krum",
    "LTUHarmonize",
    "MUNBa",
    "Mean",
    "MoDo",
    "NGDiff",
    "NashMTL",
    "NullSpace",
    "OrthoGrad",
    "PCGrad",
    "Random",
    "Rule",
    "SDMGrad",
    "SalUn",
    "SignAgreement",
    "Solution",
    "Sum",
    "TrimmedMean",
    "TwoDirections",
    "UPGrad",
    "Weighting",
]  # fmt: skip
