"""What stages and metrics are called where people read them."""

from __future__ import annotations

from gradsurgery.text import show
from gradsurgery.unlearn.jobs.stages import parts
from gradsurgery.unlearn.methods import ALL

NAMES = {"original": "Original", **{name: kind.title for name, kind in ALL.items()}}
# what a stage measured, in groups and in the order they are shown
GROUPS = {
    "Accuracy": {
        "forget": "forget set",
        "repaired": "forget set, true labels",
        "retain": "retain set",
        "test": "test",
        "test_forgotten": "test, forgotten class",
    },
    "Distance to Retrain": {
        "gap_mean": "mean gap to Retrain",
        "tow": "tug of war",
        "uis": "UIS",
        "kl_forget": "KL of outputs, forget set",
        "kl_test": "KL of outputs, test",
        "js_forget": "Jensen-Shannon, forget set",
        "js_test": "Jensen-Shannon, test",
        "activation_forget": "L2 of outputs, forget set",
        "activation_test": "L2 of outputs, test",
    },
    "Membership": {
        "mia": "membership attack",
        "mia_confidence": "confidence attack",
        "mia_entropy": "entropy attack",
        "mia_modified_entropy": "modified entropy attack",
        "mia_correctness": "correctness attack",
        "mia_auc": "AUC of the loss",
        "mia_tpr": "TPR at 1 % FPR",
        "ulira": "U-LiRA",
        "ulira_auc": "AUC of U-LiRA",
    },
    "Relearning": {
        "relearn": "steps to relearn, at most 60",
    },
    "Cost": {
        "steps": "steps",
        "seconds": "seconds",
        "seconds_ratio": "seconds over Retrain's",
        "retain_samples": "retain samples used",
        "memory": "peak memory, MB",
    },
}
LABELS = {key: label for group in GROUPS.values() for key, label in group.items()}


def title(name: str) -> str:
    """Method and variant as people read them; which fraction it is the place around it says."""
    method, variant, _ = parts(name)
    shown = NAMES.get(method, method)
    return show(f"{shown}, {variant}" if variant else shown, 120)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"
