"""Choose the options of every method of the digits job, on validation data alone.

    python scripts/tune_digits.py --task mislabeled --trials 16 --out docs/digits_tuning.jsonl

Every method gets the same number of random draws from its space. A draw's score is its mean gap to
Retrain over the tuning seeds with the validation split in the place of the test set; the smallest
wins. The tuning seeds are none that results are reported for, and the test set is the same for all
seeds, so no test sample is looked at here.
"""

import argparse
import json
import math
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from gradsurgery.unlearn import METHODS, TrainingError, digits, metrics
from gradsurgery.unlearn.config import update
from gradsurgery.unlearn.digits import DigitsCNN
from gradsurgery.unlearn.job import DigitsConfig, evaluate, make_trainer

SEEDS = (105, 106, 107)
CEILINGS = [1.2, 2.3, 4.0, 8.0, math.inf]  # 2.3 = ln 10: no better than chance


def draw(method: str, task: str, rng: random.Random) -> dict[str, Any]:
    """One random choice of a method's options."""

    def log_uniform(low: float, high: float) -> float:
        return float(f"{low * (high / low) ** rng.random():.1e}")

    options: dict[str, Any] = {"schedule": rng.choice(["constant", "cosine"])}
    if task == "random":
        options["stop"] = rng.choice(["never", "validation"])
    if method == "finetune":
        return {**options, "steps": rng.choice([100, 200, 400]), "lr": log_uniform(3e-4, 1e-2)}
    options["forget_ceiling"] = rng.choice(CEILINGS)
    options["forget_batch"] = rng.choice([32, 64, 128])
    if method == "neggrad":
        return {**options, "steps": rng.choice([10, 20, 50]), "lr": log_uniform(1e-5, 1e-3)}
    options["steps"] = rng.choice([40, 80])
    options["lr"] = log_uniform(1e-4, 3e-3)
    options["retain_batch"] = rng.choice([32, 64])
    if method == "graddiff":
        return {**options, "forget_weight": rng.choice([0.1, 0.3, 1.0])}
    options["alpha"] = rng.choice([0.3, 0.5, 0.7, 0.9])
    options["granularity"] = rng.choice(["model", "tensor"])
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=["mislabeled", "class", "random"], required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="one JSON line a trial is appended")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    base = update(DigitsConfig(), {"task": arguments.task, "probe_every": 10})
    splits = {seed: digits.load(base.task, seed) for seed in SEEDS}
    originals, wanted = {}, {}
    for seed, data in splits.items():
        for name in ("original", "retrain"):
            model = DigitsCNN()
            make_trainer(base, data, seed, name, model).run()
            if name == "original":
                originals[seed] = model.state_dict()
            else:
                wanted[seed] = evaluate(model, data, "validation")

    for method in arguments.methods:
        rng = random.Random(f"{arguments.task}/{method}")
        trials = []
        for _ in range(arguments.trials):
            options = draw(method, arguments.task, rng)
            config = update(base, {method: options})
            gaps, measured = [], []
            try:
                for seed, data in splits.items():
                    model = DigitsCNN()
                    model.load_state_dict(originals[seed])
                    make_trainer(config, data, seed, method, model).run()
                    measured.append(evaluate(model, data, "validation"))
                    gaps.append(metrics.gap(measured[-1], wanted[seed])["mean"])
            except (TrainingError, ValueError) as error:
                print(f"{method} {options}: {error}", flush=True)
                continue
            trial = {
                "task": arguments.task,
                "method": method,
                "gap": round(mean(gaps), 5),
                # JSON has no infinity
                "options": {k: "inf" if v == math.inf else v for k, v in options.items()},
                "measured": {
                    name: round(mean(one[name] for one in measured), 4) for name in measured[0]
                },
            }
            trials.append(trial)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(trial) + "\n")
        best = min(trials, key=lambda trial: trial["gap"])
        print(f"{method}: gap {best['gap']:.4f}, {best['options']}", flush=True)


if __name__ == "__main__":
    main()
