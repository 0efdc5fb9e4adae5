"""What methods and metrics are called where people read them, in the order they are shown."""

NAMES = {
    "original": "Original",
    "retrain": "Retrain",
    "orthograd": "OrthoGrad",
    "graddiff": "GradDiff",
    "neggrad": "NegGrad",
    "finetune": "Finetune",
}
# keys of evaluate() in the order they are shown
LABELS = {
    "forget": "forget set",
    "repaired": "forget set, true labels",
    "retain": "retain set",
    "test": "test",
    "test_forgotten": "test, forgotten class",
    "mia": "membership attack",
    "uis": "UIS",
    "gap_mean": "mean gap to Retrain",
    "steps": "steps",
    "seconds": "seconds",
}
