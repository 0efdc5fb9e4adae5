"""Make the table of made-up authors in docs/results-language.md.

    pip install ".[hf,language]"
    python scripts/compare_facts.py --docs docs/results-language.md

OrthoGrad beside gradient descent on what is retained: each pair of a loss and a rule goes on until
the forget set is as likely as for Retrain, and what is retained is measured there. Rules, losses
and seeds of the facts job; the options are the same for all.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import nn

from gradsurgery.language.metrics import Sums, probability, token_scores
from gradsurgery.unlearn.jobs.facts.job import FactsConfig, FactsJob
from gradsurgery.unlearn.jobs.language import TextSplit
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.methods.surgery import SurgeryConfig, SurgeryTrainer
from gradsurgery.unlearn.objectives.base import Batch
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.data import whole

JOB = FactsJob()
LOSSES = ("grad_ascent", "npo", "simnpo")
RULES = {"sum": "descent on both", "orthograd": "OrthoGrad"}
MARK = "<!-- facts -->"
MOST = 200  # steps


class End(NamedTuple):
    """Where a pair came to be as likely on the forget set as Retrain, if it did."""

    retain: float | None
    steps: int


def likely(model: nn.Module, samples: Batch) -> float:
    """Mean probability of the answers."""
    return Sums.of(probability(token_scores(model, whole(samples, 128)))).mean


def unlearned(
    original: nn.Module, split: TextSplit, loss: str, rule: str, bar: float, config: SurgeryConfig
) -> End:
    model = copy.deepcopy(original)
    options = update(config, {"forget_loss": loss, "rule": rule, "steps": MOST})
    trainer = SurgeryTrainer(
        model, JOB.objective, forget=split.forget, retain=split.retain, config=options, seed=1
    )
    for record in trainer.fit():
        if likely(model, split.forget) <= bar:
            return End(likely(model, split.retain), record["step"])
    return End(None, MOST)


def trained(config: FactsConfig, split: TextSplit, seed: int, name: str) -> nn.Module:
    run = Run(JOB, config, None, None)  # type: ignore[arg-type]  # nothing is written
    model = run.fresh(seed, name)
    run.trainer(split, seed, name, model, probed=False).run()
    return model


def table(found: dict[tuple[str, str], list[End]], seeds: Sequence[int]) -> list[str]:
    lines = ["| forget loss | rule | retain probability | steps |", "|---|---|---|---|"]
    for (loss, rule), ends in found.items():
        reached = [end.retain for end in ends if end.retain is not None]
        shown = "not reached"
        if reached:
            spread = f" ± {stdev(reached):.3f}" if len(reached) > 1 else ""
            shown = f"{mean(reached):.3f}{spread}"
            shown += "" if len(reached) == len(seeds) else f" ({len(reached)} of {len(seeds)})"
        steps = f"{mean(end.steps for end in ends):.0f}"
        lines.append(f"| `{loss}` | {RULES[rule]} | {shown} | {steps} |")
    pairs = [
        (ours.retain, plain.retain)
        for loss in LOSSES
        for ours, plain in zip(found[loss, "orthograd"], found[loss, "sum"], strict=True)
        if ours.retain is not None and plain.retain is not None
    ]
    wins = sum(ours > plain for ours, plain in pairs)
    lines += ["", f"OrthoGrad retains more in {wins} of {len(pairs)} comparisons."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start, seeds = time.perf_counter(), range(10, 10 + given.seeds)
    config = JOB.defaults()
    options: SurgeryConfig = update(config.surgery, {"stop": "never"})
    found: dict[tuple[str, str], list[End]] = {(l, r): [] for l in LOSSES for r in RULES}
    for seed in seeds:
        split = JOB.split(config, seed)
        original, retrain = (trained(config, split, seed, name) for name in ("original", "retrain"))
        bar = likely(retrain, split.forget)
        print(f"seed {seed}: Retrain {bar:.3f} on forget, {likely(retrain, split.retain):.3f}")
        for loss, rule in found:
            end = unlearned(original, split, loss, rule, bar, options)
            found[loss, rule].append(end)
            print(f"seed {seed}: {loss} {rule}: retain {end.retain} after {end.steps}", flush=True)
    lines = table(found, seeds)
    lines.append(f"\n{len(seeds)} seeds from {seeds[0]}, {time.perf_counter() - start:.0f} s.")
    print("\n".join(lines))
    if given.docs:
        before, _, after = given.docs.read_text().split(MARK)
        given.docs.write_text(f"{before}{MARK}\n" + "\n".join(lines) + f"\n{MARK}{after}")


if __name__ == "__main__":
    main()
