"""Runs of the digits job with hardly any steps: the real code, in seconds."""

from gradsurgery.unlearn.jobs.digits.job import DigitsConfig, DigitsJob
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.environment import environment
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.report.finish import finish
from gradsurgery.unlearn.training.config import update

JOB = DigitsJob()
FAST = ("neggrad", "finetune")


def tiny(task="class", method=FAST, **changes):
    """Options with a few steps for every stage."""
    few = {name: {"steps": 3} for name in method}
    config = update(
        DigitsConfig(),
        {
            "task": task,
            "method": list(method),
            "seeds": 1,
            "second_retrain": False,
            "probe_every": 3,
            "training": {"steps": 12},
            **few,
        },
    )
    return update(config, changes)


def trainer(config, split, seed, name, model):
    """Of one stage, without a run directory."""
    return Run(JOB, config, None, None).trainer(split, seed, name, model)


def run(config, directory, progress, variants=()):
    return Run(JOB, config, directory, progress).complete(variants)


def finished(path, config, variants=()):
    """A run directory as the command leaves it; its summary."""
    with RunDirectory(path) as directory:
        directory.write_options("config.yaml", config)
        directory.write_json("env.json", environment(config.threads))
        summary = run(config, directory, PlainProgress(), variants)
        finish(config, directory, summary)
    return summary
