"""Small data sets of made-up images, and runs of the images job with hardly any steps."""

import numpy as np

from gradsurgery.unlearn.command import open_directory
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.environment import environment
from gradsurgery.unlearn.jobs.images.job import ImagesJob
from gradsurgery.unlearn.jobs.pipeline import Run
from gradsurgery.unlearn.jobs.progress import PlainProgress
from gradsurgery.unlearn.report.finish import finish
from gradsurgery.unlearn.training.config import update

COUNT, CLASSES = 120, 3


def arrays(count=COUNT, classes=CLASSES, side=8, seed=0):
    """Images whose class is how bright a row of theirs is, and labels, as many of each class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 100, (count, side, side), dtype=np.uint8)
    images[np.arange(count), labels] += 150
    return images, labels


def saved(folder, **more):
    """The same as an .npz file."""
    images, labels = arrays()
    path = folder / "made.npz"
    np.savez(path, images=images, labels=labels, **more)
    return path


def tiny(data, task="random", **changes):
    """Options with a few steps for every stage."""
    few = {
        "task": task,
        "data": str(data),
        "method": ["neggrad"],
        "seeds": 1,
        "probe_every": 3,
        "training": {"steps": 12},
        "neggrad": {"steps": 3, "forget_batch": 8},
    }
    return update(update(ImagesJob().defaults(task), few), changes)


def finished(path, config):
    """A run directory as the command leaves it; its summary."""
    job = ImagesJob()
    job.check(config)
    with RunDirectory(path) as directory:
        open_directory(directory, config, job.facts(config))
        directory.write_json("env.json", environment(config.threads))
        summary = Run(job, config, directory, PlainProgress()).complete()
        finish(config, directory, summary)
    return summary
