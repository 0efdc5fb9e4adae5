"""What a run ends with: summary.json, the model and its card, the report, the final table."""

from __future__ import annotations

import sys
from typing import Any

from gradsurgery.unlearn import digits
from gradsurgery.unlearn.card import model_card
from gradsurgery.unlearn.config import read_yaml
from gradsurgery.unlearn.job import DigitsConfig
from gradsurgery.unlearn.labels import LABELS, NAMES
from gradsurgery.unlearn.run import RunDirectory, read_json, write_atomic, write_json


def finish(config: DigitsConfig, directory: RunDirectory, summary: dict[str, Any]) -> None:
    """Write everything that needs all stages; report.html last, so that it means complete."""
    write_json(directory / "summary.json", summary)
    seed = summary["seeds"][0]
    name = (config.methods or ["retrain"])[0]
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
    )
    write_atomic(directory / "report.html", page)


def cell(column: dict[str, Any], key: str, narrow: bool = False) -> str:
    """One table cell: mean, spread over seeds if there are several, and the gap to Retrain.

    A narrow one puts the spread on a line of its own and leaves the gap out.
    """
    if key not in column:
        return ""
    value, spread = column[key]["mean"], column[key]["std"]
    if key == "steps":
        return f"{value:.0f}"
    digits = 1 if key == "seconds" else 3
    text = f"{value:.{digits}f}"
    if spread is not None:
        text += f"\n± {spread:.{digits}f}" if narrow else f" ± {spread:.{digits}f}"
    gap = column.get(f"gap_{key}")
    return f"{text} ({gap['mean']:.3f})" if gap and not narrow else text


def table(summary: dict[str, Any], narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table: metrics down, Original | Retrain | methods across."""
    columns = summary["columns"]
    names = list(columns)
    keys = [key for key in LABELS if any(key in columns[name] for name in names)]
    rows = [[LABELS[key], *(cell(columns[name], key, narrow) for name in names)] for key in keys]
    return ["", *(NAMES[name] for name in names)], rows


def caption(summary: dict[str, Any], narrow: bool = False) -> str:
    """What the numbers of the table are."""
    seeds = len(summary["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    gaps = "" if narrow else "; in brackets the gap to Retrain"
    return f"digits, {summary['task']}: accuracies, {over}{gaps}"


def print_summary(summary: dict[str, Any]) -> None:
    """The final table: drawn where standard output is a terminal, aligned plain text otherwise."""
    if sys.stdout.isatty():
        try:
            _draw(summary)
        except ImportError:
            pass
        else:
            return
    header, rows = table(summary)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{caption(summary)}")
    for line in [header, *rows]:
        first = line[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip())
    print(flush=True)


def _draw(summary: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def make(narrow: bool) -> Table:
        drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        header, rows = table(summary, narrow)
        for index, name in enumerate(header):
            drawn.add_column(name, justify="right" if index else "left")
        for row in rows:
            drawn.add_row(*row)
        return drawn

    wide = make(narrow=False)
    # measured as if there were room: a table says it needs no more than it is given
    wanted = console.measure(wide, options=console.options.update(max_width=1000)).maximum
    narrow = wanted > console.width
    console.print(f"\n{caption(summary, narrow)}", style="bold")
    console.print(make(narrow) if narrow else wide)
