"""What a run ends with: summary.json, the model and its card, the report."""

from __future__ import annotations

from typing import Any

from gradsurgery.unlearn import digits
from gradsurgery.unlearn.card import model_card
from gradsurgery.unlearn.config import read_yaml
from gradsurgery.unlearn.job import DigitsConfig
from gradsurgery.unlearn.labels import TRAINED
from gradsurgery.unlearn.run import RunDirectory, read_json, write_atomic, write_json


def finish(config: DigitsConfig, directory: RunDirectory, summary: dict[str, Any]) -> None:
    """Write everything that needs all stages; report.html last, so that it means complete."""
    write_json(directory / "summary.json", summary)
    seed = summary["seeds"][0]
    name = next((name for name in summary["columns"] if name not in TRAINED), "retrain")
    model = digits.DigitsCNN()
    directory.load_model(model, (seed, name))
    directory.save_model(model, "model.safetensors")
    write_atomic(directory / "model_card.md", model_card(config, summary, seed, name))
    write_report(directory)


def write_report(directory: RunDirectory) -> None:
    """Write report.html from the other files of a finished run."""
    from gradsurgery.unlearn.report import render

    page = render(
        summary=read_json(directory / "summary.json"),
        config=read_yaml(directory / "config.yaml", "RUN"),
        environment=read_json(directory / "env.json"),
        records=list(directory.records()),
        results=directory.results(),
        tuning=list(directory.tuning()),
    )
    write_atomic(directory / "report.html", page)
