"""Options of every method on every task of the digits job, chosen on validation data.

`scripts/tune_digits.py` drew and scored them, docs/digits_tuning.jsonl holds every draw. What is
not named here is the default of the method's config.
"""

from __future__ import annotations

from typing import Any

TUNED: dict[str, dict[str, Any]] = {
    "mislabeled": {
        "orthograd": {
            "schedule": "cosine",
            "forget_ceiling": 2.3,
            "forget_batch": 128,
            "steps": 80,
            "lr": 0.0025,
            "alpha": 0.9,
            "granularity": "tensor",
        },
        "graddiff": {"forget_ceiling": 1.2, "steps": 80, "lr": 0.00061, "forget_weight": 0.1},
        "neggrad": {"forget_ceiling": 1.2, "forget_batch": 128, "steps": 10, "lr": 0.00016},
        "finetune": {"steps": 400, "lr": 0.0088},
    },
    "class": {
        "orthograd": {"forget_ceiling": 1.2, "steps": 80, "lr": 0.00019},
        "graddiff": {
            "schedule": "cosine",
            "forget_ceiling": 1.2,
            "forget_batch": 32,
            "steps": 80,
            "lr": 0.00016,
            "retain_batch": 32,
        },
        "neggrad": {"forget_ceiling": 8.0, "steps": 20, "lr": 0.00012},
        "finetune": {"schedule": "cosine", "steps": 200, "lr": 0.0071},
    },
    "random": {
        "orthograd": {"forget_ceiling": 2.3, "steps": 40, "lr": 0.00013, "alpha": 0.9},
        "graddiff": {
            "schedule": "cosine",
            "steps": 80,
            "lr": 0.00028,
            "retain_batch": 32,
            "forget_weight": 0.1,
        },
        "neggrad": {"schedule": "cosine", "forget_ceiling": 8.0, "steps": 20, "lr": 1.7e-05},
        "finetune": {"steps": 400, "lr": 0.0081},
    },
}
