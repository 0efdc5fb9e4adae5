"""Options of every method on every task of the digits job, chosen on validation data."""

from __future__ import annotations

from typing import Any

TUNED: dict[str, dict[str, Any]] = {
    "mislabeled": {
        "orthograd": {"steps": 60, "lr": 1e-3, "forget_ceiling": 2.3},
        "graddiff": {"steps": 100, "lr": 1e-3, "forget_ceiling": 2.3},
        "neggrad": {"steps": 20, "lr": 1e-4},
        "finetune": {"steps": 200, "lr": 1e-3},
    },
    "class": {},
    "random": {},
}
