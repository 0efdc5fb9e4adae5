"""Losses of causal language models, per sample, for unlearning; transformers is not imported.

A loss is an object (model, batch) -> losses [B], for `gs.Surgeon` or any loop. It says which way
forgetting moves it (`objective`) and whether it needs the original (`needs_reference`).
"""

from gradsurgery.language.base import LanguageLoss, Opposite, raised
from gradsurgery.language.losses import (
    CEU,
    KL,
    NLL,
    PDU,
    RAUL,
    UNDIAL,
    WGA,
    GradAscent,
    IdkNLL,
    SatImp,
    lm_losses,
)
from gradsurgery.language.packed import unpacked
from gradsurgery.language.pairs import rule_for
from gradsurgery.language.preference import DPO, NPO, SimNPO
from gradsurgery.language.reference import Frozen, LogProbs, WithoutAdapter
from gradsurgery.language.registry import FORGET, RETAIN, forget_loss, retain_loss
from gradsurgery.language.states import RMU, RMURetain
from gradsurgery.language.tokens import log_probs

__all__ = [
    "CEU",
    "DPO",
    "FORGET",
    "KL",
    "NLL",
    "NPO",
    "PDU",
    "RAUL",
    "RETAIN",
    "RMU",
    "UNDIAL",
    "WGA",
    "Frozen",
    "GradAscent",
    "IdkNLL",
    "LanguageLoss",
    "LogProbs",
    "Opposite",
    "RMURetain",
    "SatImp",
    "SimNPO",
    "WithoutAdapter",
    "forget_loss",
    "lm_losses",
    "log_probs",
    "raised",
    "retain_loss",
    "rule_for",
    "unpacked",
]
