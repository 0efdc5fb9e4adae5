"""What a run ends with: summary.json, the model and its card, the report."""

from __future__ import annotations

import itertools

from gradsurgery.unlearn.jobs import registry
from gradsurgery.unlearn.jobs.base import JobConfig, Summary
from gradsurgery.unlearn.jobs.directory import RunDirectory
from gradsurgery.unlearn.jobs.shapes import ENVIRONMENT
from gradsurgery.unlearn.jobs.stages import TRAINED, parts
from gradsurgery.unlearn.report.card import model_card
from gradsurgery.unlearn.training.config import update


def finish(config: JobConfig, directory: RunDirectory, summary: Summary) -> None:
    """Write everything that needs all stages; report.html last, so that it means complete."""
    directory.write_json("summary.json", summary)
    seed = summary["seeds"][0]
    name = next((name for name in summary["columns"] if name not in TRAINED), "retrain")
    changes = (directory.result((seed, name)) or {}).get("changes", {})
    config = update(config, {parts(name).method: changes} if changes else {})
    registry.find(summary["job"]).publish(config, directory, (seed, name))
    directory.write("model_card.md", model_card(config, summary, seed, name))
    write_report(directory)


def write_report(directory: RunDirectory) -> Summary:
    """Write report.html from the other files of a finished run; its summary."""
    from gradsurgery.unlearn.report.render import render

    summary = directory.summary()
    results = directory.results()
    known = {(result["seed"], result["method"]) for result in results}
    for stage in itertools.product(summary["seeds"], summary["columns"]):
        if stage not in known:
            directory.miss(stage)
    page = render(
        summary=summary,
        config=directory.options(),
        environment=directory.read_json("env.json", ENVIRONMENT),
        records=directory.records(),
        results=results,
        tuning=directory.tuning(),
    )
    directory.write("report.html", page)
    return summary
