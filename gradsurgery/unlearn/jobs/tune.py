"""Choose the options of methods by random search, on validation data alone.

Every method gets the same number of draws from its space. A draw's score is its mean gap to Retrain
over the tuning seeds, and over the shares of the retain set asked for, with the validation split in
the place of the test set. The best quarter of the draws is run on further seeds, since the best of
many on two seeds was lucky too; the smallest score over all of them wins. No result is reported for
any of these seeds, and the test set is the same for all seeds, so no test sample is looked at.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import nn

from gradsurgery.errors import InputError, TrainingError
from gradsurgery.unlearn.jobs.base import JobConfig, Measured, Split, Variant
from gradsurgery.unlearn.jobs.pipeline import Run, reproducible
from gradsurgery.unlearn.jobs.stages import NEEDED
from gradsurgery.unlearn.jobs.summary import common, gaps
from gradsurgery.unlearn.methods import METHODS
from gradsurgery.unlearn.training.config import update
from gradsurgery.unlearn.training.described import BATCHES, Described, LogUniform, Space
from gradsurgery.unlearn.training.forgetting import ASCENT
from gradsurgery.unlearn.training.trainer import TrainerConfig

SEEDS = (105, 106)
FINAL_SEEDS = (107, 108, 109, 110)


# what every method's space begins with
COMMON: Space = {"schedule": ("constant", "cosine")}
# random samples: forgetting can go too far, so a run may end where they look unseen
STOP: Space = {"stop": ("never", "validation")}


def default_space(config: TrainerConfig) -> Space:
    """Around the defaults of a method that has no space of its own."""
    steps = config.steps
    return {
        "steps": tuple(sorted({max(1, steps // 2), steps, 2 * steps})),
        "lr": LogUniform(config.lr / 10, config.lr * 10),
        "forget_batch": BATCHES,
        "retain_batch": BATCHES,
    }


def space(method: str, task: str, config: TrainerConfig) -> Space:
    """What is drawn for a method: only options that its config has."""
    kind: type[Described] = METHODS.get(method, Described)
    by_task = kind.space_by_task.get(task, {})
    own = kind.space or default_space(config)
    everything = {**COMMON, **(STOP if task == "random" else {}), **by_task, **own}
    if getattr(config, "forget_loss", ASCENT) != ASCENT:  # no ceiling for what is lowered
        del everything["forget_ceiling"]
    return {option: choices for option, choices in everything.items() if hasattr(config, option)}


def draws(method: str, task: str, config: TrainerConfig, n: int) -> list[dict[str, Any]]:
    """The first `n` random choices of a method's options; more begin with the same ones."""
    rng = random.Random(f"{task}/{method}")
    choices = space(method, task, config)
    return [
        {
            option: each.draw(rng) if isinstance(each, LogUniform) else rng.choice(each)
            for option, each in choices.items()
        }
        for _ in range(n)
    ]


Trial = dict[str, Any]  # a line of tuning.jsonl
Ready = dict[int, tuple[Split, dict[str, nn.Module], Measured]]


def check(config: JobConfig) -> None:
    """Raise `InputError` where results would be reported for a seed the options are chosen on."""
    chosen_on = SEEDS + FINAL_SEEDS
    both = [seed for seed in chosen_on if seed in config.all_seeds]
    if config.tune and both:
        raise InputError(
            "--first-seed: --tune chooses the options on seeds "
            f"{', '.join(map(str, chosen_on))}, so results for "
            f"{', '.join(map(str, both))} would be of data they were chosen on"
        )


def tune(run: Run) -> JobConfig:
    """The options of `run` with the best of `tune` draws for every method asked for, and `tune` 0.

    Each draw is a line of tuning.jsonl as soon as it is known, and a second one if it is run on
    further seeds; a search continued in the same directory repeats at most one.

    Raises:
        TrainingError: naming a method whose every draw failed.
    """
    config, directory = run.config, run.directory
    check(config)
    directory.make_folder("tuning")
    known = directory.rewind_tuning()
    ready: dict[tuple[int, ...], Ready] = {}

    def tried(method: str, options: dict[str, Any], seeds: tuple[int, ...]) -> Trial:
        if seeds not in ready:
            ready[seeds] = prepare(run, seeds)
        return try_out(run, ready[seeds], method, options)

    best: dict[str, Any] = {}
    with reproducible(config.threads):
        for method in config.methods:
            kind = run.job.kind(config.task)
            options = draws(method, kind, getattr(config, method), config.tune)
            lines = [line for line in known if line["method"] == method]
            last = config.tune + finalists(config.tune)
            with run.progress.stage(f"tune {method}", last, len(lines)) as advance:
                while len(lines) < last:
                    if len(lines) < config.tune:
                        line = tried(method, options[len(lines)], SEEDS)
                    else:
                        first = ranked(lines[: config.tune])[len(lines) - config.tune]
                        line = {**first, "final": True}  # one that failed is not run again
                        if "gap" in first:
                            line = final(first, tried(method, decoded(first), FINAL_SEEDS))
                    lines.append(directory.add_trial(line))  # several ranks take the first one's
                    advance(len(lines))
            won = winner(lines)
            if "gap" not in won:
                raise TrainingError(f"tune: every draw of {method} failed: {won['error']}")
            best[method] = decoded(won)
            run.progress.say(f"tuned  {method:<20}  gap {won['gap']:.4f}  {best[method]}")
    return replace(update(config, best), tune=0)


def seeds(n: int) -> tuple[int, ...]:
    """The seeds that a search of `n` draws looks at."""
    return (SEEDS if n else ()) + (FINAL_SEEDS if finalists(n) else ())


def finalists(n: int) -> int:
    """How many of `n` draws are run on further seeds; one alone has won already."""
    return n // 4 if n >= 8 else 0


def ranked(lines: Sequence[Trial]) -> list[Trial]:
    """The best first, failures last."""
    return sorted(lines, key=lambda line: line.get("gap", math.inf))


def winner(lines: Sequence[Trial]) -> Trial:
    """The best of those on all seeds, if there are any, else of those that did not fail there."""
    finals = [line for line in lines if "final" in line and "gap" in line]
    failed = [line["options"] for line in lines if "final" in line and "gap" not in line]
    others = [line for line in lines if line["options"] not in failed]
    return ranked(finals or others or lines)[0]


def final(first: Trial, more: Trial) -> Trial:
    """The line of a draw over its first and its further seeds."""
    if "gap" in more:
        sizes = len(SEEDS), len(FINAL_SEEDS)
        total = sizes[0] * first["gap"] + sizes[1] * more["gap"]
        more = {**more, "gap": round(total / sum(sizes), 5)}
    return {**more, "final": True}


def prepare(run: Run, seeds: Sequence[int]) -> Ready:
    """Data, original and retrained model, and Retrain's numbers, of every seed."""
    job, directory = run.job, run.directory
    ready: Ready = {}
    for seed in seeds:
        split = job.split(run.config, seed)
        models: dict[str, nn.Module] = {}
        for name in NEEDED:
            file = f"tuning/seed{seed}-{name}.safetensors"
            found = run.standing((seed, name))
            model = models[name] = run.fresh(seed, name) if found is None else found
            if found is not None:
                continue
            if directory.has(file):
                directory.load_weights(model, file)
                continue
            if name == "retrain" or not job.given(run.config, model):
                run.trainer(split, seed, name, model, probed=False).run()
            directory.save_model(model, file)
            run.progress.say(f"tune   {name} of seed {seed}")
        ready[seed] = split, models, job.evaluate(models["retrain"], split, "validation")
    return ready


def decoded(line: Trial) -> dict[str, Any]:
    """The options of a line. JSON has no infinity."""
    options = line["options"].items()
    return {key: math.inf if value == "inf" else value for key, value in options}


def try_out(run: Run, ready: Ready, method: str, options: dict[str, Any]) -> Trial:
    """The line of tuning.jsonl of one draw; one that fails has an error in place of a gap."""
    plain = {key: "inf" if value == math.inf else value for key, value in options.items()}
    line = {"task": run.config.task, "method": method, "options": plain}
    tried = replace(run, config=update(run.config, {method: options}))
    measured: list[Measured] = []
    retrained: list[Measured] = []
    try:
        getattr(tried.config, method).check(method)
        for fraction in run.config.fractions:
            for seed, (split, models, wanted) in ready.items():
                model = run.job.model(run.config)
                model.load_state_dict(models["original"].state_dict())
                tried.trainer(split, seed, Variant(method, fraction).name, model).run()
                measured.append(run.job.evaluate(model, split, "validation"))
                retrained.append(wanted)
    except (TrainingError, ValueError) as error:
        return {**line, "error": str(error)}
    among = common(measured)
    pairs = zip(measured, retrained, strict=True)
    gap = mean(gaps(run.job, one, wanted, among)["mean"] for one, wanted in pairs)
    means = {
        key: round(mean(one[key] for one in measured), 4) for key in measured[0] if key in among
    }
    return {**line, "gap": round(gap, 5), "measured": means}
